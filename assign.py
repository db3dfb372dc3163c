"""Which prediction is the positive sample of which object: Eq. 2 to 5, the subject of the paper.

A matching cost C (Eq. 2) says for every prediction q and object g what it would cost to make q
the positive sample of g.  A strategy (Eq. 3) turns the costs of one image into pairs.  The paper's two
findings are two lines of this file:

  1. the strategy must be one-to-one                        -> `hungarian`
  2. the cost must contain the classification cost (Eq. 5)  -> `matching_cost`, class_weight

To try an idea of your own, write `assign(cost)` in a file and run `python train.py --assign my.py:assign`;
`pytest tests/test_assign.py --assigner my.py:assign` tells whether it keeps the contract:

  cost: (Q, G) float32, lower is better, inf = forbidden; Q or G may be 0
  returns prediction (K,), object (K,), both long, on the device of cost: the positive pairs.  A prediction appears
  at most once, unless the function says `my_function.shares_predictions = True` (`my_function.one_to_one = True`
  makes the test check that too); object IGNORE makes a prediction neither positive nor negative.  Predictions that
  do not appear are negative.  Leave cost as it is, and do not depend on the order of its rows and columns.
"""
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert, box_iou, generalized_box_iou

IGNORE = -1


class AssignError(ValueError):
    """A strategy, or the numbers given to it, cannot be used: one sentence that says why."""


class Match(NamedTuple):
    """The positive samples of one image, and the predictions that are neither positive nor negative."""
    prediction: torch.Tensor    # (K,) long
    object: torch.Tensor        # (K,) long, whose sample prediction[k] is
    ignored: torch.Tensor       # (I,) long


# ------------------------------------------------------------------------------------------------
# costs: (Q, G), lower is better.  Boxes (Q, 4), (G, 4) xyxy pixels; size (2,) height, width of the image
# ------------------------------------------------------------------------------------------------

def classification_cost(logits, labels, alpha=0.25, gamma=2.0, eps=1e-8):
    """Price of calling prediction q the class of object g: C_cls in Eq. 5.

    logits: (Q, C)   labels: (G,)   returns (Q, G).

    It is the change in focal loss when q stops being background and becomes g's class: pay the
    positive term, get the negative one back.  Without it duplicates return (Table 2).
    """
    p = logits.float().sigmoid()[:, labels]                          # (Q, G)
    as_object = alpha * (1 - p) ** gamma * -(p + eps).log()
    as_background = (1 - alpha) * p ** gamma * -(1 - p + eps).log()
    return as_object - as_background


def softmax_cost(logits, labels):
    """DETR's classification cost: minus the probability of the object's class.

    logits: (Q, C + 1), the last column "no object"   labels: (G,)   returns (Q, G).
    """
    return -logits.float().softmax(-1)[:, labels]


def l1_cost(boxes, gt, size, centre=False):
    """Sum of the four coordinate differences, in units of the image's width and height: C_L1 in Eq. 4.

    Of the corners, or (`centre`, DETR and Deformable DETR) of centre, width and height.
    """
    if centre:
        boxes, gt = (box_convert(b, "xyxy", "cxcywh") for b in (boxes, gt))
    scale = size.flip(0).repeat(2).to(gt)                            # w, h, w, h
    return torch.cdist(boxes / scale, gt / scale, p=1)


def giou_cost(boxes, gt):
    """Minus the generalised IoU: C_iou in Eq. 4 (the paper writes IoU, the released code uses GIoU).

    Two boxes without extent give 0/0; such a pair counts as far apart (-1) rather than NaN, while a NaN
    among the coordinates stays NaN, for `match` to report.
    """
    giou = generalized_box_iou(boxes, gt)
    numbers = ~(boxes.isnan().any(1)[:, None] | gt.isnan().any(1))
    return -torch.where(giou.isnan() & numbers, -1.0, giou)


def iou_cost(boxes, gt):
    """Minus the IoU: RetinaNet's original rule compares anchors by it."""
    return -box_iou(boxes, gt)


