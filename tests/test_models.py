"""Are the dense detectors those of the published recipes?

torchvision's own detectors and operators, and numbers from the recipes, are the judges.
"""
import collections
import inspect
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torchvision.models.detection import fcos_resnet50_fpn, retinanet_resnet50_fpn
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import batched_nms, box_iou, nms
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

import checkpoints
import models
from models import Prediction

every_detector = pytest.mark.parametrize("detector", ["retinanet", "centernet", "fcos"])
# of FCOS and RetinaNet: P3 to P7
STRIDES = (8, 16, 32, 64, 128)
every_form = pytest.mark.parametrize("original", [False, True], ids=["one-to-one", "original"])


def small(detector, original=False, backbone="tiny", num_classes=3, **options):
    """An untrained detector that is quick to run."""
    torch.manual_seed(0)
    slim = {"width": 32, "depth": 1}
    if detector == "centernet":
        slim = {"neck_widths": (16, 16, 16)}
    options = {**slim, **options}
    return checkpoints.build(detector, num_classes, backbone, original, **options).eval()


def pictures(height=64, width=96, B=2):
    return torch.randint(0, 256, (B, 3, height, width), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(1))


def run(model, images=None):
    """The prediction for images, random ones if none are given, without padding."""
    images = pictures() if images is None else images
    with torch.no_grad():
        return model(images, torch.zeros(len(images), *images.shape[2:], dtype=torch.bool))


def constant(conv, values):
    """Makes a convolution answer the same values everywhere, whatever it sees."""
    torch.nn.init.zeros_(conv.weight)
    conv.bias.data = torch.tensor(values, dtype=torch.float32)


# ------------------------------------------------------------------------------------------------
# candidates and boxes
# ------------------------------------------------------------------------------------------------

def slow_anchors(H, W, stride):
    """Rows, columns, sizes, ratios, from outer to inner;
    centred on the cell's corner, as detectron2 (offset 0).
    """
    anchors = []
    for y in range(H):
        for x in range(W):
            for size in (4 * stride * 2 ** power for power in (0, 1 / 3, 2 / 3)):
                for ratio in (0.5, 1, 2):
                    w, h = math.sqrt(size ** 2 / ratio), math.sqrt(size ** 2 / ratio) * ratio
                    x1, y1 = x * stride - w / 2, y * stride - h / 2
                    x2, y2 = x * stride + w / 2, y * stride + h / 2
                    anchors.append([x1, y1, x2, y2])
    return torch.tensor(anchors)


def test_retinanet_anchors_agree_with_a_slow_loop():
    """On every level of the prediction, in the order of the scores."""
    model = small("retinanet")
    prediction = run(model)
    assert model.strides == STRIDES
    for s in model.strides:
        expected = slow_anchors(math.ceil(64 / s), math.ceil(96 / s), s)
        torch.testing.assert_close(prediction.candidates[prediction.strides == s], expected,
                                   atol=1e-3, rtol=1e-5)


def test_the_first_anchors_of_p3():
    """Width x height for a size of 32: 45.255 x 22.627, 32 x 32, 22.627 x 45.255."""
    images = torch.zeros(1, 3, 16, 16)
    first = small("retinanet").anchors(torch.zeros(1, 1, 2, 2), 8, images)[:3]
    expected = torch.tensor([[45.255, 22.627], [32, 32], [22.627, 45.255]])
    torch.testing.assert_close(first[:, 2:] - first[:, :2], expected, atol=1e-3, rtol=0)
    assert (first[:, 2:] + first[:, :2] == 0).all()


