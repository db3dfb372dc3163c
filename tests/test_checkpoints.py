"""Is a checkpoint the detector it was, and does anything else get a clear refusal, and no more?"""
import contextlib
import inspect
import os
import pickle

import pytest
import torch
import torchvision

import checkpoints
import models
from checkpoints import CheckpointError
from test_models import run, small

DESCRIPTION = {"class_names": ["a", "b", "c"], "test_transform": {}, "args": {}}
SLIM = {"backbone": "tiny", "width": 16, "depth": 1, "extra_levels": 1}


def save(file, detector="fcos", num_classes=3):
    """What train.py saves, as far as the reader cares.  Returns the model."""
    build = {"detector": detector, "num_classes": num_classes, **SLIM}
    model = checkpoints.build(**build).eval()
    torch.save({"build": build, "model": model.state_dict(), **DESCRIPTION}, file)
    return model


# ------------------------------------------------------------------------------------------------
# saving and reading
# ------------------------------------------------------------------------------------------------

def test_a_checkpoint_is_the_detector_it_was(tmp_path):
    model = save(tmp_path / "last.pt")
    again, checkpoint = checkpoints.load(tmp_path / "last.pt")
    assert torch.equal(run(again.eval()).logits, run(model).logits)
    assert {name: checkpoint[name] for name in DESCRIPTION} == DESCRIPTION


def test_a_file_is_saved_whole_or_not_at_all(tmp_path):
    file = tmp_path / "last.pt"
    checkpoints.save_whole({"step": 1}, file)
    with pytest.raises(AttributeError):
        # the second value cannot be saved: it has no name to be found by
        checkpoints.save_whole({"step": 2, "harm": lambda: None}, file)
    assert torch.load(file, weights_only=True) == {"step": 1}


