"""Section 4 of the paper: the sample that scores highest is the positive one; where does it end?

The detector is reduced to one linear classifier of samples (Observation 4.1 lets it be).  A sample
is x = [x̂, 1] with |x̂| <= 1, the classifier w = [ŵ, b], and sign(wᵀx) what it predicts.

    Labels by one-to-one assignment with classification cost: at every step the sample of the
        highest score is positive, all others are negative.  They follow the classifier.
    Labels by location alone: one sample is positive, fixed beforehand, whatever it looks like.

    python theory.py                       100 seeds each in 2, 4 and 16 dimensions; a minute
    python theory.py --picture theory.png  in two dimensions, step by step

What the paper states, in our words, and where it is checked:

    Proposition 4.2  At every step there is a bias γ with which w* = [ŵ, γ] is right on all samples,
        with a margin δ.  (Half-way between the highest and the second-highest score is the best
        one; the score gap, Eq. 6, is then 2δ.)                                   `feasible`
    Theorem 4.3  If the step size can always be chosen so that an inequality holds (`assumption`),
        the number of updates is bounded: exactly one positive prediction is reached.
    Remark 4.4  A fixed positive need not be separable from the rest by a line; then no number of
        updates is enough.  (The paper: the perceptron may then come to the classifier of fewest
        errors, and predict many positives.  In the runs here it comes to none, but swings between
        no positive prediction and many; where the positive lies inside, no prediction at all would
        be but one error.)

The bound that Theorem 4.3 prints cannot be read in our copy of the paper, so it is not here.  What
follows from its assumption can be derived in three lines, and is checked at every step (`grows`):
wᵀw* grows by more than 2ηδ.  (The derivation wants |x̂|² in the assumption, where the paper's x may
be read either way.)  That alone bounds nothing, since w* moves with w and grows as well; but it
rules out cycles: whoever comes back to the same w did not grow.  In the runs, which do not choose
their step sizes to please it, the assumption fails at many steps, and yet nearly all arrive: it is
not needed.
"""
import argparse
from typing import NamedTuple

import numpy as np


def ball(rng, n, d):
    """n samples in the unit ball of d dimensions, each with a 1 behind it: (n, d + 1).

    They are uniform in it, but for number 0: the mean of the others, inside their hull for certain.
    """
    x = rng.normal(size=(n, d))
    x *= rng.random((n, 1)) ** (1 / d) / np.linalg.norm(x, axis=1, keepdims=True)
    x[0] = x[1:].mean(0)
    return np.hstack([x, np.ones((n, 1))])


# ------------------------------------------------------------------------------------------------
# whose label is +1
# ------------------------------------------------------------------------------------------------

def highest(x, w):
    """With classification cost: the sample that the classifier itself ranks first."""
    return (x @ w).argmax()


def middle(x, w):
    """Location alone: the sample in the middle of the others.  No line separates it from them."""
    return 0


def outermost(x, w):
    """Location alone, by luck: the sample farthest out is a corner of the hull, and separable."""
    return np.linalg.norm(x, axis=1).argmax()


# ------------------------------------------------------------------------------------------------
# the statements
# ------------------------------------------------------------------------------------------------

def feasible(x, w):
    """Proposition 4.2: γ and δ of a step.  δ > 0 unless two samples share the highest score."""
    second, first = np.partition(x[:, :-1] @ w[:-1], -2)[-2:]
    return -(first + second) / 2, (first - second) / 2


def assumption(x, y, eta, b, gamma, gamma_next):
    """Theorem 4.3 asks of each step that this be positive.  x: the misclassified sample, y: ±1."""
    return (eta ** 2 * (x[:-1] @ x[:-1]) + eta * y * (gamma_next - 2 * gamma)
            + b * (gamma_next - gamma))


