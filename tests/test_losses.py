"""Are the losses those of the published recipes, and finite with finite gradients whatever comes?

Slow loops in Python's own floating point, written from the recipes, are the judges.
"""
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

import assign
import losses
from assign import Match
from models import Prediction

# The map of CenterNet for images of 32 x 48; classes.
STRIDE, GRID, C = 4, (8, 12), 3


def pairs(*rows, ignored=()):
    """A Match from (prediction, object) pairs."""
    prediction, object_ = torch.tensor(rows, dtype=torch.long).view(-1, 2).unbind(1)
    return Match(prediction, object_, torch.tensor(ignored, dtype=torch.long))


def batch(counts=(2, 0, 3), seed=0, scale=16.0, place=0.0, saturation=1.0, same=None,
          grid=GRID, dtype=torch.float32):
    """A Prediction with all that any loss needs, targets, and matches:
    object after object with prediction 0, 1, 2, ...

    counts: objects per image.  Box sides are half to one `scale`,
    corners within a `scale` of `place`.
    same: "equal" (matched predictions are their objects), "identical" (all predictions are one)
    or "empty" (predicted boxes have no extent, as where a ReLU gives four zeros).
    """
    r = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=r, dtype=dtype)

    def boxes(*shape):
        corner = place + scale * rand(*shape, 2)
        return torch.cat([corner, corner + scale * (0.5 + 0.5 * rand(*shape, 2))], -1)

    B, Q, first = len(counts), grid[0] * grid[1], [sum(counts[:n]) for n in range(len(counts))]
    targets = [{"size": torch.tensor([32, 48]), "boxes": boxes(G), "image_id": n,
                "labels": torch.randint(0, C, (G,), generator=r)} for n, G in enumerate(counts)]
    matches = [pairs(*((first[n] + g, g) for g in range(G))) for n, G in enumerate(counts)]

    # Points of positives lie inside their objects, as FCOS has it.
    gt, anchors, points = torch.cat([t["boxes"] for t in targets]), boxes(Q), boxes(Q)
    K = len(gt)
    points[:K] = (gt[:, :2] + (0.3 + 0.4 * rand(K, 2)) * (gt[:, 2:] - gt[:, :2])).repeat(1, 2)

    out = {"logits": saturation * (4 * rand(B, Q, C) - 2),
           "centreness": saturation * (4 * rand(B, Q) - 2),
           "boxes": boxes(B, Q), "deltas": rand(B, Q, 4) - 0.5,
           "size": 4 * rand(B, Q, 2), "offset": rand(B, Q, 2)}
    if same == "identical":
        out = {key: value[:1, :1].expand_as(value).clone() for key, value in out.items()}
    if same == "empty":
        out["boxes"][..., 2:] = out["boxes"][..., :2]
    if same == "equal":
        anchors[:K] = gt
        for n, m in enumerate(matches):
            out["boxes"][n, m.prediction] = targets[n]["boxes"]
            out["deltas"][n, m.prediction] = 0

    raw = {**out, "points": points.expand(B, -1, -1)}
    return Prediction(out["logits"], out["boxes"], anchors, raw=raw), targets, matches


