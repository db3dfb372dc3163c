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
import data
import losses
import queries
from assign import Match
from models import Prediction
from test_models import is_xavier

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
    all alike, whatever the query.
    """
    model = small("deformable-detr", heads=8, width=64)
    found = [m for m in model.modules() if isinstance(m, queries.DeformableAttention)]
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    assert len(found) == 4                  # two encoder layers, two decoder layers
    for m in found:
        star = m.offset.bias.view(8, 3, 4, 2)
        for head, direction in enumerate(directions):
            for point in range(4):
                expected = [(point + 1) * d for d in direction * 3]
                assert star[head, :, point].flatten().tolist() == pytest.approx(expected, abs=1e-5)
        zeros = (m.offset.weight, m.weight.weight, m.weight.bias, m.value.bias, m.output.bias)
        assert not any(p.any() for p in zeros)
        assert is_xavier(m.value.weight) and is_xavier(m.output.weight)


def test_query_detectors_start_as_published():
    """Transformers Xavier, sigmoid classes at 0.01; Deformable DETR's boxes around their reference
    points, an eighth of the picture (sigmoid of -2), which later layers of the refined form keep;
    Sparse R-CNN's the whole picture."""
    wide = {"width": 64, "hidden": 96}
    detr, deformable = small("detr", **wide), small("deformable-detr", levels=4, **wide)
    for part in (detr.encoder, detr.decoder):
        assert all(is_xavier(p) for p in part.parameters() if p.dim() > 1)
    feed_forward = [layer.feed_forward for layer in [*deformable.encoder, *deformable.decoder]]
    assert all(is_xavier(p) for part in feed_forward for p in part.parameters() if p.dim() > 1)
    for conv, _ in deformable.project:
        assert is_xavier(conv.weight) and not conv.bias.any()
    refined = small("deformable-detr", refine=True, **wide)
    for model, biases in [(deformable, [[0, 0, -2, -2]]),
                          (refined, [[0, 0, -2, -2], [0, 0, 0, 0]])]:
        assert [box[-1].bias.tolist() for box in model.box] == biases
        assert not any(box[-1].weight.any() for box in model.box)
        for score in model.score:
            assert torch.allclose(score.bias.sigmoid(), torch.tensor(0.01))

    sparse = checkpoints.build("sparse-rcnn", 3, "tiny", **wide, queries=5, layers=2)
    assert sparse.boxes.weight.tolist() == [[0.5, 0.5, 1, 1]] * 5
    for stage in sparse.stages:
        assert torch.allclose(stage.score.bias.sigmoid(), torch.tensor(0.01))
        linear = [m.weight for m in stage.modules() if isinstance(m, torch.nn.Linear)]
        assert all(is_xavier(weight) for weight in linear if len(weight) > 4)


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


# Sides that are no multiples of 32; the second picture is smaller on both.
SIZES = [(70, 90), (50, 61)]


def mixed_batch(model):
    """Both pictures as one batch, padded as the detector wants it: images and mask."""
    r = torch.Generator().manual_seed(1)
    samples = [(torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=r), {})
               for size in SIZES]
    images, mask, _ = data.collate(samples, model.divisor)
    return images, mask


@pytest.mark.parametrize("detector, sides", [
    ("detr", (70, 90)), ("deformable-detr", (70, 90)), ("sparse-rcnn", (96, 96))])
def test_a_batch_is_padded_as_published(detector, sides):
    """DETR's family: to its largest picture.  Sparse R-CNN: to a multiple of 32."""
    images, mask = mixed_batch(small(detector))
    assert images.shape[2:] == mask.shape[1:] == sides


def test_masks_positions_and_valid_shares_of_sides_that_are_no_multiples_of_32():
    """By hand, of 50 x 61 pixels in a batch of 70 x 90.

    A level of stride s has ceil(70 / s) x ceil(90 / s) cells; cell i is padding where pixel
    floor(i * 70 / cells) is.  Stride 8: 9 x 12 cells, 7 x 9 of them valid; 16: 5 x 6, 4 x 5;
    32: 3 x 3, all.  Shares count cells.
    """
    model = small("deformable-detr")                    # strides 8, 16, 32
    images, mask = mixed_batch(model)
    with torch.no_grad():
        _, position, padding, shapes, sizes, valid = model.encoder_inputs(images, mask)
    assert [tuple(shape) for shape in shapes] == [(9, 12), (5, 6), (3, 3)]
    assert sizes.tolist() == [[12, 9], [6, 5], [3, 3]]
    expected = torch.tensor([[9 / 12, 7 / 9], [5 / 6, 4 / 5], [1, 1]])
    assert torch.allclose(valid[1], expected) and (valid[0] == 1).all()

    cells = [h * w for h, w in shapes]
    levels = zip(padding[1].split(cells), position[1].split(cells), shapes, model.level_code,
                 [(7, 9), (4, 5), (3, 3)])
    for m, codes, (h, w), level_code, (rows, columns) in levels:
        m = m.view(h, w)
        assert not m[:rows, :columns].any() and m[rows:].all() and m[:, columns:].all()
        # a sine whose first frequency is 1: cell i lies at 2 pi (i + 1/2) / rows
        y = (codes - level_code).view(h, w, -1)[:rows, 0, 0]
        turns = [math.sin(2 * math.pi * (i + 0.5) / rows) for i in range(rows)]
        assert y.tolist() == pytest.approx(turns, abs=1e-4)


