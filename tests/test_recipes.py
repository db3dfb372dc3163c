"""The flags: the published values for every row, and a clear word for what cannot be followed."""
import inspect
import json

import pytest
import torch
import torchvision

import annotations
import checkpoints
import data
import grade
import losses
import recipes
import runs
import train
from test_train import fails, flags                                  # noqa: F401 (a fixture)


# The fact sheet's training tables:
# data set, detector, one-to-many -> what the configuration files say.
PUBLISHED = {
    ("coco", "retinanet", False): dict(
        steps=270_000, batch_size=16, optimizer="adamw", lr=4e-5, weight_decay=1e-4,
        milestones=[210_000, 250_000], warmup_steps=1000, warmup_factor=0.01, clip_grad=1.0,
        train_sizes=list(range(640, 897, 32)), train_longest=1500, crop=0.5, flip=0.5,
        test_size=800, test_longest=1333, skip_empty=False,
        width=256, depth=4, extra_levels=2, anchor_scales=3, tower_norm=False,
        delta_weights=[1, 1, 1, 1], backbone="resnet50", backbone_lr_factor=1),
    ("coco", "fcos", False): dict(
        steps=270_000, batch_size=16, lr=4e-5, clip_grad=1.0,
        crop=0.5, train_longest=1500, test_size=800, box_prior=0),
    ("coco", "centernet", False): dict(
        steps=270_000, batch_size=64, optimizer="adamw", lr=5e-5,
        milestones=[210_000, 250_000], clip_grad=1.0,
        train_sizes=[416, 448, 480, 512], train_longest=853, crop=0.5,
        test_size=512, test_longest=853,
        deform=True, neck_widths=[256, 128, 64], box_prior=0),
    ("coco", "retinanet", True): dict(
        steps=90_000, batch_size=16, optimizer="sgd", momentum=0.9, lr=0.01, weight_decay=1e-4,
        milestones=[60_000, 80_000], warmup_steps=1000, warmup_factor=0.001, clip_grad=0,
        train_sizes=list(range(640, 801, 32)), train_longest=1333, crop=0, flip=0.5,
        square=0, colours=0, skip_empty=True, test_size=800, test_longest=1333, spare_norms=True),
    ("coco", "fcos", True): dict(
        steps=90_000, batch_size=16, optimizer="sgd", lr=0.01,
        milestones=[60_000, 80_000], clip_grad=0,
        train_sizes=[800], train_longest=1333, crop=0, skip_empty=True),
    ("coco", "centernet", True): dict(
        steps=126_000, batch_size=128, optimizer="sgd", lr=0.02, weight_decay=1e-4,
        milestones=[81_000, 108_000], warmup_steps=1000, clip_grad=0,
        square=512, colours=0.4, crop=0, flip=0.5, test_size=0, deform=True, skip_empty=True,
        spare_norms=False),
    ("coco", "detr", False): dict(
        steps=554_400, batch_size=64, optimizer="adamw", lr=1e-4, backbone_lr_factor=0.1,
        weight_decay=1e-4, clip_grad=0.1, milestones=[369_600], warmup_steps=0,
        train_sizes=list(range(480, 801, 32)), train_longest=1333, crop=0.5, round_down=True,
        test_size=800, test_longest=1333, lambda_cls=1,
        queries=100, layers=6, hidden=2048, width=256, dropout=0.1, stride=32),
    ("coco", "deformable-detr", False): dict(
        batch_size=32, lr=2e-4, backbone_lr_factor=0.1, clip_grad=0.1, warmup_steps=0,
        milestones=[147_880], train_sizes=list(range(480, 801, 32)), train_longest=1333,
        round_down=True, lambda_cls=2,
        queries=300, hidden=1024, levels=4, refine=False),
    ("coco", "sparse-rcnn", False): dict(
        steps=270_000, batch_size=16, optimizer="adamw", lr=2.5e-5, backbone_lr_factor=1,
        milestones=[210_000, 250_000], warmup_steps=1000, warmup_factor=0.01, clip_grad=1.0,
        train_sizes=list(range(480, 801, 32)), train_longest=1333, crop=0.5, round_down=False,
        lambda_cls=2, queries=300, hidden=2048, dynamic=64, roi_size=224),
    ("crowdhuman", "retinanet", False): dict(
        steps=46_875, batch_size=16, optimizer="adamw", milestones=[37_500], crop=0, max_dets=500,
        train_longest=1400, test_longest=1400),
    ("crowdhuman", "fcos", True): dict(
        steps=30_000, batch_size=16, optimizer="sgd", lr=0.01, milestones=[20_000, 25_000],
        train_sizes=[800], train_longest=1400, test_longest=1400, crop=0, max_dets=500),
}