def on_map(prediction, targets, grid=GRID):
    """The same as CenterNet's original returns it, a cell a prediction, and its own matches."""
    y, x = torch.meshgrid(*(STRIDE * torch.arange(side) + STRIDE // 2 for side in grid),
                          indexing="ij")
    points = torch.stack([x, y] * 2, -1).view(-1, 4).float()
    heat = prediction.logits.mT.unflatten(2, grid)
    prediction = dataclasses.replace(prediction, candidates=points,
                                     strides=torch.full((len(points),), float(STRIDE)),
                                     raw={**prediction.raw, "heat": heat})
    return prediction, assign.match(prediction, targets, assign.cell_cost, assign.min_cost)


# What a loss takes from the network; "fcos coco" is that data set's own.
USES = {
    "set": ["logits", "boxes"],
    "retinanet": ["logits", "deltas"],
    "fcos": ["logits", "boxes", "centreness"],
    "fcos coco": ["logits", "boxes", "centreness"],
    "centernet": ["logits", "size", "offset"],
}
every_loss = pytest.mark.parametrize("name", USES)


def compute(name, prediction, targets, matches, outputs, grid=GRID, micro_batches=1):
    """The sum of a loss's terms, with `outputs` in the place of what the network computed."""
    raw = {**prediction.raw, **outputs}
    prediction = dataclasses.replace(prediction, logits=raw["logits"], boxes=raw["boxes"], raw=raw)
    matches, loss = [matches], losses.set_loss
    if name != "set":
        detector, _, data = name.partition(" ")
        loss = losses.row({"detector": detector, "assign": "one-to-many", "data": data}).loss
    if name.startswith("fcos"):
        strides = torch.full((len(raw["points"][0]),), 8.0)
        prediction = dataclasses.replace(prediction, candidates=raw["points"][0], strides=strides)
    if name == "centernet":
        prediction, matches = on_map(prediction, targets, grid)
    num_objects = max(1, sum(len(m.prediction) for m in matches[0]))
    return sum(loss(prediction, targets, matches, num_objects, micro_batches).values())


# ------------------------------------------------------------------------------------------------
# slow loops
# ------------------------------------------------------------------------------------------------

def slow_class_loss(logits, targets, matches):
    """Focal loss, alpha 0.25 and gamma 2, over every prediction and class of every image."""
    total = 0.0
    for image, target, m in zip(logits.tolist(), targets, matches):
        matched_to = zip(m.prediction.tolist(), m.object.tolist())
        positive = {(q, target["labels"][g].item()) for q, g in matched_to}
        for q, row in enumerate(image):
            for c, logit in enumerate(row):
                p = 1 / (1 + math.exp(-logit))
                if (q, c) in positive:
                    total -= 0.25 * (1 - p) ** 2 * math.log(p)
                elif q not in m.ignored.tolist():
                    total -= 0.75 * p ** 2 * math.log(1 - p)
    return total


def slow_giou(a, b):
    area_a, area_b = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return inter / (area_a + area_b - inter) - (hull - area_a - area_b + inter) / hull


def matched(values, targets, matches):
    """(value of the prediction, box of its object, number of the prediction), one by one."""
    return [(values[n, q].tolist(), targets[n]["boxes"][g].tolist(), q)
            for n, m in enumerate(matches)
            for q, g in zip(m.prediction.tolist(), m.object.tolist())]


def slow_set_loss(layer, targets, matches):
    boxes = matched(layer.boxes, targets, matches)
    unit = (48, 32, 48, 32)                              # width, height of the image
    return {"class": 2 * slow_class_loss(layer.logits, targets, matches),
            "l1": 5 * sum(abs(p - g) / u for a, b, _ in boxes for p, g, u in zip(a, b, unit)),
            "giou": 2 * sum(1 - slow_giou(a, b) for a, b, _ in boxes)}


def test_set_loss_agrees_with_a_slow_loop():
    """2 focal + 5 L1 + 2 (1 - GIoU), over the objects of the step;
    one image is empty, one prediction is shared.
    """
    prediction, targets, matches = batch()
    # min-cost may give one prediction to two objects
    matches[2] = pairs((5, 0), (5, 1), (9, 2))
    terms = losses.set_loss(prediction, targets, [matches], num_objects=5)
    expected = slow_set_loss(prediction, targets, matches)
    assert {key: value.item() for key, value in terms.items()} == pytest.approx(
        {key: value / 5 for key, value in expected.items()}, rel=1e-4)


def test_set_loss_by_hand():
    """One object of 8 x 8, predicted 4 pixels to the right of it in a picture 48 wide,
    at a logit of 0.
    """
    prediction = Prediction(torch.zeros(1, 1, 1), torch.tensor([[[4.0, 0, 12, 8]]]))
    target = {"size": torch.tensor([32, 48]), "boxes": torch.tensor([[0.0, 0, 8, 8]]),
              "labels": torch.tensor([0])}
    terms = losses.set_loss(prediction, [target], [[pairs((0, 0))]], num_objects=1)
    assert terms["class"].item() == pytest.approx(2 * 0.25 * 0.25 * math.log(2))
    assert terms["l1"].item() == pytest.approx(5 * (4 / 48 + 4 / 48))
    # the hull is the union
    assert terms["giou"].item() == pytest.approx(2 * (1 - 32 / 96))


def test_each_decoder_layer_pays_the_full_set_loss():
    """With its own matches, and the terms add up."""
    prediction, targets, matches = batch()
    prediction.aux = [batch(seed=1)[0], batch(seed=2)[0]]
    layers = [prediction, *prediction.aux]
    each = [matches,
            [pairs((7, 1), (8, 0)), pairs(), pairs((1, 2))],
            [pairs(), pairs(), pairs((3, 0), ignored=[4, 5])]]
    terms = losses.set_loss(prediction, targets, each, num_objects=2)
    expected = [slow_set_loss(layer, targets, m) for layer, m in zip(layers, each)]
    for key, value in terms.items():
        assert value.item() == pytest.approx(sum(layer[key] for layer in expected) / 2, rel=1e-4)


def test_retinanet_loss_agrees_with_a_slow_loop_over_three_steps():
    """Focal and L1 of deltas, over 0.9 old + 0.1 new number of positives, from 100;
    the ignored pay no class loss.
    """
    average, loss = 100.0, losses.RetinaNetLoss()
    for step, counts in enumerate([(2, 0, 3), (0, 0, 0), (4, 1, 0)]):
        prediction, targets, matches = batch(counts, seed=step)
        matches[1] = matches[1]._replace(ignored=torch.tensor([60, 70]))
        prediction.raw["deltas"].requires_grad_()
        average = 0.9 * average + 0.1 * max(1, sum(counts))

        l1 = 0.0
        for delta, (x1, y1, x2, y2), q in matched(prediction.raw["deltas"], targets, matches):
            ax1, ay1, ax2, ay2 = prediction.candidates[q].tolist()
            aw, ah = ax2 - ax1, ay2 - ay1
            goal = ((x1 + x2 - ax1 - ax2) / 2 / aw, (y1 + y2 - ay1 - ay2) / 2 / ah,
                    math.log((x2 - x1) / aw), math.log((y2 - y1) / ah))
            l1 += sum(abs(d - g) for d, g in zip(delta, goal))

        terms = loss(prediction, targets, [matches])
        focal = slow_class_loss(prediction.logits, targets, matches)
        assert terms["class"].item() == pytest.approx(focal / average, rel=1e-4)
        assert terms["l1"].item() == pytest.approx(l1 / average, rel=1e-4)
        assert loss.positives_average.item() == pytest.approx(average)

        # training may ask for the first step's gradient after the second: its divisor is the first
        if step == 0:
            early, deltas = sum(terms.values()), prediction.raw["deltas"]
            share, positive = 1 / average, (torch.tensor([0, 0]), torch.tensor([0, 1]))
        if step == 1:
            early.backward()
            assert deltas.grad[positive].abs().flatten().tolist() == pytest.approx([share] * 8)


# class_cost is not lambda_cls, which weighs the loss
WEIGHTS = {"assign": "hungarian", "class_cost": 3.0, "lambda_cls": 7.0, "lambda_l1": 11.0,
           "lambda_iou": 13.0}


@pytest.mark.parametrize("detector, location", [
    ("fcos", "predicted"),
    ("retinanet", "predefined"),
    ("centernet", "predefined"),
    ("fcos", "predefined"),
])
def test_the_weights_asked_for_reach_cost_and_loss(detector, location):
    """Boxes 11 L1 - 13 GIoU, points 11 times twice their distance; classes 3 times the focal
    loss they change.  All points are of one level here, on which no object is off its level.
    """
    prediction, targets, matches = batch()
    if detector != "retinanet":
        prediction.candidates = prediction.candidates[:, :2].repeat(1, 2)
    prediction.strides = torch.full((len(prediction.candidates),), 8.0)
    row = losses.row({**WEIGHTS, "detector": detector, "location_cost": location})
    one, gt, unit = prediction.image(0), targets[0]["boxes"], (48, 32, 48, 32)

    def between_boxes(a, b):
        l1 = sum(abs(p - g) / u for p, g, u in zip(a, b, unit))
        return 11 * l1 - 13 * slow_giou(a, b)

    def between_points(a, b):
        return 11 * sum(abs(2 * a[n] - b[n] - b[n + 2]) / unit[n] for n in (0, 1))

    boxes = one.boxes if location == "predicted" else one.candidates
    price = between_boxes if location == "predicted" or detector == "retinanet" else between_points
    away = torch.tensor([[price(a, b) for b in gt.tolist()] for a in boxes.tolist()])
    logits = one.logits[:, targets[0]["labels"]]
    change = (sigmoid_focal_loss(logits, torch.ones_like(logits), 0.25, 2.0)
              - sigmoid_focal_loss(logits, torch.zeros_like(logits), 0.25, 2.0))
    torch.testing.assert_close(row.cost(one, targets[0]), away + 3 * change, atol=1e-4, rtol=1e-4)

    published = slow_set_loss(prediction, targets, matches)            # with 2, 5 and 2
    expected = {"class": published["class"] * 7 / 2, "l1": published["l1"] * 11 / 5,
                "giou": published["giou"] * 13 / 2}
    terms = row.loss(prediction, targets, [matches], num_objects=1)
    assert {key: value.item() for key, value in terms.items()} == pytest.approx(expected, rel=1e-4)


def slow_centreness(point, box):
    l, r = point[0] - box[0], box[2] - point[0]
    t, b = point[1] - box[1], box[3] - point[1]
    return math.sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b))


