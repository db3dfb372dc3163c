"""convert.py beyond test_parity.py, which converts the layouts that its reference holds.

AdelaiDet's and CenterNet's layouts, files, refusals, folding, evaluation, and torch.export.
"""
import argparse
import fractions
import json
import os
import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import deform_conv2d

import checkpoints
import convert
import data
import evaluate
import models
from checkpoints import CheckpointError
from test_parity import loaded, reference, value


def published_weights(name):
    """Named tensors of a published model, as its authors' code names and shapes them."""
    shapes, aliases = reference()[name]["shapes"], reference()[name].get("aliases", {})
    return {key: value(aliases.get(key, key), shape, shapes) for key, shape in shapes.items()}


def keys_only(name):
    """Its names, for what is refused before any shape is looked at."""
    return {key: torch.zeros(1) for key in reference()[name]["shapes"]}


@pytest.fixture(scope="module")
def onenet_r18():
    """Named tensors of OneNet's CenterNet with a ResNet-18, plain convolutions."""
    return published_weights("onenet_centernet_r18_nodcn")


@pytest.fixture(scope="module")
def detectron2():
    """Named tensors of detectron2's RetinaNet."""
    return published_weights("d2_retinanet_r50")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------------------
# from file to figures
# ------------------------------------------------------------------------------------------------

def coco_of_one_picture(folder):
    """COCO's files with one picture and one toothbrush."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "val2017").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "val2017" / "1.jpg")
    categories = [{"id": i, "name": name} for i, name in zip(convert.COCO_IDS, convert.COCO_NAMES)]
    toothbrush = {"id": 1, "image_id": 1, "category_id": 90, "bbox": [5, 5, 40, 40], "area": 1600,
                  "iscrowd": 0}
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps({
        "images": [{"id": 1, "file_name": "1.jpg", "height": 60, "width": 90}],
        "categories": categories, "annotations": [toothbrush]}))
    return folder


def test_a_checkpoint_as_its_training_code_saved_it_needs_no_flag_in_evaluation(
        onenet_r18, tmp_path, command, monkeypatch):
    """Published file -> convert.py -> evaluate.py --data coco:
    detector, classes, size and pixels travel inside.
    """
    seen, features = [], models.Detector.features

    def watched(self, images, mask, **options):
        seen.append((self.pixels, *images.shape))
        return features(self, images, mask, **options)

    monkeypatch.setattr(models.Detector, "features", watched)
    torch.save({"model": onenet_r18, "optimizer": {"state": {}}, "iteration": 269_999},
               tmp_path / "model_final.pth")
    code, out, err = command(convert, tmp_path / "model_final.pth", "--out", tmp_path / "ours.pt")
    assert code == 0 and "OneNet CenterNet" in out and not err

    coco = coco_of_one_picture(tmp_path / "coco")
    code, out, err = command(evaluate, "--weights", tmp_path / "ours.pt", "--data", "coco",
                             "--data-dir", coco, "--device", "cpu", "--out", tmp_path / "scores")
    assert code == 0 and "AP(+NMS)" in out, err
    found = json.loads((tmp_path / "scores" / "detections.json").read_text())
    assert 90 <= len(found) <= 100
    assert {d["category_id"] for d in found} <= set(convert.COCO_IDS)
    # the picture's 60 rows become 512, OneNet CenterNet's shorter side
    assert seen == [("rgb", 1, 3, 512, 768)]


def with_outputs(weights, classifier, number):
    """The same with a classifier cut to its first outputs."""
    return {key: w[:number] if key.startswith(classifier) else w for key, w in weights.items()}


# shortest and longest side in evaluation (none: as the picture is), whether the longer one is
# rounded down, and the ResNet and the pixels where they are not torchvision's
OWN_SIZE = [], 10 ** 9, False
COCO, DETRS = ([800], 1333, False), ([800], 1333, True)
FACTS = {
    "OneNet CenterNet": ([512], 853, False, None, None),
    "OneNet FCOS": (*COCO, None, None),
    "OneNet RetinaNet": (*COCO, None, None),
    "AdelaiDet FCOS": (*COCO, "msra", None),
    "detectron2 FCOS": (*COCO, "msra", None),
    "detectron2 RetinaNet": (*COCO, "msra", None),
    "torchvision FCOS": (*COCO, None, None),
    "torchvision RetinaNet": (*COCO, None, None),
    "CenterNet": (*OWN_SIZE, None, "bgr-unit"),
    "CenterNet-better": (*OWN_SIZE, None, None),
    "Sparse R-CNN": (*COCO, None, None),
    "Deformable DETR": (*DETRS, None, None),
    "DETR": (*DETRS, None, None),
}


def test_every_detector_is_evaluated_as_its_authors_do():
    """At their size, rounded their way, on the pixels that their backbone knows."""
    found = {}
    for name, _, _, build, given in convert.LAYOUTS:
        if "detector" in build:
            size = data.Transform(**given)
            found[name] = (size.shortest, size.longest, size.round_down, build.get("resnet"),
                           build.get("pixels"))
    assert found == FACTS


@pytest.mark.parametrize("name, classifier, shortest, longest", [
    ("onenet_fcos_r50", "head.cls_score", [800], 1400),
    ("onenet_centernet_r18_nodcn", "head.cls_score", [512], 853),
    ("sparse_rcnn_r50", "class_logits", [800], 1500),
])
def test_crowdhumans_one_class_brings_its_test_size(name, classifier, shortest, longest):
    """COCO's classifiers cut to their first class stand for the released files: shapes alone."""
    with torch.device("meta"):
        weights = {key: torch.empty([1, *shape[1:]] if classifier in key else list(shape))
                   for key, shape in reference()[name]["shapes"].items()}
        _, checkpoint = convert.convert(weights)
    assert checkpoint["class_names"] == ["person"] and checkpoint["args"]["max_dets"] == 500
    assert checkpoint["test_transform"] == {"shortest": shortest, "longest": longest}