def centre_cost(points, gt, size):
    """Distance from candidate point to box centre, C_loc of pre-defined points (Eq. 4 with lambda_iou = 0).

    points: (Q, 4) boxes without extent.  |dx| / width + |dy| / height, times 2: the released code compares
    x1 + x2 with x1 + x2 without halving, and the published numbers were made with that weight.
    """
    scale = size.flip(0).to(gt)                                      # w, h
    return torch.cdist((points[:, :2] + points[:, 2:]) / scale, (gt[:, :2] + gt[:, 2:]) / scale, p=1)


def side_distances(points, gt):
    """Left, top, right, bottom distance of each point to the sides of each box: (Q, G, 4)."""
    at = points[:, None]                                             # (Q, 1, 4)
    return torch.cat([at[..., :2] - gt[:, :2], gt[:, 2:] - at[..., 2:]], -1)


def in_level_range(points, levels, gt, strides):
    """True where FCOS lets a point's pyramid level care for an object: (Q, G) bool.

    The largest of the four distances must lie within [4, 8] strides of the level, the finest level
    reaching down to, and the coarsest up to, any distance: [-1, 64], [64, 128], ... [512, inf] for P3 to P7.
    """
    reach = side_distances(points, gt).amax(-1)                      # (Q, G)
    stride = torch.as_tensor(strides, dtype=reach.dtype, device=reach.device)[levels]              # (Q,), of each point's level
    low = (4 * stride).masked_fill(levels == 0, -1)[:, None]
    high = (8 * stride).masked_fill(levels == len(strides) - 1, float("inf"))[:, None]
    return (low <= reach) & (reach <= high)


def level_cost(points, levels, gt, strides):
    """Keeps FCOS's pre-defined candidates on the level that suits the object's size ("pre-defined layer", 3.2).

    A finite 9,999, so that an object no level cares for still gets its nearest point.  This uses the
    true four distances; the released code overwrites the top one with the bottom one.
    """
    return 9999.0 * ~in_level_range(points, levels, gt, strides)


def fcos_area_cost(points, levels, gt, strides, radius=1.5):
    """FCOS's original rule as a cost: the area of the box where the point may care for it, else inf.

    A point may care for an object if it lies inside the box, within `radius` strides of its centre, and
    on the level for its size.  Of several objects it takes the smallest: the cheapest.
    """
    inside = side_distances(points, gt).amin(-1) > 0
    reach = radius * torch.as_tensor(strides, dtype=points.dtype, device=points.device)[levels][:, None]       # (Q, 1)
    centre = (gt[:, :2] + gt[:, 2:]) / 2
    near = ((points[:, None, :2] - centre).abs().amax(-1) < reach)
    area = (gt[:, 2:] - gt[:, :2]).prod(1).expand(len(points), -1)
    return torch.where(inside & near & in_level_range(points, levels, gt, strides), area, float("inf"))


# the location cost of Eq. 4, for each kind of object candidate (Section 3.3) -----------------------
# `one` holds the predictions of one image: logits, boxes, candidates, levels, and how the detector scores (models.Prediction)

def predicted_location(one, target, l1_weight=5.0, giou_weight=2.0):
    """Between predicted box and object: what all end-to-end rows of Table 2 use."""
    return (l1_weight * l1_cost(one["boxes"], target["boxes"], target["size"], one.get("centre_l1", False))
            + giou_weight * giou_cost(one["boxes"], target["boxes"]))


def anchor_location(one, target, l1_weight=5.0, giou_weight=2.0):
    """Between pre-defined anchor box and object (RetinaNet)."""
    return predicted_location({"boxes": one["candidates"]}, target, l1_weight, giou_weight)


def point_location(one, target, l1_weight=5.0):
    """Between pre-defined point and object's centre (CenterNet)."""
    return l1_weight * centre_cost(one["candidates"], target["boxes"], target["size"])


def level_point_location(one, target, strides, l1_weight=5.0):
    """The same, on the pre-defined pyramid level (FCOS)."""
    return (point_location(one, target, l1_weight)
            + level_cost(one["candidates"], one["levels"], target["boxes"], strides))


def matching_cost(one, target, location=predicted_location, class_weight=2.0):
    """Eq. 5: C = lambda_cls * C_cls + C_loc.  (Q, G).  class_weight 0 is "location only" (Conclusion 3.1)."""
    cost = location(one, target)
    if class_weight:
        labels = torch.zeros_like(target["labels"]) if one.get("class_agnostic") else target["labels"]
        cost = cost + class_weight * (softmax_cost if one.get("softmax") else classification_cost)(one["logits"], labels)
    return cost