def test_centreness_by_hand():
    """1 in the middle; at a quarter of the width and half the height, the root of 1/3."""
    points, gt = torch.tensor([[4.0, 2, 4, 2], [2, 2, 2, 2]]), torch.tensor([[0.0, 0, 8, 4]] * 2)
    assert losses.centreness_target(points, gt).tolist() == pytest.approx([1, math.sqrt(1 / 3)])


def test_fcos_loss_agrees_with_a_slow_loop():
    """Focal and centre-ness over the positives' number,
    GIoU weighted by centre-ness over the sum of its targets.
    """
    prediction, targets, matches = batch((2, 0, 4))
    prediction.candidates = prediction.raw["points"][0]
    boxes = matched(prediction.boxes, targets, matches)
    goals = [slow_centreness(prediction.candidates[q].tolist(), box) for _, box, q in boxes]
    giou = sum(goal * (1 - slow_giou(a, b)) for goal, (a, b, _) in zip(goals, boxes))

    centreness = matched(prediction.raw["centreness"], targets, matches)
    scores = [1 / (1 + math.exp(-logit)) for logit, _, _ in centreness]
    entropy = -sum(goal * math.log(p) + (1 - goal) * math.log(1 - p)
                   for goal, p in zip(goals, scores))

    terms = losses.fcos_loss(prediction, targets, [matches])
    expected = {"class": slow_class_loss(prediction.logits, targets, matches) / 6,
                "giou": giou / sum(goals), "centreness": entropy / 6}
    assert {key: value.item() for key, value in terms.items()} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("box, gt, expected", [
    # overlap 3 x 2, union 10, which is the hull
    ([1, 0, 5, 2], [0, 0, 4, 2], 1 - 7 / 11),
    # the same at half the size: overlap 1.5, union 2.5
    ([0.5, 0, 2.5, 1], [0, 0, 2, 1], 1 - 2.5 / 3.5),
    # overlap 3 x 1, union 13, hull 5 x 3
    ([1, 1, 5, 3], [0, 0, 4, 2], 1 - 4 / 14 + 2 / 15),
    # 6 apart: overlap 0, union 8, hull 10 x 2
    ([8, 0, 10, 2], [0, 0, 2, 2], 1 - 1 / 9 + 12 / 20),
    # no extent, inside: overlap 0, union 8
    ([2, 1, 2, 1], [0, 0, 4, 2], 1 - 1 / 9),
    ([0, 0, 4, 2], [0, 0, 4, 2], 0),
])
def test_smooth_giou_loss_by_hand(box, gt, expected):
    """1 - (I + 1) / (U + 1) + (hull - U) / hull, in strides; it grows with the size of boxes."""
    found = losses.smooth_giou_loss(torch.tensor([box]).float(), torch.tensor([gt]).float())
    assert found.tolist() == pytest.approx([expected], abs=1e-6)