class Harmful:
    """Unpickled, it makes a folder; it could as well delete one."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def pickled(what, file):
    file.write_bytes(pickle.dumps(what, protocol=2))


@pytest.mark.parametrize("write", [torch.save, pickled], ids=["torch.save", "pickle"])
def test_a_checkpoint_with_code_in_it_does_not_run(tmp_path, write):
    file, folder = tmp_path / "last.pt", tmp_path / "harm"
    write({"model": Harmful(folder)}, file)
    with pytest.raises(CheckpointError, match="last.pt: refused.*run code"):
        checkpoints.read(file)
    assert not folder.exists()
    # the same file, trusted, does run: this test can fail
    with contextlib.suppress(RuntimeError):
        torch.load(file, weights_only=False)
    assert folder.exists()


def half(file):
    save(file)
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("write, words", [
    (lambda file: None, "cannot be read.*check the path"),
    (lambda file: file.mkdir(), "cannot be read"),
    (half, "cut short"),
    (lambda file: file.write_text(""), "cut short, or another kind of file"),
    (lambda file: file.write_text("these are not weights\n" * 100), "another kind of file"),
    (lambda file: file.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(500)), "another kind of file"),
    (lambda file: torch.save([1, 2, 3], file), "holds a list"),
    (lambda file: torch.save(torch.zeros(3), file), "holds a Tensor"),
], ids=["missing", "folder", "half", "empty", "text", "png", "list", "tensor"])
def test_a_file_that_is_no_checkpoint_is_called_what_it_is(tmp_path, write, words):
    file = tmp_path / "last.pt"
    write(file)
    with pytest.raises(CheckpointError, match=f"last.pt: .*{words}"):
        checkpoints.read(file)


TINY = {"num_classes": 3, "backbone": "tiny"}


@pytest.mark.parametrize("content", [
    {},
    {"model": 3},
    {"epoch": 7, "state_dict": {"conv1.weight": torch.zeros(1)}},
    {0: torch.zeros(1)},
    {"model": {"stem.0.weight": [1, 2]}},
    {"model": {}, "build": 3, **DESCRIPTION},
    {"build": {"detector": "fcos", **TINY}, **DESCRIPTION},
    {"model": {}, "build": {"detector": "yolo", **TINY}, **DESCRIPTION},
    {"model": {}, "build": {"detector": "fcos", **TINY, "wings": 2}, **DESCRIPTION},
    {"model": {}, "build": {"detector": "fcos", **TINY}, **DESCRIPTION},
], ids=["empty", "number", "state_dict", "numbered", "lists", "no description", "no model",
        "unknown detector", "unknown option", "no weights"])
@pytest.mark.parametrize("reader", ["load", "load_weights", "load_backbone"])
def test_a_file_of_another_program_is_refused(tmp_path, reader, content):
    """Whatever dict it holds, the reader says so in its own words."""
    file = tmp_path / "other.pt"
    torch.save(content, file)
    with pytest.raises(CheckpointError, match="other.pt"):
        if reader == "load":
            checkpoints.load(file)
        elif reader == "load_weights":
            checkpoints.load_weights(small("fcos"), file)
        else:
            checkpoints.load_backbone(models.Tiny(), file)


# ------------------------------------------------------------------------------------------------
# checkpoints of earlier versions: the names of before -> today's build
# ------------------------------------------------------------------------------------------------

QUERIES = {"backbone": "tiny", "width": 32, "layers": 1, "hidden": 32, "queries": 5,
           "dropout": 0.0, "levels": 2, "refine": True}
TOWERS = {"backbone": "tiny", "width": 16, "depth": 1, "extra": 1}
RESNET = {"backbone": "resnet18", "original": True, "width": 16, "depth": 1}
TODAY = {
    "retinanet": (
        {**TOWERS, "original": False, "scales": 1, "tower_norm": True,
         "delta_weights": (10.0, 10.0, 5.0, 5.0)},
        {**SLIM, "anchor_scales": 1, "tower_norm": True,
         "delta_weights": (10.0, 10.0, 5.0, 5.0)}),
    "retinanet without levels of its own": (
        {**TOWERS, "original": False, "extra": 0, "scales": 1},
        {**SLIM, "extra_levels": 0, "anchor_scales": 1}),
    "retinanet one-to-many": (
        {**TOWERS, "original": True, "scales": 2, "tower_norm": False,
         "delta_weights": (1.0, 1.0, 1.0, 1.0)},
        {**SLIM, "original": True, "anchor_scales": 2}),
    "fcos": (
        {**TOWERS, "original": False, "box_prior": 3.0},
        {**SLIM, "box_prior": 3.0}),
    "fcos one-to-many": (
        {**TOWERS, "original": True, "box_prior": 0.0},
        {**SLIM, "original": True}),
    "centernet": (
        {"backbone": "tiny", "original": False, "box_prior": 12.0, "deform": False,
         "widths": (16, 8), "laterals": False},
        {"backbone": "tiny", "deform": False, "neck_widths": (16, 8)}),
    "centernet with a list": (           # laterals was said of OneNet's, which always has them
        {"backbone": "tiny", "original": False, "deform": False, "widths": [16, 8],
         "laterals": True},
        {"backbone": "tiny", "deform": False, "neck_widths": [16, 8]}),
    "centernet one-to-many": (
        {"backbone": "tiny", "original": True, "box_prior": 12.0, "deform": False,
         "widths": (16, 8, 8), "laterals": True},
        {"backbone": "tiny", "original": True, "deform": False, "neck_widths": (16, 8, 8),
         "laterals": True}),
    "deformable-detr": (
        {**QUERIES, "original": False, "two_stage": False},
        QUERIES),
    # what convert.py wrote
    "retinanet torchvision": (
        {**RESNET, "resnet": "torchvision", "torchvision_grid": True, "extra_from": "p5"},
        {**RESNET, "variant": "torchvision"}),
    "fcos torchvision": (
        {**RESNET, "resnet": "torchvision", "torchvision_grid": True, "score_threshold": 0.2},
        {**RESNET, "variant": "torchvision"}),
    "fcos detectron2": (
        {**RESNET, "resnet": "msra", "score_threshold": 0.2},
        {**RESNET, "resnet": "msra", "variant": "detectron2"}),
}


@pytest.mark.parametrize("name", TODAY)
def test_a_checkpoint_of_before_is_still_the_detector_it_was(tmp_path, name):
    """Also of RetinaNet, whose model then kept the moving average that is its loss's today."""
    before, today = TODAY[name]
    of_all = {"detector": name.split()[0], "num_classes": 3}
    model = checkpoints.build(**of_all, **today).eval()
    weights = model.state_dict()
    if name.startswith("retinanet") and before["original"]:
        weights = {**weights, "positives_average": torch.tensor(77.0)}
    content = {"build": {**of_all, **before}, "model": weights, **DESCRIPTION, "step": 5}
    torch.save(content, tmp_path / "last.pt")

    again, checkpoint = checkpoints.load(tmp_path / "last.pt")
    assert type(again) is type(model) and checkpoint["step"] == 5
    ours, theirs = run(again.eval()), run(model)
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.boxes, theirs.boxes)
    found, expected = (m.detections(p.image(0), 20)["nms"]
                       for m, p in ((again, ours), (model, theirs)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("reader", ["read", "load"])
def test_two_stage_deformable_detr_is_refused_in_a_sentence(tmp_path, reader):
    build = {"detector": "deformable-detr", "num_classes": 3, **QUERIES, "two_stage": True}
    torch.save({"build": build, "model": {}, **DESCRIPTION}, tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match="two.pt: two-stage Deformable DETR") as refused:
        getattr(checkpoints, reader)(tmp_path / "two.pt")
    assert "\n" not in str(refused.value)


def test_what_a_checkpoint_describes_is_what_the_constructors_know():
    """Every detector's options, and `build`'s own, by today's names; no name means two things."""
    own = {"detector", "num_classes", "backbone", "original", "variant", "norm", "freeze", "resnet"}
    for detector in checkpoints.DETECTORS.values():
        options = set(inspect.signature(detector).parameters) - {"backbone", "num_classes"}
        assert not options & own and not options & set(checkpoints.RENAMED)


# ------------------------------------------------------------------------------------------------
# weights for a new run
# ------------------------------------------------------------------------------------------------

def test_weights_of_another_detector_fill_what_fits(tmp_path):
    """RetinaNet from FCOS: backbone and neck fit;
    its deltas get nothing, distances are left over, scores differ.
    """
    file = tmp_path / "fcos.pt"
    fcos = save(file)
    model = checkpoints.build("retinanet", 3, **SLIM)
    missing, left_over, shapes = checkpoints.load_weights(model, file)
    assert missing == ["delta.weight", "delta.bias"]
    assert shapes == ["score.weight", "score.bias"]
    parts = {name.split(".")[0] for name in left_over}
    assert parts == {"class_tower", "box_tower", "ltrb", "scale"}
    for name in ("backbone.stem.0.weight", "neck.output.0.bias", "class_tower.0.weight"):
        assert torch.equal(model.state_dict()[name], fcos.state_dict()[name])


def test_weights_of_other_classes_fill_all_but_the_scores(tmp_path):
    save(tmp_path / "coco.pt", num_classes=80)
    model = checkpoints.build("fcos", 3, **SLIM)
    answer = checkpoints.load_weights(model, tmp_path / "coco.pt")
    assert answer == ([], [], ["score.weight", "score.bias"])


def test_parts_that_are_spared_start_anew(tmp_path):
    fcos, model = save(tmp_path / "last.pt"), checkpoints.build("fcos", 3, **SLIM)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spared = ("class_tower", "score")
    missing, left_over, shapes = checkpoints.load_weights(model, tmp_path / "last.pt", spared)
    assert {name.split(".")[0] for name in missing} == set(spared)
    assert left_over == shapes == []
    for name, value in model.state_dict().items():
        source = before if name in missing else fcos.state_dict()
        assert torch.equal(value, source[name]), name
    assert not torch.equal(model.score.weight, fcos.score.weight)


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_a_torchvision_resnet_becomes_the_backbone(tmp_path, norm):
    """From its state dict: the last map is what torchvision's own network
    averages and classifies.
    """
    reference = torchvision.models.resnet18(weights=None).eval()
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for x in (module.weight, module.bias, module.running_mean, module.running_var):
                x.data.uniform_(0.5, 1.5)
    torch.save(reference.state_dict(), tmp_path / "resnet18.pth")
    backbone = models.ResNet("resnet18", norm).eval()
    checkpoints.load_backbone(backbone, tmp_path / "resnet18.pth")
    images = torch.randn(2, 3, 64, 64)
    answer = reference.fc(backbone(images)[-1].mean((2, 3)))
    torch.testing.assert_close(answer, reference(images), atol=1e-4, rtol=1e-4)


def test_imagenet_is_torchvisions_first_version(monkeypatch):
    """V1, from which the published recipes start; where there is no network, a sentence says so."""
    asked = []

    def fetch(url, *options, **more):
        asked.append(url)
        if len(asked) > 1:
            raise OSError("no route")
        return {"fc.bias": torch.zeros(1)}

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    with torch.device("meta"):
        backbone = models.ResNet("resnet50")
    assert checkpoints.imagenet(backbone).keys() == {"fc.bias"}
    assert asked == ["https://download.pytorch.org/models/resnet50-0676ba61.pth"]
    with pytest.raises(CheckpointError, match="cannot be downloaded .no route.; fetch .*resnet50"):
        checkpoints.imagenet(backbone)


def test_a_trained_detector_lends_its_backbone(tmp_path):
    """From train.py's last.pt, head and neck left aside."""
    fcos, backbone = save(tmp_path / "last.pt"), models.Tiny()
    checkpoints.load_backbone(backbone, tmp_path / "last.pt")
    trained = fcos.backbone.state_dict()
    assert all(torch.equal(x, trained[name]) for name, x in backbone.state_dict().items())


def test_the_wrong_backbone_is_refused(tmp_path):
    """ResNet34 weights for a ResNet18, a ResNet's for the tiny one, and the other way round:
    nothing is loaded.
    """
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), tmp_path / "resnet34.pth")
    save(tmp_path / "last.pt")
    for file, backbone in [("resnet34.pth", models.ResNet("resnet18")),
                           ("resnet34.pth", models.Tiny()),
                           ("last.pt", models.ResNet("resnet18"))]:
        before = {name: value.clone() for name, value in backbone.state_dict().items()}
        with pytest.raises(CheckpointError, match=f"{file}: not the weights of this backbone"):
            checkpoints.load_backbone(backbone, tmp_path / file)
        assert all(torch.equal(x, before[name]) for name, x in backbone.state_dict().items())

    with pytest.raises(CheckpointError, match="imagenet: there are none for the tiny backbone"):
        checkpoints.load_backbone(models.Tiny(), "imagenet")


def test_a_resnet_of_another_kind_is_refused(tmp_path):
    """MSRA's has its strides elsewhere, so that its weights would load and mean something else."""
    weights = {"resnet": "msra", "model": models.ResNet("resnet18").state_dict(prefix="backbone.")}
    torch.save(weights, tmp_path / "msra.pt")
    with pytest.raises(CheckpointError, match="msra.pt: .*--resnet msra"):
        checkpoints.load_backbone(models.ResNet("resnet18"), tmp_path / "msra.pt")
    checkpoints.load_backbone(models.ResNet("resnet18", stride_in_1x1=True), tmp_path / "msra.pt")
    with pytest.raises(CheckpointError, match="imagenet: those are torchvision's"):
        checkpoints.load_backbone(models.ResNet("resnet18", stride_in_1x1=True), "imagenet")