@pytest.mark.parametrize("detector, strides", [("fcos", STRIDES), ("centernet", (4,))])
@every_form
def test_points_are_the_middles_of_cells(detector, original, strides):
    """(stride j + stride / 2, stride i + stride / 2), rows outer; as boxes without extent."""
    model = small(detector, original)
    expected = [[x, y, x, y] for s in strides
                for y in range(s // 2, 64 + s // 2, s) for x in range(s // 2, 96 + s // 2, s)]
    assert model.strides == strides
    assert run(model).candidates.tolist() == expected


# Corner, size, shift and change of the size.
boxes_and_deltas = st.tuples(*[st.floats(-500, 500)] * 2, *[st.floats(1, 500)] * 2,
                             *[st.floats(-3, 3)] * 2, *[st.floats(-4, 8)] * 2)


@given(st.lists(boxes_and_deltas, min_size=1, max_size=5))
def test_apply_deltas_is_torchvisions_box_coder(rows):
    """Weights 1, and the logarithms of width and height cut at ln(1000 / 16)."""
    corner, size, deltas = torch.tensor(rows, dtype=torch.float64).split([2, 2, 4], 1)
    anchors = torch.cat([corner, corner + size], 1)
    expected = BoxCoder((1, 1, 1, 1)).decode_single(deltas, anchors)
    torch.testing.assert_close(models.apply_deltas(anchors, deltas), expected)


@given(st.lists(boxes_and_deltas, min_size=1, max_size=5))
def test_get_deltas_is_the_inverse_of_apply_deltas(rows):
    corner, size, deltas = torch.tensor(rows, dtype=torch.float64).split([2, 2, 4], 1)
    anchors, deltas = torch.cat([corner, corner + size], 1), deltas.clamp(max=4.1)
    again = models.get_deltas(anchors, models.apply_deltas(anchors, deltas))
    torch.testing.assert_close(again, deltas)


def test_delta_weights_divide_what_the_head_says():
    model = small("retinanet", delta_weights=(10.0, 10.0, 5.0, 5.0))
    constant(model.delta, [10.0, 20, 5, 10] * 9)
    assert (run(model).raw["deltas"] == torch.tensor([1.0, 2, 1, 2])).all()


def test_a_huge_delta_gives_62_times_the_anchor():
    box = models.apply_deltas(torch.tensor([[0.0, 0, 16, 16]]), torch.tensor([[0.0, 0, 1e4, 0]]))
    assert box[0].tolist() == pytest.approx([8 - 500, 0, 8 + 500, 16], rel=1e-5)


# ------------------------------------------------------------------------------------------------
# heads: what the outputs of the last convolutions mean
# ------------------------------------------------------------------------------------------------

def test_retinanet_channels_are_anchor_then_class():
    """Channel 3 a + c is class c of anchor a; channel 4 a + d is delta d;
    anchors innermost in the prediction.
    """
    model = small("retinanet")
    constant(model.score, [float(n) for n in range(27)])
    constant(model.delta, [n / 100 for n in range(36)])
    prediction = run(model)
    assert (prediction.logits.view(2, -1, 9, 3) == torch.arange(27.0).view(9, 3)).all()
    deltas = (torch.arange(36.0) / 100).view(9, 4).repeat(len(prediction.candidates) // 9, 1)
    expected = BoxCoder((1, 1, 1, 1)).decode_single(deltas, prediction.candidates)
    torch.testing.assert_close(prediction.boxes, expected.expand(2, -1, -1))


def number_the_cells(conv, inputs, output):
    """A forward hook: answers n / 100 in the map's n-th cell, rows outer."""
    H, W = output.shape[-2:]
    return (torch.arange(H * W) / 100).view(H, W).expand_as(output)


@every_detector
@every_form
def test_all_outputs_are_in_the_order_of_the_candidates(detector, original):
    """Row by row within a level, anchors innermost: the scores,
    and everything that makes the boxes.
    """
    model = small(detector, original)
    for name in ("score", "delta", "ltrb", "centreness", "size", "offset"):
        if getattr(model, name, None):
            getattr(model, name).register_forward_hook(number_the_cells)
    prediction = run(model)

    per_cell = 9 if detector == "retinanet" else 1
    cells = [math.ceil(64 / s) * math.ceil(96 / s) for s in model.strides]
    cell = torch.cat([(torch.arange(n) / 100).repeat_interleave(per_cell) for n in cells])  # (Q,)
    assert (prediction.logits == cell[:, None]).all()
    for key in {"deltas", "centreness", "size", "offset"} & prediction.raw.keys():
        assert (prediction.raw[key].view(2, len(cell), -1) == cell[:, None]).all()
    if "heat" in prediction.raw:
        assert torch.equal(prediction.raw["heat"].flatten(2).mT, prediction.logits)

    if detector == "retinanet":
        deltas = cell[:, None].repeat(1, 4)
        expected = BoxCoder((1, 1, 1, 1)).decode_single(deltas, prediction.candidates)
        torch.testing.assert_close(prediction.boxes[0], expected)
    elif not (detector == "centernet" and original):
        unit = prediction.strides if detector == "fcos" else 1
        down = prediction.boxes[0, :, 3] - prediction.candidates[:, 3]
        torch.testing.assert_close(down, cell * unit)


@every_form
def test_fcos_predicts_distances_in_strides(original):
    """ReLU(scale of the level x output) x stride: left, top, right, bottom;
    a negative distance is 0.
    """
    model = small("fcos", original)
    constant(model.ltrb, [1, 2, 3, -4])
    model.scale.data = torch.tensor([1, 2, 1, 0.5, 1])
    prediction = run(model)
    of_stride = {8: 8, 16: 16 * 2, 32: 32, 64: 64 / 2, 128: 128}
    s = torch.tensor([of_stride[stride] for stride in prediction.strides.tolist()])
    x, y = prediction.candidates[:, 0], prediction.candidates[:, 1]
    assert torch.equal(prediction.boxes[1], torch.stack([x - s, y - 2 * s, x + 3 * s, y], 1))


def test_centernet_predicts_distances_in_pixels():
    model = small("centernet")
    constant(model.ltrb, [1, 2, 3, -4])
    prediction = run(model)
    assert (prediction.boxes - prediction.candidates == torch.tensor([-1, -2, 3, 0])).all()


def test_original_centernet_predicts_size_and_offset_in_cells():
    """Of 4 pixels; the offset counts from the cell's corner,
    which lies 2 pixels before its middle.
    """
    model = small("centernet", original=True)
    constant(model.size[-1], [3, 5])
    constant(model.offset[-1], [0.25, 0.75])
    prediction = run(model)
    expected = torch.tensor([1.0 - 6, 3 - 10, 1 + 6, 3 + 10]) - 2
    torch.testing.assert_close(prediction.boxes - prediction.candidates,
                               expected.expand_as(prediction.boxes))


def test_a_centernet_of_two_steps_has_stride_8():
    """Its points lie 8 pixels apart, and so its cells are 8 pixels wide."""
    model = small("centernet", original=True, neck_widths=(16, 16))
    constant(model.size[-1], [2, 3])
    constant(model.offset[-1], [0.5, 0.5])
    prediction = run(model)
    expected = [[x, y, x, y] for y in range(4, 64, 8) for x in range(4, 96, 8)]
    assert model.strides == (8,)
    assert prediction.raw["heat"].shape[-2:] == (8, 12) and (prediction.strides == 8).all()
    assert prediction.candidates.tolist() == expected
    assert (prediction.boxes - prediction.candidates == torch.tensor([-8, -12, 8, 12])).all()


def test_the_original_centernet_begins_with_boxes_of_the_prior_and_may_have_laterals():
    """Twice the distance to a side, in strides; laterals are three convolutions more."""
    for widths, side in [((16, 16, 16), 24.0), ((16, 16), 48.0)]:
        model = small("centernet", original=True, box_prior=3.0, neck_widths=widths)
        torch.nn.init.zeros_(model.size[-1].weight)
        boxes = run(model).boxes
        assert torch.allclose(boxes[..., 2:] - boxes[..., :2], torch.tensor(side), atol=1e-4)
    model = small("centernet", original=True)

    def names(model):
        return {name for name, _ in model.named_parameters()}

    more = names(small("centernet", original=True, laterals=True)) - names(model)
    assert {f"neck.lateral.{n}.weight" for n in range(3)} <= more
    assert all(name.startswith("neck.") for name in more)


def test_box_prior_is_the_distance_to_begin_with():
    """In strides, on all four sides."""
    for detector, original, options, strides in [
            ("fcos", False, {}, STRIDES), ("fcos", True, {}, STRIDES),
            ("centernet", False, {}, (4,)), ("centernet", False, {"neck_widths": (16, 16)}, (8,))]:
        model = small(detector, original, box_prior=3.0, **options)
        torch.nn.init.zeros_(model.ltrb.weight)
        prediction = run(model)
        assert model.strides == strides and set(prediction.strides.tolist()) <= set(strides)
        reach = 3 * prediction.strides[:, None] * torch.tensor([-1, -1, 1, 1])
        assert torch.equal(prediction.boxes[0], prediction.candidates + reach)


@every_detector
@every_form
def test_an_untrained_detector_finds_nothing(detector, original):
    """Every class starts at a score of about 0.01 on random images,
    in the original CenterNet at 0.1.
    """
    prior = 0.1 if (detector, original) == ("centernet", True) else 0.01
    logits = run(small(detector, original, num_classes=20)).logits
    assert models.PRIOR_BIAS == pytest.approx(-4.595120, abs=1e-6)
    assert logits.mean().item() == pytest.approx(math.log(prior / (1 - prior)), abs=0.3)
    assert logits.sigmoid().max() < 0.5


# ------------------------------------------------------------------------------------------------
# necks and backbones
# ------------------------------------------------------------------------------------------------

def is_xavier(weight):
    """Uniform within sqrt(6 / (fan-in + fan-out)) (Glorot and Bengio, 2010)."""
    cell = weight[0, 0].numel() if weight.dim() > 2 else 1
    bound = math.sqrt(6 / (cell * (weight.shape[0] + weight.shape[1])))
    return (0.9 * bound < weight.abs().max() <= bound
            and weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1))


def is_normal(weight):
    """Normal with a deviation of 0.01 (Lin et al., 2017b, 4.1)."""
    return (weight.std().item() == pytest.approx(0.01, rel=0.1)
            and 0.025 < weight.abs().max() < 0.06)


@pytest.mark.parametrize("detector, original, start", [
    ("retinanet", False, is_xavier), ("retinanet", True, is_normal), ("fcos", False, is_xavier),
    ("fcos", True, is_normal), ("centernet", False, is_xavier)])
def test_heads_start_as_published(detector, original, start):
    """The classes so unlikely that the focal loss of all negatives is small: a score of 0.01."""
    slim = ({"neck_widths": (32, 32, 32)} if detector == "centernet"
            else {"width": 64, "depth": 2})
    model = small(detector, original, num_classes=8, **slim)
    heads = [part for name, part in model.named_children() if name != "backbone"
             and not (name == "neck" and detector != "centernet")]
    convolutions = [m for part in heads for m in part.modules()
                    if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d,
                                      models.DeformConv))]
    assert len(convolutions) >= 5 and all(start(m.weight) for m in convolutions)
    assert torch.allclose(model.score.bias.sigmoid(), torch.tensor(0.01))
    assert all((m.bias == 0).all() for m in convolutions
               if getattr(m, "bias", None) is not None and m is not model.score)


