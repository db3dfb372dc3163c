"""A run that was stopped goes on, all of it; nothing is lost; what is damaged is told."""
import functools
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

import checkpoints
import evaluate
import figures
import recipes
import runs
import train
from test_runs import small_files                                    # noqa: F401 (a fixture)
from test_train import ROOT, fails, flags, rows, same, weights       # noqa: F401 (a fixture)


@pytest.fixture
def interrupted(monkeypatch):
    """Trains, with a request to end in step `at` (from 1)."""
    def run(arguments, at):
        real, calls = train.match, []

        def ask_to_end(*args):
            calls.append(1)
            if len(calls) == at:
                os.kill(os.getpid(), 15)
            return real(*args)

        monkeypatch.setattr(train, "match", ask_to_end)
        with pytest.raises(SystemExit) as stop:
            train.main(arguments)
        assert stop.value.code == 130
        monkeypatch.setattr(train, "match", real)
    return run


def steps(file):
    return [int(row["step"]) for row in rows(file)]


def test_an_evaluation_that_was_due_when_the_run_was_stopped_is_made_up_for(
        tiny_scenes, tmp_path, interrupted):
    """A signal that comes during step 4 is read in step 5, unless it is the one after the last."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.main(flags(tiny_scenes, out=whole, **{"eval-every": 2}))
    interrupted(flags(tiny_scenes, out=parts, **{"eval-every": 2}), at=5)
    assert weights(parts)["step"] == 6 and steps(parts / "eval.csv") == [2, 4]
    train.main(["--resume", "--out", str(parts)])
    assert steps(parts / "eval.csv") == [2, 4, 6, 8]
    assert (parts / "eval.csv").read_text() == (whole / "eval.csv").read_text()
    assert same(weights(parts)["model"], weights(whole)["model"])


def test_a_finished_run_that_is_resumed_is_evaluated_again_and_replaces_its_last_row(
        tiny_scenes, tmp_path):
    out = tmp_path / "run"
    train.main(flags(tiny_scenes, out=out))
    files = [out / name for name in ("eval.csv", "metrics.json", "detections.json")]
    before = [file.read_text() for file in files]
    for file in files[1:]:
        file.unlink()
    train.main(["--resume", "--out", str(out)])
    assert [file.read_text() for file in files] == before and before[0].count("\n") == 2


def test_the_line_that_says_how_to_go_on_can_be_pasted(tiny_scenes, tmp_path, interrupted, capsys):
    out = tmp_path / "my run; it's $HOME"
    interrupted(flags(tiny_scenes, out=out), at=2)
    said = capsys.readouterr().err
    words = shlex.split(said[said.index("python train.py"):])
    assert words[:2] == ["python", "train.py"]
    train.main(words[2:])
    assert weights(out)["step"] == 8


def test_one_command_line_starts_and_goes_on(tiny_scenes, tmp_path, interrupted, fails):
    command = [*flags(tiny_scenes, out=tmp_path / "run"), "--resume", "auto"]
    interrupted(command, at=3)
    reached = weights(tmp_path / "run")["step"]
    train.main(command)
    train.main(command)
    train.main(flags(tiny_scenes, out=tmp_path / "whole"))
    assert 0 < reached < 8
    assert same(weights(tmp_path / "run")["model"], weights(tmp_path / "whole")["model"])
    fails(["--resume", "--out", str(tmp_path / "none")], "none", "last.pt")
    fails(["--resume", "auto"], "--resume", "--out")


KILL_ONCE = """
import os
from pathlib import Path
import assign

def mine(cost, progress):
    marker = Path({marker!r})
    if progress >= 0.7 and os.environ["RANK"] == "1" and not marker.exists():
        marker.write_text("")
        os.kill(os.getpid(), 9)
    return assign.hungarian(cost)