def test_detrs_unused_ids_stay_behind_the_classes():
    """Rows of the published classifiers by COCO's id: 80, then 0 and the ten gaps, "no object"."""
    gaps = [0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83]
    for name, key, theirs in [("detr_r50", "score.weight", "class_embed.weight"),
                              ("deformable_detr_r50", "score.0.weight", "class_embed.0.weight")]:
        weights = published_weights(name)
        _, checkpoint = convert.convert(weights)
        build = checkpoint["build"]
        rows = checkpoint["model"][key]
        assert (build["num_classes"], build["unused_ids"]) == (80, 11)
        assert torch.equal(rows[[0, 11, 79]], weights[theirs][[1, 13, 90]])
        assert torch.equal(rows[80:91], weights[theirs][gaps])
        assert torch.equal(rows[91:], weights[theirs][91:])


@pytest.mark.parametrize("name, classifier, outputs", [
    ("onenet_centernet_r18_nodcn", "head.cls_score", 3),
    ("d2_retinanet_r50", "head.cls_score", 27),         # nine anchors
    ("detr_r50", "class_embed", 4),                     # and "no object"
])
def test_any_number_of_classes_is_converted(name, classifier, outputs):
    weights = with_outputs(published_weights(name), classifier, outputs)
    _, checkpoint = convert.convert(weights)
    assert checkpoint["class_names"] == ["class 1", "class 2", "class 3"]
    assert checkpoint["category_ids"] == [1, 2, 3]
    assert checkpoint["args"]["data"] == "custom" and checkpoint["args"]["max_dets"] == 100
    assert torch.equal(loaded(checkpoint).state_dict()["score.bias"], weights[f"{classifier}.bias"])


def test_names_of_classes_come_from_a_file(onenet_r18, tmp_path, command):
    """Also where their number is CrowdHuman's: one class is not a person then."""
    torch.save(with_outputs(onenet_r18, "head.cls_score", 1), tmp_path / "in.pth")
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfraccoon \r\n\r\n")
    code, _, err = command(convert, tmp_path / "in.pth", "--out", tmp_path / "ours.pt",
                           "--classes", tmp_path / "names.txt")
    checkpoint = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert code == 0 and not err and checkpoint["class_names"] == ["raccoon"]
    assert checkpoint["args"]["data"] == "custom"
    assert checkpoint["test_transform"] == {"shortest": [512], "longest": 853}