@pytest.mark.parametrize("detector", ["detr", "deformable-detr"])
def test_the_largest_picture_of_a_batch_is_answered_as_if_it_were_alone(detector):
    """It has no padding; to a multiple of 32 it would have some, and be answered otherwise."""
    model = small(detector)
    images, mask = mixed_batch(model)
    together, alone = run(model, images, mask).image(0), run(model, images[:1]).image(0)
    assert (together.boxes - alone.boxes).abs().max() < 1e-2
    assert (together.logits - alone.logits).abs().max() < 1e-4
    padded, its_mask, _ = data.collate([(images[0], {})], 32)
    other = run(model, padded, its_mask).image(0)
    assert (other.logits - alone.logits).abs().max() > 0.01


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
    for ours in ("pixels", "unused_ids"):                # of the files, not of the architectures
        defaults.pop(ours, None)
    assert defaults.pop("many") == 0                     # not in the papers
    assert defaults == PUBLISHED[detector]


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


@every_query_detector
def test_nms_works_on_the_k_best(detector):
    """Three queries, the two best of which overlap; with k = 2 the third is in neither list."""
    model = small(detector)
    logits = torch.full((3, 3 + (detector == "detr")), -9.0)
    logits[:, 0] = torch.tensor([5.0, 4.0, 3.0])
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60.0]])
    found = model.detections(Prediction(logits, boxes, softmax=detector == "detr"), k=2)
    assert found["plain"][0].tolist() == boxes[:2].tolist()
    assert found["nms"][0].tolist() == boxes[:1].tolist()
    assert found["nms"][2].tolist() == [0]


def test_unused_ids_take_part_in_the_softmax_and_are_not_reported():
    """DETR, by hand: classes a and b, one unused id, "no object"; exp of the logits is 4 3 2 1.

    The first query is a with 4/10, which without the unused id would be 4/8; the second is b with
    5/10; the third says the unused id, 7/10, and so nothing.
    """
    logits = torch.tensor([[[4.0, 3, 2, 1], [1, 5, 3, 1], [1, 1, 7, 1]]]).log()
    boxes = torch.arange(12.0).view(1, 3, 4)
    model = small("detr", num_classes=2, unused_ids=1)
    assert model.score.out_features == 4
    found = model.detections(Prediction(logits, boxes, softmax=True).image(0))["plain"]
    assert [part.tolist() for part in found[:1]] == [[[4, 5, 6, 7], [0, 1, 2, 3]]]
    assert found[1].tolist() == pytest.approx([0.5, 0.4]) and found[2].tolist() == [1, 0]


def test_unused_ids_rank_with_the_classes_and_are_not_reported():
    """Deformable DETR, by hand: of the 3 best pairs one is of the unused id, and 2 are left."""
    p = torch.tensor([[[0.5, 0.2, 0.8], [0.1, 0.6, 0.3]]])                 # a, b, unused
    boxes = torch.arange(8.0).view(1, 2, 4)
    model = small("deformable-detr", num_classes=2, unused_ids=1)
    assert all(score.out_features == 3 for score in model.score)
    for k, expected in [(3, [(0.6, 1), (0.5, 0)]), (4, [(0.6, 1), (0.5, 0)]),
                        (6, [(0.6, 1), (0.5, 0), (0.2, 1), (0.1, 0)])]:
        one = Prediction(p.logit(), boxes).image(0)
        _, scores, labels = model.detections(one, k)["plain"]
        assert scores.tolist() == pytest.approx([score for score, _ in expected])
        assert labels.tolist() == [label for _, label in expected]


def test_an_unused_id_is_a_negative_and_learns():
    """It is background in DETR's and Deformable DETR's losses: its logit is pressed down."""
    for detector in ("detr", "deformable-detr"):
        model = small(detector, unused_ids=2)
        prediction = model(pictures(), torch.zeros(2, 64, 96, dtype=torch.bool))
        prediction.logits.retain_grad()
        targets = [{"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([2]),
                    "size": torch.tensor([64, 96])}] * 2
        first, none = torch.tensor([0]), torch.tensor([], dtype=torch.long)
        matches = [[Match(first, first, none)] * 2] * 2
        sum(losses.set_loss(prediction, targets, matches, 2).values()).backward()
        assert (prediction.logits.grad[..., 3:5] > 0).all()
        assert (prediction.logits.grad[:, 0, 2] < 0).all()


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