def grows(w, gamma, delta, w_next, gamma_next, eta):
    """Whether wᵀw* grew by more than 2ηδ in a step.

    Expand it: it grew by 2ηy(ŵᵀx̂ + γ) and what `assumption` says.  The first is at least 2ηδ by
    Proposition 4.2, the second is positive if the assumption holds.
    """
    before = w @ np.append(w[:-1], gamma)
    after = w_next @ np.append(w_next[:-1], gamma_next)
    return after - before > 2 * eta * delta


# ------------------------------------------------------------------------------------------------
# the perceptron
# ------------------------------------------------------------------------------------------------

class Run(NamedTuple):
    """What a run went through."""
    w: np.ndarray               # (T + 1, d + 1), the classifiers
    positive: list              # T + 1 numbers of samples: whose label was +1
    converged: bool             # no sample is misclassified at the end
    assumed: list               # T times: the theorem's assumption held
    grew: list                  # T times: wᵀw* grew by more than 2ηδ


def perceptron(x, w, label, step_size, rng=None, most=700):
    """Updates w by one misclassified sample at a time, until there is none, or `most` times.

    x: (n, d + 1)   label(x, w): the number of the positive sample   step_size(t): η of update t.
    The sample is drawn at random, or without `rng` the first is taken.
    """
    ws, positive = [w], [label(x, w)]
    assumed, grew = [], []
    gamma, delta = feasible(x, w)
    for t in range(most + 1):
        y = np.where(np.arange(len(x)) == positive[-1], 1, -1)
        wrong = np.flatnonzero((x @ w > 0) != (y > 0))
        if len(wrong) == 0 or t == most:
            break
        i = wrong[0] if rng is None else rng.choice(wrong)
        eta = step_size(t)
        w_next = w + eta * y[i] * x[i]

        gamma_next, delta_next = feasible(x, w_next)
        assumed.append(assumption(x[i], y[i], eta, w[-1], gamma, gamma_next) > 0)
        grew.append(grows(w, gamma, delta, w_next, gamma_next, eta))
        w, gamma, delta = w_next, gamma_next, delta_next
        ws.append(w)
        positive.append(label(x, w))
    return Run(np.array(ws), positive, len(wrong) == 0, assumed, grew)


def start(seed, n, d):
    """Samples, a classifier and a generator, as `seed` has them."""
    rng = np.random.default_rng(seed)
    return ball(rng, n, d), 0.1 * rng.normal(size=d + 1), rng


STEP_SIZES = {"0.1": lambda t: 0.1, "0.1 / sqrt(t + 1)": lambda t: 0.1 / np.sqrt(t + 1)}


def survey(seeds=100, n=200):
    """Prints, by labels, dimensions and step size, how many runs converge and how fast."""
    print(f"{n} samples, {seeds} seeds, at most 700 updates")
    print("positive: the sample labelled so   predicted: how many samples are positive at the end "
          "(median)\nassumed: share of updates at which the theorem's assumption held; grew: of "
          "these, the share at which wᵀw* grew by more than 2ηδ")
    print(f"{'positive':10} {'d':>3}  {'step size':18} {'converged':>9} {'updates':>14} "
          f"{'predicted':>10} {'assumed':>8} {'grew':>6}")
    for label in (highest, middle, outermost):
        for d in (2, 4, 16):
            for name, step_size in STEP_SIZES.items():
                paths, left = [], []
                for seed in range(seeds):
                    x, w, rng = start(seed, n, d)
                    paths.append(perceptron(x, w, label, step_size, rng))
                    left.append(int((x @ paths[-1].w[-1] > 0).sum()))
                tell(label.__name__, d, name, paths, left)


