"""Are the query detectors indifferent to what must not matter, and are their new operators right?

The published codes' numbers are in test_parity_queries.py; here slow loops, finite differences and
symmetry judge.
"""
import inspect
import itertools
import math

import pytest
import torch
from torch import nn

import checkpoints
import queries
from models import Prediction

every_query_detector = pytest.mark.parametrize("detector",
                                               ["detr", "deformable-detr", "sparse-rcnn"])


def small(detector, backbone="tiny", num_classes=3, **options):
    """An untrained detector that is quick to run; no two of its queries alike."""
    torch.manual_seed(0)
    slim = {"width": 32, "layers": 2, "hidden": 48, "queries": 12, "heads": 4}
    slim |= {"detr": {"stride": 16}, "deformable-detr": {"levels": 3},
             "sparse-rcnn": {"dynamic": 8, "roi_size": 32}}[detector]
    model = checkpoints.build(detector, num_classes, backbone, **{**slim, **options}).eval()
    if detector == "sparse-rcnn":
        # proposals at different places
        with torch.no_grad():
            model.boxes.weight[:, :2] += torch.randn(len(model.boxes.weight), 2) / 10
            model.boxes.weight[:, 2:] *= 0.5
    return model


def pictures(height=64, width=96, B=2):
    return torch.randint(0, 256, (B, 3, height, width), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(1))


def run(model, images, mask=None):
    if mask is None:
        mask = torch.zeros(len(images), *images.shape[2:], dtype=torch.bool)
    with torch.no_grad():
        return model(images, mask)


@every_query_detector
def test_permuting_the_queries_permutes_the_outputs(detector):
    model = small(detector)
    before = run(model, pictures())
    order = torch.randperm(12)
    with torch.no_grad():
        for embedding in [model.query, *([model.boxes] if detector == "sparse-rcnn" else [])]:
            embedding.weight.copy_(embedding.weight[order])
    after = run(model, pictures())
    for a, b in zip([before, *before.aux], [after, *after.aux]):
        assert (a.logits[:, order] - b.logits).abs().max() < 1e-4
        assert (a.boxes[:, order] - b.boxes).abs().max() < 1e-2            # pixels
    # queries do differ
    assert before.logits.std(1).min() > 1e-4


class Blocks(nn.Module):
    """A backbone whose cells see nothing but their own pixels,
    so that only what follows it can let padding in.
    """
    strides, channels = (4, 8, 16, 32), (3, 3, 3, 3)

    def stages(self):
        return []

    def forward(self, x, count=4):
        return [nn.functional.avg_pool2d(x, stride) for stride in self.strides[:count]]


def test_padding_a_picture_does_not_change_detrs_detections():
    torch.manual_seed(0)
    model = queries.DETR(Blocks(), 3, width=32, heads=4, layers=2, hidden=48, queries=12, stride=16)
    model.eval()
    images = pictures()
    padded = torch.full((2, 3, 128, 160), 200, dtype=torch.uint8)
    padded[:, :, :64, :96] = images
    mask = torch.ones(2, 128, 160, dtype=torch.bool)
    mask[:, :64, :96] = False

    a, b = run(model, images), run(model, padded, mask)
    assert (a.logits - b.logits).abs().max() < 1e-4 and (a.boxes - b.boxes).abs().max() < 1e-2
    # without the mask it would
    seen = run(model, padded)
    assert (a.logits - seen.logits).abs().max() > 0.1


@pytest.mark.parametrize("refine", [False, True])
def test_what_lies_in_the_padding_does_not_reach_deformable_detrs_queries(refine):
    """Behind the group norms of its projection, which see padding in the published code too."""
    model = small("deformable-detr", refine=refine)
    images, mask = pictures(128, 160), torch.zeros(2, 128, 160, dtype=torch.bool)
    mask[1, 64:], mask[1, :, 96:] = True, True
    encoder_inputs = model.encoder_inputs
    answers = []
    for noise in (0.0, 100.0):
        def noisy(images, mask):
            memory, position, padding, *rest = encoder_inputs(images, mask)
            return memory + noise * padding[..., None], position, padding, *rest
        model.encoder_inputs = noisy
        answers.append(run(model, images, mask))
    a, b = answers
    assert (a.logits - b.logits).abs().max() < 1e-4 and (a.boxes - b.boxes).abs().max() < 1e-2