# ------------------------------------------------------------------------------------------------
# strategies: cost (Q, G) -> prediction (K,), object (K,)
# ------------------------------------------------------------------------------------------------

def cheapest(cost):
    """For every object its min(Q, G) cheapest predictions: their costs and rows, both (min(Q, G), G).

    Enough for an exact assignment: were an object given a prediction outside its G cheapest, one of those
    G would be free (the other objects use at most G - 1), and swapping to it costs no more.
    """
    values, rows = cost.topk(min(cost.shape), dim=0, largest=False)
    return values, rows


def solve(values, rows):
    """The cheapest one-to-one assignment among the candidates that `cheapest` found.  On the host (scipy)."""
    values, rows = values.double().numpy(), rows.numpy()
    used, at = np.unique(rows, return_inverse=True)
    finite = np.abs(values[np.isfinite(values)])
    # dearer than any set of allowed pairs, so that a forbidden one is taken only where nothing else is left
    forbidden = 1e3 + 4 * (finite.max() if finite.size else 0.0) * (1 + rows.shape[1])
    small = np.full((len(used), rows.shape[1]), forbidden)
    np.put_along_axis(small, at.reshape(rows.shape), np.where(np.isfinite(values), values, forbidden), 0)
    row, column = linear_sum_assignment(small)
    allowed = small[row, column] < forbidden
    return torch.from_numpy(used[row[allowed]]).long(), torch.from_numpy(column[allowed]).long()


def hungarian(cost):
    """One-to-one: the pairs that are cheapest in total; every object gets one prediction if there are enough.

    cost: (Q, G)   returns prediction (K,) ascending, object (K,), K = min(Q, G) less what inf forbids.

    In training `match` runs the two halves itself, `cheapest` for all images on the device and `solve` on the host, with one
    copy between them.  So to change it, change the halves, or copy it into a file of your own (--assign my.py:hungarian).
    """
    prediction, object_ = solve(*(part.cpu() for part in cheapest(cost)))
    return prediction.to(cost.device), object_.to(cost.device)


def min_cost(cost):
    """One positive per object: its cheapest prediction, without asking the other objects.

    The same answer as `hungarian` unless two objects want one prediction: then both get it.  The rule of
    the authors' first release; they report about equal AP.
    """
    if cost.shape[0] == 0:
        return cost.new_zeros(2, 0, dtype=torch.long).unbind()
    best, prediction = cost.min(dim=0)
    object_ = torch.arange(cost.shape[1], device=cost.device)
    return prediction[best < float("inf")], object_[best < float("inf")]


def one_to_many_iou(cost, positive=0.5, negative=0.4):
    """RetinaNet's rule on -IoU: at least 0.5 is positive, 0.4 to 0.5 neither, below negative (one-to-many).

    Every object also gets the predictions that come closest to it, ties included, however poor; but
    such a prediction keeps its own best object, which may be another one (as published).
    """
    if min(cost.shape) == 0:
        return cost.new_zeros(2, 0, dtype=torch.long).unbind()
    best, object_ = cost.min(dim=1)                                  # (Q,)
    low_quality = ((cost == cost.amin(dim=0)) & (cost < float("inf"))).any(1)
    is_positive = (best <= -positive) | low_quality
    ignored = (best <= -negative) & ~is_positive
    prediction = torch.cat([is_positive.nonzero()[:, 0], ignored.nonzero()[:, 0]])
    return prediction, torch.where(ignored, IGNORE, object_)[prediction]


def one_to_many_points(cost):
    """FCOS's rule: every prediction that may care for an object takes its cheapest one (one-to-many)."""
    if min(cost.shape) == 0:
        return cost.new_zeros(2, 0, dtype=torch.long).unbind()
    best, object_ = cost.min(dim=1)
    prediction = (best < float("inf")).nonzero()[:, 0]
    return prediction, object_[prediction]