@pytest.mark.parametrize("data_set, detector, one_to_many", PUBLISHED)
def test_the_recipes_are_the_published_ones(data_set, detector, one_to_many):
    found = recipes.recipe(data_set, detector, one_to_many)
    for name, value in PUBLISHED[data_set, detector, one_to_many].items():
        assert found[name] == value, name


@pytest.mark.parametrize("data_set, detector, one_to_many, epochs", [
    ("coco", "retinanet", False, 36.5),
    ("coco", "centernet", False, 146.1),
    ("coco", "fcos", True, 12.2),
    ("coco", "centernet", True, 136.3),
    ("coco", "detr", False, 300.0),
    ("coco", "deformable-detr", False, 50.0),
    ("coco", "sparse-rcnn", False, 36.5),
    *(("crowdhuman", detector, False, 300.0 if detector == "detr" else 50.0)
      for detector in recipes.NAMES),
    ("crowdhuman", "retinanet", True, 32.0),
    ("crowdhuman", "fcos", True, 32.0),
    ("crowdhuman", "centernet", True, 50.0),
])
def test_the_recipes_last_as_long_as_published(data_set, detector, one_to_many, epochs):
    """Steps times batch over the training pictures, COCO's 118,287 or CrowdHuman's 15,000.

    Where the learning rate falls, more than half of the steps are done, and not all.
    """
    found = recipes.recipe(data_set, detector, one_to_many)
    pictures = {"coco": 118_287, "crowdhuman": 15_000}[data_set]
    assert found["steps"] * found["batch_size"] / pictures == pytest.approx(epochs, abs=0.06)
    assert all(0.5 < step / found["steps"] < 1 for step in found["milestones"])


def test_bad_flags_are_told_by_name(tiny_scenes, tmp_path, fails):
    out = {"out": tmp_path / "run"}
    points = {"detector": "retinanet", "assign": "one-to-many-points"}
    predefined = {"detector": "sparse-rcnn", "location-cost": "predefined"}
    coco = ["--data", "coco", "--data-dir", str(tmp_path), "--out", str(tmp_path / "run")]

    fails(flags(tiny_scenes, **out, assign="cheapest"), "cheapest", "hungarian")
    fails(flags(tiny_scenes, **out, assign="missing.py:f"), "missing.py")
    fails(flags(tiny_scenes, **out, **{"batch-size": 5, "accumulate": 2}), "--batch-size", "5")
    fails(flags(tiny_scenes, **out, lr=-1), "--lr")
    fails(flags(tiny_scenes, **out, assign="one-to-many", **{"class-cost": 0}), "--class-cost")
    fails(flags(tiny_scenes, **out, detector="yolo"), "yolo")
    fails(flags(tiny_scenes, **out, **points), "one-to-many-points", "FCOS")
    fails(flags(tiny_scenes, **out, seed=-1), "--seed")
    fails(flags(tiny_scenes, **out, detector="detr", layers=0), "--layers")
    fails(flags(tiny_scenes, **{**out, "width": 100}), "--width", "multiple")
    fails(flags(tiny_scenes, **out, detector="detr", assign="one-to-many"),
          "--detector detr", "one-to-many")
    fails(flags(tiny_scenes, **out, **predefined), "sparse-rcnn", "predefined")
    fails(flags(tiny_scenes, **out, **{"train-json": tmp_path / "none.json"}), "none.json")
    fails(coco, "instances_train2017.json", "download")
    assert not (tmp_path / "run").exists()


