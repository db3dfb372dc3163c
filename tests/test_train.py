"""The loop: it learns, continues exactly, is the same on one process or two,
and stops with one clear sentence.
"""
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

import assign
import checkpoints
import data
import evaluate
import losses
import models
import recipes
import runs
import train

ROOT = Path(__file__).resolve().parent.parent


TOWERS = {"width": 16, "depth": 1, "extra-levels": 0}
QUERIES = {"width": 32, "layers": 2, "hidden": 32, "queries": 10}
SMALL = {"fcos": TOWERS, "retinanet": TOWERS, "centernet": {}, "detr": QUERIES,
         "deformable-detr": QUERIES, "sparse-rcnn": QUERIES}


def flags(folder, **more):
    """A run of seconds: 24 pictures in training, 7 in validation, a narrow FCOS."""
    base = {"data": "custom", "train-json": folder / "train.json", "train-images": folder / "train",
            "val-json": folder / "val.json", "val-images": folder / "val",
            "backbone": "tiny", **SMALL.get(more.get("detector", "fcos"), {}),
            "steps": 8, "batch-size": 4, "train-sizes": 64, "train-longest": 64,
            "test-size": 64, "test-longest": 64, "log-every": 1, "checkpoint-every": 4,
            "device": "cpu", "precision": "fp32", **more}
    return [part for name, value in base.items() for part in (f"--{name}", str(value))]


def weights(out):
    return torch.load(out / "last.pt", weights_only=True)