@pytest.mark.parametrize("names, words", [
    (b"cat\ndog", "with 1 classes, but --classes names 2"),
    (b"cat\ncat", "names cat twice"),
    (b"cat\xff", "UTF-8"),
    (None, "check the path"),
])
def test_names_that_do_not_fit_are_refused(tmp_path, command, names, words):
    """A classifier of one number knows one class."""
    torch.save(keys_only("onenet_centernet_r18_nodcn"), tmp_path / "in.pth")
    if names:
        (tmp_path / "names.txt").write_bytes(names)
    code, _, err = command(convert, tmp_path / "in.pth", "--out", tmp_path / "ours.pt",
                           "--classes", tmp_path / "names.txt")
    assert code == 2 and err.count("\n") == 1 and words in err
    assert not (tmp_path / "ours.pt").exists()


def test_cocos_91_outputs_are_91_classes_where_they_are_named():
    names = [f"kind {n}" for n in range(91)]
    _, checkpoint = convert.convert(published_weights("detr_r50"), names=names)
    assert checkpoint["class_names"] == names and "unused_ids" not in checkpoint["build"]


WEIGHTS = {"backbone.conv1.weight": torch.ones(2, 3), "head.cls_conv_module.0.bias": torch.ones(4)}
AVERAGE = {key: w / 2 for key, w in WEIGHTS.items()}


def behind(prefix, weights):
    return {prefix + key: w for key, w in weights.items()}