def fcos_by_hand():
    """Two objects of a picture, each with one positive, on the levels of stride 8 and 16.

    The first point lies at half the height and a quarter of the width: centre-ness is the root of
    1/3; the second in the middle.  In strides both boxes are 1 off to the right of 4 x 2 cells.
    """
    points = torch.tensor([[8.0, 8, 8, 8], [32, 16, 32, 16]])
    boxes = torch.tensor([[[8.0, 0, 40, 16], [16, 0, 80, 32]]])
    prediction = Prediction(torch.zeros(1, 2, 3), boxes, points, torch.tensor([8.0, 16.0]),
                            raw={"centreness": torch.zeros(1, 2)})
    target = {"boxes": torch.tensor([[0.0, 0, 32, 16], [0, 0, 64, 32]]),
              "labels": torch.tensor([0, 1])}
    return prediction, [target], [[pairs((0, 0), (1, 1))]]


@pytest.mark.parametrize("data, expected", [("coco", 1 - 7 / 11), ("crowdhuman", 1 - 6 / 10),
                                            ("scenes", 1 - 6 / 10), ("custom", 1 - 6 / 10)])
def test_fcos_on_coco_has_its_authors_giou(data, expected):
    """The authors' code: IoU 7/11 in strides, on either level; all others have the usual 6/10."""
    loss = losses.row({"detector": "fcos", "assign": "one-to-many", "data": data}).loss
    terms = loss(*fcos_by_hand())
    assert terms["giou"].item() == pytest.approx(expected, abs=1e-6)
    # of both targets, at a logit of 0
    assert terms["centreness"].item() == pytest.approx(math.log(2))