def tell(label, d, step_size, paths, left):
    """One line of the survey."""
    arrived = [len(path.assumed) for path in paths if path.converged]
    updates = f"{np.median(arrived):.0f}, up to {max(arrived)}" if arrived else "-"
    line = (f"{label:10} {d:3}  {step_size:18} {f'{len(arrived)}/{len(paths)}':>9} {updates:>14} "
            f"{np.median(left):10.0f}")
    if label == "highest":                   # the theorem is about these labels
        assumed = np.concatenate([path.assumed for path in paths]).astype(bool)
        grew = np.concatenate([path.grew for path in paths]).astype(bool)
        line += f" {100 * assumed.mean():7.0f}% {100 * grew[assumed].mean():5.0f}%"
    print(line, flush=True)


def cycle(seeds=1000, n=20, d=2, eta=0.5):
    """The first seed whose run of a constant step, always at the first misclassified sample, comes
    back to an earlier w.  Returns (seed, its Run, where the cycle begins), or None.
    """
    for seed in range(seeds):
        x, w, _ = start(seed, n, d)
        path, met = perceptron(x, w, highest, lambda t: eta, most=300), {}
        for t, w in enumerate(path.w):
            begins = met.setdefault(tuple(w.round(9)), t)
            if begins < t and not path.converged:
                return seed, path._replace(w=path.w[:t + 1]), begins
    return None


def tell_cycle(n=20, d=2):
    seed, path, begins = cycle(n=n, d=d)
    length = len(path.w) - 1 - begins
    held = path.assumed[begins:begins + length]
    print(f"\nA constant step that is larger than the gap may cycle for ever: seed {seed}, {n} "
          f"samples, step 0.5, always the first misclassified sample.  After {begins} updates the "
          f"same {length} classifiers return.  The assumption holds at {sum(held)} of these "
          f"{length} updates; at all of them it cannot, since wᵀw* would have grown.")
    x, w, _ = start(seed, n, d)
    smaller = perceptron(x, w, highest, STEP_SIZES["0.1 / sqrt(t + 1)"])
    print(f"The same start with 0.1 / sqrt(t + 1): {'converged' if smaller.converged else 'open'} "
          f"after {len(smaller.assumed)} updates.")


# ------------------------------------------------------------------------------------------------
# to look at
# ------------------------------------------------------------------------------------------------

def picture(file, seed=1, n=200, columns=5):
    """Two dimensions: above, the label follows the highest score; below, it is fixed inside."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, columns, figsize=(2.5 * columns, 6))
    words = {highest: "positive = highest score", middle: "positive = the middle one"}
    for row, (label, said) in zip(axes, words.items()):
        x, w, rng = start(seed, n, 2)
        path = perceptron(x, w, label, STEP_SIZES["0.1"], rng)
        for t, plot in zip(np.linspace(0, len(path.w) - 1, columns).astype(int), row):
            scores = x @ path.w[t]
            plot.scatter(*x[:, :2].T, s=7, c=np.where(scores > 0, "tab:orange", "lightgrey"))
            plot.scatter(*x[path.positive[t], :2], s=70, facecolors="none", edgecolors="red")
            a, b, c = path.w[t]                          # the line a x + b y + c = 0
            along = np.array([-2, 2]) / np.hypot(a, b)
            foot = -c * np.array([a, b]) / (a * a + b * b)
            plot.plot(foot[0] - b * along, foot[1] + a * along, "k-", linewidth=1)
            plot.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), xticks=[], yticks=[], aspect="equal",
                     title=f"update {t}: {int((scores > 0).sum())} predicted")
            plot.title.set_fontsize(9)
        row[0].set_ylabel(said, fontsize=9)
    figure.suptitle(f"Red ring: labelled positive.  Orange: predicted positive.  Line: the "
                    f"classifier.  {n} samples, step 0.1, seed {seed}", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100, metavar="N", help="default: 100")
    parser.add_argument("--picture", metavar="PNG", help="only draw the picture into this file")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    if args.picture:
        try:
            picture(args.picture)
        except OSError as error:
            parser.error(error)
        print(f"wrote {args.picture}")
    else:
        survey(args.seeds)
        tell_cycle()


if __name__ == "__main__":
    main()
