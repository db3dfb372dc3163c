"""convert.py beyond test_parity.py (which converts every published layout): files, refusals, folding, evaluation."""
import argparse
import json
import os
import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import deform_conv2d

import convert
import evaluate
import models
from test_parity import reference, value


@pytest.fixture(scope="module")
def onenet_r18():
    """Named tensors of OneNet's CenterNet with a ResNet-18, plain convolutions."""
    shapes = reference()["onenet_centernet_r18_nodcn"]["shapes"]
    return {key: value(key, shape, shapes) for key, shape in shapes.items()}


@pytest.fixture(scope="module")
def detectron2():
    """Named tensors of detectron2's RetinaNet."""
    shapes = reference()["d2_retinanet_r50"]["shapes"]
    return {key: value(key, shape, shapes) for key, shape in shapes.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_checkpoint_as_its_training_code_saved_it_needs_no_flag_in_evaluation(onenet_r18, tmp_path, command):
    """Published file -> convert.py -> evaluate.py --data coco: detector, classes, size and pixels travel inside."""
    torch.save({"model": onenet_r18, "optimizer": {"state": {}}, "iteration": 269_999}, tmp_path / "model_final.pth")
    code, out, err = command(convert, tmp_path / "model_final.pth", "--out", tmp_path / "ours.pt")
    assert code == 0 and "OneNet CenterNet" in out and not err
    coco = tmp_path / "coco"
    (coco / "annotations").mkdir(parents=True)
    (coco / "val2017").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(coco / "val2017" / "1.jpg")
    categories = [{"id": i, "name": name} for i, name in zip(convert.COCO_IDS, convert.COCO_NAMES)]
    (coco / "annotations" / "instances_val2017.json").write_text(json.dumps({
        "images": [{"id": 1, "file_name": "1.jpg", "height": 60, "width": 90}], "categories": categories,
        "annotations": [{"id": 1, "image_id": 1, "category_id": 90, "bbox": [5, 5, 40, 40], "area": 1600, "iscrowd": 0}]}))
    code, out, err = command(evaluate, "--weights", tmp_path / "ours.pt", "--data", "coco", "--data-dir", coco, "--device", "cpu",
                             "--out", tmp_path / "scores")
    assert code == 0 and "AP(+NMS)" in out, err
    found = json.loads((tmp_path / "scores" / "detections.json").read_text())
    assert 90 <= len(found) <= 100 and {d["category_id"] for d in found} <= set(convert.COCO_IDS)


def test_crowdhumans_one_class_brings_its_test_size():
    """OneNet tests at 800 / 1400; COCO's classifiers cut to their first class stand for the released files."""
    for name, layer in (("onenet_fcos_r50", "head.cls_score"), ("onenet_centernet_r18_nodcn", "head.cls_score")):
        shapes = dict(reference()[name]["shapes"])
        for key in shapes:
            if key.startswith(layer):
                shapes[key] = (1, *shapes[key][1:])
        layout, checkpoint = convert.convert({key: value(key, shape, shapes) for key, shape in shapes.items()})
        assert checkpoint["class_names"] == ["person"] and checkpoint["args"]["max_dets"] == 500
        assert checkpoint["test_transform"] == ({"shortest": [800], "longest": 1400} if "FCOS" in layout else {"shortest": [512], "longest": 853})


def test_cocos_classes_are_ranks_of_their_ids():
    assert len(convert.COCO_IDS) == len(convert.COCO_NAMES) == 80
    known = dict(zip(convert.COCO_IDS, convert.COCO_NAMES))
    assert (known[1], known[13], known[25], known[44], known[67], known[90]) == (
        "person", "stop sign", "giraffe", "bottle", "dining table", "toothbrush")


def test_detectron2s_pickle_of_arrays_gives_the_same_weights(detectron2, tmp_path):
    arrays = {k: v.numpy() for k, v in detectron2.items()}
    for protocol in (2, 4):
        (tmp_path / "zoo.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}, protocol))
        assert same(convert.read(tmp_path / "zoo.pkl"), detectron2)
    _, checkpoint = convert.convert(convert.read(tmp_path / "zoo.pkl"))
    model = models.from_checkpoint(checkpoint, "zoo.pkl")
    assert model.pixels == "bgr" and model.backbone.body.layer2[0].conv1.stride == (2, 2)          # MSRA's ResNet
    assert model.backbone.body.layer1[0].conv1.stride == model.backbone.body.layer2[0].conv2.stride == (1, 1)


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


def test_keys_that_are_missing_left_over_or_of_another_shape_are_all_listed(detectron2):
    weights = dict(detectron2)
    del weights["head.bbox_subnet.4.bias"], weights["backbone.fpn_lateral4.weight"]
    weights["head.extra.weight"] = torch.zeros(3)
    weights["backbone.fpn_output3.bias"] = torch.zeros(7)
    with pytest.raises(models.CheckpointError) as error:
        convert.convert(weights)
    for words in ("4 entries", "missing box_tower.4.bias", "missing neck.lateral.1.weight", "left over head.extra.weight", "neck.output.0.bias is (7,), not (256,)"):
        assert words in str(error.value)


@pytest.mark.parametrize("content, words", [({"model": {"a.weight": torch.zeros(2)}}, "none of the published layouts"), ([1, 2], "holds a list"), (None, "check the path")])
def test_other_files_are_refused_in_one_sentence(tmp_path, command, content, words):
    if content is not None:
        torch.save(content, tmp_path / "x.pth")
    code, _, err = command(convert, tmp_path / "x.pth", "--out", tmp_path / "out.pt")
    assert code == 2 and err.count("\n") == 1 and words in err and not (tmp_path / "out.pt").exists()


def test_what_is_there_is_not_overwritten(onenet_r18, tmp_path, command):
    torch.save(onenet_r18, tmp_path / "in.pth")
    (tmp_path / "out.pt").write_text("mine")
    code, _, err = command(convert, tmp_path / "in.pth", "--out", tmp_path / "out.pt")
    assert code == 2 and "exists" in err and (tmp_path / "out.pt").read_text() == "mine"


def centernet_names(own):
    """CenterNet's own names for our original CenterNet's: written down from its modules, not from convert.py's rules."""
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


def test_centernets_own_file_and_the_bias_of_its_deformable_convolutions():
    """Batch norm's mean takes the bias in: the first step up gives what convolution + bias + norm give."""
    torch.manual_seed(1)
    source = models.build("centernet", 80, "resnet18", original=True, norm="batch", freeze=0, pixels="bgr-unit").eval()
    for m in source.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    own = {k: v for k, v in source.state_dict().items()}
    names = centernet_names(own)
    published = {"module." + names[k]: v.clone() for k, v in own.items()}
    layout, checkpoint = convert.convert({k.removeprefix("module."): v for k, v in published.items()})
    assert layout == "CenterNet" and same(checkpoint["model"], own)
    bias = torch.randn(256)
    published["module.deconv_layers.0.bias"] = bias
    model = models.from_checkpoint(convert.convert({k.removeprefix("module."): v for k, v in published.items()})[1], "ctdet.pth").eval()
    assert model.pixels == "bgr-unit" and model.original
    x, step = torch.randn(1, 512, 4, 5), source.neck.steps[0]
    where = step.conv.offset(x)
    y = deform_conv2d(x, where[:, :18].contiguous(), step.conv.weight, bias, padding=1, mask=where[:, 18:].sigmoid())
    expected = step.up_norm(step.up(step.conv_norm(y).relu())).relu()
    assert (model.neck.steps[0](x) - expected).abs().max() < 1e-4


def test_torchvisions_older_names_of_retinanets_towers():
    """Before torchvision 0.13 convolution n of a tower was conv.2n, as in its released RetinaNet."""
    shapes = reference()["tv_retinanet_r50"]["shapes"]
    new = {key: value(key, shape, shapes) for key, shape in shapes.items()}
    old = {re.sub(r"_head\.conv\.(\d)\.0\.", lambda m: f"_head.conv.{2 * int(m[1])}.", key): v for key, v in new.items()}
    old = {re.sub(r"(inner|layer)_blocks\.(\d)\.0\.", r"\1_blocks.\2.", key): v for key, v in old.items()}
    assert old.keys() != new.keys()
    assert same(convert.convert(old)[1]["model"], convert.convert(new)[1]["model"])


def caffe_names(key):
    """The name detectron2's R-50.pkl has for a torchvision ResNet's tensor, as its loading logs list them."""
    key = key.replace("weight", "gamma") if "bn" in key or "downsample.1" in key else key.replace("weight", "w")
    key = key.replace("bias", "beta")
    if not key.startswith("layer"):
        return {"conv1.w": "conv1_w"}.get(key, key.replace("bn1.", "res_conv1_bn_"))
    layer, block, rest = key[5:].split(".", 2)
    for old, new in (("downsample.0.", "branch1_"), ("downsample.1.", "branch1_bn_"), *((f"conv{n}.", f"branch2{c}_") for n, c in ((1, "a"), (2, "b"), (3, "c"))),
                     *((f"bn{n}.", f"branch2{c}_bn_") for n, c in ((1, "a"), (2, "b"), (3, "c")))):
        if rest.startswith(old):
            return f"res{int(layer) + 1}_{block}_{new}{rest[len(old):]}"


def test_imagenet_weights_of_both_kinds_become_backbones(detectron2, tmp_path, command):
    """MSRA's want --resnet msra: loading them, or torchvision's into an MSRA network, is refused by the flag's name."""
    torch.manual_seed(2)
    source = {k: torch.rand_like(v) for k, v in models.ResNet("resnet50").body.state_dict().items()}
    arrays = {caffe_names(k): v.numpy() for k, v in source.items()}
    assert {"conv1_w", "res_conv1_bn_gamma", "res2_0_branch1_bn_running_var", "res4_5_branch2c_w"} <= arrays.keys()
    arrays |= {"conv1_b": np.zeros(64), "fc1000_w": np.zeros((1000, 2048)), "fc1000_b": np.zeros(1000)}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(arrays))
    code, out, err = command(convert, tmp_path / "R-50.pkl", "--out", tmp_path / "msra.pt")
    assert code == 0 and "MSRA" in out, err
    right = models.build("fcos", 3, "resnet50", resnet="msra")
    models.load_backbone(right.backbone, tmp_path / "msra.pt")
    assert same(right.backbone.body.state_dict(), source) and right.pixels == "bgr"
    with pytest.raises(models.CheckpointError, match="--resnet msra"):
        models.load_backbone(models.build("fcos", 3, "resnet50").backbone, tmp_path / "msra.pt")
    with pytest.raises(models.CheckpointError, match="--resnet msra"):
        models.load_backbone(right.backbone, "imagenet")

    detectron = {k.removeprefix("backbone.bottom_up."): v for k, v in detectron2.items() if "bottom_up" in k} | {"stem.fc.weight": torch.zeros(1000, 2048), "stem.fc.bias": torch.zeros(1000)}
    layout, checkpoint = convert.convert(detectron)                  # detectron2's conversion of torchvision's weights
    assert checkpoint["resnet"] == "torchvision"
    assert torch.equal(checkpoint["model"]["backbone.body.layer2.0.downsample.0.weight"], detectron["res3.0.shortcut.weight"])

    layout, checkpoint = convert.convert({**source, "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)})
    torch.save(checkpoint, tmp_path / "tv.pt")
    model = models.build("fcos", 3, "resnet50")
    models.load_backbone(model.backbone, tmp_path / "tv.pt")
    assert layout == "torchvision ResNet" and same(model.backbone.body.state_dict(), source)


def test_a_dilated_detr_is_refused_where_its_file_says_so(tmp_path, command):
    torch.save({"model": {"query_embed.weight": torch.zeros(1)}, "args": argparse.Namespace(dilation=True)}, tmp_path / "dc5.pth")
    code, _, err = command(convert, tmp_path / "dc5.pth", "--out", tmp_path / "out.pt")
    assert code == 2 and "DC5" in err and err.count("\n") == 1
