"""The lesson runs.  The exercises: matrices and numbers are right, solutions keep the contract."""
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import assign
import grade
import ideas

ROOT = Path(assign.__file__).parent
PAGE = (ROOT / "docs" / "exercises.md").read_text()
SOLUTIONS = re.findall(r"^def (\w+)", (ROOT / "tests" / "solutions.py").read_text(), re.M)


def solution(name):
    return ideas.load("", f"{ROOT}/tests/solutions.py:{name}")


def test_the_staircase_is_right():
    rows = re.findall(r"^\| \d \| `(\[\[.*\]\])` \|(.*)\|(.*)\|(.*)\|$", PAGE, re.M)
    assert len(rows) == 6
    for matrix, *answers in rows:
        cost = torch.tensor(eval(matrix, {"inf": float("inf")}), dtype=torch.float32)
        for rule, answer in zip((assign.hungarian, assign.min_cost, solution("greedy")), answers):
            pairs = {tuple(map(int, pair)) for pair in re.findall(r"\((\d),(\d)\)", answer)}
            assert set(zip(*(part.tolist() for part in rule(cost)))) == pairs, (matrix, rule)


def test_the_numbers_of_the_classification_cost_are_right():
    p, expected = (torch.tensor([float(v) for v in line.split("|")[2:-1]], dtype=torch.float64)
                   for line in PAGE.splitlines() if line.startswith(("| p |", "| C_cls |")))
    fl = (0.25 * (1 - p) ** 2 * -p.log()) - (0.75 * p ** 2 * -(1 - p).log())
    assert torch.allclose(fl, expected, atol=1e-7, rtol=0)
    ours = assign.classification_cost(p.logit()[:, None].float(), torch.tensor([0]))[:, 0]
    assert torch.allclose(ours.double(), expected, atol=1e-5)


@pytest.mark.parametrize("name", SOLUTIONS)
def test_every_solution_keeps_the_contract(name):
    faults = [wrong for *_, wrong in grade.contract(solution(name)) if wrong]
    assert not faults


def test_a_solution_is_the_formula_that_its_exercise_names():
    """Exercises 6 and 7, pair by pair: p^(1-a) IoU^a inside 1.5 strides of the centre, p^a IoU^b.

    What is best is cheapest: with a minus.  Of 1 and 3 assign.py has a rule and a cost.
    """
    one, target = grade.image(torch.Generator().manual_seed(0), 40, 5)
    one.candidates[:5] = (target["boxes"][:, :2] + target["boxes"][:, 2:]).repeat(1, 2) / 2 + 1
    one.boxes[:5] = target["boxes"] + 3
    quality, aligned = (solution(name)(one, target) for name in ("quality", "task_aligned"))
    for q, (x, y) in enumerate(one.candidates[:, :2].tolist()):
        for g, box in enumerate(target["boxes"].tolist()):
            p = 1 / (1 + math.exp(-float(one.logits[q, target["labels"][g]])))
            other = one.boxes[q].tolist()
            width, height = (min(box[n + 2], other[n + 2]) - max(box[n], other[n]) for n in (0, 1))
            shared = max(0, width) * max(0, height)
            areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
            iou = shared / (sum(areas) - shared)
            off = max(abs(x - (box[0] + box[2]) / 2), abs(y - (box[1] + box[3]) / 2))
            inside = off <= 1.5 * float(one.strides[q])
            expected = -p ** 0.2 * iou ** 0.8 if inside else math.inf
            assert float(quality[q, g]) == pytest.approx(expected, rel=1e-4, abs=1e-6)
            assert float(aligned[q, g]) == pytest.approx(-p * iou ** 6, rel=1e-4, abs=1e-6)
    assert 5 <= quality.isfinite().sum() < quality.numel() and (quality < 0).sum() >= 5

    location = assign.matching_cost(one, target, class_cost=0)
    assert torch.equal(solution("location_only")(one, target), location)
    for seed in range(20):
        cost = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed))
        cost[cost < 0.5] = math.inf          # now and then all of an object's pairs
        ours, theirs = solution("argmin_rule")(cost), assign.min_cost(cost)
        assert all(map(torch.equal, ours, theirs))


def test_the_auction_is_as_cheap_as_the_hungarian():
    for seed, (Q, G) in enumerate([(30, 6), (30, 6), (8, 8), (4, 9), (30, 6)]):
        cost = 10 ** (seed - 2) * torch.rand(Q, G, generator=torch.Generator().manual_seed(seed))
        own, best = solution("auction")(cost), assign.hungarian(cost)
        assert len(own[0]) == len(best[0]) == min(Q, G)
        assert cost[own].sum() <= cost[best].sum() + G * 1e-3 * cost.max()
    for cost in (torch.zeros(2, 3), torch.ones(2, 3)):
        assert len(solution("auction")(cost)[0]) == 2


def test_two_predictions_are_two_and_many_become_one():
    cost = torch.rand(30, 4)
    _, g = solution("two_predictions")(cost)
    assert g.bincount().tolist() == [2, 2, 2, 2]
    counts = [len(solution("many_early_one_late")(cost, progress)[0]) for progress in (0, 0.5, 1)]
    assert counts[0] > 12 and counts == sorted(counts, reverse=True) and counts[-1] == 4


def test_the_lesson_runs_from_top_to_bottom(tiny_scenes, tmp_path):
    """Two steps a run: what it prints of hand-made numbers is right, its files are there."""
    known = {"LESSON_STEPS": "2", "LESSON_OUT": str(tmp_path), "LESSON_DATA": str(tiny_scenes),
             "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, ROOT / "docs" / "lesson.py"], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, **known})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "hungarian: [(0, 0), (2, 1)], in total 4" in done.stdout
    assert "min_cost: [(0, 0), (0, 1)], in total 3" in done.stdout
    for name in ("location", "end-to-end"):
        assert f"\n{name}: AP " in done.stdout and (tmp_path / name / "detections.png").exists()