def rows(file):
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def same(a, b):
    """Bit for bit equality of nested dicts, lists and tensors."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture
def fails(command):
    """The command ends with exit code 2 and one line on standard error that holds `words`."""
    def run(arguments, *words):
        code, _, message = command(train, *arguments)
        assert code == 2 and "Traceback" not in message
        last = message.strip().splitlines()[-1]
        for word in words:
            assert str(word) in last, last
    return run


FILES = {"args.json", "log.csv", "eval.csv", "last.pt", "training.png",
         "detections.json", "detections_nms.json", "metrics.json", "detections.png"}


def assert_all_learn(out):
    """AdamW keeps a state for each parameter that had a gradient, and for no other.

    Processes would wait for a gradient that one of them never has, in the second step.
    """
    optimizer = weights(out)["optimizer"]
    assert len(optimizer["state"]) == sum(len(g["params"]) for g in optimizer["param_groups"])


@pytest.mark.parametrize("detector", ["fcos", "retinanet", "centernet"])
@pytest.mark.parametrize("row", [
    ["--assign", "one-to-many"],
    ["--class-cost", "0", "--location-cost", "predefined"],
    ["--location-cost", "predefined"],
    [],
    ["--assign", "min-cost"],
    ["--assign", "top-k"],
    ["--assign", "one-to-many-iou"],
], ids=["one-to-many", "location-only", "predefined", "predicted", "min-cost", "top-k", "iou"])
def test_every_row_of_the_dense_half_of_tables_1_and_2_runs_and_leaves_its_files(
        tiny_scenes, tmp_path, detector, row):
    out = tmp_path / "run"
    train.main(flags(tiny_scenes, detector=detector, steps=2, out=out) + row)
    assert FILES <= set(os.listdir(out))
    losses = [float(row["loss"]) for row in rows(out / "log.csv")]
    assert len(losses) == 2 and all(0 < loss < 1e4 for loss in losses)
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR", "nms"} <= metrics.keys()
    assert_all_learn(out)


@pytest.fixture
def seen(monkeypatch):
    """What the network is shown: whether it trains, in bfloat16, and the shape of each batch."""
    batches, features = [], models.Detector.features

    def watched(self, images, mask, **options):
        batches.append((self.training, torch.is_autocast_enabled("cpu"), *images.shape))
        return features(self, images, mask, **options)

    monkeypatch.setattr(models.Detector, "features", watched)
    return batches


@pytest.mark.parametrize("detector, side, precision", [
    ("detr", 70, "fp32"), ("deformable-detr", 70, "fp32"), ("fcos", 96, "fp32"),
    ("sparse-rcnn", 96, "fp32"), ("fcos", 96, "bf16")])
def test_each_detector_is_trained_and_evaluated_with_its_own_padding(
        tiny_scenes, tmp_path, seen, detector, side, precision):
    """Pictures of 70 pixels: as they are for DETR's family, else on 96, a multiple of 32.

    Four at a time in training, one at a time in evaluation of other than the embedded data; both
    in bfloat16 where that is asked for.
    """
    sides = dict.fromkeys(("train-sizes", "train-longest", "test-size", "test-longest"), 70)
    train.main(flags(tiny_scenes, detector=detector, steps=1, out=tmp_path / "run",
                     precision=precision, **sides))
    half = precision == "bf16"
    assert seen == [(True, half, 4, 3, side, side)] + 7 * [(False, half, 1, 3, side, side)]
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "run")["model"].values()
               if value.is_floating_point())


@pytest.mark.parametrize("detector, more", [
    ("detr", []),
    ("deformable-detr", []),
    ("deformable-detr", ["--no-refine"]),
    ("sparse-rcnn", []),
])
@pytest.mark.parametrize("class_cost", [[], ["--class-cost", "0"]],
                         ids=["predicted", "location-only"])
def test_every_row_of_the_other_half_runs_and_leaves_its_files(
        tiny_scenes, tmp_path, detector, more, class_cost):
    out = tmp_path / "run"
    common = {"detector": detector, "steps": 2, "accumulate": 2, "out": out}
    train.main(flags(tiny_scenes, **common) + more + class_cost)
    assert FILES <= set(os.listdir(out))
    losses = [float(row["loss"]) for row in rows(out / "log.csv")]
    assert len(losses) == 2 and all(0 < loss < 1e4 for loss in losses)
    expected = 0 if class_cost else 1 if detector == "detr" else 2
    assert json.loads((out / "args.json").read_text())["class_cost"] == expected
    assert_all_learn(out)


def test_a_small_run_learns_what_an_untrained_network_cannot(tiny_scenes, tmp_path):
    """24 pictures, learned by heart:
    the loss falls to a fraction and most of them are found again.
    """
    out = tmp_path / "run"
    by_heart = {"val-json": tiny_scenes / "train.json", "val-images": tiny_scenes / "train",
                "train-sizes": 128, "train-longest": 128, "test-size": 128, "test-longest": 128,
                "width": 32, "batch-size": 8, "lr": 2e-3, "flip": 0}
    once = {**by_heart, "steps": 1, "lr": 1e-9}
    train.main(flags(tiny_scenes, out=tmp_path / "untrained", **once))
    often = {**by_heart, "steps": 120, "checkpoint-every": 120}
    train.main(flags(tiny_scenes, out=out, **often))

    log = [float(row["loss"]) for row in rows(out / "log.csv")]
    assert sum(log[-10:]) < 0.5 * sum(log[:10])
    untrained, learned = (json.loads((folder / "metrics.json").read_text())
                          for folder in (tmp_path / "untrained", out))
    assert untrained["AP50"] < 10 and learned["AP50"] > 60


def without_times(log):
    """The rows of a log.csv but for what depends on the machine."""
    drop = ("images_per_second", "seconds_waiting", "gigabytes")
    return [{k: v for k, v in row.items() if k not in drop} for row in rows(log)]


@pytest.mark.parametrize("detector, assign", [
    ("fcos", "hungarian"),
    ("retinanet", "one-to-many"),
    ("centernet", "hungarian"),
    ("detr", "hungarian"),
])
def test_a_run_that_is_killed_and_resumed_is_bit_for_bit_the_run_that_was_not(
        tiny_scenes, tmp_path, monkeypatch, detector, assign):
    """Killed in step 6, two steps after the last checkpoint,
    which a resume must not be able to notice.
    """
    small = {"dropout": 0.1} if detector == "detr" else {}
    common = {"detector": detector, "assign": assign, **small}
    train.main(flags(tiny_scenes, out=tmp_path / "whole", **common))
    calls, real = [], train.match

    def die_in_step_6(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyError("killed")
        return real(*args)

    monkeypatch.setattr(train, "match", die_in_step_6)
    with pytest.raises(KeyError):
        train.main(flags(tiny_scenes, out=tmp_path / "parts", **common))
    monkeypatch.setattr(train, "match", real)
    assert weights(tmp_path / "parts")["step"] == 4
    train.main(["--resume", "--out", str(tmp_path / "parts")])

    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for part in ("model", "optimizer", "step", "random", "buffers"):
        assert same(whole[part], parts[part]), part
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert without_times(whole / "log.csv") == without_times(parts / "log.csv")
    assert (whole / "metrics.json").read_text() == (parts / "metrics.json").read_text()


def test_ctrl_c_saves_the_step_it_reached_and_resume_goes_on_from_there(
        tiny_scenes, tmp_path, monkeypatch, capsys):
    real, calls = train.match, []

    def interrupt_in_step_2(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), 2)
        return real(*args)

    monkeypatch.setattr(train, "match", interrupt_in_step_2)
    with pytest.raises(SystemExit) as stop:
        train.main(flags(tiny_scenes, out=tmp_path / "run"))
    assert stop.value.code == 130 and "--resume" in capsys.readouterr().err
    # read in the step after it, and before the checkpoint that is due after step 4
    assert weights(tmp_path / "run")["step"] == 3
    monkeypatch.setattr(train, "match", real)
    train.main(["--resume", "--out", str(tmp_path / "run")])
    train.main(flags(tiny_scenes, out=tmp_path / "whole"))
    assert same(weights(tmp_path / "whole")["model"], weights(tmp_path / "run")["model"])


def test_resume_refuses_changed_flags_by_name_and_touches_nothing(tiny_scenes, tmp_path, fails):
    out = tmp_path / "run"
    train.main(flags(tiny_scenes, steps=4, out=out))
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    fails(["--resume", "--out", str(out), "--lr", "0.5", "--class-cost", "0"],
          "--lr", "--class-cost", "0.5")
    assert before == {file.name: file.read_bytes() for file in out.iterdir()}


def run_processes(count, port, arguments):
    """With the environment that torchrun would give them; torchrun itself starts test_resume's."""
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count),
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                text=True, env={**shared, "RANK": str(n), "LOCAL_RANK": str(n)})
               for n in range(count)]
    try:
        said = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * count, "".join(said)[-4000:]