def test_fcos_weighs_giou_by_centreness():
    """Perfect on the second object, which weighs 1; the first weighs the root of 1/3."""
    prediction, targets, matches = fcos_by_hand()
    prediction.boxes[0, 1] = targets[0]["boxes"][1]
    weight = math.sqrt(1 / 3)
    terms = losses.fcos_loss(prediction, targets, matches, smooth=True)
    assert terms["giou"].item() == pytest.approx(weight * 4 / 11 / (1 + weight), abs=1e-6)


@pytest.mark.parametrize("counts", [(2, 0, 3), (0,)])
def test_centernet_loss_agrees_with_a_slow_loop(counts):
    """Penalty-reduced focal over the number of centres;
    sizes (weight 0.1) and offsets, in cells, at centre cells.
    """
    prediction, targets, _ = batch(counts)
    H, W = GRID
    size = offset = focal = 0.0
    centres = 0
    for n, target in enumerate(targets):
        heat = slow_heat_map(target["boxes"] / STRIDE, target["labels"], C, H, W)
        for x1, y1, x2, y2 in (target["boxes"] / STRIDE).tolist():
            cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
            # boxes of 16 pixels lie inside the 32 x 48
            at = int(cy) * W + int(cx)
            w, h = prediction.raw["size"][n, at].tolist()
            dx, dy = prediction.raw["offset"][n, at].tolist()
            size += abs(w - (x2 - x1)) + abs(h - (y2 - y1))
            offset += abs(dx - (cx - int(cx))) + abs(dy - (cy - int(cy)))
        for c in range(C):
            for y in range(H):
                for x in range(W):
                    p = 1 / (1 + math.exp(-prediction.logits[n, y * W + x, c].item()))
                    t = heat[c, y, x].item()
                    centres += t == 1
                    if t == 1:
                        focal -= (1 - p) ** 2 * math.log(p)
                    else:
                        focal -= (1 - t) ** 4 * p ** 2 * math.log(1 - p)

    values = 2 * sum(counts) + 1e-4
    prediction, matches = on_map(prediction, targets)
    terms = losses.centernet_loss(prediction, targets, matches)
    expected = {"class": focal / max(1, centres), "size": 0.1 * size / values,
                "offset": offset / values}
    assert {key: value.item() for key, value in terms.items()} == pytest.approx(
        expected, rel=1e-4, abs=1e-7)


