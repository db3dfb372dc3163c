"""Five kinds of hand-ins, each with the points it deserves."""
import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import assign
import grade
import train
from assign import AssignError

RIGHT = """import assign
def f(cost):
    return assign.hungarian(cost)
"""
# a prediction of two objects, and no thought of pictures without predictions
BROKEN = """import torch
def f(cost):
    return cost.argmin(0), torch.arange(cost.shape[1])
"""
RANDOM = """import torch, assign
def f(cost):
    return assign.hungarian(torch.where(cost.isinf(), cost, torch.rand_like(cost)))
f.randomised = True
"""
# the pairs of a sorted cost, whatever it says
CHEATING = """import torch
def f(cost):
    n = torch.arange(min(cost.shape))
    return n[cost[n, n] < float("inf")], n[cost[n, n] < float("inf")]
"""
# whatever it says, nobody is anybody's: the order of nothing is always the same
NOTHING = """import torch
def f(cost):
    return torch.zeros(2, 0, dtype=torch.long).unbind()
"""
SLOW = """import time, assign
def f(cost):
    time.sleep(0.6 if len(cost) > 1000 else 0)
    return assign.hungarian(cost)
"""
COST = """import torch
def f(one, target):
    return torch.cdist(one.boxes, target["boxes"], p=1)
"""


def graded(folder, text):
    (folder / "my.py").write_text(text)
    function = grade.ideas.load("", f"{folder / 'my.py'}:f")
    return {rule: (points, wrong) for rule, _, points, _, wrong in grade.contract(function)}


def lost(rows):
    return {rule: wrong for rule, (_, wrong) in rows.items() if wrong}


@pytest.mark.parametrize("text, rules", [
    (RIGHT, {}),
    (BROKEN, {"answers": "for 0 x 0 it raised IndexError", "forbidden": "inf", "once": "at most"}),
    (RANDOM, {}),
    (RANDOM.replace("f.randomised = True", ""), {"order": "if it draws lots"}),
    (CHEATING, {"order": "another order"}),
    (NOTHING, {"chooses": "in which every pair is allowed got no positive"}),
    (SLOW, {"speed": "5000 x 20 took 0.6 s"}),
    ("def f(cost):\n    return 1 / 0\n", {"answers": "my.py, line 2: return 1 / 0"}),
    ("def f(cost):\n    cost += 1\n    return cost.argmin(0), cost.argmin(0)\n",
     {"answers": "0 x 0", "range": "an object must be one of", "forbidden": "inf",
      "once": "at most once", "leaves": "modify"}),
])
def test_a_strategy_loses_the_points_of_what_it_breaks(tmp_path, text, rules):
    rows = graded(tmp_path, text)
    assert sum(of for of, _ in grade.STRATEGY.values()) == 100
    found = {rule: wrong for rule, wrong in lost(rows).items() if "could not be" not in wrong}
    assert found.keys() == rules.keys(), found
    assert all(words in found[rule] for rule, words in rules.items()), found
    assert (sum(points for points, _ in rows.values()) == 100) == (not rules)


@pytest.mark.parametrize("text, rule, words", [
    (COST, None, ""),
    (COST.replace("p=1)", "p=1) / (one.boxes[:, 2:] - one.boxes[:, :2]).prod(1, True) * 0"),
     "number", "must be a number"),
    (COST.replace("p=1)", "p=1).T"), "form", "floating-point tensor of shape"),
    (COST.replace("p=1)", "p=1) + torch.arange(len(one.boxes))[:, None]"), "predictions",
     "another order of the predictions"),
    (COST.replace("p=1)", "p=1) + torch.arange(len(target['boxes']))"), "objects",
     "another order of the objects"),
    (COST.replace("    return", "    one.boxes += 1\n    return"), "leaves", "must not modify"),
])
def test_a_cost_loses_the_points_of_what_it_breaks(tmp_path, text, rule, words):
    found = lost(graded(tmp_path, text))
    assert (found == {}) if rule is None else words in found[rule], found
    assert sum(of for of, _ in grade.COST.values()) == 100


def test_an_endless_loop_does_not_take_longer_than_one_call(tmp_path, monkeypatch):
    monkeypatch.setattr(grade.ideas, "SECONDS", 0.5)
    began = time.time()
    rows = graded(tmp_path, "def f(cost):\n    while True:\n        pass\n")
    assert time.time() - began < 5
    assert "no answer after 0.5 seconds" in lost(rows)["answers"]
    assert sum(points for points, _ in rows.values()) == 0