@pytest.fixture
def descent(tmp_path):
    """Flags of plain gradient descent, where the change of the weights is the gradient.

    The backbone's norms are frozen:
    batch norm's statistics would be those of each process's own share.
    """
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    return {"backbone": "resnet18", "backbone-weights": tmp_path / "resnet18.pth",
            "optimizer": "sgd", "momentum": 0, "weight-decay": 0,
            "lr": 0.01, "schedule": "step", "clip-grad": 0, "steps": 2}


@pytest.mark.parametrize("assign", ["hungarian", "one-to-many"])
def test_two_processes_compute_the_losses_and_gradients_of_one(
        tiny_scenes, tmp_path, descent, port, assign):
    """And evaluation of the 7 pictures, an odd number, counts each once: the same detections."""
    descent["assign"] = assign
    train.main(flags(tiny_scenes, out=tmp_path / "one", **descent))
    run_processes(2, port, flags(tiny_scenes, out=tmp_path / "two", **descent))

    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=0, atol=1e-6)

    one, two = rows(tmp_path / "one" / "log.csv"), rows(tmp_path / "two" / "log.csv")
    for a, b in zip(one, two, strict=True):
        assert float(a["gradient_norm"]) == pytest.approx(float(b["gradient_norm"]), rel=1e-5)
        # normalised over all processes, so that even the terms agree
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)

    a, b = (json.loads((tmp_path / run / "detections.json").read_text()) for run in ("one", "two"))
    assert [d["image_id"] for d in a] == [d["image_id"] for d in b]
    assert [d["score"] for d in a] == pytest.approx([d["score"] for d in b], abs=1e-5)
    for one, two in zip(a, b, strict=True):
        assert one["bbox"] == pytest.approx(two["bbox"], abs=0.01), one     # pixels