"""


def test_a_process_that_is_killed_is_started_again_and_all_go_on(tiny_scenes, tmp_path, port):
    """torchrun restarts all of them; the line of the innocent one is one line."""
    (tmp_path / "my.py").write_text(KILL_ONCE.format(marker=str(tmp_path / "killed")))
    arguments = [*flags(tiny_scenes, out=tmp_path / "run", assign=f"{tmp_path / 'my.py'}:mine"),
                 "--resume", "auto"]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                           "--max-restarts", "1", "--master-port", port,
                           str(ROOT / "train.py"), *arguments],
                          capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "killed").exists() and "going on from step 4" in done.stdout
    assert "Traceback" not in done.stderr
    assert steps(tmp_path / "run" / "log.csv") == list(range(1, 9))
    saved = weights(tmp_path / "run")
    assert len(saved["buffers"]) == len(saved["random"]) == 2
    assert not same(*saved["buffers"]) and not same(*saved["random"])


def test_under_torchrun_the_sentence_is_the_last_thing_said(tiny_scenes, tmp_path, port):
    """A picture that only evaluation reads is broken: one process finds it, the other waits."""
    shutil.copytree(tiny_scenes / "val", tmp_path / "val")
    broken = sorted((tmp_path / "val").iterdir())[3]
    broken.write_bytes(broken.read_bytes()[:200])
    arguments = flags(tiny_scenes, steps=2, out=tmp_path / "run", workers=2,
                      **{"val-images": tmp_path / "val"})
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                           "--master-port", port, str(ROOT / "train.py"), *arguments],
                          capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode != 0
    last = done.stderr[done.stderr.index("Root Cause"):]
    assert f"traceback : {broken} (image " in last and "cannot be decoded" in last
    # torchrun's own traceback alone
    assert done.stderr.count("Traceback") == 1


def test_what_is_hardware_is_free_on_resume(tiny_scenes, tmp_path, interrupted, capsys):
    """Micro-batches, the place of the pictures, when to evaluate; frozen norms would give the
    same weights, batch norm sees other micro-batches.
    """
    out, moved = tmp_path / "run", tmp_path / "moved"
    interrupted(flags(tiny_scenes, out=out), at=3)
    shutil.copytree(tiny_scenes, moved)
    paths = {"train-json": moved / "train.json", "train-images": moved / "train",
             "val-json": moved / "val.json", "val-images": moved / "val"}
    words = [part for name, value in paths.items() for part in (f"--{name}", str(value))]
    train.main(["--resume", "--out", str(out), *words, "--accumulate", "2", "--eval-every", "6"])
    assert steps(out / "eval.csv") == [6, 8]
    assert json.loads((out / "args.json").read_text())["accumulate"] == 2

    # as if two processes had written it
    checkpoint = weights(out)
    for name in ("buffers", "random"):
        checkpoint[name] *= 2
    torch.save(checkpoint, out / "last.pt")
    capsys.readouterr()
    train.main(["--resume", "--out", str(out)])
    assert "with 1 process(es), before with 2" in capsys.readouterr().out


def test_other_pictures_and_another_schedule_are_another_run(tiny_scenes, tmp_path, fails):
    out, other = tmp_path / "run", tmp_path / "other.json"
    train.main(flags(tiny_scenes, steps=1, out=out))
    content = json.loads((tiny_scenes / "train.json").read_text())
    gone = content["images"].pop()["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != gone]
    other.write_text(json.dumps(content))
    fails(["--resume", "--out", str(out), "--train-json", str(other)], "other.json", "last.pt",
          "trained on other pictures")
    content = json.loads((tiny_scenes / "train.json").read_text())
    content["annotations"][0]["bbox"][0] += 1
    other.write_text(json.dumps(content))
    fails(["--resume", "--out", str(out), "--train-json", str(other)], "other.json", "last.pt",
          "or boxes", f"--init {out}/last.pt")
    fails(["--resume", "--out", str(out), "--steps", "20"], "--steps (was 1, now 20)", "schedule",
          f"--init {out}/last.pt")


def test_weights_that_are_not_finite_are_not_saved(tiny_scenes, tmp_path, monkeypatch, fails):
    """The losses of the step were, its update was not."""
    real, calls = torch.optim.AdamW.step, []

    def overflow_in_step_6(optimizer, *args):
        real(optimizer, *args)
        calls.append(1)
        if len(calls) == 8:
            optimizer.param_groups[0]["params"][0].data[0] = float("nan")

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow_in_step_6)
    fails(flags(tiny_scenes, out=tmp_path / "run"), "step 8", "weights", "not finite", "--lr")
    assert weights(tmp_path / "run")["step"] == 4


@pytest.mark.parametrize("drawn, file, rows_there", [(12, "training.png", 0), (0, "last.pt", 4)])
def test_a_full_disk_ends_the_run_in_a_sentence(
        tiny_scenes, tmp_path, fails, small_files, monkeypatch, drawn, file, rows_there):
    """At the first file that is larger than what is left: the pictures, or the checkpoint."""
    draw = functools.partial(figures.training_pictures, count=drawn)
    monkeypatch.setattr(figures, "training_pictures", draw if drawn else lambda *_: None)
    out = tmp_path / "run"
    fails(flags(tiny_scenes, out=out), f"{file}: no space left", "go on")
    assert not list(out.glob("*.tmp")) and not (out / "last.pt").exists()
    assert (len(rows(out / "log.csv")) if rows_there else 0) == rows_there


# ------------------------------------------------------------------------------------------------
# checkpoints of another version, damaged, or made by hand
# ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def good(tiny_scenes, tmp_path_factory):
    """A checkpoint, to be spoiled."""
    out = tmp_path_factory.mktemp("good") / "run"
    train.main(flags(tiny_scenes, out=out, steps=2))
    return torch.load(out / "last.pt", weights_only=True)


LATE = {"optimizer", "random", "buffers", "watch"}     # what evaluation does not want
DAMAGE = {
    "no optimizer": {"optimizer": None},
    "no args": {"args": None},
    "no step": {"step": None},
    "step in words": {"step": "two"},
    "args of another type": {"args": [1, 2]},
    "a flag of another type": {"args": {"width": [16, 16]}},
    "a flag in words": {"args": {"lr": "fast"}},
    "detections in words": {"args": {"max_dets": "many"}},
    "a choice that is none": {"args": {"detector": "yolo"}},
    "another build": {"build": {"width": 24}},
    "an option in words": {"build": {"depth": "deep"}},
    "an unknown option": {"build": {"wings": 2}},
    "classes": {"class_names": ["a"]},
    "classes without names": {"class_names": [1] * 6},
    "a transform in words": {"test_transform": {"longest": "x"}},
    "an unknown transform": {"test_transform": {"blur": 2}},
    "weights of another shape": {"model": {"score.bias": torch.zeros(77)}},
    "weights that are none": {"model": {"score.bias": "heavy"}},
    "an optimizer of another model": {"optimizer": {"param_groups": []}},
    "no generators": {"random": []},
    "generators of another kind": {"random": [{"python": 1, "torch": 2}]},
    "buffers of another kind": {"buffers": [3]},
    "positives that are none": {"watch": {"seen": {1: {2: "there"}}}},
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_checkpoint_that_is_no_sound_one_is_told_in_a_line(
        good, tmp_path, fails, command, damage):
    content = dict(good)
    for name, value in damage.items():
        content[name] = {**good[name], **value} if isinstance(value, dict) else value
    torch.save(content, tmp_path / "last.pt")
    before = (tmp_path / "last.pt").read_bytes()
    fails(["--resume", "--out", str(tmp_path)], "last.pt: ", checkpoints.DAMAGED)
    if not damage.keys() & {"step", *LATE}:
        code, _, said = command(evaluate, "--weights", tmp_path)
        assert code == 2 and checkpoints.DAMAGED in said and said.count("\n") == 1
    assert (tmp_path / "last.pt").read_bytes() == before
    # what is found out last is found after the logs are opened
    late = {"args.json", "log.csv", "eval.csv"} if damage.keys() & LATE else set()
    assert {file.name for file in tmp_path.iterdir()} - late == {"last.pt"}


def resumed(good, folder, name, value):
    """The flags in force when a run goes on with one flag given."""
    torch.save(good, folder / "last.pt")
    words = ["--resume", "--out", str(folder), f"--{name}", value]
    return recipes.effective_flags(vars(recipes.make_parser().parse_args(words)))[0]


@pytest.mark.parametrize("name, value, in_force", [
    ("device", "cuda", "cuda"), ("workers", "3", 3), ("accumulate", "4", 4),
    ("log-every", "7", 7), ("checkpoint-every", "7", 7), ("eval-every", "7", 7),
    ("keep-checkpoints", "0.3", [0.3]),
    *((name, "elsewhere", "elsewhere")
      for name in ("train-json", "train-images", "val-json", "val-images"))])
def test_machine_places_and_what_is_written_may_change_on_resume(
        good, tmp_path, name, value, in_force):
    assert resumed(good, tmp_path, name, value)[name.replace("-", "_")] == in_force


@pytest.mark.parametrize("name, value", [
    ("seed", "1"), ("batch-size", "8"), ("assign", "min-cost"), ("flip", "0.1"), ("shift", "3"),
    ("weight-decay", "0.5"), ("precision", "bf16"), ("width", "32"), ("max-dets", "50")])
def test_what_the_result_depends_on_may_not_change_on_resume(good, tmp_path, name, value):
    with pytest.raises(recipes.UsageError, match=rf"--{name} \(was .*, now {value}\)"):
        resumed(good, tmp_path, name, value)


def test_what_a_run_started_from_is_remembered(good, tiny_scenes, tmp_path, interrupted):
    """--init and --freeze: without --init, --freeze would be refused on resume."""
    torch.save(good, tmp_path / "start.pt")
    interrupted([*flags(tiny_scenes, out=tmp_path / "run", init=tmp_path / "start.pt",
                        freeze="location")], at=3)
    train.main(["--resume", "--out", str(tmp_path / "run")])
    saved = weights(tmp_path / "run")
    assert saved["step"] == 8
    assert saved["args"]["init"] == str(tmp_path / "start.pt")
    assert saved["args"]["freeze"] == "location"


def test_other_weights_to_start_from_are_refused_on_resume(good, tmp_path, fails):
    """They would change nothing but what is said of the network."""
    torch.save(good, tmp_path / "last.pt")
    fails(["--resume", "--out", str(tmp_path), "--init", str(tmp_path / "last.pt")], "--init")


def test_a_request_to_end_in_the_last_step_ends_the_run_before_its_evaluation(
        tiny_scenes, tmp_path, interrupted, capsys):
    interrupted(flags(tiny_scenes, out=tmp_path / "run", steps=3), at=3)
    assert "interrupted" in capsys.readouterr().err and weights(tmp_path / "run")["step"] == 3
    assert not (tmp_path / "run" / "metrics.json").exists()
    train.main(["--resume", "--out", str(tmp_path / "run")])
    assert steps(tmp_path / "run" / "eval.csv") == [3]


def test_what_was_reached_is_saved_before_an_evaluation(tiny_scenes, tmp_path, monkeypatch):
    """It takes minutes on COCO, and a scheduler that ends a job waits for less."""
    def killed(*arguments):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "score", killed)
    with pytest.raises(SystemExit) as stop:
        train.main(flags(tiny_scenes, out=tmp_path / "run", **{"eval-every": 3}))
    assert stop.value.code == 130 and weights(tmp_path / "run")["step"] == 3


def test_a_full_disk_at_the_first_row_of_a_log_leaves_nothing_that_hinders(tmp_path):
    (tmp_path / "eval.csv").write_bytes(b"")
    runs.Log(tmp_path / "eval.csv", 3).row({"step": 4, "AP": 1.5})
    assert (tmp_path / "eval.csv").read_text() == "step,AP\n4,1.5\n"


def test_a_flag_out_of_its_range_is_told_as_on_the_command_line(good, tmp_path, fails):
    torch.save({**good, "args": {**good["args"], "batch_size": -4}}, tmp_path / "last.pt")
    fails(["--resume", "--out", str(tmp_path)], "--batch-size -4")


def test_a_checkpoint_of_before_a_flag_existed_goes_on_with_its_default(good, tmp_path):
    flags_of_then = {name: value for name, value in good["args"].items()
                     if name not in ("shift", "colours", "keep_checkpoints", "freeze")}
    then = {name: value for name, value in good.items() if name not in ("watch", "boxes")}
    then["random"] = [{name: state for name, state in states.items() if name != "numpy"}
                      for states in good["random"]]
    torch.save({**then, "args": flags_of_then, "step": 1}, tmp_path / "last.pt")
    train.main(["--resume", "--out", str(tmp_path)])
    args = weights(tmp_path)["args"]
    assert weights(tmp_path)["step"] == 2
    assert (args["shift"], args["colours"], args["keep_checkpoints"], args["freeze"]) == (
        12, 0.0, [], "nothing")
