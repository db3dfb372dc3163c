"""A strategy or cost of one's own: found, called, and told what is wrong, with its line."""
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import assign
import ideas
import losses
import recipes
import train
from assign import AssignError, match
from test_assign import random_batch
from test_train import flags, rows, same, weights


def write(folder, text, name="my.py"):
    (folder / name).write_text(text)
    return f"{folder / name}:f"


@pytest.mark.parametrize("body, words", [
    ("    return cost.nonsense()", ["AttributeError", "my.py, line 3: return cost.nonsense()"]),
    ("    return helper(cost)\ndef helper(cost):\n    return 1 / 0",
     ["ZeroDivisionError", "my.py, line 5: return 1 / 0"]),
    ("    return torch.zeros(2) + torch.zeros(3)", ["RuntimeError", "my.py, line 3"]),
    ("    sys.exit(0)", ["SystemExit", "my.py, line 3: sys.exit(0)"]),
    ("    raise GeneratorExit", ["GeneratorExit"]),
])
def test_an_exception_is_told_with_the_line_of_the_file(tmp_path, body, words):
    mine = ideas.load("--assign", write(tmp_path, "import sys, torch\ndef f(cost):\n" + body))
    with pytest.raises(AssignError) as error:
        match(*random_batch((3,), aux=0), assign.matching_cost, mine)
    assert str(error.value).startswith("image 100: the strategy f failed on a cost of 30 x 3")
    assert all(word in str(error.value) for word in words), error.value


def test_an_endless_loop_is_ended(tmp_path, monkeypatch):
    """Even one that catches every Exception."""
    monkeypatch.setattr(ideas, "SECONDS", 0.3)
    mine = ideas.load("--assign", write(tmp_path, "def f(cost):\n    while True:\n        try:\n"
                                                  "            sum(range(1000))\n"
                                                  "        except Exception:\n            pass\n"))
    began = time.time()
    with pytest.raises(AssignError, match="no answer after 0.3 seconds"):
        match(*random_batch((3,), aux=0), assign.matching_cost, mine)
    assert time.time() - began < 5
    ideas.call(time.sleep, 0)                            # the alarm is off again
    time.sleep(0.4)


def test_a_loop_that_catches_everything_ends_too():
    """In a process of its own, which ends with code 2 and a sentence."""
    program = ("import ideas; ideas.SECONDS = 0.3\n"
               "def f(cost):\n"
               "    while True:\n"
               "        try:\n"
               "            sum(range(1000))\n"
               "        except:\n"
               "            pass\n"
               "ideas.call(f, None)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          cwd=Path(ideas.__file__).parent, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("no answer after 0.3 seconds") and "`except:`" in done.stderr


def test_time_in_which_the_process_was_suspended_does_not_count():
    """Ctrl-Z and fg, or a scheduler's pause; the function takes half a second of two."""
    program = ("import time, ideas; ideas.SECONDS = 2\n"
               "def f(cost):\n"
               "    print('begun', flush=True)\n"
               "    time.sleep(0.5)\n"
               "    return 'done'\n"
               "print(ideas.call(f, None))")
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True,
                             cwd=Path(ideas.__file__).parent)
    assert child.stdout.readline() == "begun\n"
    child.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    child.send_signal(signal.SIGCONT)
    assert child.communicate(timeout=60)[0] == "done\n"


def test_ctrl_c_is_not_a_fault_of_the_function():
    def f(cost):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        ideas.call(f, None)