def test_what_two_processes_trained_is_scored_as_one_finds_it(
        tiny_scenes, tmp_path, port, command):
    """Batch norm's statistics differ from process to process: those of the checkpoint count."""
    run_processes(2, port, flags(tiny_scenes, out=tmp_path / "run", detector="centernet", steps=3))
    assert len(rows(tmp_path / "run" / "log.csv")) == 3
    assert command(evaluate, "--weights", tmp_path / "run", "--out", tmp_path / "again")[0] == 0
    here, there = (json.loads((tmp_path / run / "detections.json").read_text())
                   for run in ("run", "again"))
    assert [d["score"] for d in here] == pytest.approx([d["score"] for d in there], abs=1e-6)


def in_force(*words):
    return recipes.effective_flags(vars(recipes.make_parser().parse_args(words)))[0]


@pytest.mark.parametrize("sizes, expected", [
    (["--train-sizes", "64", "96", "--train-longest", "120"],
     {"shortest": [64, 96], "longest": 120, "square": 0}),
    (["--square", "64"], {"shortest": [], "longest": 10 ** 9, "square": 64})])
def test_flags_of_the_pictures_reach_the_pictures(tiny_scenes, tmp_path, sizes, expected):
    """Those of training alone change nothing in evaluation; each has a value of its own here."""
    files = [part for split in ("train", "val") for part in (
        f"--{split}-json", f"{tiny_scenes}/{split}.json",
        f"--{split}-images", f"{tiny_scenes}/{split}")]
    flags = in_force(*files, *sizes, *"--test-size 80 --test-longest 110 --flip 0.1 --crop 0.2 "
                     "--round-down --colours 0.3 --shift 5 --seed 6".split())
    ours, theirs = train.open_data(flags, runs.Process(0, 1, "cpu"))
    assert ours.transform == data.Transform(flip=0.1, crop=0.2, round_down=True, colours=0.3,
                                            shift=5, **expected)
    assert theirs.transform == data.Transform([80], 110, round_down=True)
    assert (len(ours), len(theirs), ours.seed) == (24, 7, 6)


def test_pictures_without_objects_are_left_out_of_training_where_that_is_asked_for(
        tiny_scenes, tmp_path, monkeypatch):
    """Six of 24 pictures hold objects; in an epoch of two steps nothing else is seen."""
    content = json.loads((tiny_scenes / "train.json").read_text())
    few = {image["id"] for image in content["images"][::4]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in few]
    (tmp_path / "few.json").write_text(json.dumps(content))
    counts, real = [], train.match

    def watched(prediction, targets, *more):
        counts.extend(len(target["boxes"]) for target in targets)
        return real(prediction, targets, *more)

    monkeypatch.setattr(train, "match", watched)
    train.main(flags(tiny_scenes, out=tmp_path / "run", steps=2, shift=0,
                     **{"train-json": tmp_path / "few.json"}) + ["--skip-empty"])
    assert len(counts) == 8 and all(counts)


# ------------------------------------------------------------------------------------------------
# learning rate, weight decay, clipping
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words, expected", [
    (["--data", "coco"], {0: 0.01, 500: 0.505, 1000: 1, 209_999: 1, 210_000: 0.1, 250_000: 0.01}),
    (["--data", "coco", "--assign", "one-to-many"],
     {0: 0.001, 500: 0.5005, 59_999: 1, 60_000: 0.1, 80_000: 0.01}),
    (["--data", "coco", "--detector", "detr"], {0: 1, 369_599: 1, 369_600: 0.1}),
    (["--steps", "1000"], {0: 0.01, 49: 0.5, 99: 1, 100: 1, 550: 0.5, 775: 0.5 - 0.5 ** 1.5,
                           1000: 0})],
    ids=["OneNet", "detectron2", "DETR", "one-cycle"])