# ------------------------------------------------------------------------------------------------
# CenterNet's original targets
# ------------------------------------------------------------------------------------------------

def slow_radius(h, w, overlap=0.7):
    """The three roots of the recipe, each with the plus sign and halved, as published."""
    roots = [(-b + math.sqrt(max(b * b - 4 * a * c, 0))) / 2 for a, b, c in (
        (1, -(h + w), h * w * (1 - overlap) / (1 + overlap)),
        (4, -2 * (h + w), (1 - overlap) * h * w),
        (4 * overlap, 2 * overlap * (h + w), (overlap - 1) * h * w))]
    return min(roots)


@pytest.mark.parametrize("height, width, radius", [
    (10, 10, 2.7332),
    (32, 64, 11.7694),
    (100, 50, 18.3896),
    (4, 4, 1.0933),
])
def test_gaussian_radius_has_the_published_quirk(height, width, radius):
    """The values of the released CenterNet, not those of the textbook root
    (0.8167, 3.4476, 5.3869, 0.3267).
    """
    both = torch.tensor([float(height)]), torch.tensor([float(width)])
    expected = slow_radius(height, width)
    assert losses.gaussian_radius(*both).item() == pytest.approx(radius, abs=1e-3) == expected


def slow_heat_map(boxes, labels, C, H, W):
    heat = np.zeros((C, H, W))
    for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist()):
        cx = min(max(int((x1 + x2) / 2), 0), W - 1)
        cy = min(max(int((y1 + y2) / 2), 0), H - 1)
        r = max(0, int(slow_radius(math.ceil(y2 - y1), math.ceil(x2 - x1))))
        for y in range(max(0, cy - r), min(H, cy + r + 1)):
            for x in range(max(0, cx - r), min(W, cx + r + 1)):
                value = math.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * ((2 * r + 1) / 6) ** 2))
                heat[label, y, x] = max(heat[label, y, x], value)
    return torch.tensor(heat, dtype=torch.float32)


