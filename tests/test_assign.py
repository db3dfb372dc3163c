"""Is every cost what the paper and the released code say?  Does every strategy keep its contract?

`pytest tests/test_assign.py --assigner my.py:my_strategy --cost my.py:my_cost` puts your own to the
contract tests; `python grade.py my.py:my_strategy` does it in seconds, with points.
"""
import itertools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou, sigmoid_focal_loss

import assign
import ideas
from assign import (ASSIGNERS, IGNORE, AssignError, hungarian, match, min_cost, one_to_many_iou,
                    one_to_many_points, top_k)
from grade import check_contract, check_order, cost_cases
from models import Prediction

INF, NAN = float("inf"), float("nan")
ROOT = Path(__file__).resolve().parent.parent


def generator(seed):
    return torch.Generator().manual_seed(seed)


def random_boxes(n, seed=0, height=64, width=96, step=None):
    """(n, 4) boxes inside the image.

    With a step, corners lie on a grid, so that ties and exact limits occur.
    """
    a, b = torch.rand(2, n, 2, generator=generator(seed)) * torch.tensor([width, height])
    boxes = torch.cat([torch.minimum(a, b), torch.maximum(a, b) + 1], 1)
    return boxes if step is None else (boxes / step).round() * step


def random_cost(Q, G, forbidden=0.0, seed=0):
    """Costs in [-1, 0], so that they may be -IoU too; a share of the pairs is forbidden (inf)."""
    r = generator(seed)
    cost = torch.rand(Q, G, generator=r) - 1
    return cost.masked_fill(torch.rand(Q, G, generator=r) < forbidden, INF)


def as_set(prediction, object_):
    return set(zip(prediction.tolist(), object_.tolist()))


# ------------------------------------------------------------------------------------------------
# costs
# ------------------------------------------------------------------------------------------------

def test_classification_cost_has_the_published_values():
    """A confident prediction is cheap, one that says background is dear
    (values computed from the formula by hand).
    """
    p = torch.tensor([0.001, 0.01, 0.1, 0.5, 0.9, 0.99])
    cost = assign.classification_cost(torch.logit(p)[:, None], torch.tensor([0]))[:, 0]
    expected = torch.tensor([1.723484, 1.128381, 0.465483, -0.086643, -1.398557, -3.385144])
    torch.testing.assert_close(cost, expected, atol=1e-5, rtol=1e-5)