def test_the_learning_rate_follows_the_published_schedule(words, expected):
    """Up on a straight line, then a tenth at each milestone; or up for a tenth, down a cosine."""
    found = {step: train.lr_factor(step, in_force(*words)) for step in expected}
    assert found == pytest.approx(expected, abs=1e-9)


def groups_of(detector, *words):
    """{name of a parameter: (learning rate, weight decay)} as the optimiser of a recipe has it."""
    flags = in_force("--detector", detector, *words, "--backbone", "tiny",
                     "--backbone-weights", "none")
    model = checkpoints.build(**recipes.build_arguments(flags, 3))
    optimizer = train.make_optimizer(model, flags, "cpu")
    of = {id(p): (group["peak"], group["weight_decay"]) for group in optimizer.param_groups
          for p in group["params"]}
    return {name: of[id(p)] for name, p in model.named_parameters()}


def test_deformable_detr_learns_where_it_looks_and_its_backbone_at_a_tenth_of_the_rate():
    """2e-4, and 2e-5 for backbone, reference points and sampling offsets; AdamW decays all."""
    for name, rate_and_decay in groups_of("deformable-detr", "--data", "coco").items():
        slow = name.startswith("backbone") or "reference_points" in name or "offset" in name
        assert rate_and_decay == (pytest.approx(2e-5 if slow else 2e-4), 1e-4), name


@pytest.mark.parametrize("detector, more, spared", [
    ("retinanet", [], True), ("retinanet", ["--no-spare-norms"], False), ("centernet", [], False)])
def test_sgd_spares_norms_where_the_published_code_does(detector, more, spared):
    """detectron2's WEIGHT_DECAY_NORM is 0; CenterNet-better knows its batch norms by no name."""
    slim = ["--neck-widths", "16", "16", "16"] if detector == "centernet" else ["--width", "32"]
    found = groups_of(detector, "--data", "coco", "--assign", "one-to-many", *slim, *more)
    norms = {name for name in found if "norm" in name or "stem.1" in name}
    assert len(norms) > 4
    for name, (_, decay) in found.items():
        assert decay == (0 if spared and name in norms else 1e-4), name


def test_clipping_limits_the_norm_of_the_whole_gradient(tiny_scenes, tmp_path, descent):
    """A step of gradient descent then moves the weights by the learning rate times that norm."""
    once = {**descent, "steps": 1}
    for name, more in (("still", {"lr": 1e-30}), ("free", {}), ("cut", {"clip-grad": 0.5})):
        train.main(flags(tiny_scenes, out=tmp_path / name, **{**once, **more}))
    start, free, cut = (weights(tmp_path / name)["model"] for name in ("still", "free", "cut"))

    def way(end):
        return sum(((end[name] - start[name]) ** 2).sum() for name in start).sqrt().item()

    assert way(cut) == pytest.approx(0.01 * 0.5, rel=1e-3)
    assert way(free) > 2 * way(cut)


def test_micro_batches_add_up_to_the_same_step(tiny_scenes, tmp_path, descent):
    train.main(flags(tiny_scenes, out=tmp_path / "one", **descent))
    train.main(flags(tiny_scenes, out=tmp_path / "four", accumulate=4, **descent))
    for name, value in weights(tmp_path / "one")["model"].items():
        four = weights(tmp_path / "four")["model"][name]
        torch.testing.assert_close(four, value, rtol=0, atol=1e-6)


def test_the_checkpoint_alone_gives_the_same_figures_again(
        tiny_scenes, tmp_path, monkeypatch, capsys):
    run, again = tmp_path / "run", tmp_path / "again"
    train.main(flags(tiny_scenes, steps=4, out=run))
    command = ["evaluate.py", "--weights", str(run / "last.pt"), "--out", str(again)]
    monkeypatch.setattr(sys, "argv", command)
    evaluate.main()
    assert (again / "metrics.json").read_text() == (run / "metrics.json").read_text()
    assert (again / "detections.json").read_text() == (run / "detections.json").read_text()