# what argparse lets through: a value out of its range, none at all, or not even a number
BEYOND = {
    "train-sizes": [0, "64 -1"], "train-longest": [0], "test-size": [-1], "test-longest": [0],
    "crop": ["nan", 1.5], "flip": [7, -0.1], "colours": ["inf"], "square": [-5], "shift": [-1],
    "lr": [0, -1, "nan", "inf"], "weight-decay": [-1, "nan"], "clip-grad": [-1, "inf"],
    "backbone-lr-factor": [-0.1], "steps": [0, -5], "batch-size": [0, -4], "accumulate": [0],
    "seed": [-1, 2 ** 63], "workers": [-1], "eval-every": [-1], "log-every": [0],
    "checkpoint-every": [0], "keep-checkpoints": [0, "0.5 1.5"], "max-dets": [0],
    "class-cost": ["nan", -1], "lambda-cls": ["inf"], "lambda-l1": [-1], "lambda-iou": ["nan"],
    "width": [0], "depth": [0, 10 ** 9], "extra-levels": [-1, 9], "box-prior": ["nan"],
}
BEYOND_OF = {
    "retinanet": {"anchor-scales": [0], "delta-weights": ["0 1 1 1", "nan 1 1 1"]},
    "centernet": {"neck-widths": [0]},
    "detr": {"queries": [0], "layers": [0], "hidden": [0], "dropout": [1, 7, "nan"]},
    "deformable-detr": {"levels": [0, 9]},
    "sparse-rcnn": {"roi-size": [0], "dynamic": [0]},
}
SGD = ["--optimizer", "sgd", "--schedule", "step"]
BEYOND_CASES = [
    *(("fcos", [], name, value) for name, values in BEYOND.items() for value in values),
    *((detector, [], name, value) for detector, of in BEYOND_OF.items()
      for name, values in of.items() for value in values),
    *(("fcos", SGD, name, value) for name, value in (
        ("momentum", 5), ("momentum", 1), ("momentum", -0.1), ("milestones", -1),
        ("warmup-steps", -1), ("warmup-factor", "nan"))),
]


@pytest.mark.parametrize("detector, more, name, value", BEYOND_CASES)
def test_a_value_out_of_its_range_is_refused_by_name(detector, more, name, value):
    words = ["--detector", detector, *more, f"--{name}", *str(value).split()]
    flags, _ = recipes.effective_flags(vars(recipes.make_parser().parse_args(words)))
    with pytest.raises(recipes.UsageError, match=f"^--{name} .*: must be from "):
        recipes.check_flags(flags, world=1)


@pytest.mark.parametrize("data", recipes.RECIPES)
@pytest.mark.parametrize("detector", recipes.NAMES)
def test_every_recipe_is_within_the_ranges(data, detector):
    for one_to_many in (False, True)[:1 + (detector in recipes.DENSE)]:
        recipe = recipes.recipe(data, detector, one_to_many)
        flags = {**recipe, "data": data, "detector": detector, "class_cost": 2.0}
        recipes.check_flags(flags, world=1)


@pytest.mark.parametrize("words", ["--train-sizes 640", "--test-size 640"])
def test_a_size_above_the_longest_side_is_refused(words):
    """It would be 336 x 448 pixels, in silence, of a picture of 480 x 640."""
    words = f"--data custom --train-json a --train-images a {words}".split()
    flags, _ = recipes.effective_flags(vars(recipes.make_parser().parse_args(words)))
    with pytest.raises(recipes.UsageError, match=f"^{words[-2]} 640: .* 448; give both"):
        recipes.check_flags(flags, world=1)


def test_the_largest_seed_is_one_that_all_generators_take(tiny_scenes):
    """torch's, Python's and numpy's, of several processes, and those of order and augmentation."""
    largest = 2 ** 63 - 1
    words = ["--seed", str(largest)]
    given, _ = recipes.effective_flags(vars(recipes.make_parser().parse_args(words)))
    recipes.check_flags(given, world=1)
    runs.seed_everything(largest)
    torch.manual_seed(largest + 7)           # the eighth process's
    read = annotations.read_annotations(tiny_scenes / "train.json", tiny_scenes / "train")
    (key,) = next(data.training_batches(read, 1, largest))
    image, _ = data.Pictures(read, data.Transform([64], 64, flip=0.5), largest)[key]
    assert image.shape == (3, 64, 64)


# ------------------------------------------------------------------------------------------------
# a flag concerns the run, or is refused by name
# ------------------------------------------------------------------------------------------------