@given(st.lists(st.floats(-8, 8), min_size=3, max_size=12), st.lists(st.integers(0, 2), max_size=4))
def test_classification_cost_is_the_change_in_focal_loss(values, labels):
    """Calling q class c turns one entry of the focal loss from negative to positive;
    the cost is the difference.
    """
    logits = torch.tensor(values[:len(values) // 3 * 3]).view(-1, 3)
    labels = torch.tensor(labels, dtype=torch.long)
    chosen = logits[:, labels]
    change = (sigmoid_focal_loss(chosen, torch.ones_like(chosen), 0.25, 2.0)
              - sigmoid_focal_loss(chosen, torch.zeros_like(chosen), 0.25, 2.0))
    torch.testing.assert_close(assign.classification_cost(logits, labels), change,
                               atol=1e-4, rtol=1e-4)


def test_classification_cost_of_saturated_logits_is_finite():
    logits = torch.tensor([[-1e4], [-50.0], [50.0], [1e4]])
    assert assign.classification_cost(logits, torch.tensor([0])).isfinite().all()


def slow_l1(box, gt, size):
    (h, w), unit = size, (size[1], size[0], size[1], size[0])
    return sum(abs(a - b) / u for a, b, u in zip(box, gt, unit))


def slow_giou(a, b):
    area_a, area_b = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    union = area_a + area_b - inter
    return inter / union - (hull - union) / hull


def slow_centre(point, gt, size):
    """Twice the distance: the released code adds x1 + x2 without halving."""
    (h, w), (x, y) = size, point[:2]
    return 2 * (abs(x - (gt[0] + gt[2]) / 2) / w + abs(y - (gt[1] + gt[3]) / 2) / h)


def slow_in_range(point, level, gt, strides):
    """FCOS, inclusive at both ends: [-1, 8 s0], [4 s1, 8 s1], ... [4 sL, inf]
    on the largest of the four distances.
    """
    x, y = point[:2]
    reach = max(x - gt[0], y - gt[1], gt[2] - x, gt[3] - y)
    low = -1 if level == 0 else 4 * strides[level]
    high = INF if level == len(strides) - 1 else 8 * strides[level]
    return low <= reach <= high


def slow_area(point, level, gt, strides):
    """The area, for points strictly inside the box and within 1.5 strides of its centre,
    on the right level.
    """
    x, y = point[:2]
    inside = gt[0] < x < gt[2] and gt[1] < y < gt[3]
    near = max(abs(x - (gt[0] + gt[2]) / 2), abs(y - (gt[1] + gt[3]) / 2)) < 1.5 * strides[level]
    allowed = inside and near and slow_in_range(point, level, gt, strides)
    return (gt[2] - gt[0]) * (gt[3] - gt[1]) if allowed else INF


def every_pair(price, rows, columns):
    """(Q, G) tensor of price(row number, row, column), in Python's own floating point."""
    return torch.tensor([[price(q, row, column) for column in columns.tolist()]
                         for q, row in enumerate(rows.tolist())]).view(len(rows), len(columns))


def test_box_costs_agree_with_a_slow_loop():
    """Sum of corner differences in units of width and height,
    and minus the generalised IoU of every pair.
    """
    boxes, gt = random_boxes(15, 1), random_boxes(6, 2)
    torch.testing.assert_close(assign.l1_cost(boxes, gt, torch.tensor([64, 96])),
                               every_pair(lambda q, a, b: slow_l1(a, b, (64, 96)), boxes, gt))
    torch.testing.assert_close(assign.giou_cost(boxes, gt),
                               every_pair(lambda q, a, b: -slow_giou(a, b), boxes, gt))
    iou = assign.predicted_iou_cost(Prediction(None, boxes), {"boxes": gt})
    assert ((iou == INF) == (box_iou(boxes, gt) == 0)).all()
    torch.testing.assert_close(iou.masked_fill(iou == INF, 0.0), -box_iou(boxes, gt))


def test_l1_cost_by_hand():
    """8 pixels are 1/8 of a width of 64 and 1/4 of a height of 32."""
    boxes, gt = torch.tensor([[8.0, 0, 16, 32]]), torch.tensor([[0.0, 0, 16, 24]])
    assert assign.l1_cost(boxes, gt, torch.tensor([32, 64])).item() == pytest.approx(1 / 8 + 1 / 4)


def detr_by_hand():
    """One query and one object, and -GIoU, in a picture 64 wide and 32 high.

    Centres lie 4 to the right and 4 below, sides differ by 8 and 8; corners by 8 right and 8 down.
    The boxes share 192, their union is 448, their hull 512.
    """
    one = Prediction(torch.tensor([[4.0, 3, 2, 1]]).log(), torch.tensor([[8.0, 0, 16, 32]]))
    target = {"boxes": torch.tensor([[0.0, 0, 16, 24]]), "labels": torch.tensor([1]),
              "size": torch.tensor([32, 64])}
    return one, target, 64 / 512 - 192 / 448


def test_detrs_class_cost_is_minus_the_probability():
    """Its logits here are those of 4, 3, 2 tenths for the classes and 1 for "no object"."""
    one, target, _ = detr_by_hand()
    cost = assign.softmax_cost(one.logits, torch.tensor([1, 0, 0]))
    assert cost[0].tolist() == pytest.approx([-0.3, -0.4, -0.4])

    def nowhere(one, target):
        return torch.zeros(1, 1)

    one.softmax = True
    cost = assign.matching_cost(one, target, location=nowhere, class_cost=1)
    assert cost.item() == pytest.approx(-0.3)


def test_detrs_l1_compares_centres_and_sides():
    """Of predicted boxes; its family has no anchors, whose corners are compared."""
    one, target, far = detr_by_hand()
    centres, corners = 4 / 64 + 4 / 32 + 8 / 64 + 8 / 32, 8 / 64 + 8 / 32
    cost = assign.l1_cost(one.boxes, target["boxes"], target["size"], centre=True)
    assert cost.item() == pytest.approx(centres)

    one.candidates = one.boxes
    for centre_l1, l1 in ((False, corners), (True, centres)):
        one.centre_l1 = centre_l1
        predicted, anchor = assign.predicted_location, assign.anchor_location
        assert predicted(one, target).item() == pytest.approx(5 * l1 + 2 * far)
        assert anchor(one, target).item() == pytest.approx(5 * corners + 2 * far)


def test_giou_cost_of_boxes_without_extent_is_a_number():
    """Two empty boxes overlap in 0/0: they count as far apart,
    whether they coincide, share a line, or lie anywhere.
    """
    empty = torch.tensor([[1.0, 1, 1, 1], [9, 9, 9, 9], [1, 1, 1, 7], [4, 1, 8, 1]])
    assert assign.giou_cost(empty, empty).isfinite().all()
    assert (assign.giou_cost(empty[:2], empty[:2]) == 1).all()
    # a point inside: IoU 0, hull = union
    full = torch.tensor([[0.0, 0, 4, 4]])
    assert assign.giou_cost(empty[:1], full).item() == 0
    assert assign.giou_cost(full, full).item() == -1


@pytest.mark.parametrize("gt", [[0.0, 0, 4, 4], [1.0, 1, 1, 1]], ids=["box", "point"])
@pytest.mark.parametrize("box", [[NAN] * 4, [NAN, 0, 4, 4], [0, 0, 4, NAN], [5, NAN, 5, 7]])
def test_giou_cost_does_not_hide_nan(box, gt):
    """A NaN coordinate means a diverged network;
    no special case for empty boxes may cover it up.
    """
    assert assign.giou_cost(torch.tensor([box]), torch.tensor([gt])).isnan().all()


def test_centre_cost_agrees_with_a_slow_loop():
    points, gt = random_boxes(15, 1)[:, :2].repeat(1, 2), random_boxes(6, 2)
    torch.testing.assert_close(assign.centre_cost(points, gt, torch.tensor([64, 96])),
                               every_pair(lambda q, a, b: slow_centre(a, b, (64, 96)), points, gt))


@pytest.mark.parametrize("reach, levels", [
    (0, {0}), (63, {0}), (64, {0, 1}), (65, {1}), (128, {1, 2}),
    (200, {2}), (256, {2, 3}), (512, {3, 4}), (513, {4}), (100_000, {4}),
])
def test_fcos_level_ranges(reach, levels):
    """FCOS's published limits for P3 to P7, both ends included: -1, 64, 128, 256, 512, infinity.

    The box reaches only upwards from the point: the released code of OneNet loses this distance.
    """
    points, gt = torch.zeros(5, 4), torch.tensor([[0.0, -reach, 0, 0]])
    cares = assign.in_level_range(points, torch.tensor([8.0, 16, 32, 64, 128]), gt)[:, 0]
    assert set(cares.nonzero()[:, 0].tolist()) == levels


@pytest.mark.parametrize("strides", [(4,), (4, 8, 16)])
def test_fcos_costs_agree_with_a_slow_loop(strides):
    """9,999 off the object's level;
    the box's area where a point may care for it, forbidden elsewhere.
    """
    points, levels = [], []
    for level, s in enumerate(strides):
        for y in range(s // 2, 128, s):
            points += [[x, y, x, y] for x in range(s // 2, 128, s)]
        levels += [level] * (len(points) - len(levels))
    points, levels = torch.tensor(points).float(), torch.tensor(levels)
    gt = random_boxes(12, 3, 124, 124, step=2)

    off_level = every_pair(
        lambda q, p, b: 9999.0 * (not slow_in_range(p, levels[q], b, strides)), points, gt)
    area = every_pair(lambda q, p, b: slow_area(p, levels[q], b, strides), points, gt)
    assert len(strides) == 1 or 0 < (off_level > 0).sum() < off_level.numel()
    assert 0 < area.isfinite().sum() < area.numel()
    stride = torch.tensor(strides, dtype=torch.float32)[levels]
    assert torch.equal(assign.level_cost(points, stride, gt), off_level)
    one = Prediction(None, None, points, stride)
    assert torch.equal(assign.fcos_area_cost(one, {"boxes": gt}), area)


def one_image(Q=15, G=6, C=4):
    """The predictions and the target of one image, as assign.match hands them to a cost."""
    one = Prediction(torch.randn(Q, C, generator=generator(5)), random_boxes(Q, 1),
                     random_boxes(Q, 6), 4.0 * 2 ** (torch.arange(Q) % 3))
    target = {"boxes": random_boxes(G, 2), "labels": torch.arange(G) % C,
              "size": torch.tensor([64, 96])}
    return one, target


def test_location_costs_weigh_their_parts_as_published():
    """5 L1 - 2 GIoU between boxes;
    5 times the centre distance between points, plus 9,999 off the level.
    """
    one, target = one_image()
    size, strides, levels = (64, 96), (4, 8, 16), (torch.arange(15) % 3).tolist()

    def between_boxes(q, a, b):
        return 5 * slow_l1(a, b, size) - 2 * slow_giou(a, b)

    def between_points(q, a, b):
        return 5 * slow_centre(a, b, size)

    def on_its_level(q, a, b):
        return between_points(q, a, b) + 9999 * (not slow_in_range(a, levels[q], b, strides))

    torch.testing.assert_close(assign.predicted_location(one, target),
                               every_pair(between_boxes, one.boxes, target["boxes"]))
    torch.testing.assert_close(assign.anchor_location(one, target),
                               every_pair(between_boxes, one.candidates, target["boxes"]))

    one.candidates = one.candidates[:, :2].repeat(1, 2)
    torch.testing.assert_close(assign.point_location(one, target),
                               every_pair(between_points, one.candidates, target["boxes"]))
    torch.testing.assert_close(assign.level_point_location(one, target),
                               every_pair(on_its_level, one.candidates, target["boxes"]))


def test_matching_cost_without_class_is_location_alone():
    """Conclusion 3.1's "location only" does not look at the scores at all;
    by default they weigh 2 (Eq. 5).
    """
    one, target = one_image()
    location = every_pair(lambda q, a, b: 5 * slow_l1(a, b, (64, 96)) - 2 * slow_giou(a, b),
                          one.boxes, target["boxes"])
    alone = assign.matching_cost(Prediction(None, one.boxes), target, class_cost=0)
    torch.testing.assert_close(alone, location)

    logit = one.logits[:, target["labels"]]
    change = (sigmoid_focal_loss(logit, torch.ones_like(logit))
              - sigmoid_focal_loss(logit, torch.zeros_like(logit)))
    torch.testing.assert_close(assign.matching_cost(one, target), location + 2 * change,
                               atol=1e-4, rtol=1e-4)


@given(st.floats(-3, 5), st.sampled_from([0.0, 1.0, 50.0]), st.booleans(), st.integers(0, 9))
def test_matching_cost_is_finite(exponent, saturation, empty, seed):
    """Boxes of a thousandth to 100,000 pixels, saturated logits, predictions without extent."""
    one, target = one_image()
    one.boxes = random_boxes(15, seed) * 10 ** exponent / 100
    target["boxes"] = random_boxes(6, seed + 1) * 10 ** exponent / 100
    one.logits = saturation * one.logits.sign()
    if empty:
        one.boxes[:, 2:] = one.boxes[:, :2]
    assert assign.matching_cost(one, target).isfinite().all()


# ------------------------------------------------------------------------------------------------
# strategies
# ------------------------------------------------------------------------------------------------

def small_costs(values):
    return arrays(np.float32, array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=4),
                  elements=st.sampled_from(values)).map(torch.from_numpy)


def brute_force(cost):
    """(objects served, total cost) of the best of all one-to-one pairings:
    serve most objects, then pay least.
    """
    Q, G = cost.shape
    best = (0, 0.0)
    # None: the object goes without
    for rows in set(itertools.permutations([*range(Q), *[None] * G], G)):
        prices = [cost[q, g].item() for g, q in enumerate(rows) if q is not None]
        if INF not in prices:
            best = min(best, (-len(prices), sum(prices)))
    return -best[0], best[1]


@settings(max_examples=200)
@given(small_costs([-3.0, -1.0, 0.0, 1.0, 2.0, INF]))
def test_hungarian_is_the_best_of_all_pairings(cost):
    """No pairing serves more objects, and none that serves as many is cheaper;
    ties and forbidden pairs included.
    """
    prediction, object_ = hungarian(cost)
    assert (len(prediction), cost[prediction, object_].sum().item()) == brute_force(cost)


@pytest.mark.parametrize("Q, G, shift", [
    (2000, 40, 0.0),
    (2000, 40, -1.5),
    (2000, 40, 100.0),
    (30, 50, 0.0),
    (20_000, 100, 0.0),
])
def test_hungarian_of_a_dense_head_is_exact(Q, G, shift):
    """Looking at each object's G cheapest predictions loses nothing
    against scipy on the whole matrix.
    """
    cost = torch.rand(Q, G, generator=generator(Q + G)) * 3 + shift
    rows, columns = linear_sum_assignment(cost.double().numpy())
    assert as_set(*hungarian(cost)) == set(zip(rows.tolist(), columns.tolist()))


def test_hungarian_when_all_objects_want_the_same_predictions():
    """The hundredth object must be content with the hundredth prediction:
    none of its cheapest may be left out.
    """
    cost = (torch.rand(500, 1, generator=generator(0))
            + torch.rand(500, 100, generator=generator(1)) / 1000)
    rows, columns = linear_sum_assignment(cost.double().numpy())
    assert as_set(*hungarian(cost)) == set(zip(rows.tolist(), columns.tolist()))
    assert set(rows) == set(cost.mean(1).topk(100, largest=False).indices.tolist())


@pytest.mark.parametrize("crowd", [False, True], ids=["spread", "all want the same few"])
def test_hungarian_with_forbidden_pairs_serves_as_many_objects_as_possible(crowd):
    """As many as a maximum matching of the allowed pairs,
    at scipy's price with a very large cost for the others.
    """
    for seed in range(20):
        # whole numbers: sums are exact
        cost = (random_cost(60, 25, 0.93, seed) * 8).round()
        if crowd:
            cost[8:] = INF
        prediction, object_ = hungarian(cost)
        allowed = cost.isfinite().numpy()
        assert allowed[prediction, object_].all()
        partner = maximum_bipartite_matching(csr_array(allowed), perm_type="column")
        assert len(prediction) == (partner >= 0).sum()

        large = cost.double().nan_to_num(posinf=1e6).numpy()
        cheapest = large[linear_sum_assignment(large)].sum() - 1e6 * (25 - len(prediction))
        assert cost[prediction, object_].sum().item() == cheapest


def test_an_object_is_served_however_dear_that_makes_the_others():
    """All but the last could move to the next prediction, for nothing; then the last has none."""
    G, dear = 12, 1e6
    cost = torch.full((G, G), INF).fill_diagonal_(dear)
    cost[torch.arange(1, G), torch.arange(G - 1)] = 0
    prediction, object_ = hungarian(cost)
    assert prediction.tolist() == object_.tolist() == list(range(G))


def test_hungarian_answers_in_the_order_of_predictions():
    prediction, _ = hungarian(random_cost(50, 9))
    assert prediction.tolist() == sorted(prediction.tolist())


def test_two_twins_and_one_obvious_prediction():
    """The cheapest-prediction rule gives it to both objects; the Hungarian rule does not."""
    cost = torch.tensor([[0.0, 0.1],
                         [1.0, 1.0]])
    assert min_cost(cost)[0].tolist() == [0, 0]
    # 0 + 1 is less than 0.1 + 1
    assert as_set(*hungarian(cost)) == {(0, 0), (1, 1)}


@pytest.mark.parametrize("size", [9_999.0, 1e30])
def test_what_costs_much_is_not_forbidden(size):
    """level_cost adds 9,999 and promises that every object still gets a point."""
    cost = size + size * torch.rand(50, 2, generator=torch.Generator().manual_seed(0))
    prediction, object_ = hungarian(cost)
    assert sorted(object_.tolist()) == [0, 1]
    assert sorted(cost[prediction, object_].tolist()) == sorted(cost.amin(0).tolist())
    cost[:, 0] = INF
    assert hungarian(cost)[1].tolist() == [1]


@given(small_costs([-3.0, -1.0, 0.0, 1.0, INF]).filter(lambda cost: len(cost) > 0))
def test_min_cost_takes_every_objects_cheapest_prediction(cost):
    """numpy's arg-min of every column that holds an allowed pair."""
    prediction, object_ = min_cost(cost)
    served = [g for g in range(cost.shape[1]) if min(cost[:, g].tolist()) < INF]
    assert object_.tolist() == served
    assert cost[prediction, object_].tolist() == cost.numpy().min(0)[served].tolist()


def retinanet_answer(iou):
    """torchvision's matcher: for each prediction its object, -1 for negative, -2 for ignored."""
    return Matcher(0.5, 0.4, allow_low_quality_matches=True)(iou.mT.contiguous()).tolist()


def as_matcher(cost):
    answer = torch.full((len(cost),), -1)
    prediction, object_ = one_to_many_iou(cost)
    answer[prediction] = torch.where(object_ == IGNORE, -2, object_)
    return answer.tolist()


@pytest.mark.parametrize("step", [None, 16], ids=["anywhere", "on a grid, with ties"])
def test_one_to_many_iou_is_torchvisions_matcher_on_boxes(step):
    seen = set()
    for seed in range(30):
        anchors, gt = random_boxes(80, seed, step=step), random_boxes(5, 100 + seed, step=step)
        iou = box_iou(anchors + torch.tensor([0, 0, 1, 1]), gt + torch.tensor([0, 0, 2, 2]))
        assert as_matcher(-iou) == retinanet_answer(iou)
        seen |= {min(answer, 0) for answer in as_matcher(-iou)}
    # positives, negatives and ignored all occurred
    assert seen == {0, -1, -2}


@given(small_costs([-1.0, -0.75, -0.5, -0.45, -0.4, -0.25, 0.0])
       .filter(lambda cost: min(cost.shape) > 0))
def test_one_to_many_iou_is_torchvisions_matcher_at_its_limits(cost):
    """Exactly 0.5 is positive, exactly 0.4 is ignored;
    all predictions that tie for an object's best are positive.
    """
    assert as_matcher(cost) == retinanet_answer(-cost)


def test_an_object_that_no_predicted_box_meets_gets_none_of_them():
    boxes = torch.tensor([[0.0, 0, 9, 9], [4, 4, 9, 9], [20, 20, 30, 30]])
    gt = torch.tensor([[0.0, 0, 9, 9], [50, 50, 60, 60]])
    cost = assign.predicted_iou_cost(Prediction(None, boxes), {"boxes": gt})
    assert as_matcher(cost) == [0, -1, -1]


@given(small_costs([1.0, 2.0, 5.0, INF]))
def test_one_to_many_points_takes_the_cheapest_object_that_is_allowed(cost):
    prediction, object_ = one_to_many_points(cost)
    allowed = [q for q, row in enumerate(cost.tolist()) if row and min(row) < INF]
    assert prediction.tolist() == allowed
    assert cost[prediction, object_].tolist() == [min(cost[q].tolist()) for q in allowed]


@pytest.mark.parametrize("forbidden", [0.0, 0.6])
@pytest.mark.parametrize("Q, G, k", [(40, 5, 9), (40, 5, 1), (4, 6, 9)])
def test_top_k_agrees_with_a_slow_loop(Q, G, k, forbidden):
    """Every object asks for its k (9) cheapest predictions;
    a prediction says yes to the one it is cheapest for.
    """
    cost = random_cost(Q, G, forbidden, seed=k)
    price = cost.tolist()
    asked = {}
    for g in range(G):
        allowed = [q for q in range(Q) if price[q][g] < INF]
        asked[g] = sorted(allowed, key=lambda q: price[q][g])[:k]

    expected = set()
    for q in range(Q):
        asking = [g for g in range(G) if q in asked[g]]
        if asking:
            expected.add((q, min(asking, key=lambda g: price[q][g])))
    assert as_set(*(top_k(cost) if k == 9 else top_k(cost, k))) == expected


# ------------------------------------------------------------------------------------------------
# the contract: every strategy of ASSIGNERS, and every --assigner
# ------------------------------------------------------------------------------------------------

def pytest_generate_tests(metafunc):
    if "strategy" in metafunc.fixturenames:
        names = [*ASSIGNERS, *metafunc.config.getoption("--assigner")]
        metafunc.parametrize("strategy", names, indirect=True, scope="module")
    if "own_cost" in metafunc.fixturenames:
        metafunc.parametrize("own_cost", [*COSTS, *metafunc.config.getoption("--cost")])


@pytest.fixture(scope="module")
def strategy(request):
    return assign.load_strategy(request.param)


def test_the_rule_of_the_paper_claims_to_be_one_to_one():
    """So that the contract tests below hold it to that;
    only the rule of the first release shares predictions.
    """
    one_to_one = [name for name in ASSIGNERS if getattr(ASSIGNERS[name], "one_to_one", False)]
    assert one_to_one == ["hungarian"]
    sharing = [name for name in ASSIGNERS if getattr(ASSIGNERS[name], "shares_predictions", False)]
    assert sharing == ["min-cost"]


@pytest.mark.parametrize("forbidden", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("Q, G", [(0, 0), (0, 3), (7, 0), (1, 1), (1, 4), (3, 5), (5, 5), (60, 6)])
def test_contract_shapes(strategy, Q, G, forbidden):
    """Images without objects, more objects than predictions, no predictions, all pairs forbidden:
    all are answered.
    """
    check_contract(strategy, random_cost(Q, G, forbidden))


@given(cost=small_costs([-1.0, -0.75, -0.5, -0.4, -0.25, 0.0, INF]))
def test_contract_ties(strategy, cost):
    """Equal costs, and any pattern of forbidden pairs, do not break the contract."""
    check_contract(strategy, cost)


@pytest.mark.parametrize("forbidden", [0.0, 0.5])
@pytest.mark.parametrize("Q, G", [(30, 5), (4, 7)])
def test_contract_order(strategy, Q, G, forbidden):
    """The answer follows when predictions and objects change places."""
    for seed in range(5):
        check_order(strategy, random_cost(Q, G, forbidden, seed), generator(seed))


COSTS = {cost.__name__: cost for cost in (
    assign.matching_cost, assign.predicted_location, assign.anchor_location, assign.point_location,
    assign.predicted_iou_cost)}


def test_contract_of_costs(own_cost):
    """Any number of objects and predictions, empty boxes, certain scores, any order."""
    cost = COSTS.get(own_cost) or ideas.load("--cost", own_cost)
    for check, *case in cost_cases(generator(0)):
        check(cost, *case)


def first_come(cost):
    n = torch.arange(min(cost.shape))
    return n[cost[n, n] < INF], n[cost[n, n] < INF]


def greedy_in_place(cost):
    pairs = []
    while cost.numel() and cost.min() < INF:
        q, g = divmod(cost.argmin().item(), cost.shape[1])
        cost[q], cost[:, g] = INF, INF
        pairs.append((q, g))
    return torch.tensor(pairs, dtype=torch.long).view(-1, 2).unbind(1)


def claims_one_to_one(cost):
    return top_k(cost)


claims_one_to_one.one_to_one = True

BROKEN = {
    "two tensors": lambda cost: torch.stack(hungarian(cost)),
    "must be long": lambda cost: tuple(part.float() for part in hungarian(cost)),
    "vectors of one length": lambda cost: tuple(part[:, None] for part in hungarian(cost)),
    "must answer every cost":
        lambda cost: (cost.argmin(1), torch.arange(len(cost) // (cost.shape[1] - 3))),
    "not modify the cost": greedy_in_place,
    "a prediction must be one of":
        lambda cost: (hungarian(cost)[0] + len(cost), hungarian(cost)[1]),
    "an object must be one of": lambda cost: (hungarian(cost)[0], hungarian(cost)[1] - 2),
    "forbidden pair": lambda cost: hungarian(cost.nan_to_num(posinf=-9.0)),
    "at most once": lambda cost: min_cost(cost),
    "claims one_to_one": claims_one_to_one,
    "another order": first_come,
}


@pytest.mark.parametrize("sentence", BROKEN)
def test_a_broken_strategy_is_told_what_is_wrong(sentence):
    """Each rule of the contract has a strategy that breaks it,
    and this is the sentence its author reads.
    """
    cost = random_cost(12, 3, 0.2, seed=1)
    # all three want it
    cost[0] = torch.tensor([-3.0, -3.5, -4.0])
    with pytest.raises(AssertionError, match=sentence):
        check_order(BROKEN[sentence], cost, generator(0))


def copied(page, name, folder):
    """The one example on a page that begins with its file's name, as a reader copies it."""
    (example,) = [block.split("```")[0] for block in (ROOT / page).read_text().split("```python\n")
                  if block.startswith(f"# {name}")]
    (folder / name).write_text(example)


def test_the_readmes_example_keeps_the_contract(tmp_path):
    """What a student copies first must pass the test that the README tells to run next."""
    copied("README.md", "my.py", tmp_path)
    mine = assign.load_strategy(f"{tmp_path}/my.py:greedy")
    for Q, G, forbidden in itertools.product((0, 1, 9), (0, 1, 5, 12), (0.0, 0.4, 1.0)):
        prediction, object_ = check_contract(mine, random_cost(Q, G, forbidden))
        assert len(set(prediction.tolist())) == len(set(object_.tolist())) == len(prediction)


def test_the_cost_of_one_kind_allows_square_anchors_of_the_finest_level_alone(tmp_path):
    """The experiment of docs/results.md.  RetinaNet's anchors of two levels, by hand."""
    copied("docs/results.md", "one_kind.py", tmp_path)
    mine = ideas.load("--cost", f"{tmp_path}/one_kind.py:one_kind")
    sides = [(45, 23), (32, 32), (23, 45), (91, 45), (64, 64), (45, 91)]
    half = torch.tensor(sides) / 2
    anchors = torch.cat([40 - half, 40 + half], 1)
    one = Prediction(torch.zeros(6, 2), anchors, anchors, torch.tensor([8, 8, 8, 16, 16, 16]))
    target = {"boxes": torch.tensor([[20.0, 20, 60, 60]]), "labels": torch.tensor([1]),
              "size": torch.tensor([128, 128])}
    cost = mine(one, target)
    assert cost[:, 0].isfinite().tolist() == [False, True, False, False, False, False]
    allowed = assign.matching_cost(one, target, assign.anchor_location)
    assert cost[1] == allowed[1]


MY_OWN = """import assign

def good(cost):
    return assign.hungarian(cost)

def broken(cost):
    return assign.min_cost(cost)

def good_price(one, target):
    return assign.predicted_location(one, target)

def broken_price(one, target):
    return assign.predicted_location(one, target).log()
"""


def test_the_options_for_ones_own(tmp_path):
    """A good strategy or cost passes; the author of a broken one reads why it does not."""
    my = tmp_path / "my.py"
    my.write_text(MY_OWN)
    command = [sys.executable, "-m", "pytest", "tests/test_assign.py", "-q",
               "-p", "no:cacheprovider",
               "-k", "my.py and (test_contract_shapes or test_contract_of_costs)",
               "--assigner", f"{my}:good", "--assigner", f"{my}:broken",
               "--cost", f"{my}:good_price", "--cost", f"{my}:broken_price"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    failed = [line for line in run.stdout.splitlines() if line.startswith("FAILED")]
    assert run.returncode == 1, run.stdout
    for name in ("broken", "broken_price"):
        assert any(f"my.py:{name}-" in line or f"my.py:{name}]" in line for line in failed), failed
    assert all("my.py:broken" in line for line in failed), run.stdout
    assert "a prediction must appear at most once" in run.stdout
    assert "a cost must be a number or inf" in run.stdout
    # 24 shapes for either strategy, and two costs
    assert re.search(rf"{len(failed)} failed, {50 - len(failed)} passed", run.stdout), run.stdout


# ------------------------------------------------------------------------------------------------
# load_strategy
# ------------------------------------------------------------------------------------------------

def test_a_strategy_has_a_name_or_a_file(tmp_path):
    (tmp_path / "my.py").write_text("def mine(cost):\n    return 42\n")
    assert assign.load_strategy("hungarian") is hungarian
    assert assign.load_strategy(f"{tmp_path}/my.py:mine")(None) == 42


@pytest.mark.parametrize("name, words", [
    ("hungarain", "no such strategy.*hungarian"),
    ("missing.py:mine", "missing.py does not exist"),
    ("good.py:yours", "no function yours"),
    ("good.py:number", "no function number"),
    ("typo.py:mine", "SyntaxError"),
    ("raises.py:mine", "ZeroDivisionError"),
    ("notes.txt:mine", "notes.txt"),
])
def test_a_strategy_that_cannot_be_loaded_says_why(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    Path("good.py").write_text("number = 1\ndef mine(cost):\n    return 42\n")
    Path("typo.py").write_text("def mine(cost:\n")
    Path("raises.py").write_text("1 / 0\n")
    Path("notes.txt").write_text("def mine(cost):\n    return 42\n")
    with pytest.raises(AssignError, match=words):
        assign.load_strategy(name)


# ------------------------------------------------------------------------------------------------
# match
# ------------------------------------------------------------------------------------------------

def random_batch(counts=(3, 0, 5, 1), Q=30, C=4, aux=2):
    """Predictions with aux layers for images 100, 101, ... of as many objects as counts says."""
    def layer(seed):
        boxes = random_boxes(len(counts) * Q, seed).view(len(counts), Q, 4)
        return Prediction(torch.randn(len(counts), Q, C, generator=generator(seed)), boxes)

    prediction = layer(0)
    prediction.aux = [layer(1 + n) for n in range(aux)]
    targets = [{"image_id": 100 + n, "size": torch.tensor([64, 96]),
                "boxes": random_boxes(G, 50 + n), "labels": torch.arange(G) % C}
               for n, G in enumerate(counts)]
    return prediction, targets


@pytest.mark.parametrize("assigner", [hungarian, min_cost, lambda cost: hungarian(cost)],
                         ids=["hungarian", "min-cost", "my own"])
def test_match_solves_every_image_and_layer_on_its_own(assigner):
    """scipy (or arg-min) on the cost of one image and one layer
    gives what match gives for the whole batch.
    """
    prediction, targets = random_batch()
    answer = match(prediction, targets, assign.matching_cost, assigner)
    assert len(answer) == 3 and all(len(layer) == 4 for layer in answer)
    for layer, matches in zip([prediction, *prediction.aux], answer):
        for n, (target, m) in enumerate(zip(targets, matches)):
            one = Prediction(layer.logits[n], layer.boxes[n])
            cost = assign.matching_cost(one, target).numpy()
            if assigner is min_cost:
                expected = (cost.argmin(0), range(cost.shape[1]))
            else:
                expected = linear_sum_assignment(cost)
            rows, columns = expected
            assert as_set(m.prediction, m.object) == set(zip(map(int, rows), map(int, columns)))
            assert m.prediction.dtype == m.object.dtype == m.ignored.dtype == torch.long
            assert len(m.ignored) == 0


def test_match_hands_over_what_belongs_to_the_image():
    """The cost sees that image's logits, boxes and target,
    and the candidates that all images share.
    """
    prediction, targets = random_batch(aux=0)
    prediction.candidates, prediction.strides = random_boxes(30, 9), torch.arange(30)
    prediction.raw = {"centreness": torch.randn(4, 30)}
    seen = []

    def cost(one, target):
        seen.append(target["image_id"])
        n = target["image_id"] - 100
        assert torch.equal(one.logits, prediction.logits[n])
        assert torch.equal(one.boxes, prediction.boxes[n])
        assert one.candidates is prediction.candidates
        assert one.strides is prediction.strides
        assert torch.equal(one.raw["centreness"], prediction.raw["centreness"][n])
        assert isinstance(one, Prediction)
        return torch.zeros(30, len(target["boxes"]))

    match(prediction, targets, cost, min_cost)
    assert seen == [100, 101, 102, 103]


def test_match_keeps_ignored_predictions_apart():
    """Object -1 is neither a positive nor a negative sample."""
    prediction, targets = random_batch((2,), aux=0)

    def mine(cost):
        return torch.tensor([4, 7, 9]), torch.tensor([1, IGNORE, 0])

    m = match(prediction, targets, assign.matching_cost, mine)[0][0]
    assert (m.prediction.tolist(), m.object.tolist(), m.ignored.tolist()) == ([4, 9], [1, 0], [7])


@pytest.mark.parametrize("part", ["logits", "boxes"])
@pytest.mark.parametrize("rows", [slice(None), slice(8, 9)],
                         ids=["all predictions", "one prediction"])
@pytest.mark.parametrize("assigner", [hungarian, min_cost])
def test_match_names_the_image_whose_cost_is_nan(assigner, rows, part):
    """A diverged network stops with the image's id and what to try,
    before a solver can choke on it.
    """
    prediction, targets = random_batch()
    getattr(prediction.aux[0], part)[2, rows] = NAN
    with pytest.raises(AssignError, match="image 102: .*NaN.*--lr"):
        match(prediction, targets, assign.matching_cost, assigner)


@pytest.mark.parametrize("words, assigner", [
    ("two tensors", lambda cost: 3),
    ("two tensors", lambda cost: torch.stack(hungarian(cost))),
    ("two tensors", lambda cost: (*hungarian(cost), None)),
    ("two tensors", lambda cost: ([0], [0])),
    ("long", lambda cost: tuple(part.float() for part in hungarian(cost))),
    (r"one length.*\(3, 1\)", lambda cost: tuple(part[:, None] for part in hungarian(cost))),
    (r"one length.*\(3,\) and \(2,\).*30 x 3",
     lambda cost: (hungarian(cost)[0], hungarian(cost)[1][1:])),
    ("prediction outside 0...29", lambda cost: (hungarian(cost)[0] + 30, hungarian(cost)[1])),
    ("object outside 0...2", lambda cost: (hungarian(cost)[0], hungarian(cost)[1] + 3)),
    ("object outside", lambda cost: (hungarian(cost)[0], hungarian(cost)[1] - 9)),
    ("image 100: .*30 x 3: ZeroDivisionError", lambda cost: 1 / 0),
])
def test_match_says_what_is_wrong_with_a_strategy(words, assigner):
    prediction, targets = random_batch((3,), aux=0)
    with pytest.raises(AssignError, match=words):
        match(prediction, targets, assign.matching_cost, assigner)


@pytest.mark.parametrize("assigner", [hungarian, min_cost])
def test_match_runs_in_float32_without_gradient(assigner):
    """Under autocast, with a network's half-precision outputs that require gradient:
    same pairs, nothing recorded.
    """
    prediction, targets = random_batch(aux=0)
    prediction.logits, prediction.boxes = prediction.logits.bfloat16(), prediction.boxes.bfloat16()
    rounded = Prediction(prediction.logits.float(), prediction.boxes.float())
    prediction.logits.requires_grad_()

    def cost(one, target):
        assert not torch.is_grad_enabled()
        # autocast is off
        assert (one.boxes @ target["boxes"].mT).dtype == torch.float32
        return assign.matching_cost(one, target)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        answer = match(prediction, targets, cost, assigner)[0]
    for m, expected in zip(answer, match(rounded, targets, cost, assigner)[0]):
        assert as_set(m.prediction, m.object) == as_set(expected.prediction, expected.object)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_a_strategy_is_given_float32_whatever_the_cost_computes_in(kind):
    prediction, targets = random_batch((3,), aux=0)
    given = []

    def cost(one, target):
        return assign.matching_cost(one, target).to(kind)

    def mine(cost):
        given.append(cost.dtype)
        return hungarian(cost)

    match(prediction, targets, cost, mine)
    assert given == [torch.float32]


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_the_hungarian_answer_is_exact_in_other_precisions(kind):
    """Row numbers beyond 2,048 are no half-precision numbers."""
    cost = torch.rand(6000, 5, generator=torch.Generator().manual_seed(0)).to(kind)
    q, g = assign.hungarian(cost)
    rows, columns = linear_sum_assignment(cost.double().numpy())
    assert float(cost.double()[q, g].sum()) == pytest.approx(
        cost.double().numpy()[rows, columns].sum(), abs=1e-9)


def test_infinite_boxes_are_told_and_not_taken_for_forbidden_ones():
    """The network has diverged; a cost of +inf would leave the image without positives."""
    one = Prediction(torch.zeros(1, 4, 2), torch.full((1, 4, 4), INF))
    target = {"boxes": torch.tensor([[0.0, 0, 9, 9]]), "labels": torch.tensor([1]),
              "size": torch.tensor([32, 32]), "image_id": 7}
    with pytest.raises(assign.AssignError, match="image 7: .*the network's output does too"):
        match(one, [target], assign.matching_cost, hungarian)


def test_a_cost_of_minus_infinity_is_told_as_one():
    prediction = Prediction(torch.zeros(1, 6, 2), torch.rand(1, 6, 4))
    targets = [{"boxes": torch.rand(2, 4), "labels": torch.zeros(2, dtype=torch.long),
                "image_id": 7}]

    def bad(one, target):
        return torch.full((6, 2), -INF)
    with pytest.raises(assign.AssignError, match="image 7: the matching cost holds NaN or -inf"):
        assign.match(prediction, targets, bad, assign.hungarian)
