"""The exercises' page: its matrices and numbers are right, and the solutions keep the contract."""
import re
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