def slow_deformable_attention(value, shapes, where, weights):
    """One sampling point after the other, bilinear by hand:
    cell centres lie at half cells, outside is zero.
    """
    B, S, H, D = value.shape
    Q, L, P = where.shape[1], where.shape[3], where.shape[4]
    out = torch.zeros(B, Q, H, D, dtype=value.dtype)
    first = 0
    for level, (h, w) in enumerate(shapes):
        grid = value[:, first:first + h * w].view(B, h, w, H, D)
        first += h * w
        for b, q, head, p in itertools.product(range(B), range(Q), range(H), range(P)):
            x, y = (where[b, q, head, level, p] * torch.tensor([w, h]) - 0.5).tolist()
            for i in (math.floor(y), math.floor(y) + 1):
                for j in (math.floor(x), math.floor(x) + 1):
                    if 0 <= i < h and 0 <= j < w:
                        share = (1 - abs(y - i)) * (1 - abs(x - j))
                        share *= weights[b, q, head, level, p]
                        out[b, q, head] += share * grid[b, i, j, head]
    return out.flatten(2)


def sampling(Q=3):
    torch.manual_seed(1)
    shapes = [(4, 6), (2, 3)]
    value = torch.randn(2, 30, 2, 3, dtype=torch.double)
    # some outside the maps
    where = torch.rand(2, Q, 2, 2, 2, 2, dtype=torch.double) * 1.4 - 0.2
    weights = torch.rand(2, Q, 2, 2, 2, dtype=torch.double)
    return value, shapes, where, weights


def test_deformable_attention_agrees_with_a_slow_loop():
    value, shapes, where, weights = sampling(5)
    found = queries.deformable_attention(value, shapes, where, weights)
    expected = slow_deformable_attention(value, shapes, where, weights)
    assert (found - expected).abs().max() < 1e-9


def test_the_gradients_of_deformable_attention():
    value, shapes, where, weights = sampling()
    inputs = [t.requires_grad_() for t in (value, where, weights)]

    def attention(value, where, weights):
        return queries.deformable_attention(value, shapes, where, weights)

    assert torch.autograd.gradcheck(attention, inputs)


def test_deformable_attention_begins_as_a_star():
    """Head h looks in direction 2 pi h / 8 on the unit square, point p at distance p + 1;
    all alike.
    """
    module = queries.DeformableAttention(32, 8, 2, 4)
    module.reset()
    star = module.offset.bias.view(8, 2, 4, 2)
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, direction in enumerate(directions):
        for point in range(4):
            expected = [(point + 1) * d for d in direction * 2]
            assert star[head, :, point].flatten().tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("shift, first", [
    (0.0, [1.0, 0.0, 0.977918, 0.208991]),
    (-0.5, [0.707107, 0.707107, 0.628891, 0.777493]),
])
def test_position_codes_have_the_published_values(shift, first):
    """The first of four rows, 128 numbers for y; the same along x with its halves exchanged."""
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    codes = queries.sine_position(mask, 256, shift).view(4, 4, 256)
    assert codes[0, 2, :4].tolist() == pytest.approx(first, abs=1e-5)
    assert torch.allclose(codes[..., :128], codes.transpose(0, 1)[..., 128:])


def test_position_codes_stretch_over_the_picture_without_its_padding():
    mask = torch.zeros(2, 4, 6, dtype=torch.bool)
    mask[1, 2:], mask[1, :, 3:] = True, True
    codes = queries.sine_position(mask, 32).view(2, 4, 6, 32)
    alone = queries.sine_position(torch.zeros(1, 2, 3, dtype=torch.bool), 32).view(2, 3, 32)
    assert torch.allclose(codes[1, :2, :3], alone)


@pytest.mark.parametrize("side, level", [
    (8, 0), (111.9, 0), (112.1, 1), (223.9, 1), (224.1, 2),
    (447.9, 2), (448.1, 3), (2000, 3), (0, 0),
])
def test_regions_come_from_the_level_of_their_size(side, level):
    """Smaller than 112 pixels from P2, then P3, P4, and from 448 on P5."""
    square = torch.tensor([[10.0, 20.0, 10 + side, 20 + side]])
    assert queries.region_levels(square).tolist() == [level]
    oblong = torch.tensor([[0.0, 0.0, side * 2, side / 2]])
    assert queries.region_levels(oblong).tolist() == [level]