def test_a_file_may_import_its_neighbours_and_a_missing_function_name_is_told(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("answer = 42\n")
    mine = ideas.load("--assign", write(tmp_path, "from neighbour_of_mine import answer\n"
                                                  "def f(cost):\n    return answer\n"))
    assert mine(None) == 42
    with pytest.raises(AssignError, match="which function of it"):
        assign.load_strategy("my.py")
    with pytest.raises(AssignError, match="SystemExit.*line 1"):
        ideas.load("--cost", write(tmp_path, "raise SystemExit(0)\n", "exits.py"))


COST = """import torch
def f(one, target):
    return torch.cdist(one.boxes, target["boxes"], p=1)
"""


@pytest.mark.parametrize("text, words", [
    (COST.replace("p=1)", "p=1).T"), r"shape \(30, 3\); it returned torch.float32 of shape \(3, 3"),
    (COST.replace("p=1)", "p=1).long()"), "floating-point.*torch.int64"),
    (COST.replace("torch.cdist", "len"), "the cost f failed on 30 predictions and 3 objects: Type"),
    (COST.replace("p=1)", "p=1) * float('nan')"), "image 100: .*NaN or -inf, but the network"),
    (COST.replace("return torch.cdist", "1; torch.cdist"), "it returned NoneType"),
])
def test_a_cost_of_ones_own_is_told_what_is_wrong(tmp_path, text, words):
    mine = ideas.load("--cost", write(tmp_path, text))
    with pytest.raises(AssignError, match=words):
        match(*random_batch((3,), aux=0), mine, assign.hungarian)


def test_a_file_may_hold_a_dataclass_and_be_called_like_one_of_ours(tmp_path):
    (tmp_path / "data.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass\nclass Seen:\n    count: int = 0\n\ndef f(cost):\n    return Seen(3)\n")
    before = sys.modules["data"]
    assert ideas.load("--assign", f"{tmp_path}/data.py:f")(None).count == 3
    assert sys.modules["data"] is before


def test_progress_is_told_to_those_who_ask():
    seen = []

    def strategy(cost, progress):
        seen.append(progress)
        return assign.hungarian(cost)

    def cost(one, target, *, progress=None):
        seen.append(progress)
        return assign.matching_cost(one, target)

    match(*random_batch((3,), aux=0), cost, strategy, 0.25)
    assert seen == [0.25, 0.25]
    match(*random_batch((3,), aux=0), assign.matching_cost, assign.hungarian, 0.25)


def test_a_cost_acts_in_training_and_is_named(tmp_path, tiny_scenes):
    """Eq. 5 written by hand trains to the weights of the built-in one; another cost does not."""
    mine = write(tmp_path, "import assign\ndef f(one, target):\n"
                           "    return 2 * assign.classification_cost(one.logits, "
                           "target['labels']) + assign.predicted_location(one, target)\n")
    other = write(tmp_path, COST, "other.py")
    train.main(flags(tiny_scenes, out=tmp_path / "a", steps=3))
    train.main(flags(tiny_scenes, out=tmp_path / "b", steps=3, cost=mine))
    train.main(flags(tiny_scenes, out=tmp_path / "c", steps=3, cost=other))
    a, b, c = (weights(tmp_path / name) for name in "abc")
    torch.testing.assert_close(b["model"], a["model"], atol=1e-4, rtol=1e-3)
    assert not same(c["model"], a["model"])
    saved = json.loads((tmp_path / "b" / "args.json").read_text())
    assert saved["cost"] == mine and len(saved["cost_sha256"]) == 64
    assert "class_cost" not in saved and saved["lambda_cls"] == 2
    assert "my.py" in recipes.headline(saved, 24, 6) and "my.py-f" in recipes.run_name(saved)


def test_a_changed_file_is_refused_on_resume(tmp_path, tiny_scenes, command):
    mine = write(tmp_path, "import assign\ndef f(cost):\n    return assign.hungarian(cost)\n")
    train.main(flags(tiny_scenes, out=tmp_path / "a", steps=1, assign=mine))
    train.main(["--resume", "--out", str(tmp_path / "a")])
    Path(mine[:-2]).write_text("import assign\ndef f(cost):\n    return assign.top_k(cost)\n")
    code, _, said = command(train, "--resume", "--out", tmp_path / "a")
    assert code == 2 and "--assign" in said and "has changed" in said


def test_a_strategy_without_positives_is_warned_of(tmp_path, tiny_scenes, capsys):
    mine = write(tmp_path, "import torch\ndef f(cost):\n"
                           "    return torch.zeros(2, 0, dtype=torch.long).unbind()\n")
    train.main(flags(tiny_scenes, out=tmp_path / "a", steps=3, assign=mine))
    said = capsys.readouterr().out
    assert said.count("warning: f gives no positive sample") == 1
    assert [float(row["positives"]) for row in rows(tmp_path / "a" / "log.csv")] == [0, 0, 0]