def test_pictures_of_their_own_size_are_evaluated_and_gone_on_with(
        tiny_scenes, tmp_path, command, seen):
    """As the recipe of COCO's one-to-many CenterNet: squares in training, nothing resized after.

    The pictures have 128 pixels.
    """
    words = flags(tiny_scenes, steps=2, out=tmp_path / "run", square=64)
    for name in ("--train-sizes", "--train-longest", "--test-longest"):
        at = words.index(name)
        words[at:at + 2] = []
    words[words.index("--test-size") + 1] = "0"
    train.main(words)
    evaluated = 7 * [(False, False, 1, 3, 128, 128)]
    assert seen == 2 * [(True, False, 4, 3, 64, 64)] + evaluated
    kept = json.loads((tmp_path / "run" / "args.json").read_text())
    assert kept["square"] == 64 and not {"train_sizes", "train_longest", "test_longest"} & set(kept)
    code, out, err = command(evaluate, "--weights", tmp_path / "run", "--device", "cpu")
    assert code == 0 and out.splitlines()[-1].startswith("AP "), err
    train.main(["--resume", "--out", str(tmp_path / "run")])
    assert seen[9:] == 2 * evaluated


def test_without_a_val_split_a_share_is_cut_off_the_same_in_training_and_evaluation(
        tiny_scenes, tmp_path, command):
    """Of 24 pictures a quarter; a pair of flags is taken out of the command line."""
    out, words = tmp_path / "run", flags(tiny_scenes, steps=2, out=tmp_path / "run")
    for name in ("--val-json", "--val-images"):
        del words[words.index(name):words.index(name) + 2]
    train.main([*words, "--val-share", "0.25"])
    assert json.loads((out / "args.json").read_text())["val_share"] == 0.25
    found = json.loads((out / "detections.json").read_text())
    assert len({d["image_id"] for d in found}) == 6

    code, _, err = command(evaluate, "--weights", out / "last.pt", "--out", tmp_path / "again")
    assert code == 0, err
    assert (tmp_path / "again" / "metrics.json").read_text() == (out / "metrics.json").read_text()


def test_init_takes_what_fits_and_lists_the_rest(tiny_scenes, tmp_path, capsys):
    train.main(flags(tiny_scenes, steps=1, out=tmp_path / "a"))
    train.main(flags(tiny_scenes, steps=1, lr=1e-12, detector="retinanet",
                     out=tmp_path / "b", init=tmp_path / "a" / "last.pt"))
    said = capsys.readouterr().out
    assert "delta.weight" in said and "score.weight" in said and "ltrb.bias" in said
    a, b = weights(tmp_path / "a")["model"], weights(tmp_path / "b")["model"]
    name = "backbone.stem.0.weight"
    torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-6)


def test_not_a_number_stops_the_run_with_step_and_images_and_keeps_the_good_checkpoint(
        tiny_scenes, tmp_path, monkeypatch, fails):
    calls, (cost, strategy, real) = [], losses.ROWS["one-to-one"]

    def overflow_in_step_6(*args, **options):
        calls.append(1)
        terms = real(*args, **options)
        return {k: v * float("inf") for k, v in terms.items()} if len(calls) == 6 else terms

    monkeypatch.setitem(losses.ROWS, "one-to-one", (cost, strategy, overflow_in_step_6))
    fails(flags(tiny_scenes, out=tmp_path / "run"), "step 5", "images", "--lr", "last.pt")
    good = weights(tmp_path / "run")
    assert good["step"] == 4
    assert all(v.isfinite().all() for v in good["model"].values() if v.is_floating_point())


def test_a_learning_rate_that_explodes_is_told_as_such(tiny_scenes, tmp_path, fails):
    explosive = {"optimizer": "sgd", "lr": 1e30, "schedule": "step"}
    fails(flags(tiny_scenes, out=tmp_path / "run", **explosive), "step", "image", "lower --lr")


def student(tmp_path, body):
    file = tmp_path / "my.py"
    body = "".join(f"    {line}\n" for line in body.splitlines())
    file.write_text("import torch\ndef mine(cost):\n" + body)
    return f"{file}:mine"