def test_a_pyramid_starts_uniform_by_its_fan_in():
    """Within sqrt(3 / fan-in), biases 0, as detectron2's (c2_xavier_fill)."""
    for m in models.FPN(models.Tiny(), 64, extra=2, extra_from="c5").modules():
        if isinstance(m, torch.nn.Conv2d):
            bound = math.sqrt(3 / m.weight[0].numel())
            assert 0.9 * bound < m.weight.abs().max() <= bound and (m.bias == 0).all()


def test_the_stride_of_msras_bottlenecks_lies_in_their_first_convolution():
    for stride_in_1x1 in (False, True):
        with torch.device("meta"):
            backbone = models.ResNet("resnet50", stride_in_1x1=stride_in_1x1)
        for layer in backbone.stages()[1:]:
            strides = layer[0].conv1.stride, layer[0].conv2.stride
            assert strides == (((2, 2), (1, 1)) if stride_in_1x1 else ((1, 1), (2, 2)))


@pytest.mark.parametrize("extra_from", ["c5", "p5"])
def test_fpn_is_torchvisions(extra_from):
    """With the same weights; P6 from C5 (RetinaNet, OneNet) or from P5 (the original FCOS),
    P7 from ReLU(P6).
    """
    backbone = models.Tiny()
    neck = models.FPN(backbone, 16, 2, extra_from)
    top = LastLevelP6P7(16 if extra_from == "p5" else backbone.channels[-1], 16)
    reference = FeaturePyramidNetwork(backbone.channels[-3:], 16, extra_blocks=top)

    ours = [*neck.lateral, *neck.output, *neck.extra]
    blocks = [block[0] for block in (*reference.inner_blocks, *reference.layer_blocks)]
    for mine, theirs in zip(ours, [*blocks, top.p6, top.p7], strict=True):
        theirs.load_state_dict(mine.state_dict())

    features = [torch.randn(2, c, 64 // s, 96 // s)
                for c, s in zip(backbone.channels, backbone.strides)]
    expected = reference(collections.OrderedDict(enumerate(features[-3:])))
    for ours, theirs in zip(neck(features), expected.values(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("extra", [0, 1, 2])
def test_fpn_strides_are_those_of_its_maps(extra):
    images = torch.zeros(1, 3, 64, 128)
    for backbone in (models.Tiny(), models.ResNet("resnet18")):
        neck = models.FPN(backbone, 16, extra)
        maps = neck(backbone(images))
        sides = [(math.ceil(64 / s), math.ceil(128 / s)) for s in neck.strides]
        assert sides == [x.shape[-2:] for x in maps]
        shapes = [(c, 64 // s, 128 // s) for c, s in zip(backbone.channels, backbone.strides)]
        assert [x.shape[1:] for x in backbone(images)] == shapes


def test_a_deformable_convolution_starts_as_half_a_convolution():
    """Without offsets it looks where a plain 3x3 does; the masks start at sigmoid(0) = 1/2."""
    conv, x = models.DeformConv(5, 7), torch.randn(2, 5, 9, 11)
    expected = F.conv2d(x, conv.weight, padding=1) / 2
    torch.testing.assert_close(conv(x), expected, atol=1e-5, rtol=1e-5)


def test_deformable_offsets_are_y_then_x():
    """Offsets of one row down and two columns right, masks of 1:
    the plain convolution of the moved picture.
    """
    conv, x = models.DeformConv(5, 7), torch.randn(2, 5, 9, 11)
    constant(conv.offset, [1.0, 2.0] * 9 + [50.0] * 9)
    moved = F.conv2d(F.pad(x, (0, 2, 0, 1))[..., 1:, 2:], conv.weight, padding=1)
    torch.testing.assert_close(conv(x)[..., 1:, 1:], moved[..., 1:, 1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("freeze, frozen", [(0, ()), (1, ("conv1",)), (2, ("conv1", "layer1"))])
def test_frozen_stages_receive_no_gradient(freeze, frozen):
    """Stem, then layer1, ...; and a frozen batch norm has nothing to train."""
    backbone = models.ResNet("resnet18", norm="frozen", freeze=freeze)
    for name, p in backbone.named_parameters():
        assert "bn" not in name and "downsample.1" not in name
        assert p.requires_grad == (name.split(".")[1] not in frozen)
    trained = models.ResNet("resnet18", norm="batch", freeze=0)
    assert "body.bn1.weight" in dict(trained.named_parameters())
    assert all(p.requires_grad for p in trained.parameters())


def parameters(model):
    """How many, not counting batch norms, which some count and some freeze."""
    return sum(p.numel() for module in model.modules()
               if not isinstance(module, torch.nn.BatchNorm2d)
               for p in module.parameters(recurse=False))


def test_original_detectors_have_as_many_parameters_as_torchvisions():
    """torchvision's FCOS lacks the five scales;
    its RetinaNet takes P6 from P5 (256 channels), not C5 (2048).
    """
    with torch.device("meta"):
        fcos, retinanet = (make(weights=None, weights_backbone=None, num_classes=91)
                           for make in (fcos_resnet50_fpn, retinanet_resnet50_fpn))
        ours = [parameters(checkpoints.build(detector, 91, "resnet50", original=True))
                for detector in ("fcos", "retinanet")]
        assert ours[0] == parameters(fcos) + 5
        assert ours[1] == parameters(retinanet) + (2048 - 256) * 256 * 9


def test_one_to_one_detectors_lack_what_onenet_left_out():
    """The eight tower biases; and in FCOS the centre-ness, while its P6 comes from C5."""
    with torch.device("meta"):
        build = checkpoints.build
        count = {(name, original): parameters(build(name, 80, "resnet50", original))
                 for name in ("retinanet", "fcos") for original in (False, True)}
    assert count["retinanet", True] - count["retinanet", False] == 8 * 256
    centreness, extra = 256 * 9 + 1, (2048 - 256) * 256 * 9
    assert count["fcos", True] - count["fcos", False] == 8 * 256 + centreness - extra


@pytest.mark.parametrize("detector, candidates", [("retinanet", 201_600), ("fcos", 22_400)])
@every_form
def test_candidates_of_a_coco_image(detector, candidates, original):
    """800 x 1333 padded to 800 x 1344: 22,400 points, nine anchors each
    (shapes only, on the meta device).
    """
    with torch.device("meta"):
        model = checkpoints.build(detector, 80, "resnet50", original=original)
        images = torch.zeros(1, 3, 800, 1344, dtype=torch.uint8)
        prediction = model(images, torch.zeros(1, 800, 1344, dtype=torch.bool))
    assert model.strides == (8, 16, 32, 64, 128)
    assert prediction.logits.shape == (1, candidates, 80)
    assert prediction.boxes.shape == (1, candidates, 4)
    assert prediction.candidates.shape == (candidates, 4)
    assert prediction.strides.shape == (candidates,)


# ------------------------------------------------------------------------------------------------
# whole detectors
# ------------------------------------------------------------------------------------------------

@every_detector
@every_form
@pytest.mark.parametrize("backbone", ["tiny", "resnet18"])
def test_every_detector_answers_in_the_documented_shapes(detector, original, backbone):
    """(B, Q, C), (B, Q, 4), (Q, 4), (Q,): levels from fine to coarse,
    with ceil(size / stride) cells a side.
    """
    per_cell = {"retinanet": 9, "fcos": 1, "centernet": 1}[detector]
    strides = (4,) if detector == "centernet" else STRIDES
    cells = [math.ceil(64 / s) * math.ceil(96 / s) * per_cell for s in strides]
    Q = sum(cells)
    raw = {("retinanet", False): {"deltas"}, ("retinanet", True): {"deltas"},
           ("fcos", True): {"centreness"}, ("centernet", True): {"heat", "size", "offset"}}

    torch.manual_seed(0)
    prediction = run(checkpoints.build(detector, 5, backbone, original=original).eval())
    assert isinstance(prediction, Prediction) and prediction.aux == []
    assert prediction.logits.shape == (2, Q, 5) and prediction.boxes.shape == (2, Q, 4)
    assert prediction.candidates.shape == (Q, 4)
    assert prediction.strides.tolist() == [s for s, n in zip(strides, cells) for _ in range(n)]
    assert set(prediction.raw) == raw.get((detector, original), set())


@every_detector
@every_form
def test_the_prediction_of_one_image_is_its_own_in_float32(detector, original):
    """`image(n)` of a batch: what the detector answers when it is shown that image alone."""
    model = small(detector, original)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = run(model)
    one = prediction.image(1)
    assert isinstance(one, Prediction) and one.aux == []
    assert one.logits.dtype == one.boxes.dtype == torch.float32
    assert torch.equal(one.logits, prediction.logits[1])
    assert torch.equal(one.boxes, prediction.boxes[1])
    assert one.raw.keys() == prediction.raw.keys()
    for name, value in one.raw.items():
        assert value.dtype == torch.float32 and torch.equal(value, prediction.raw[name][1])

    one, alone = run(model).image(1), run(model, pictures()[1:]).image(0)
    Q = len(one.candidates)
    assert one.logits.shape == (Q, 3) and one.boxes.shape == (Q, 4) and one.strides.shape == (Q,)
    for name in ("logits", "boxes", "candidates", "strides"):
        a, b = getattr(one, name), getattr(alone, name)
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


def test_half_precision_is_left_behind_by_the_prediction_of_one_image():
    """Whatever a network hands over, costs and detections are computed in float32."""
    batch = Prediction(torch.randn(2, 5, 3).bfloat16(), torch.rand(2, 5, 4).half(), softmax=True)
    one = batch.image(0)
    assert one.logits.dtype == one.boxes.dtype == torch.float32
    assert torch.equal(one.logits, batch.logits[0].float()) and one.softmax


TOWERS = {"width": 256, "depth": 4, "extra_levels": 2}
PUBLISHED = {       # the fact sheet's tables of the architectures
    models.RetinaNet: {**TOWERS, "anchor_scales": 3, "tower_norm": False,
                       "delta_weights": (1, 1, 1, 1), "many": 0},
    models.OriginalRetinaNet: {**TOWERS, "anchor_scales": 3, "tower_norm": False,
                               "delta_weights": (1, 1, 1, 1), "many": 0},
    models.FCOS: {**TOWERS, "box_prior": 0, "many": 0},
    models.OriginalFCOS: {**TOWERS, "box_prior": 0},
    models.CenterNet: {"neck_widths": (256, 128, 64), "deform": True, "box_prior": 0,
                       "many": 0},
    models.OriginalCenterNet: {"neck_widths": (256, 128, 64), "deform": True, "laterals": False,
                               "box_prior": 0},
}


@pytest.mark.parametrize("detector", PUBLISHED, ids=lambda detector: detector.__name__)
def test_the_constructors_defaults_are_the_published_values(detector):
    parameters = inspect.signature(detector).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    assert defaults == {**PUBLISHED[detector], "pixels": "rgb"}


@every_detector
@every_form
def test_every_parameter_learns_from_the_outputs_it_makes(detector, original):
    """From the scores everything but the box branch;
    from boxes (and centre-ness) everything but the class branch.
    """
    model = small(detector, original)
    prediction = model(pictures(), torch.zeros(2, 64, 96, dtype=torch.bool))
    assert all(x.requires_grad for x in prediction.raw.values())
    # the heat map is the logits in another shape
    raw = [value for name, value in prediction.raw.items() if name != "heat"]
    location = [prediction.boxes, *raw]
    of_scores = {"class_tower", "score"}
    of_boxes = {"box_tower", "delta", "ltrb", "scale", "centreness", "size", "offset"}
    for outputs, idle in [([prediction.logits], of_boxes), (location, of_scores)]:
        total = sum(x.sum() for x in outputs)
        gradients = torch.autograd.grad(total, model.parameters(),
                                        retain_graph=True, allow_unused=True)
        for (name, _), gradient in zip(model.named_parameters(), gradients):
            assert (gradient is None) == (name.split(".")[0] in idle), name


@every_detector
@every_form
def test_bfloat16_ends_before_logits_and_boxes(detector, original):
    """Costs and losses are float32: the heads hand over float32 also under autocast,
    close to the full computation.
    """
    model = small(detector, original)
    expected = run(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = run(model)
    assert prediction.logits.dtype == prediction.boxes.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in prediction.raw.values())
    torch.testing.assert_close(prediction.logits, expected.logits, atol=0.2, rtol=0.05)


@pytest.mark.parametrize("pixels, red", [
    ("rgb", [(255 - 123.675) / 58.395, -116.28 / 57.12, -103.53 / 57.375]),
    ("bgr", [-103.53, -116.28, 255 - 123.675]),
    ("bgr-unit", [-0.408 / 0.289, -0.447 / 0.274, (1 - 0.470) / 0.278])])
def test_a_red_picture_reaches_the_backbone_as_its_weights_know_it(pixels, red):
    """Shares of 255, in the published order; nothing under the mask."""
    model = models.Detector(lambda x: x, pixels)
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[:, :, 5:] = True
    picture = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 6)
    seen = model.features(picture, mask)
    torch.testing.assert_close(seen[0, :, 0, 0], torch.tensor(red), rtol=1e-5, atol=0)
    assert (seen[..., :5] == seen[..., :1, :1]).all() and (seen[..., 5:] == 0).all()


@every_detector
def test_what_lies_in_the_padding_does_not_matter(detector):
    """Under the mask every picture is the same."""
    model = small(detector)
    images = torch.randint(0, 256, (2, 2, 3, 64, 96), dtype=torch.uint8)
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[:, 40:], mask[1, :, 70:] = True, True
    images = torch.where(mask[:, None], images, images[0])
    with torch.no_grad():
        a, b = model(images[0], mask), model(images[1], mask)
    assert not torch.equal(images[0], images[1])
    assert torch.equal(a.logits, b.logits) and torch.equal(a.boxes, b.boxes)


# ------------------------------------------------------------------------------------------------
# from predictions to detections
# ------------------------------------------------------------------------------------------------

def slow_candidates(prediction, scores, accepted, threshold):
    """Class by class torchvision's NMS on the accepted pairs:
    (score, prediction, class), best first.
    """
    kept = []
    for c in range(scores.shape[1]):
        rows = accepted[:, c].nonzero()[:, 0]
        for q in rows[nms(prediction.boxes[0, rows], scores[rows, c], threshold)].tolist():
            kept.append((scores[q, c].item(), q, c))
    return sorted(kept, reverse=True)


@pytest.mark.parametrize("detector, threshold", [("retinanet", 0.5), ("fcos", 0.6)])
def test_original_detections(detector, threshold):
    """Class scores above 0.05 (FCOS ranks by the root of class score x centre-ness),
    then NMS of each class.
    """
    model = small(detector, original=True)
    prediction = run(model, pictures(B=1))
    prediction.logits = torch.randn(prediction.logits.shape) * 2 - 3
    prediction.boxes[0, :, 2:] = prediction.boxes[0, :, :2] + 30

    p = prediction.logits[0].sigmoid()
    scores = p
    if detector == "fcos":
        prediction.raw["centreness"] = torch.randn(prediction.raw["centreness"].shape)
        scores = (p * prediction.raw["centreness"][0].sigmoid()[:, None]).sqrt()

    # the 1,000 best accepted pairs of each level
    keep = torch.zeros_like(p, dtype=torch.bool)
    accepted = (p > 0.05).nonzero().tolist()
    for s in STRIDES:
        pairs = [(scores[q, c].item(), q, c) for q, c in accepted if prediction.strides[q] == s]
        for _, q, c in sorted(pairs, reverse=True)[:1000]:
            keep[q, c] = True

    for k in (100, 10_000):
        found = model.detections(prediction.image(0), k)
        expected = slow_candidates(prediction, scores, keep, threshold)[:k]
        assert found["nms"][1].tolist() == [score for score, _, _ in expected]
        assert found["nms"][2].tolist() == [c for _, _, c in expected]
        assert torch.equal(found["nms"][0], prediction.boxes[0, [q for _, q, _ in expected]])
        plain = sorted(scores[keep].tolist(), reverse=True)[:k]
        assert found["plain"][1].tolist() == plain


def test_nms_tells_classes_apart_left_of_the_picture_too():
    """torchvision moves class 1 by the largest coordinate and 1: here onto the other box."""
    boxes = torch.tensor([[10.0, 10, 20, 20], [-11, -11, -1, -1], [11, 10, 20, 20]])
    kept, _, labels = models.with_nms(boxes, torch.tensor([0.9, 0.8, 0.7]),
                                      torch.tensor([0, 1, 0]), 0.5, 10)
    assert labels.tolist() == [0, 1] and kept.tolist() == boxes[:2].tolist()
    assert len(models.with_nms(boxes[:0], torch.zeros(0), torch.zeros(0), 0.5, 10)[0]) == 0


@every_detector
def test_one_to_one_detections_need_no_nms(detector):
    """They are the k best pairs; the NMS column is computed from those k
    (torchvision, class by class).
    """
    model = small(detector)
    prediction = run(model)
    prediction.logits = torch.randn(prediction.logits.shape)
    prediction.boxes[..., 2:] = prediction.boxes[..., :2] + 30
    found = model.detections(prediction.image(1), 50)
    boxes, scores, labels = found["plain"]
    every = prediction.logits[1].sigmoid().flatten().tolist()
    assert scores.tolist() == sorted(every, reverse=True)[:50]

    kept = []
    for c in range(3):
        rows = (labels == c).nonzero()[:, 0]
        for i in rows[nms(boxes[rows], scores[rows], 0.5)].tolist():
            kept.append((-scores[i].item(), i))
    kept.sort()
    assert 0 < len(kept) < 50 and torch.equal(found["nms"][0], boxes[[i for _, i in kept]])


def distinct(rng, *shape):
    """Scores between 0 and 1 of which no two are equal, so that every order is one order."""
    n = int(np.prod(shape))
    return torch.from_numpy(rng.permutation(n).reshape(shape) + 0.5).float() / n


def random_boxes(rng, n, size=100):
    corner = torch.from_numpy(rng.uniform(0, size, (n, 2))).float()
    extent = torch.from_numpy(rng.uniform(5, size / 2, (n, 2))).float()
    return torch.cat([corner, corner + extent], 1)


def as_list(detections):
    boxes, scores, labels = detections
    return list(zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True))


@settings(max_examples=30)
@given(st.integers(0, 999), st.integers(1, 12), st.integers(1, 5), st.integers(1, 80))
def test_top_k_is_the_head_of_the_sorted_pairs_of_prediction_and_class(seed, q, c, k):
    rng = np.random.default_rng(seed)
    boxes, scores = random_boxes(rng, q), distinct(rng, q, c)
    pairs = [(boxes[i].tolist(), scores[i, j].item(), j) for i in range(q) for j in range(c)]
    assert as_list(models.top_k(boxes, scores, k)) == sorted(pairs, key=lambda pair: -pair[1])[:k]


@settings(max_examples=30)
@given(st.integers(0, 999), st.integers(0, 30), st.integers(1, 40),
       st.sampled_from([0.3, 0.5, 0.7]))
def test_nms_is_greedy_and_class_by_class(seed, n, k, threshold):
    rng = np.random.default_rng(seed)
    boxes, scores = random_boxes(rng, n), distinct(rng, n)
    labels, overlap = torch.from_numpy(rng.integers(0, 3, n)), box_iou(boxes, boxes)
    kept = []
    for i in scores.argsort(descending=True).tolist():
        if all(labels[i] != labels[j] or overlap[i, j] <= threshold for j in kept):
            kept.append(i)
    ours = as_list(models.with_nms(boxes, scores, labels, threshold, k))
    assert ours == as_list((boxes[kept[:k]], scores[kept[:k]], labels[kept[:k]]))
    theirs = batched_nms(boxes, scores, labels, threshold)[:k]
    assert ours == as_list((boxes[theirs], scores[theirs], labels[theirs]))


def test_a_one_to_one_detectors_nms_works_on_its_k_best():
    """Three boxes; the two best overlap.
    With k = 2 the third is not promoted when NMS removes the second.
    """
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]]).float()
    one = Prediction(torch.tensor([[2.0], [1.0], [0.0]]), boxes)
    found = models.Detector.detections(None, one, k=2)
    assert found["plain"][0].tolist() == boxes[:2].tolist()
    assert found["nms"][0].tolist() == boxes[:1].tolist()
    expected = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))]
    assert found["plain"][1].tolist() == pytest.approx(expected)