def test_another_seed_has_other_cases():
    first, again, other = ([case[0] for _, *case in grade.strategy_cases(
        grade.torch.Generator().manual_seed(seed))] for seed in (0, 0, 1))
    same = [a.equal(b) for a, b in zip(first, again)]
    assert all(same) and not all(a.equal(b) for a, b in zip(first, other))


def test_the_command_prints_a_line_a_rule_and_writes_for_a_grader(tmp_path, command):
    """And a line of the sum, which ends it."""
    (tmp_path / "my.py").write_text(BROKEN)
    code, out, err = command(grade, f"{tmp_path}/my.py:f", "--json", tmp_path / "a.json")
    written = json.loads((tmp_path / "a.json").read_text())
    assert code == 1 and not err
    assert len(written["rows"]) == len(grade.STRATEGY) and written["of"] == 100
    lines = [line for line in out.splitlines() if re.match(r" *\d+/\d+", line)]
    assert len(lines) == len(grade.STRATEGY) + 1
    assert lines[-1] == out.splitlines()[-1]
    assert lines[-1] == f"{written['points']}/100 points for {tmp_path}/my.py:f"
    code, out, err = command(grade, "none.py:f")
    assert code == 2 and not out
    assert err == "grade.py: the function none.py:f: the file none.py does not exist\n"


def test_points_of_the_effect_are_a_straight_line_between_the_published_cut_offs():
    reference = {"end-to-end": [{"AP": 40, "AP+NMS": 41}, {"AP": 42, "AP+NMS": 42}],
                 "location only": [{"AP": 36, "AP+NMS": 39}, {"AP": 34, "AP+NMS": 36}]}

    def points(ap, nms):
        return [row[2] for row in grade.effect_points({"AP": ap, "AP+NMS": nms}, reference)]

    assert points(40, 40) == [50, 50] and points(45, 44) == [50, 50]
    assert points(30, 31) == [25, 50]                    # half of the way from 20; 1 AP is allowed
    assert points(20, 41) == [0, 0]
    assert points(40, 43) == [50, 25]                    # half-way from 5, twice 2.5, down to 1


def test_each_grading_trains_a_run_of_its_own_by_the_rule_the_cost_or_a_second_branch(
        tmp_path, monkeypatch, capsys):
    asked, figures = [], {"AP": 40.0, "AP+NMS": 40.0, "duplicates": 0.1, "gap": 0.3}

    def trained(out, words):
        asked.append((out, words))
        (tmp_path / out).mkdir(parents=True)
        return figures

    (tmp_path / "my.py").write_text(COST)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grade, "effect", trained)
    monkeypatch.setattr(grade, "REFERENCE", tmp_path / "reference.json")
    (tmp_path / "reference.json").write_text(json.dumps(
        {"end-to-end": [figures], "location only": [{**figures, "AP": 36.0}]}))
    for words in ("hungarian", "hungarian", "hungarian --many 6", "my.py:f"):
        monkeypatch.setattr(sys, "argv", ["grade.py", "--train", *words.split()])
        with pytest.raises(SystemExit) as end:
            grade.main()
        assert end.value.code == 0, capsys.readouterr()
    assert asked == [("runs/grade-hungarian-0", ["--assign", "hungarian", "--seed", "0"]),
                     ("runs/grade-hungarian-0-2", ["--assign", "hungarian", "--seed", "0"]),
                     ("runs/grade-hungarian-0-3", ["--many-assign", "hungarian", "--seed", "0",
                                                   "--many", "6"]),
                     ("runs/grade-my.py-f-0", ["--cost", "my.py:f", "--seed", "0"])]


@pytest.fixture
def trained_here(monkeypatch):
    """The command that grade.py starts, in this process: [python, train.py, its words]."""
    def run(words):
        assert Path(words[1]).name == "train.py"
        train.main([str(word) for word in words[2:]])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(grade.subprocess, "run", run)