def cells_of(boxes, H, W):
    """The truncated centres, within the map: (G, 2) x, y."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    return torch.minimum(centre.long().clamp(min=0), torch.tensor([W - 1, H - 1]))


@pytest.mark.parametrize("seed", range(5))
def test_heat_map_agrees_with_a_slow_loop(seed):
    """Boxes overlap, share classes, and reach over the edges of the map."""
    r = torch.Generator().manual_seed(seed)
    a, b = torch.rand(2, 9, 2, generator=r) * torch.tensor([30.0, 20.0])
    boxes = torch.cat([torch.minimum(a, b), torch.maximum(a, b) + 1], 1) - 3
    labels, cells = torch.arange(9) % 3, cells_of(boxes, 16, 24)
    heat = losses.heat_map(boxes, labels, cells, 4, (16, 24))
    torch.testing.assert_close(heat, slow_heat_map(boxes, labels, 4, 16, 24), atol=1e-6, rtol=1e-5)
    assert (heat[labels, cells[:, 1], cells[:, 0]] == 1).all()
    assert (heat[3] == 0).all()


def test_heat_map_by_hand():
    """Two boxes of 4 x 4 cells (radius 1, sigma 1/2), two cells apart:
    1 at the centres, the larger in between.
    """
    # centres (3.5, 3.5), (5.5, 3.9)
    boxes = torch.tensor([[1.5, 1.5, 5.5, 5.5], [3.5, 1.9, 7.5, 5.9]])
    cells = torch.tensor([[3, 3], [5, 3]])
    heat = losses.heat_map(boxes, torch.tensor([0, 0]), cells, 1, (8, 8))
    row = [0, 0, math.exp(-2), 1, math.exp(-2), 1, math.exp(-2), 0]
    assert heat[0, 3].tolist() == pytest.approx(row, abs=1e-6)
    assert heat[0, 2, 4].item() == pytest.approx(math.exp(-4)) and heat[0, 1].sum() == 0


def test_heat_map_of_no_objects_is_empty():
    none = torch.zeros(0, dtype=torch.long)
    heat = losses.heat_map(torch.zeros(0, 4), none, none.view(0, 2), 3, (4, 5))
    assert heat.shape == (3, 4, 5) and heat.sum() == 0


# ------------------------------------------------------------------------------------------------
# gradients
# ------------------------------------------------------------------------------------------------

@every_loss
def test_gradients_are_those_of_finite_differences(name):
    """In double precision, with the matches held fixed."""
    prediction, targets, matches = batch((2, 0, 1), grid=(2, 4), dtype=torch.float64)
    outputs = [prediction.raw[key].requires_grad_() for key in USES[name]]

    def loss(*values):
        outputs = dict(zip(USES[name], values))
        return compute(name, prediction, targets, matches, outputs, grid=(2, 4))

    assert torch.autograd.gradcheck(loss, outputs)


@every_loss
@pytest.mark.parametrize("counts", [(2, 0, 3), (0,)])
def test_losses_and_gradients_are_finite(name, counts):
    """Boxes of a thousandth to 100,000 pixels, logits up to +-50;
    perfect, identical, empty predictions; no objects: in every combination.
    """
    for case in itertools.product((1e-3, 10.0, 1e5), (0.0, 500.0), (0.0, 1.0, 25.0),
                                  (None, "equal", "identical", "empty")):
        scale, place, saturation, same = case
        prediction, targets, matches = batch(counts, 0, scale, place, saturation, same)
        outputs = {key: prediction.raw[key].requires_grad_() for key in USES[name]}
        loss = compute(name, prediction, targets, matches, outputs)
        loss.backward()
        assert loss.isfinite(), case
        for key, value in outputs.items():
            assert value.grad.isfinite().all(), f"{case}: the gradient of {key} is not finite"


@every_loss
def test_a_micro_batch_of_four_weighs_a_quarter_unless_the_step_divides_by_all_objects(name):
    """set_loss divides by the objects of the whole step, the others by what their part holds."""
    whole, quarter = (compute(name, *batch(), {}, micro_batches=n) for n in (1, 4))
    assert quarter.item() == pytest.approx(whole.item() / (1 if name == "set" else 4))


def test_the_class_loss_of_detr_is_the_mean_of_micro_batches():
    """Its weights are normalised in each part; L1 and GIoU by the objects of the whole step."""
    prediction, targets, matches = batch()
    prediction.softmax = True
    whole, quarter = (losses.set_loss(prediction, targets, [matches], 5.0, n) for n in (1, 4))
    parts = {"class": 4, "l1": 1, "giou": 1}
    for term, value in whole.items():
        assert quarter[term].item() == pytest.approx(value.item() / parts[term])


@every_loss
def test_without_objects_only_the_scores_learn(name):
    """All predictions are negatives; the location terms are zero,
    yet in the graph, as distributed training needs.
    """
    prediction, targets, matches = batch((0, 0))
    outputs = {key: prediction.raw[key].requires_grad_() for key in USES[name]}
    loss = compute(name, prediction, targets, matches, outputs)
    loss.backward()
    assert loss > 0
    for key, value in outputs.items():
        assert (value.grad > 0).all() if key == "logits" else (value.grad == 0).all()


def test_perfect_boxes_cost_nothing():
    prediction, targets, matches = batch(same="equal")
    terms = losses.set_loss(prediction, targets, [matches], 5)
    assert terms["l1"] == 0 and terms["giou"].item() == pytest.approx(0, abs=1e-5)
    l1 = losses.RetinaNetLoss()(prediction, targets, [matches])["l1"]
    assert l1.item() == pytest.approx(0, abs=1e-6)


def test_a_softmax_loss_of_nothing_but_ignored_queries_is_zero():
    logits = torch.randn(1, 3, 5, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.long)
    match = assign.Match(nothing, nothing, torch.arange(3))
    loss = losses.softmax_loss(logits, (nothing, nothing), nothing, [match])
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()