@pytest.mark.parametrize("content", [
    WEIGHTS,
    behind("module.", WEIGHTS),
    behind("_orig_mod.", WEIGHTS),
    behind("module._orig_mod.model.module.", WEIGHTS),
    {key.replace(".", "._orig_mod.", 1): w for key, w in WEIGHTS.items()},      # parts compiled
    {"state_dict": behind("model.", WEIGHTS), "epoch": 3},                      # Lightning's
    {"model": {"state_dict": WEIGHTS}},
    {"state_dict": {"model": WEIGHTS}, "best": torch.ones(1)},
    {"model": {"name": "fcos", "depth": 50}, "state_dict": WEIGHTS},
    {"model": None, "ema": WEIGHTS},
    {"ema": {"module": behind("module.", WEIGHTS), "decay": 0.999}, "optimizer": {"state": {}}},
    {"model_ema": WEIGHTS},
    {"ema_state_dict": WEIGHTS},
    {"state_dict_ema": WEIGHTS},
    {"ema_model": {"model": WEIGHTS}},
    {"model_ema_state_dict": WEIGHTS, "optimizer": {"model": AVERAGE}},
    {"ema": AVERAGE, "model": WEIGHTS},                                         # not the average
])
def test_weights_are_found_wherever_a_training_code_puts_them(content, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    assert same(convert.read(tmp_path / "x.pth"), WEIGHTS)


def test_a_file_that_holds_itself_ends(tmp_path):
    content = {"ema": {}}
    content["model"] = content["ema"]["module"] = content
    torch.save(content, tmp_path / "x.pth")
    assert convert.read(tmp_path / "x.pth") == {}


def test_cocos_classes_are_ranks_of_their_ids():
    assert len(convert.COCO_IDS) == len(convert.COCO_NAMES) == 80
    known = dict(zip(convert.COCO_IDS, convert.COCO_NAMES))
    assert [known[i] for i in (1, 13, 25, 44, 67, 90)] == [
        "person", "stop sign", "giraffe", "bottle", "dining table", "toothbrush"]


def test_detectron2s_pickle_of_arrays_gives_the_same_weights(detectron2, tmp_path):
    arrays = {k: v.numpy() for k, v in detectron2.items()}
    content = {"model": arrays, "__author__": "Detectron2 Model Zoo"}
    for protocol in (2, 4):
        (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(content, protocol))
        assert same(convert.read(tmp_path / "zoo.pkl"), detectron2)

    # on MSRA's ResNet
    _, checkpoint = convert.convert(convert.read(tmp_path / "zoo.pkl"))
    model = loaded(checkpoint)
    first, second = model.backbone.body.layer1[0], model.backbone.body.layer2[0]
    assert model.pixels == "bgr" and second.conv1.stride == (2, 2)
    assert first.conv1.stride == second.conv2.stride == (1, 1)


# ------------------------------------------------------------------------------------------------
# refusals
# ------------------------------------------------------------------------------------------------

class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("name", ["bad.pkl", "bad.pth"])
def test_a_pickle_with_code_in_it_is_refused_and_does_not_run(tmp_path, monkeypatch, command, name):
    monkeypatch.chdir(tmp_path)
    if name.endswith("pkl"):
        (tmp_path / name).write_bytes(pickle.dumps({"model": Harmful()}))
    else:
        torch.save({"model": Harmful()}, name)
    code, _, err = command(convert, name, "--out", "out.pt")
    assert code == 2 and err.count("\n") == 1 and "refused" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


@pytest.mark.parametrize("content, named", [
    ({"model": WEIGHTS, "best": np.float64(40.1)}, "multiarray.scalar"),
    ({"model": WEIGHTS, "lr": fractions.Fraction(1, 2)}, "fractions.Fraction"),
    ({"model": torch.nn.Linear(1, 1)}, "torch.nn.modules.linear.Linear"),
])
def test_what_is_no_tensor_is_refused_by_name(tmp_path, command, content, named):
    torch.save(content, tmp_path / "x.pth")
    code, _, err = command(convert, tmp_path / "x.pth", "--out", tmp_path / "out.pt")
    assert code == 2 and err.count("\n") == 1 and "refused" in err and named in err


def test_an_array_of_words_is_refused_by_name(tmp_path, command):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": np.zeros(2), "b": np.array(["x"])}, 2))
    code, _, err = command(convert, tmp_path / "x.pkl", "--out", tmp_path / "out.pt")
    assert code == 2 and err.count("\n") == 1 and "entry b is no tensor" in err


def test_two_models_in_one_dict_are_refused(tmp_path, command):
    torch.save({**WEIGHTS, **behind("module.", AVERAGE)}, tmp_path / "x.pth")
    code, _, err = command(convert, tmp_path / "x.pth", "--out", tmp_path / "out.pt")
    assert code == 2 and err.count("\n") == 1
    assert "backbone.conv1.weight twice, once as module.backbone.conv1.weight" in err


@pytest.mark.parametrize("shape", [(), (0,), (5, 0), (9 * 91 + 1,)])
def test_a_classifier_of_any_shape_ends_in_a_sentence(tmp_path, command, shape):
    weights = {k: torch.zeros(shape) if "cls_score" in k else w
               for k, w in keys_only("d2_retinanet_r50").items()}
    torch.save(weights, tmp_path / "x.pth")
    code, _, err = command(convert, tmp_path / "x.pth", "--out", tmp_path / "out.pt")
    assert code == 2 and err.count("\n") == 1 and "x.pth: " in err


def test_keys_that_are_missing_left_over_or_of_another_shape_are_all_listed(detectron2):
    weights = dict(detectron2)
    del weights["head.bbox_subnet.4.bias"], weights["backbone.fpn_lateral4.weight"]
    weights["head.extra.weight"] = torch.zeros(3)
    weights["backbone.fpn_output3.bias"] = torch.zeros(7)
    with pytest.raises(CheckpointError) as error:
        convert.convert(weights)
    for words in ("4 entries", "missing box_tower.4.bias", "missing neck.lateral.1.weight",
                  "left over head.extra.weight", "neck.output.0.bias is (7,), not (256,)"):
        assert words in str(error.value)


@pytest.mark.parametrize("key", ["head.regression_head.bbox_reg.bias",
                                 "head.classification_head.cls_logits.bias"])
def test_a_torchvision_retinanet_that_lacks_a_bias_is_told_so(key):
    """Its anchors are reordered: not before it is known that all are there."""
    weights = published_weights("tv_retinanet_r50")
    del weights[key]
    ours = {"bbox_reg": "delta.bias", "cls_logits": "score.bias"}[key.split(".")[-2]]
    with pytest.raises(CheckpointError, match=f"1 entries do not fit: missing {ours}"):
        convert.convert(weights)


@pytest.mark.parametrize("name, change, words", [
    ("deformable_detr_r50", lambda w: w.update({"class_embed.3.weight": torch.ones(1)}),
     "but score.3.weight is not the copy of its first layer's"),
    ("onenet_fcos_r50", lambda w: [w.pop(key) for key in list(w) if ".res4.5." in key],
     "no ResNet of 18, 34, 50 or 101 layers .third stage: 5 blocks"),
    ("onenet_fcos_r50", lambda w: [w.pop(key) for key in list(w) if "cls_score" in key],
     "OneNet FCOS: its classifier is missing"),
])
def test_a_part_that_its_authors_never_had_so_is_named(name, change, words):
    weights = keys_only(name)
    change(weights)
    with pytest.raises(CheckpointError, match=words):
        convert.convert(weights)


@pytest.mark.parametrize("content, words", [
    ({"model": {"a.weight": torch.zeros(2)}}, "none of the published layouts"),
    ([1, 2], "holds a list"),
    (None, "check the path"),
])
def test_other_files_are_refused_in_one_sentence(tmp_path, command, content, words):
    if content is not None:
        torch.save(content, tmp_path / "x.pth")
    code, _, err = command(convert, tmp_path / "x.pth", "--out", tmp_path / "out.pt")
    assert code == 2 and err.count("\n") == 1 and words in err
    assert not (tmp_path / "out.pt").exists()


def test_what_is_there_is_not_overwritten(tmp_path, command):
    torch.save(WEIGHTS, tmp_path / "in.pth")
    (tmp_path / "out.pt").write_text("mine")
    code, _, err = command(convert, tmp_path / "in.pth", "--out", tmp_path / "out.pt")
    assert code == 2 and "exists" in err and (tmp_path / "out.pt").read_text() == "mine"


def test_a_dilated_detr_is_refused_where_its_file_says_so(tmp_path, command):
    torch.save({"model": {"query_embed.weight": torch.zeros(1)},
                "args": argparse.Namespace(dilation=True)}, tmp_path / "dc5.pth")
    code, _, err = command(convert, tmp_path / "dc5.pth", "--out", tmp_path / "out.pt")
    assert code == 2 and "DC5" in err and err.count("\n") == 1


def test_a_two_stage_deformable_detr_is_refused(tmp_path, command):
    """Under the names its authors' code gives; no row of the paper uses it."""
    shapes = reference()["deformable_detr_r50_two_stage"]["shapes"]
    torch.save({"model": {key: torch.zeros(1) for key in shapes}}, tmp_path / "two_stage.pth")
    code, _, err = command(convert, tmp_path / "two_stage.pth", "--out", tmp_path / "out.pt")
    assert code == 2 and err.count("\n") == 1
    assert "two_stage.pth: two-stage Deformable DETR is not supported" in err
    assert not (tmp_path / "out.pt").exists()


# ------------------------------------------------------------------------------------------------
# other names, other forms
# ------------------------------------------------------------------------------------------------

# AdelaiDet's names of what detectron2's FCOS, which was written after it, has too
ADELAIDET = {"head.cls_subnet": "cls_tower", "head.bbox_subnet": "bbox_tower",
             "head.cls_score": "cls_logits", "head.bbox_pred": "bbox_pred",
             "head.ctrness": "ctrness"}


def test_adelaidets_own_file():
    """FCOS by its authors: the same network, and a learned factor for each level."""
    theirs, given = published_weights("d2_fcos_r50"), {}
    for n in (3, 0, 4, 2, 1):
        given[f"proposal_generator.fcos_head.scales.{n}.scale"] = torch.tensor([n + 1.0])
    for key, w in theirs.items():
        for detectron2, own in ADELAIDET.items():
            key = key.replace(detectron2, f"proposal_generator.fcos_head.{own}")
        given[key] = w
    layout, checkpoint = convert.convert(given)
    assert layout == "AdelaiDet FCOS" and "variant" not in checkpoint["build"]
    assert checkpoint["build"]["original"] and checkpoint["build"]["resnet"] == "msra"
    expected = {**convert.convert(theirs)[1]["model"], "scale": torch.arange(1.0, 6)}
    assert same(checkpoint["model"], expected)


def centernet_names(own):
    """CenterNet's own names for our original CenterNet's:
    written down from its modules, not from convert.py's rules.
    """
    modules = {"conv": 0, "conv_norm": 1, "up": 3, "up_norm": 4}
    heads = {"score": "hm", "size": "wh", "offset": "reg"}
    names = {}
    for key in own:
        part = key.split(".")
        if part[0] == "backbone":
            names[key] = ".".join(part[2:])
        elif part[0] == "neck":
            tail = ".".join(part[4:]).replace("offset", "conv_offset_mask")
            names[key] = f"deconv_layers.{6 * int(part[2]) + modules[part[3]]}.{tail}"
        else:
            names[key] = ".".join([heads[part[0]], *part[1:]])
    return names


def better_names(own):
    """CenterNet-better's names for the same."""
    steps = {"conv": "dcn", "conv_norm": "dcn_bn", "up": "up_sample", "up_norm": "up_bn"}
    heads = {"score": "cls", "size": "wh", "offset": "reg"}
    names = {}
    for key in own:
        part = key.split(".")
        if part[0] == "backbone":
            stage = {"conv1": "stage0.0", "bn1": "stage0.1"}.get(part[2])
            stage = stage or part[2].replace("layer", "stage")
            names[key] = ".".join(["backbone", stage, *part[3:]])
        elif part[0] == "neck":
            tail = ".".join(part[4:]).replace("offset", "conv_offset_mask")
            names[key] = f"upsample.deconv{int(part[2]) + 1}.{steps[part[3]]}.{tail}"
        else:
            conv = {"0": "feat_conv", "2": "out_conv"}[part[1]]
            names[key] = f"head.{heads[part[0]]}_head.{conv}.{part[2]}"
    return names


def random_centernet(**options):
    """An original CenterNet whose batch norms have seen something."""
    torch.manual_seed(1)
    model = checkpoints.build("centernet", 80, "resnet18", original=True, norm="batch", freeze=0,
                              **options).eval()
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return model


def test_centernets_own_file_and_the_bias_of_its_deformable_convolutions():
    """Batch norm's mean takes the bias in:
    the first step up gives what convolution + bias + norm give.
    """
    source = random_centernet(pixels="bgr-unit")
    own = source.state_dict()
    names = centernet_names(own)
    published = {names[k]: v.clone() for k, v in own.items()}
    layout, checkpoint = convert.convert(published)
    assert layout == "CenterNet" and same(checkpoint["model"], own)

    bias = torch.randn(256)
    model = loaded(convert.convert({**published, "deconv_layers.0.bias": bias})[1]).eval()
    assert model.pixels == "bgr-unit" and isinstance(model, models.OriginalCenterNet)
    x, step = torch.randn(1, 512, 4, 5), source.neck.steps[0]
    where = step.conv.offset(x)
    y = deform_conv2d(x, where[:, :18].contiguous(), step.conv.weight, bias, padding=1,
                      mask=where[:, 18:].sigmoid())
    expected = step.up_norm(step.up(step.conv_norm(y).relu())).relu()
    assert (model.neck.steps[0](x) - expected).abs().max() < 1e-4


def test_centernet_betters_file():
    own = random_centernet().state_dict()
    names = better_names(own)
    layout, checkpoint = convert.convert({names[k]: v for k, v in own.items()})
    assert layout == "CenterNet-better" and same(checkpoint["model"], own)


def test_torchvisions_older_names_of_retinanets_towers():
    """Before torchvision 0.13 convolution n of a tower was conv.2n, as in its released file."""
    new = published_weights("tv_retinanet_r50")
    old = {}
    for key, weight in new.items():
        key = re.sub(r"_head\.conv\.(\d)\.0\.", lambda m: f"_head.conv.{2 * int(m[1])}.", key)
        old[re.sub(r"(inner|layer)_blocks\.(\d)\.0\.", r"\1_blocks.\2.", key)] = weight
    assert old.keys() != new.keys()
    assert same(convert.convert(old)[1]["model"], convert.convert(new)[1]["model"])


# ------------------------------------------------------------------------------------------------
# backbones
# ------------------------------------------------------------------------------------------------

def caffe_names(key):
    """The name detectron2's R-50.pkl has for a torchvision ResNet's tensor,
    as its loading logs list them.
    """
    norm = "bn" in key or "downsample.1" in key
    key = key.replace("weight", "gamma" if norm else "w").replace("bias", "beta")
    if not key.startswith("layer"):
        return {"conv1.w": "conv1_w"}.get(key, key.replace("bn1.", "res_conv1_bn_"))

    layer, block, rest = key[5:].split(".", 2)
    branches = {"downsample.0.": "branch1_", "downsample.1.": "branch1_bn_"}
    for n, letter in ((1, "a"), (2, "b"), (3, "c")):
        branches[f"conv{n}."] = f"branch2{letter}_"
        branches[f"bn{n}."] = f"branch2{letter}_bn_"
    for theirs, new in branches.items():
        if rest.startswith(theirs):
            return f"res{int(layer) + 1}_{block}_{new}{rest[len(theirs):]}"


@pytest.fixture(scope="module")
def imagenet():
    """Random weights in place of a pre-trained ResNet-50's, under torchvision's names."""
    torch.manual_seed(2)
    own = models.ResNet("resnet50").body.state_dict()
    return {k: torch.rand_like(v) for k, v in own.items()}


CLASSIFIER = {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}


def test_msras_weights_want_their_flag(imagenet, tmp_path, command):
    """Loading them without --resnet msra, or torchvision's with it, is refused by its name."""
    arrays = {caffe_names(k): v.numpy() for k, v in imagenet.items()}
    assert {"conv1_w", "res_conv1_bn_gamma", "res2_0_branch1_bn_running_var",
            "res4_5_branch2c_w"} <= arrays.keys()
    arrays["conv1_b"] = np.zeros(64)
    arrays |= {"fc1000_w": np.zeros((1000, 2048)), "fc1000_b": np.zeros(1000)}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(arrays))
    code, out, err = command(convert, tmp_path / "R-50.pkl", "--out", tmp_path / "msra.pt")
    assert code == 0 and "MSRA" in out, err

    slim = {"width": 16, "depth": 1}
    right = checkpoints.build("fcos", 3, "resnet50", resnet="msra", **slim)
    checkpoints.load_backbone(right.backbone, tmp_path / "msra.pt")
    assert same(right.backbone.body.state_dict(), imagenet) and right.pixels == "bgr"
    wrong = checkpoints.build("fcos", 3, "resnet50", **slim)
    with pytest.raises(CheckpointError, match="--resnet msra"):
        checkpoints.load_backbone(wrong.backbone, tmp_path / "msra.pt")
    with pytest.raises(CheckpointError, match="--resnet msra"):
        checkpoints.load_backbone(right.backbone, "imagenet")