def test_a_run_on_the_default_pictures_is_read(tiny_scenes, tmp_path, monkeypatch, trained_here):
    """As the README has it, without --data-dir: data/scenes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grade, "STEPS", 1)
    Path("data").mkdir()
    Path("data/scenes").symlink_to(tiny_scenes)
    words = ["--width", "16", "--depth", "1", "--batch-size", "4"]
    first = grade.effect("runs/g", words)
    assert grade.effect("runs/g", words) == first
    # the device that was chosen is told too
    device = json.loads(Path("runs/g/args.json").read_text())["device"]
    assert device.startswith("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(AssignError, match="of --seed 0 on the pictures of data/scenes"):
        grade.effect("runs/g", [*words, "--data-dir", "data/scenes18"])


def test_a_finished_run_is_read_and_not_trained_again(
        tiny_scenes, tmp_path, monkeypatch, trained_here):
    monkeypatch.setattr(grade, "STEPS", 2)
    words = ["--data-dir", str(tiny_scenes), "--width", "16", "--depth", "1", "--batch-size", "4"]
    first = grade.effect(tmp_path / "run", words)
    assert set(first) == {"AP", "AP+NMS", "duplicates", "gap"}
    monkeypatch.setattr(grade.subprocess, "run", None)   # to call it is an error now
    assert grade.effect(tmp_path / "run", words) == first
    for other in (["--data-dir", "data/18", *words[2:]], [*words, "--seed", "1"]):
        with pytest.raises(AssignError, match=f"holds a run of --seed 0 on .*{tiny_scenes.name}"):
            grade.effect(tmp_path / "run", other)


@pytest.mark.parametrize("file, words", [
    ("nowhere/a.json", "is not there, or it cannot be written"),
    ("my.py", "would be written over")])
def test_where_the_points_go_is_checked_before_they_are_counted(tmp_path, command, file, words):
    (tmp_path / "my.py").write_text(BROKEN)
    code, out, err = command(grade, f"{tmp_path}/my.py:f", "--json", tmp_path / file)
    assert code == 2 and not out and words in err and "Traceback" not in err
    assert (tmp_path / "my.py").read_text() == BROKEN


def test_gradings_become_a_table_of_means_and_half_ranges(tmp_path, monkeypatch, capsys):
    def effect(ap):
        return {"AP": ap, "AP+NMS": ap + 1, "duplicates": 0.25, "gap": 0.3}

    monkeypatch.setattr(grade, "REFERENCE", tmp_path / "reference.json")
    (tmp_path / "reference.json").write_text(json.dumps({"end-to-end": [effect(40), effect(42)]}))
    # anna in two sittings and ben with a copy of it; carl with code of his own
    names = "anna-0", "anna-1", "ben", "carl"
    for n, (name, found) in enumerate(zip(names, [effect(30), effect(33), effect(36), {}])):
        copied, points = n < 3, 180 - 90 * (n // 3)
        (tmp_path / f"{name}.json").write_text(json.dumps(
            {"function": "my.py:f", "sha256": "ab" if copied else "cd", "many": None,
             "data_dir": None, "seed": n, "points": points, "of": 200 if copied else 100,
             "effect": found, "rows": []}))
    files = [str(tmp_path / f"{name}.json") for name in names]
    monkeypatch.setattr(sys, "argv", ["grade.py", "--collect", *files])
    grade.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| | function | seeds | points | AP | AP+NMS | duplicates | gap |"
    assert lines[2:] == [
        "| reference | end-to-end | 2 |  | 41.0 ± 1.0 | 42.0 ± 1.0 | 0.25 ± 0.00 | 0.30 ± 0.00 |",
        "| anna, ben | `my.py:f` | 3 | 180 ± 0 of 200 | 33.0 ± 3.0 | 34.0 ± 3.0 | 0.25 ± 0.00 "
        "| 0.30 ± 0.00 |",
        "| carl | `my.py:f` | 1 | 90 of 100 |  |  |  |  |"]

    (tmp_path / "carl.json").write_text("[1]")
    with pytest.raises(SystemExit) as end:
        grade.main()
    assert end.value.code == 2
    assert "carl.json is not a file of grade.py --json" in capsys.readouterr().err


def test_points_are_for_what_was_shown_where_there_was_something_to_choose():
    """Who never gives a pair has only shown answers of the right form; who spoils every cost has
    shown all that was looked at before."""
    def nobody(cost):
        return torch.zeros(2, 0, dtype=torch.long).unbind()

    def in_place(cost):
        q, g = assign.hungarian(cost)
        cost += 1
        return q, g

    def points(strategy):
        return {rule: points for rule, _, points, *_ in grade.contract(strategy) if points}

    assert points(nobody) == {"answers": 15, "form": 15, "range": 10}
    assert points(in_place) == {"answers": 15, "form": 15, "range": 10, "chooses": 5,
                                "forbidden": 15, "once": 15}
    first = grade.contract(in_place)[0]
    assert first[0] == "leaves" and "work on cost.clone()" in first[4]


@pytest.mark.parametrize("answer, words", [
    (None, "this is NoneType"), ([[0], [0]], "this is list of 2: list, list"),
    ((torch.zeros(0).long(),) * 3, "this is tuple of 3: Tensor, Tensor, Tensor"),
])
def test_what_has_no_form_is_told_with_what_it_is(answer, words):
    rule, *_, wrong = grade.contract(lambda cost: answer)[0]
    assert rule == "form" and words in wrong