def top_k(cost, k=9):
    """Each object's k cheapest predictions; one wanted by several objects goes to where it is cheapest (one-to-many)."""
    wanted = torch.full_like(cost, float("inf"))
    values, rows = cost.topk(min(k, cost.shape[0]), dim=0, largest=False)
    return one_to_many_points(wanted.scatter(0, rows, values))


hungarian.halves = cheapest, solve   # `match` copies to the host between them, once for all images
hungarian.one_to_one = True          # what a strategy claims, the contract test checks
min_cost.shares_predictions = True

ASSIGNERS = {"hungarian": hungarian, "min-cost": min_cost, "one-to-many-iou": one_to_many_iou,
             "one-to-many-points": one_to_many_points, "top-k": top_k}


def load_strategy(name):
    """A strategy by name, or `file.py:function` from a student's file.  Raises AssignError."""
    if name in ASSIGNERS:
        return ASSIGNERS[name]
    file, _, function = name.rpartition(":")
    if not file:
        raise AssignError(f"--assign {name}: no such strategy; use one-to-many, {', '.join(ASSIGNERS)}, or my.py:my_function")
    if not Path(file).is_file():
        raise AssignError(f"--assign {name}: the file {file} does not exist")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None:
        raise AssignError(f"--assign {name}: {file} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:                         # a student's file may raise anything
        raise AssignError(f"--assign {name}: {file} does not run: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, function, None)):
        raise AssignError(f"--assign {name}: {file} defines no function {function}")
    return getattr(module, function)


# ------------------------------------------------------------------------------------------------
# match: all images and layers of a batch
# ------------------------------------------------------------------------------------------------

def check_answer(answer, cost, assign):
    """Raises AssignError, in words for a student, if a strategy's answer is not two valid index vectors."""
    name = getattr(assign, "__name__", "assign")
    Q, G = cost.shape
    if not (isinstance(answer, (tuple, list)) and len(answer) == 2 and all(torch.is_tensor(v) for v in answer)):
        raise AssignError(f"{name} must return two tensors, prediction and object; it returned {type(answer).__name__}")
    prediction, object_ = answer
    if prediction.ndim != 1 or prediction.shape != object_.shape:
        raise AssignError(f"{name} must return two vectors of one length; it returned shapes "
                          f"{tuple(prediction.shape)} and {tuple(object_.shape)} for a cost of {Q} x {G}")
    if prediction.dtype != torch.long or object_.dtype != torch.long:
        raise AssignError(f"{name} must return long vectors (use .long()); it returned {prediction.dtype} and {object_.dtype}")
    if len(prediction) and not (0 <= prediction.min() and prediction.max() < Q
                                and IGNORE <= object_.min() and object_.max() < G):
        raise AssignError(f"{name} returned a prediction outside 0...{Q - 1} or an object outside 0...{G - 1}")
    return prediction.to(cost.device), object_.to(cost.device)


@torch.no_grad()
def match(prediction, targets, cost, assign):
    """Positive samples of a batch (Eq. 3): for every layer, a list with a Match per image.

    prediction: models.Prediction; layer 0 of the answer is its own, the others those of prediction.aux
    cost(one, target): the matching cost of one image, (Q, G)      assign(cost): the strategy

    Without gradient and in float32.  Raises AssignError with the image if a cost is NaN or a strategy
    fails.  The Hungarian solver works on the host: what it needs of all images and layers, and the
    NaN check, travel there in one copy.
    """
    answer, costs, nan, images, halves = [], [], [], [], getattr(assign, "halves", None)
    with torch.autocast(prediction.logits.device.type, enabled=False):
        for layer in [prediction, *prediction.aux]:
            for n, target in enumerate(targets):
                one = {"logits": layer.logits[n].float(), "boxes": layer.boxes[n].float(),
                       "candidates": layer.candidates, "levels": layer.levels,
                       "softmax": layer.softmax, "centre_l1": layer.centre_l1, "class_agnostic": layer.class_agnostic}
                c = cost(one, target).float()
                nan.append(c.isnan().any().float())
                costs.append(halves[0](c) if halves else c)
                images.append(target["image_id"])
        device = prediction.logits.device
        parcels = [torch.stack(nan)]
        if halves:                           # row numbers are exact in float32 up to 2^24
            parcels += [part.float().flatten() for pair in costs for part in pair]
        parcel = torch.cat(parcels).cpu()                            # <- the one copy
        bad = parcel[:len(costs)].nonzero()[:, 0].tolist()
        if bad:
            ids = ", ".join(str(i) for i in dict.fromkeys(images[b] for b in bad))
            raise AssignError(f"image {ids}: the matching cost holds NaN, so the network's output does too; "
                              f"lower --lr, set --clip-grad, or use --precision fp32")
        if halves:
            parts = parcel[len(costs):].split([part.numel() for pair in costs for part in pair])
            pairs = [halves[1](values.view(pair[0].shape), rows.view(pair[0].shape).long())
                     for values, rows, pair in zip(parts[::2], parts[1::2], costs)]
            joined = torch.cat([v for pair in pairs for v in pair]).to(device, non_blocking=True)
            flat = joined.split([len(v) for pair in pairs for v in pair])
            answer = [Match(p, o, p[:0]) for p, o in zip(flat[::2], flat[1::2])]
        else:
            for c, image in zip(costs, images):
                try:
                    prediction_, object_ = check_answer(assign(c), c, assign)
                    positive = object_ != IGNORE
                    answer.append(Match(prediction_[positive], object_[positive], prediction_[~positive]))
                except AssignError as error:
                    raise AssignError(f"image {image}: {error}") from None
                except Exception as error:                           # a student's function may raise anything
                    raise AssignError(f"image {image}: the strategy {getattr(assign, '__name__', assign)} failed on a "
                                      f"cost of {c.shape[0]} x {c.shape[1]}: {type(error).__name__}: {error}") from error
    return [answer[n:n + len(targets)] for n in range(0, len(answer), len(targets))]


# ------------------------------------------------------------------------------------------------
# CenterNet's original targets: a Gaussian instead of a pair
# ------------------------------------------------------------------------------------------------

def gaussian_radius(height, width, overlap=0.7):
    """How far (cells) a corner may move while the box keeps an IoU of `overlap`; tensors in, tensors out.

    CornerNet's three cases.  All take (b + sqrt(disc)) / 2, also where the textbook root divides by 2a: the
    published models were trained with these radii.
    """
    def root(a, b, c):
        return (b + (b ** 2 - 4 * a * c).clamp(min=0).sqrt()) / 2
    area, both = height * width, height + width
    r1 = root(1, both, area * (1 - overlap) / (1 + overlap))
    r2 = root(4, 2 * both, (1 - overlap) * area)
    r3 = root(4 * overlap, -2 * overlap * both, (overlap - 1) * area)
    return torch.minimum(torch.minimum(r1, r2), r3)


def heat_map(boxes, labels, num_classes, grid):
    """CenterNet's targets for one image.

    boxes: (G, 4) xyxy in cells of the output map   grid: its (H, W)
    returns the heat map (C, H, W), 1 at object centres, and the centre cells (G, 2) as (x, y), long.

    A Gaussian of sigma (2r + 1) / 6 within r cells of the truncated centre; where two meet the larger wins.
    """
    H, W = grid
    heat = boxes.new_zeros(num_classes, H, W)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    cell = torch.minimum(centre.long().clamp(min=0), torch.tensor([W - 1, H - 1], device=boxes.device))
    size = (boxes[:, 2:] - boxes[:, :2]).ceil()
    radius = gaussian_radius(size[:, 1], size[:, 0]).floor().clamp(min=0)                 # (G,)
    dy = torch.arange(H, device=boxes.device) - cell[:, 1:]                               # (G, H)
    dx = torch.arange(W, device=boxes.device) - cell[:, :1]                               # (G, W)
    sigma = ((2 * radius + 1) / 6)[:, None, None]
    blob = torch.exp(-(dy[:, :, None] ** 2 + dx[:, None] ** 2) / (2 * sigma ** 2))        # (G, H, W)
    near = (dy.abs()[:, :, None] <= radius[:, None, None]) & (dx.abs()[:, None] <= radius[:, None, None])
    blob = blob * (near & (blob >= torch.finfo(blob.dtype).eps))
    index = labels.view(-1, 1, 1).expand_as(blob)
    return heat.scatter_reduce(0, index, blob, "amax"), cell