def test_torchvisions_weights_under_detectron2s_names(detectron2):
    bottom_up = "backbone.bottom_up."
    weights = {k.removeprefix(bottom_up): v for k, v in detectron2.items() if bottom_up in k}
    weights |= {f"stem.{k}": v for k, v in CLASSIFIER.items()}
    _, checkpoint = convert.convert(weights)
    assert checkpoint["resnet"] == "torchvision"
    assert torch.equal(checkpoint["model"]["backbone.body.layer2.0.downsample.0.weight"],
                       weights["res3.0.shortcut.weight"])


def test_torchvisions_own_weights(imagenet, tmp_path):
    layout, checkpoint = convert.convert({**imagenet, **CLASSIFIER})
    torch.save(checkpoint, tmp_path / "tv.pt")
    model = checkpoints.build("fcos", 3, "resnet50", width=16, depth=1)
    checkpoints.load_backbone(model.backbone, tmp_path / "tv.pt")
    assert layout == "torchvision ResNet"
    assert same(model.backbone.body.state_dict(), imagenet)


# ------------------------------------------------------------------------------------------------
# torch.export
# ------------------------------------------------------------------------------------------------

SIDE = 64                       # pixels
POINTS = {"width": 32, "depth": 1, "extra_levels": 0}
QUERIES = {"width": 32, "heads": 4, "hidden": 48, "queries": 12}
SMALL = {
    "retinanet": POINTS,
    "centernet": {"neck_widths": (16, 16, 16)},
    "fcos": POINTS,
    "detr": {**QUERIES, "layers": 1},
    "deformable-detr": {**QUERIES, "layers": 2, "levels": 1, "refine": True},
    # proposals of more than one level after the first stage
    "sparse-rcnn": {**QUERIES, "layers": 2, "dynamic": 8, "roi_size": 32},
}