GIVEN = {       # a value for each option of a detector, and whose constructors know it
    "width": (16, "retinanet fcos detr deformable-detr sparse-rcnn"),
    "depth": (1, "retinanet fcos"),
    "extra-levels": (1, "retinanet fcos"),
    "anchor-scales": (2, "retinanet"),
    "box-prior": (2, "fcos centernet"),
    "neck-widths": (32, "centernet"),
    "queries": (5, "detr deformable-detr sparse-rcnn"),
    "layers": (1, "detr deformable-detr sparse-rcnn"),
    "hidden": (8, "detr deformable-detr sparse-rcnn"),
    "dropout": (0.5, "detr deformable-detr"),
    "stride": (16, "detr"),
    "levels": (2, "deformable-detr"),
    "roi-size": (32, "sparse-rcnn"),
    "dynamic": (8, "sparse-rcnn"),
}


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("detector", recipes.NAMES)
def test_an_option_goes_with_its_detectors_only(detector, name):
    """The list is the fact sheet's: which detector has towers, a neck, queries, proposals."""
    value, whose = GIVEN[name]
    arguments = ["--detector", detector, f"--{name}", str(value)]
    given = vars(recipes.make_parser().parse_args(arguments))
    key = name.replace("-", "_")
    if detector in whose.split():
        found, _ = recipes.effective_flags(given)
        assert found[key] == ([value] if name == "neck-widths" else value)
    else:
        with pytest.raises(recipes.UsageError) as refused:
            recipes.effective_flags(given)
        fits = ", ".join(d for d in recipes.NAMES if d in whose.split())
        assert str(refused.value) == f"--{name} does not concern {detector}; it goes with {fits}"


@pytest.mark.parametrize("arguments, words", [
    (["--laterals"],
     "--laterals does not concern fcos; it goes with centernet --assign one-to-many"),
    (["--momentum", "0.5"], "--momentum does not concern --optimizer adamw"),
    (["--assign", "one-to-many-iou", "--class-cost", "0"],
     "--class-cost does not concern --assign one-to-many-iou"),
    (["--assign", "one-to-many-points", "--location-cost", "predefined"],
     "--location-cost does not concern --assign one-to-many-points"),
    (["--milestones", "5"], "--milestones does not concern --schedule one-cycle"),
    (["--schedule", "step", "--steps", "40", "--milestones", "30", "50"],
     "--milestones 50: the run ends before"),
    (["--square", "96", "--train-sizes", "64"], "--train-sizes does not concern --square 96"),
    (["--square", "96", "--train-longest", "64"], "--train-longest does not concern --square 96"),
    (["--test-size", "0", "--test-longest", "64"], "--test-longest does not concern --test-size 0"),
    (["--warmup-steps", "5"], "--warmup-steps does not concern --schedule one-cycle"),
    (["--resnet", "msra"], "--resnet does not concern --backbone tiny"),
    (["--assign", "one-to-many", "--lambda-iou", "1"], "--lambda-iou does not concern"),
    (["--cost", "my.py:f", "--assign", "one-to-many"],
     "--cost does not concern --assign one-to-many"),
    (["--cost", "my.py:f", "--class-cost", "1"], "--class-cost does not concern --cost my.py:f"),
    (["--cost", "my.py:f", "--location-cost", "predefined"],
     "--location-cost does not concern --cost my.py:f"),
])
def test_a_flag_without_effect_is_refused_by_name(arguments, words):
    given = vars(recipes.make_parser().parse_args(arguments))
    with pytest.raises(recipes.UsageError) as refused:
        recipes.effective_flags(given)
    assert str(refused.value).startswith(words)


def test_a_flag_of_another_data_set_is_refused_by_name():
    arguments = ["--data", "coco", "--train-json", "a.json"]
    given = vars(recipes.make_parser().parse_args(arguments))
    with pytest.raises(annotations.DataError, match="^--train-json names a file of your own"):
        recipes.effective_flags(given)


def test_files_of_ones_own_are_custom_data():
    arguments = ["--train-json", "a", "--train-images", "b", "--val-json", "c", "--val-images", "d"]
    found, _ = recipes.effective_flags(vars(recipes.make_parser().parse_args(arguments)))
    assert found["data"] == "custom"
    assert found["train_sizes"] == recipes.RECIPES["custom"][""]["train_sizes"]


