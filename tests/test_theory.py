"""Section 4: its statements on random samples, hulls by linear programming, a case by hand."""

import numpy as np
import pytest
from scipy.optimize import linprog

import theory

STEP = theory.STEP_SIZES["0.1"]


def in_hull(points, i):
    """Whether point i is a convex combination of the others."""
    others = np.delete(points, i, axis=0)
    equations = np.vstack([others.T, np.ones(len(others))])
    found = linprog(np.zeros(len(others)), A_eq=equations, b_eq=np.append(points[i], 1))
    return found.status == 0


@pytest.mark.parametrize("d", [2, 4, 16])
@pytest.mark.parametrize("seed", range(5))
def test_samples_lie_in_the_unit_ball_and_the_two_fixed_positives_where_they_say(seed, d):
    x, w, _ = theory.start(seed, 60, d)
    assert (np.linalg.norm(x[:, :-1], axis=1) <= 1).all() and (x[:, -1] == 1).all()
    assert in_hull(x[:, :-1], theory.middle(x, w))
    assert not in_hull(x[:, :-1], theory.outermost(x, w))


@pytest.mark.parametrize("d", [2, 4, 16])
@pytest.mark.parametrize("seed", range(10))
def test_proposition_4_2_holds_at_every_step_and_the_score_gap_is_twice_its_margin(seed, d):
    x, w, rng = theory.start(seed, 60, d)
    path = theory.perceptron(x, w, theory.highest, STEP, rng)
    for w, i in zip(path.w, path.positive):
        gamma, delta = theory.feasible(x, w)
        y = -np.ones(60)
        y[i] = 1
        assert delta > 0
        assert (y * (x[:, :-1] @ w[:-1] + gamma) >= delta - 1e-12).all()
        scores = sorted(x @ w)
        assert scores[-1] - scores[-2] == pytest.approx(2 * delta)


@pytest.mark.parametrize("d", [2, 4, 16])
def test_where_the_assumption_holds_w_w_star_grows_by_more_than_two_eta_delta(d):
    """Its growth, computed anew, is the derivation's: 2 eta y (w x + gamma) and the assumption."""
    held, eta = 0, 0.1
    for seed in range(20):
        x, w, rng = theory.start(seed, 60, d)
        path = theory.perceptron(x, w, theory.highest, STEP, rng)
        for w, v, assumed, grew in zip(path.w, path.w[1:], path.assumed, path.grew):
            (gamma, delta), (gamma_next, _) = theory.feasible(x, w), theory.feasible(x, v)
            growth = v[:-1] @ v[:-1] + v[-1] * gamma_next - w[:-1] @ w[:-1] - w[-1] * gamma
            y = np.sign((v - w)[-1])
            sample = (v - w) / (eta * y)
            value = theory.assumption(sample, y, eta, w[-1], gamma, gamma_next)
            assert growth == pytest.approx(2 * eta * y * (w[:-1] @ sample[:-1] + gamma) + value)
            assert assumed == (value > 0) and grew == (growth > 2 * eta * delta)
            assert grew or not assumed
        held += sum(path.assumed)
    assert held > 20                                     # the line above was asked


def test_samples_fill_the_ball_evenly():
    """Half of them within the radius of half the volume."""
    for d in (2, 4, 16):
        x = theory.ball(np.random.default_rng(0), 20_000, d)[1:, :-1]
        inside = np.linalg.norm(x, axis=1) < 0.5 ** (1 / d)
        assert inside.mean() == pytest.approx(0.5, abs=0.02)
        assert np.abs(x.mean(0)).max() < 0.02


def test_without_a_generator_the_first_misclassified_sample_is_taken_and_with_one_any():
    x, w, _ = theory.start(1, 60, 2)
    first = theory.perceptron(x, w, theory.highest, STEP, most=1)
    drawn = {tuple(theory.perceptron(x, w, theory.highest, STEP, np.random.default_rng(n),
                                     most=1).w[-1]) for n in range(20)}
    wrong = np.flatnonzero((x @ w > 0) != (np.arange(60) == (x @ w).argmax()))
    y = 1 if wrong[0] == (x @ w).argmax() else -1
    np.testing.assert_allclose(first.w[1], w + 0.1 * y * x[wrong[0]])
    assert len(drawn) > 2


@pytest.mark.parametrize("d", [2, 4, 16])
def test_labels_that_follow_the_score_end_with_exactly_one_positive_prediction(d):
    for seed in range(20):
        x, w, rng = theory.start(seed, 60, d)
        path = theory.perceptron(x, w, theory.highest, theory.STEP_SIZES["0.1 / sqrt(t + 1)"], rng)
        assert path.converged
        assert (x @ path.w[-1] > 0).sum() == 1


@pytest.mark.parametrize("d", [2, 4, 16])
def test_a_positive_inside_the_hull_is_never_reached_and_a_corner_is(d):
    for seed in range(5):
        x, w, rng = theory.start(seed, 60, d)
        assert not theory.perceptron(x, w, theory.middle, STEP, rng).converged
        corner = theory.perceptron(x, w, theory.outermost, STEP, rng, most=20_000)
        assert corner.converged
        assert np.flatnonzero(x @ corner.w[-1] > 0).tolist() == [theory.outermost(x, w)]


def test_three_samples_on_a_line_step_by_step():
    """Scores -1, 0, 1 plus a bias of 0.5: sample 1 is wrongly positive.  One update of 0.5 adds
    -0.5 [0, 1] and leaves -1, 0, 1: right, since 0 counts as negative."""
    x = np.array([[-1.0, 1], [0, 1], [1, 1]])
    path = theory.perceptron(x, np.array([1.0, 0.5]), theory.highest, lambda t: 0.5)
    assert path.w.tolist() == [[1.0, 0.5], [1.0, 0.0]]
    assert path.positive == [2, 2] and path.converged
    assert theory.feasible(x, path.w[0]) == (-0.5, 0.5)
    # gamma stays -0.5: 0.25 * 0 + 0.5 * -1 * (-0.5 + 1) + 0.5 * 0 = -0.25
    value = theory.assumption(x[1], -1, 0.5, 0.5, -0.5, -0.5)
    assert value == -0.25 and path.assumed == [False]


def test_a_cycle_returns_to_its_classifier_and_the_assumption_fails_in_it():
    seed, path, begins = theory.cycle()
    x, _, _ = theory.start(seed, 20, 2)
    length = len(path.w) - 1 - begins
    again = theory.perceptron(x, path.w[begins], theory.highest, lambda t: 0.5, most=2 * length)
    for t in range(2 * length + 1):
        np.testing.assert_allclose(again.w[t], path.w[begins + t % length], atol=1e-9)
    assert not all(path.assumed[begins:len(path.w) - 1])


def test_the_page_runs_and_draws(tmp_path, command):
    code, out, _ = command(theory, "--seeds", 3)
    assert code == 0 and out.count("3/3") >= 12 and out.count("0/3") == 6
    assert command(theory, "--picture", tmp_path / "theory.png")[0] == 0
    assert (tmp_path / "theory.png").stat().st_size > 10_000