def saved_detector(file, detector, original=False, transform=None):
    """A detector that is sure of some things, and its checkpoint in a file."""
    build = {"detector": detector, "num_classes": 3, "backbone": "tiny", "original": original,
             **SMALL[detector]}
    model = checkpoints.build(**build).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))
    for name, p in model.named_parameters():
        if name.startswith("score") and name.endswith("bias"):
            p.zero_()
    torch.save({"build": build, "model": model.state_dict(), "class_names": ["a", "b", "c"],
                "test_transform": transform or {"shortest": [SIDE], "longest": SIDE}, "args": {}},
               file)
    return model


@pytest.mark.parametrize("detector, original", [
    *((name, False) for name in SMALL), *((name, True) for name in SMALL if name in models.DENSE)])
def test_an_exported_detector_gives_what_evaluation_sees(detector, original, tmp_path, command):
    """Boxes to 1e-4 of the side; the best scores of batches of 1, 2 and 3, to 1e-4."""
    model = saved_detector(tmp_path / "last.pt", detector, original)
    code, _, err = command(convert, "--export", tmp_path / "out.pt2",
                           "--weights", tmp_path / "last.pt")
    assert code == 0 and not err
    extra = {"classes.json": ""}
    program = torch.export.load(tmp_path / "out.pt2", extra_files=extra).module()
    assert json.loads(extra["classes.json"]) == ["a", "b", "c"]

    for number in (1, 2, 3):
        images = torch.randint(0, 256, (number, 3, SIDE, SIDE), dtype=torch.uint8)
        expected = model(images, torch.zeros(number, SIDE, SIDE, dtype=torch.bool))
        boxes, scores = program(images.float())
        assert boxes.dtype == scores.dtype == torch.float32
        assert boxes.shape == expected.boxes.shape and scores.shape == (*boxes.shape[:2], 3)
        assert (boxes - expected.boxes).abs().max() < 1e-4 * SIDE
        for n in range(number):
            found, best, labels = model.detections(expected.image(n), k=1)["plain"]
            q, label = divmod(int(scores[n].argmax()), 3)
            assert abs(scores[n].max() - best[0]) < 1e-4 and label == labels[0]
            assert (boxes[n, q] - found[0]).abs().max() < 1e-4 * SIDE