def dearest(cost):
    """A strategy nobody would choose: every object's dearest prediction."""
    return cost.argmax(0), torch.arange(cost.shape[1])


def test_an_edit_of_a_strategy_acts_in_training(tiny_scenes, tmp_path, monkeypatch):
    """Patched in assign.py, `hungarian` is what a file of one's own with the same rule is."""
    mine = student(tmp_path, "return cost.argmax(0), torch.arange(cost.shape[1])")
    train.main(flags(tiny_scenes, steps=5, out=tmp_path / "mine", assign=mine))
    train.main(flags(tiny_scenes, steps=5, out=tmp_path / "before"))
    monkeypatch.setattr(assign, "hungarian", dearest)
    train.main(flags(tiny_scenes, steps=5, out=tmp_path / "patched"))
    patched = weights(tmp_path / "patched")["model"]
    assert same(patched, weights(tmp_path / "mine")["model"])
    assert not same(patched, weights(tmp_path / "before")["model"])


def test_an_edit_of_assign_py_on_disk_acts_in_training(tiny_scenes, tmp_path):
    """The course's sentence, "change one function in assign.py", taken at its word."""
    house = tmp_path / "house"
    house.mkdir()
    for file in [*ROOT.glob("*.py"), ROOT / "tiny.pt"]:
        shutil.copy(file, house)
    text = (house / "assign.py").read_text()
    head, body = text.split("def hungarian(cost):\n")
    edit = "    return cost.argmax(0), torch.arange(cost.shape[1])\n"
    (house / "assign.py").write_text(head + "def hungarian(cost):\n" + edit + body)

    command = [sys.executable, "train.py", *flags(tiny_scenes, steps=2, out=tmp_path / "edited")]
    done = subprocess.run(command, cwd=house, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    mine = student(tmp_path, edit.strip())
    train.main(flags(tiny_scenes, steps=2, out=tmp_path / "mine", assign=mine))
    assert same(weights(tmp_path / "edited")["model"], weights(tmp_path / "mine")["model"])


def test_a_student_function_that_fails_is_told_what_it_did(tiny_scenes, tmp_path, fails):
    mine = student(tmp_path, "raise RuntimeError('I forgot')")
    fails(flags(tiny_scenes, steps=2, out=tmp_path / "run", assign=mine),
          "step 0: image ", "mine", "I forgot")


def test_resume_takes_precision_auto_for_what_it_was(tiny_scenes, tmp_path):
    arguments = flags(tiny_scenes, out=tmp_path / "run", precision="auto")
    train.main(arguments)
    train.main(arguments + ["--resume"])


def test_a_folder_that_holds_a_run_or_cannot_be_written_is_left_alone(tiny_scenes, tmp_path, fails):
    out = tmp_path / "run"
    train.main(flags(tiny_scenes, steps=1, out=out))
    before = (out / "last.pt").read_bytes()
    fails(flags(tiny_scenes, steps=1, out=out), "--resume", out)
    assert (out / "last.pt").read_bytes() == before
    (tmp_path / "file").write_text("")
    fails(flags(tiny_scenes, steps=1, out=tmp_path / "file" / "run"), "file")


def test_a_checkpoint_cut_in_half_or_of_another_detector_is_refused(tiny_scenes, tmp_path, fails):
    train.main(flags(tiny_scenes, steps=1, out=tmp_path / "a"))
    whole = (tmp_path / "a" / "last.pt").read_bytes()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "last.pt").write_bytes(whole[:len(whole) // 2])
    fails(["--resume", "--out", str(tmp_path / "b")], "last.pt", "cut short")
    fails(["--resume", "--out", str(tmp_path / "a"), "--detector", "retinanet"], "--detector")
    fails(flags(tiny_scenes, out=tmp_path / "c", init=tmp_path / "b" / "last.pt"), "last.pt")
    foreign = {"backbone": "resnet18", "backbone-weights": tmp_path / "a" / "last.pt"}
    fails(flags(tiny_scenes, out=tmp_path / "c", **foreign), "backbone")


# ------------------------------------------------------------------------------------------------
# what is kept and what is frozen
# ------------------------------------------------------------------------------------------------

def test_checkpoints_are_kept_at_the_shares_that_were_asked_for(tiny_scenes, tmp_path):
    out = tmp_path / "run"
    train.main(flags(tiny_scenes, out=out, **{"checkpoint-every": 100})
               + ["--keep-checkpoints", "0.01", "0.5", "1"])
    kept = sorted(out.glob("step-*.pt"))
    assert [file.name for file in kept] == ["step-000001.pt", "step-000004.pt", "step-000008.pt"]
    assert [torch.load(file, weights_only=True)["step"] for file in kept] == [1, 4, 8]
    assert same(torch.load(kept[-1], weights_only=True)["model"], weights(out)["model"])


@pytest.mark.parametrize("detector", ["fcos", "retinanet"])
def test_with_location_frozen_only_the_classification_sub_net_learns(
        tiny_scenes, tmp_path, detector):
    """Weights and batch norm's statistics of all else stay, through an evaluation and a resume.

    The sub-net starts anew: of weights that no start would draw nothing is left.
    """
    train.main(flags(tiny_scenes, out=tmp_path / "a", detector=detector, steps=1))
    start, anew = weights(tmp_path / "a"), ("score.weight", "class_tower.0.weight")
    for name in anew:
        start["model"][name].fill_(7)
    torch.save(start, tmp_path / "a" / "last.pt")
    frozen = {"detector": detector, "steps": 3, "init": tmp_path / "a" / "last.pt",
              "freeze": "location", "eval-every": 2, "keep-checkpoints": 0.67}
    train.main(flags(tiny_scenes, out=tmp_path / "b", **frozen))
    (tmp_path / "c").mkdir()
    shutil.copy(tmp_path / "b" / "step-000002.pt", tmp_path / "c" / "last.pt")
    train.main(["--resume", "--out", str(tmp_path / "c")])
    assert same(weights(tmp_path / "b")["model"], weights(tmp_path / "c")["model"])

    before, after = (weights(tmp_path / name)["model"] for name in "ab")
    for name, value in after.items():
        of_classes = name.split(".")[0] in ("class_tower", "score")
        if not of_classes:
            assert torch.equal(value, before[name]), name
    for name in anew:
        assert after[name].abs().max() < 1, name

    one = train.checkpoints.load(tmp_path / "b" / "last.pt")[1]
    assert {len(part) for part in one["optimizer"]["state"].values()} == {3}     # AdamW's
    own = train.checkpoints.build(**one["build"])
    count = sum(name.split(".")[0] in ("class_tower", "score")
                for name, _ in own.named_parameters())
    assert len(one["optimizer"]["state"]) == count


def test_freezing_wants_a_start_and_a_sub_net(tiny_scenes, tmp_path, fails):
    fails(flags(tiny_scenes, out=tmp_path / "a", freeze="location"), "--freeze location", "--init")
    fails(flags(tiny_scenes, out=tmp_path / "a", detector="centernet", freeze="location",
                init="x.pt"), "--freeze does not concern centernet")


def test_log_csv_says_where_the_positives_lie(tiny_scenes, tmp_path):
    """One-to-one: one positive an object; ranks start at 1; after an epoch some have moved."""
    train.main(flags(tiny_scenes, out=tmp_path / "a", steps=18, **{"log-every": 6}))
    log = rows(tmp_path / "a" / "log.csv")
    assert [float(row["positives"]) for row in log] == [1, 1, 1]
    assert all(float(row["rank"]) >= 1 and 0 <= float(row["gap"]) <= 1 for row in log)
    assert log[0]["moved"] == "" and 0 < float(log[2]["moved"]) <= 100
    train.main(flags(tiny_scenes, out=tmp_path / "b", steps=6, assign="top-k"))
    assert float(rows(tmp_path / "b" / "log.csv")[0]["positives"]) > 2