def test_candidates_are_cut_per_level_then_put_in_order():
    """Two levels of two predictions, one pair a level:
    the better of each, best first, whatever the other level has.
    """
    boxes = torch.tensor([[0, 0, 10, 10], [20, 0, 30, 10],
                          [40, 0, 50, 10], [60, 0, 70, 10]]).float()
    scores = torch.tensor([[0.3, 0.1], [0.2, 0.0], [0.6, 0.9], [0.8, 0.7]])
    one = Prediction(scores, boxes, strides=torch.tensor([8, 8, 16, 16]))
    found = models.candidate_detections(one, scores, scores > 0.05, k=10, nms=0.5, per_level=1)
    expected = boxes[[2, 0]], torch.tensor([0.9, 0.3]), torch.tensor([1, 0])
    assert as_list(found["plain"]) == as_list(expected)


def test_candidates_that_are_not_accepted_are_never_reported():
    scores = torch.tensor([[0.04, 0.9], [0.05, 0.06]])
    boxes = torch.tensor([[0, 0, 9, 9], [50, 0, 59, 9]]).float()
    one = Prediction(scores, boxes, strides=torch.full((2,), 8))
    found = models.candidate_detections(one, scores, scores > 0.05, k=10, nms=0.5)
    for variant in ("plain", "nms"):
        assert found[variant][1].tolist() == pytest.approx([0.9, 0.06])
        assert found[variant][2].tolist() == [1, 1]