def test_region_features_keep_the_order_of_the_boxes_whatever_their_levels():
    """Maps that hold their own level's number: every box finds its level's."""
    strides = (4, 8, 16, 32)
    features = [torch.full((2, 1, 256 // s, 256 // s), float(n)) for n, s in enumerate(strides)]
    boxes = torch.tensor([[[0, 0, 250, 250], [0, 0, 20, 20], [0, 0, 130, 130.0]],
                          [[0, 0, 130, 130], [0, 0, 500, 500], [0, 0, 20, 20.0]]])
    found = queries.region_features(features, strides, boxes)
    assert found.shape == (6, 1, 7, 7)
    assert found[:, 0, 3, 3].tolist()[:4] == [2, 0, 1, 1] and found[5, 0, 3, 3] == 0


@every_query_detector
def test_every_layer_answers_in_the_documented_shapes(detector):
    model = small(detector)
    prediction = run(model, pictures())
    assert len(prediction.aux) == 1 and prediction.candidates is None
    for layer in [prediction, *prediction.aux]:
        assert layer.logits.shape == (2, 12, 3 + (detector == "detr"))
        assert layer.boxes.shape == (2, 12, 4)
        assert layer.logits.dtype == layer.boxes.dtype == torch.float32


@every_query_detector
def test_the_prediction_of_one_image_is_its_own_in_float32(detector):
    """`image(n)` of a batch: what the detector answers when it is shown that image alone."""
    model = small(detector)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = run(model, pictures())
    for layer in [prediction, *prediction.aux]:
        one = layer.image(1)
        assert isinstance(one, Prediction) and one.aux == [] and one.raw == {}
        assert one.logits.dtype == one.boxes.dtype == torch.float32
        assert torch.equal(one.logits, layer.logits[1])
        assert torch.equal(one.boxes, layer.boxes[1])
        assert one.candidates is None and one.strides is None
        assert one.softmax == (detector == "detr")
        assert one.centre_l1 == (detector != "sparse-rcnn")

    one = run(model, pictures()).image(1)
    alone = run(model, pictures()[1:]).image(0)
    assert one.logits.shape == (12, 3 + (detector == "detr")) and one.boxes.shape == (12, 4)
    assert (one.logits - alone.logits).abs().max() < 1e-4
    assert (one.boxes - alone.boxes).abs().max() < 1e-2                     # pixels


TRANSFORMER = {"width": 256, "heads": 8, "layers": 6}
PUBLISHED = {       # the fact sheet's tables of the architectures
    queries.DETR: {**TRANSFORMER, "hidden": 2048, "dropout": 0.1, "queries": 100, "stride": 32},
    queries.DeformableDETR: {**TRANSFORMER, "hidden": 1024, "dropout": 0.1, "queries": 300,
                             "levels": 4, "points": 4, "refine": False},
    queries.SparseRCNN: {**TRANSFORMER, "hidden": 2048, "dynamic": 64, "queries": 300,
                         "roi_size": 224},
}


@pytest.mark.parametrize("detector", PUBLISHED, ids=lambda detector: detector.__name__)
def test_the_constructors_defaults_are_the_published_values(detector):
    parameters = inspect.signature(detector).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    assert defaults == {**PUBLISHED[detector], "pixels": "rgb"}


@every_query_detector
def test_every_parameter_learns(detector):
    """But maps that these small pictures leave unused, and the queries' and keys' weights
    where all values are equal (DETR's first layer).
    """
    model = small(detector).train()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1 and not p.any():
                p.normal_(std=0.1)

    prediction = model(pictures(), torch.zeros(2, 64, 96, dtype=torch.bool))
    sum((layer.logits ** 2).sum() + ((layer.boxes / 100) ** 2).sum()
        for layer in [prediction, *prediction.aux]).backward()

    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    unused = {"detr": ("backbone.stage4.", "decoder.0.self_"), "deformable-detr": (),
              "sparse-rcnn": ("neck.lateral.0.", "neck.lateral.1.",
                              "neck.output.0.", "neck.output.1.")}[detector]
    silent = [name for name in silent if not name.startswith(unused)]
    assert not silent, silent


@every_query_detector
def test_bfloat16_ends_before_logits_and_boxes(detector):
    model = small(detector)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = run(model, pictures())
    exact = run(model, pictures())
    assert prediction.logits.dtype == prediction.boxes.dtype == torch.float32
    # pixels of 96
    assert (prediction.boxes - exact.boxes).abs().median() < 2


def test_a_detr_query_is_reported_once_and_a_deformable_one_as_often_as_it_scores():
    # two queries; classes a, b, and no object for DETR
    logits = torch.tensor([[[3.0, 2.0, -5.0], [0.0, 1.0, 4.0]]])
    boxes = torch.tensor([[[0, 0, 10, 10], [20, 20, 30, 30.0]]])

    once = Prediction(logits, boxes, softmax=True)
    _, scores, labels = small("detr", num_classes=2).detections(once.image(0))["plain"]
    assert labels.tolist() == [0, 1]
    expected = [float(torch.softmax(logits[0, n], 0)[n]) for n in (0, 1)]
    assert scores.tolist() == pytest.approx(expected)

    often = Prediction(logits, boxes)
    _, scores, labels = small("deformable-detr").detections(often.image(0))["plain"]
    assert labels.tolist() == [2, 0, 1, 1, 0, 2] and len(scores) == 6