def test_scores_of_outputs_that_are_no_class_are_left_out():
    """DETR's softmax goes over all five outputs: the classes, an id of no class, "no object"."""
    one = models.Prediction(torch.tensor([[[1.0, 2.0, 3.0, 2.0, 0.0]]]).log(), torch.zeros(1, 1, 4))
    options = {"unused_ids": 1, "width": 32, "heads": 4, "layers": 1, "queries": 1}
    detr = checkpoints.build("detr", 3, "tiny", **options)
    assert torch.allclose(detr.scores(one), torch.tensor([[[0.125, 0.25, 0.375]]]))
    detr = checkpoints.build("deformable-detr", 3, "tiny", **{**options, "unused_ids": 2})
    assert torch.allclose(detr.scores(one), torch.tensor([[[1 / 2, 2 / 3, 3 / 4]]]))


def test_the_size_to_export_for():
    """Given, or the only one that evaluation makes; a multiple of the detector's divisor."""
    def size(shortest, longest, given=None, divisor=32):
        return convert.export_size(data.Transform(shortest, longest), given, divisor)

    assert list(size([128], 128)) == [128, 128]
    assert list(size([800], 1333, [800, 1344])) == [800, 1344]
    assert list(size([800], 1333, [799, 1333], divisor=1)) == [799, 1333]
    for wrong in ([800, 1333], [0, 32], [-32, 32], [32, 32 * 10 ** 9]):
        with pytest.raises(CheckpointError, match="multiples of 32"):
            size([800], 1333, wrong)
    for shortest, longest in ([800], 1333), ([], 10 ** 9), ([96, 128], 128):
        with pytest.raises(CheckpointError, match="give --size HEIGHT WIDTH"):
            size(shortest, longest)


def test_export_refuses_in_one_sentence(tmp_path, command):
    saved_detector(tmp_path / "last.pt", "fcos", transform={"shortest": [64], "longest": 96})
    export = "--export", tmp_path / "out.pt2"
    weights = "--weights", tmp_path / "last.pt"
    (tmp_path / "there.pt2").write_text("mine")
    for flags, words in [((*export, *weights), "--size HEIGHT WIDTH"),
                         ((*export, "--weights", tmp_path / "no.pt"), "check the path"),
                         (("--export", tmp_path / "there.pt2", *weights), "exists already")]:
        code, _, err = command(convert, *flags)
        assert code == 2 and err.count("\n") == 1 and words in err
    for flags in [export, weights, (*export, *weights, "--classes", "names.txt"),
                  (*export, *weights, "--out", "out.pt"), ("in.pth",), ("in.pth", *export)]:
        code, _, err = command(convert, *flags)
        assert code == 2 and err.endswith("or --export OUT.pt2 --weights F (and --size)\n")
    assert not (tmp_path / "out.pt2").exists()