@pytest.mark.parametrize("arguments, words", [
    (["--epochs", "3"], "--steps"),
    (["--num-workers", "2"], "--workers"),
    (["--detectr", "fcos"], "--detector"),
    (["--class-costs=0"], "--class-cost"),
])
def test_an_unknown_flag_gets_a_suggestion(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and arguments[0].split("=")[0] in said[-1] and words in said[-1]


def test_help_opens_with_one_line_and_the_papers_axes(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    said = capsys.readouterr().out
    assert said.splitlines()[0].startswith("usage: train.py") and said.splitlines()[1] == ""
    axes = [said.index(f"  --{name} ") for name in ("detector", "assign", "location-cost",
                                                    "class-cost", "lambda-cls", "data", "steps")]
    assert axes == sorted(axes)


def test_only_flags_in_force_are_saved(tiny_scenes, tmp_path):
    train.main(flags(tiny_scenes, steps=1, out=tmp_path / "run"))
    saved = json.loads((tmp_path / "run" / "args.json").read_text())
    assert not {"queries", "anchor_scales", "momentum", "milestones", "resnet", "init"} & set(saved)
    assert saved["class_cost"] == saved["lambda_cls"] == 2
    assert (saved["lambda_l1"], saved["lambda_iou"]) == (5, 2)


def test_the_lambdas_weigh_the_cost():
    """Eq. 4 and 5, L1 in units of the picture's sides; C_cls is a difference of focal losses.

    A picture of 96 x 64 pixels.  lambda_cls weighs the classification unless --class-cost does.
    """
    one, target = grade.image(torch.Generator().manual_seed(0), 6, 2)
    gt, sides = target["boxes"], torch.tensor([96.0, 64, 96, 64])

    def cost(*words):
        arguments = ["--lambda-l1", "3", "--lambda-iou", "7", *words]
        given, _ = recipes.effective_flags(vars(recipes.make_parser().parse_args(arguments)))
        return losses.row(given).cost(one, target)

    location = (3 * torch.cdist(one.boxes / sides, gt / sides, p=1)
                - 7 * torchvision.ops.generalized_box_iou(one.boxes, gt))
    logits = one.logits[:, target["labels"]]
    as_object, as_background = (torchvision.ops.sigmoid_focal_loss(logits, kind)
                                for kind in (torch.ones_like(logits), torch.zeros_like(logits)))
    torch.testing.assert_close(cost("--class-cost", "0"), location, rtol=1e-5, atol=1e-5)
    for words in (["--lambda-cls", "4"], ["--class-cost", "4"]):
        expected = location + 4 * (as_object - as_background)
        torch.testing.assert_close(cost(*words), expected, rtol=1e-5, atol=1e-5)


def test_the_lambdas_weigh_the_loss(tiny_scenes, tmp_path):
    """Twice the three lambdas: the same positives, and twice the loss, at the first step."""
    def first_loss(name, **more):
        train.main(flags(tiny_scenes, steps=1, out=tmp_path / name, **more))
        return float((tmp_path / name / "log.csv").read_text().splitlines()[1].split(",")[1])

    once = first_loss("once")
    twice = first_loss("twice", **{"lambda-cls": 4, "lambda-l1": 10, "lambda-iou": 4})
    assert twice == pytest.approx(2 * once, rel=1e-4)


def test_what_the_constructors_know_and_what_the_parser_knows_are_one_list():
    """But for what no flag says: how many classes, and what the network itself is made of."""
    known = set()
    for detector in recipes.NAMES:
        for original in (False, True)[:1 + (detector in recipes.DENSE)]:
            made_by = checkpoints.detector_class(detector, original)
            known |= inspect.signature(made_by).parameters.keys()
    without_flag = {"backbone", "num_classes", "pixels", "heads", "points", "unused_ids"}
    assert known - without_flag == recipes.OPTIONS


@pytest.mark.parametrize("detector", recipes.NAMES)
def test_a_recipe_builds_its_detector(detector):
    found = recipes.recipe("scenes", detector)
    flags = {**found, "detector": detector}
    build = recipes.build_arguments(flags, 6)
    model = checkpoints.build(**build)
    assert type(model).__name__.lower() == detector.replace("-", "")