def test_an_original_detectors_nms_comes_before_its_k_best():
    """Box 2 repeats box 1:
    without NMS it takes the second of two places, with NMS box 3 has it.
    """
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]]).float()
    scores = torch.tensor([[0.9], [0.8], [0.7]])
    one = Prediction(scores, boxes, strides=torch.full((3,), 8))
    found = models.candidate_detections(one, scores, scores > 0.05, k=2, nms=0.6)
    assert found["plain"][0].tolist() == boxes[[0, 1]].tolist()
    assert found["nms"][0].tolist() == boxes[[0, 2]].tolist()


@pytest.mark.parametrize("seed", range(3))
def test_centernets_nms_keeps_the_local_maxima_of_each_class(seed):
    rng = np.random.default_rng(seed)
    H, W, C = 5, 7, 2
    heat, boxes = distinct(rng, H, W, C), random_boxes(rng, H * W)
    logits = torch.logit(heat)
    one = Prediction(logits.flatten(0, 1), boxes, raw={"heat": logits.permute(2, 0, 1)})
    peaks = []
    for y, x, c in itertools.product(range(H), range(W), range(C)):
        around = heat[max(y - 1, 0):y + 2, max(x - 1, 0):x + 2, c]
        if heat[y, x, c] == around.max():
            peaks.append((boxes[y * W + x].tolist(), heat[y, x, c].item(), c))
    peaks.sort(key=lambda peak: -peak[1])
    assert 1 < len(peaks) < H * W

    every = models.OriginalCenterNet.detections(None, one, k=H * W * C)
    found = [d for d in as_list(every["nms"]) if d[1] > 0]
    for ours, peak in zip(found, peaks, strict=True):
        assert ours[0] == peak[0] and ours[2] == peak[2]
        assert ours[1] == pytest.approx(peak[1], abs=1e-5)
    few = models.OriginalCenterNet.detections(None, one, k=3)
    assert as_list(few["nms"]) == found[:3]

    # the NMS of boxes that other detectors have, beside its own
    boxes, scores, labels = every["plain"]
    kept = batched_nms(boxes, scores, labels, 0.5)
    assert len(peaks) < len(kept) < len(scores)
    assert as_list(every["box_nms"]) == as_list((boxes[kept], scores[kept], labels[kept]))


def test_detections_go_back_to_the_original_picture_clipped_and_without_empty_boxes():
    """From 200 high and 400 wide to 100 x 100: x a quarter, y a half."""
    boxes = torch.tensor([[40, 20, 80, 60], [-40, -20, 440, 220], [410, 0, 450, 50],
                          [8, 8, 8, 20], [0, 150, 100, 200]]).float()
    target = {"size": torch.tensor([200, 400]), "original_size": torch.tensor([100, 100])}
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    found = models.to_original((boxes, scores, torch.arange(5)), target)
    assert found[0].tolist() == [[10, 10, 20, 30], [0, 0, 100, 100], [0, 75, 25, 100]]
    assert found[1].tolist() == pytest.approx([0.9, 0.8, 0.5]) and found[2].tolist() == [0, 1, 4]


def test_boxes_that_are_not_a_number_are_dropped():
    boxes = torch.tensor([[float("nan"), 0, 10, 10], [0, 0, 10, 10]])
    target = {"size": torch.tensor([20, 20]), "original_size": torch.tensor([20, 20])}
    found = models.to_original((boxes, torch.ones(2), torch.arange(2)), target)
    assert found[2].tolist() == [1]
