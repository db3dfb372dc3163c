"""Training losses (Eq. 1): classification over all samples, location over the positive ones.

    L = sum over i in P of [L_cls(i) + L_loc(i)]  +  sum over i in S \\ P of L_cls(i)          Eq. 1

S: the samples, all predictions of an image   P: the positive ones, which assign.match chose.

`set_loss` trains every one-to-one row of Tables 1 and 2.  The others are the detectors' original
losses, for the one-to-many rows: in the published numbers the two differ, and so they do here.
`ROWS`, at the end, says which cost, strategy and loss make a row.

All losses have one signature and return a dict of weighted terms whose sum is the loss:

    loss(prediction, targets, matches, num_objects, micro_batches=1)

matches: as assign.match returns them, one list per layer
num_objects: of the whole step, averaged over the processes, at least 1
micro_batches: of the step; a term that is a mean over one of them is divided by their number

All are float32, and finite, with finite gradients, for images without objects too.
"""
import copy
import functools
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss

import assign
import ideas
from assign import LAMBDA_CLS, LAMBDA_IOU, LAMBDA_L1
from models import get_deltas


def mean_over_processes(x):
    """A tensor's mean over all training processes, without gradient."""
    x = x.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def positives(targets, matches):
    """The positive samples P of a batch, joined over its images.

    Returns their index (image (K,), prediction (K,)) into tensors of shape (B, Q, ...), and their
    objects' boxes (K, 4) and labels (K,).
    """
    image = torch.cat([torch.full_like(m.prediction, n) for n, m in enumerate(matches)])
    prediction = torch.cat([m.prediction for m in matches])
    boxes = torch.cat([t["boxes"][m.object] for t, m in zip(targets, matches)])
    labels = torch.cat([t["labels"][m.object] for t, m in zip(targets, matches)])
    return (image, prediction), boxes, labels


# ------------------------------------------------------------------------------------------------
# the paper's loss
# ------------------------------------------------------------------------------------------------

def focal_loss(logits, index, labels, matches):
    """L_cls: sigmoid focal loss (alpha 0.25, gamma 2), summed over all predictions and classes.

    logits: (B, Q, C)   index, labels: of the positives; all others are negatives, except those a
    strategy told to ignore.
    """
    one_hot = torch.zeros_like(logits)
    one_hot[(*index, labels)] = 1
    loss = sigmoid_focal_loss(logits, one_hot, 0.25, 2.0)
    for n, m in enumerate(matches):
        if len(m.ignored):
            loss[n, m.ignored] = 0
    return loss.sum()


def softmax_loss(logits, index, labels, matches, no_object=0.1):
    """DETR's L_cls: cross entropy over C classes and "no object", which weighs a tenth.

    logits: (B, Q, C + 1)   index, labels: of the positives; all others are "no object", except
    those a strategy told to ignore.  Returns the weighted mean over the queries.
    """
    target = torch.full(logits.shape[:2], logits.shape[2] - 1, device=logits.device)
    target[index] = labels
    for n, m in enumerate(matches):
        target[n, m.ignored] = -100          # cross_entropy's own mark for what does not count
    if any(len(m.ignored) for m in matches) and (target < 0).all():
        return 0 * logits.sum()              # a mean over nothing would be NaN
    weight = logits.new_ones(logits.shape[2])
    weight[-1] = no_object
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), weight)


def set_loss(prediction, targets, matches, num_objects, micro_batches=1,
             lambda_cls=LAMBDA_CLS, lambda_l1=LAMBDA_L1, lambda_iou=LAMBDA_IOU):
    """The paper's training loss: Eq. 1 with the three terms and weights of the matching cost.

        L = lambda_cls L_cls + lambda_L1 L_L1 + lambda_iou L_iou

    Eq. 1 names no weights and no divisor; these are the released code's.  Each decoder layer pays
    the full loss.  Sums are divided by the number of objects, but DETR's softmax loss is a mean
    over the queries of the micro-batch.  A second branch weighs less, its negatives too.
    """
    terms = {"class": 0.0, "l1": 0.0, "giou": 0.0}
    scale = torch.stack([t["size"].flip(0).repeat(2) for t in targets])
    scale = scale.to(prediction.boxes)                                       # (B, 4) w, h, w, h

    for layer, layer_matches in zip([prediction, *prediction.aux], matches):
        index, gt, labels = positives(targets, layer_matches)
        boxes, size = layer.boxes[index], scale[index[0]]                    # (K, 4)

        if layer.softmax:
            mean = softmax_loss(layer.logits, index, labels, layer_matches)
            # a second group's queries, `many` times as many, pay as a sum, which its weight divides
            groups = layer.logits.shape[1] / prediction.logits.shape[1]
            terms["class"] += lambda_cls * layer.weight * groups * mean / micro_batches
        else:
            total = focal_loss(layer.logits, index, labels, layer_matches)
            terms["class"] += lambda_cls * layer.weight * total / num_objects

        giou = generalized_box_iou_loss(boxes, gt, reduction="sum")
        terms["giou"] += lambda_iou * layer.weight * giou / num_objects
        if layer.centre_l1:                  # DETR compares centres and sizes, in the cost too
            boxes = box_convert(boxes, "xyxy", "cxcywh")
            gt = box_convert(gt, "xyxy", "cxcywh")
        l1 = (boxes / size - gt / size).abs().sum()
        terms["l1"] += lambda_l1 * layer.weight * l1 / num_objects
    return terms


# ------------------------------------------------------------------------------------------------
# the original losses of the dense detectors
# ------------------------------------------------------------------------------------------------

class RetinaNetLoss(nn.Module):
    """RetinaNet's original losses: focal, and L1 between deltas (detectron2's form).

    Both are divided by a moving average of the number of positives (momentum 0.9, starting from
    100), which each process keeps for itself.  A class only because that number must be kept.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("positives_average", torch.tensor(100.0))

    def forward(self, prediction, targets, matches, num_objects=None, micro_batches=1):
        index, gt, labels = positives(targets, matches[0])
        deltas, anchors = prediction.raw["deltas"][index], prediction.candidates[index[1]]
        self.positives_average.mul_(0.9).add_(0.1 * max(len(anchors), 1))
        normaliser = self.positives_average.clone()  # backward may come after the next forward
        total = focal_loss(prediction.logits, index, labels, matches[0])
        l1 = (deltas - get_deltas(anchors, gt)).abs().sum()
        return {"class": total / normaliser / micro_batches, "l1": l1 / normaliser / micro_batches}


def centreness_target(points, gt):
    """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) for points inside their boxes: (K,)."""
    lt, rb = points[:, :2] - gt[:, :2], gt[:, 2:] - points[:, 2:]
    return (torch.minimum(lt, rb) / torch.maximum(lt, rb)).prod(1).sqrt()


def smooth_giou_loss(boxes, gt):
    """1 - GIoU with (I + 1) / (U + 1) in place of the IoU I / U, of intersection and union: (K,).

    boxes, gt: (K, 4) in strides of their level, as in the code of FCOS's authors (AdelaiDet).
    Because of the ones the loss depends on the unit: in strides a pair of small boxes pays less
    than in pixels.
    """
    shared = torch.minimum(boxes[:, 2:], gt[:, 2:]) - torch.maximum(boxes[:, :2], gt[:, :2])
    hull = torch.maximum(boxes[:, 2:], gt[:, 2:]) - torch.minimum(boxes[:, :2], gt[:, :2])
    intersection, hull = shared.clamp(min=0).prod(1), hull.prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (gt[:, 2:] - gt[:, :2]).prod(1)
    union = areas - intersection
    return 1 - (intersection + 1) / (union + 1) + (hull - union) / hull


def fcos_loss(prediction, targets, matches, num_objects=None, micro_batches=1, smooth=False):
    """FCOS's original losses: focal, GIoU weighted by centre-ness, centre-ness.

    Normalised by the number of positives, and the sum of their centre-ness, averaged over the
    processes.

    smooth: smooth_giou_loss, as the authors' code (COCO), else the usual GIoU loss (cvpods, the
    baseline on CrowdHuman)
    """
    index, gt, labels = positives(targets, matches[0])
    boxes, logit = prediction.boxes[index], prediction.raw["centreness"][index]
    centreness = centreness_target(prediction.candidates[index[1]], gt)      # (K,)

    own = torch.stack([centreness.new_tensor(len(gt)), centreness.sum()])
    count, total = mean_over_processes(own)
    count, total = count.clamp(min=1), total.clamp(min=1e-6)

    if smooth:
        stride = prediction.strides[index[1], None]
        giou = smooth_giou_loss(boxes / stride, gt / stride)
    else:
        giou = generalized_box_iou_loss(boxes, gt, reduction="none")
    entropy = F.binary_cross_entropy_with_logits(logit, centreness, reduction="sum")
    focal = focal_loss(prediction.logits, index, labels, matches[0])
    return {"class": focal / count / micro_batches,
            "giou": (giou * centreness).sum() / total / micro_batches,
            "centreness": entropy / count / micro_batches}


def gaussian_radius(height, width, overlap=0.7):
    """How far (cells) a corner may move while the box keeps an IoU of `overlap`; tensors.

    CornerNet's three cases.  All take (b + sqrt(disc)) / 2, also where the textbook root divides by
    2a: the published models were trained with these radii.
    """
    def root(a, b, c):
        return (b + (b ** 2 - 4 * a * c).clamp(min=0).sqrt()) / 2

    area, both = height * width, height + width
    r1 = root(1, both, area * (1 - overlap) / (1 + overlap))
    r2 = root(4, 2 * both, (1 - overlap) * area)
    r3 = root(4 * overlap, -2 * overlap * both, (overlap - 1) * area)
    return torch.minimum(torch.minimum(r1, r2), r3)


def heat_map(boxes, labels, cells, num_classes, grid):
    """CenterNet's class targets of one image: 1 at the positives, a Gaussian around each.

    boxes: (G, 4) xyxy in cells of the output map   cells: (G, 2) x, y long, the positive of each
    grid: (H, W) of the map   returns (C, H, W)

    Sigma is (2r + 1) / 6, cut off at r cells; where two meet the larger wins.  The radius is that
    of sides rounded up, as its authors have it (CenterNet-better does not round).
    """
    H, W = grid
    size = (boxes[:, 2:] - boxes[:, :2]).ceil()
    radius = gaussian_radius(size[:, 1], size[:, 0]).floor().clamp(min=0)                 # (G,)
    dy = torch.arange(H, device=boxes.device) - cells[:, 1:]                              # (G, H)
    dx = torch.arange(W, device=boxes.device) - cells[:, :1]                              # (G, W)

    sigma = ((2 * radius + 1) / 6)[:, None, None]
    blob = torch.exp(-(dy[:, :, None] ** 2 + dx[:, None] ** 2) / (2 * sigma ** 2))        # (G,H,W)
    near_y = dy.abs()[:, :, None] <= radius[:, None, None]
    near_x = dx.abs()[:, None] <= radius[:, None, None]
    blob = blob * (near_y & near_x & (blob >= torch.finfo(blob.dtype).eps))

    index = labels.view(-1, 1, 1).expand_as(blob)
    return boxes.new_zeros(num_classes, H, W).scatter_reduce(0, index, blob, "amax")


def centernet_loss(prediction, targets, matches, num_objects=None, micro_batches=1):
    """CenterNet's original losses: penalty-reduced focal, L1 on size (0.1) and offset.

    Sizes and offsets are in cells of the output map, and learned at the positives only.  The
    probabilities stay 1e-4 away from 0 and 1, as its authors have them (CenterNet-better: 1e-12).
    """
    C, (H, W) = prediction.logits.shape[2], prediction.raw["heat"].shape[2:]
    stride = prediction.strides[0]
    heats, count = [], 0
    size = offset = 0.0
    for n, (target, m) in enumerate(zip(targets, matches[0])):
        boxes, q = target["boxes"][m.object] / stride, m.prediction          # (K, 4), (K,)
        cell = torch.stack([q % W, q // W], 1)                               # (K, 2) x, y
        heat = heat_map(boxes, target["labels"][m.object], cell, C, (H, W))
        heats.append(heat.flatten(1).mT)                                     # (HW, C)

        centre = (boxes[:, :2] + boxes[:, 2:]) / 2
        size = size + (prediction.raw["size"][n][q] - (boxes[:, 2:] - boxes[:, :2])).abs().sum()
        offset = offset + (prediction.raw["offset"][n][q] - (centre - cell)).abs().sum()
        count += len(q)

    heat = torch.stack(heats)                                                # (B, HW, C)
    p = prediction.logits.sigmoid().clamp(1e-4, 1 - 1e-4)
    positive = heat == 1
    negatives = (1 - heat) ** 4 * p ** 2 * (1 - p).log()
    penalty = torch.where(positive, (1 - p) ** 2 * p.log(), negatives)
    # two numbers an object, as published
    return {"class": -penalty.sum() / positive.sum().clamp(min=1) / micro_batches,
            "size": 0.1 * size / (2 * count + 1e-4) / micro_batches,
            "offset": offset / (2 * count + 1e-4) / micro_batches}


# ------------------------------------------------------------------------------------------------
# the rows of Tables 1 and 2
# ------------------------------------------------------------------------------------------------

class Row(NamedTuple):
    """What makes a row: cost(one, target) -> (Q, G), strategy(cost) -> pairs, and the loss."""
    cost: Callable
    strategy: Callable
    loss: Callable


# the strategy of the one-to-one form is the default of --assign; a row that ends in a data set is
# that one's own
ROWS = {  # Table 1           cost                    strategy              loss
    "one-to-one":            (assign.matching_cost,   "hungarian",          set_loss),
    "retinanet one-to-many": (assign.anchor_iou_cost, "one-to-many-iou",    RetinaNetLoss()),
    "centernet one-to-many": (assign.cell_cost,       "min-cost",           centernet_loss),
    "fcos one-to-many":      (assign.fcos_area_cost,  "one-to-many-points", fcos_loss),
    "fcos one-to-many coco": (assign.fcos_area_cost,  "one-to-many-points",
                              functools.partial(fcos_loss, smooth=True)),
}
# Table 2: the location cost between objects and pre-defined candidates; else predicted_location
PREDEFINED = {"retinanet": assign.anchor_location,
              "centernet": assign.point_location,
              "fcos": assign.level_point_location}


def row(flags):
    """The Row that flags ask for.  Raises AssignError if there is no such strategy.

    flags: detector, assign, and those of data, cost, location_cost, class_cost and the lambdas in
    force.
    """
    if flags["assign"] == "one-to-many":
        name = f"{flags['detector']} one-to-many"
        cost, strategy, loss = ROWS.get(f"{name} {flags.get('data')}", ROWS[name])
        # a fresh copy, because RetinaNet's loss keeps a moving average
        return Row(cost, assign.load_strategy(strategy), copy.deepcopy(loss))

    cost, _, loss = ROWS["one-to-one"]
    lambdas = {name: flags[name] for name in ("lambda_l1", "lambda_iou")}
    predefined = flags.get("location_cost") == "predefined"
    if flags["assign"] == "one-to-many-iou":     # these two rules judge what they were made for
        cost = assign.anchor_iou_cost if predefined else assign.predicted_iou_cost
    elif flags["assign"] == "one-to-many-points":
        cost = assign.fcos_area_cost
    elif flags.get("cost"):
        cost = ideas.load("--cost", flags["cost"])
    else:
        location = PREDEFINED[flags["detector"]] if predefined else assign.predicted_location
        cost = functools.partial(cost, location=functools.partial(location, **lambdas),
                                 class_cost=flags["class_cost"])
    loss = functools.partial(loss, lambda_cls=flags["lambda_cls"], **lambdas)
    return Row(cost, assign.load_strategy(flags["assign"]), loss)


def many_row(flags):
    """Cost and strategy of the second branch that --many asks for, else None.

    The same cost, and up to `many` of an object's cheapest predictions or --many-assign's rule.
    """
    if not flags.get("many"):
        return None
    rule = flags["many_assign"]
    if rule == "top-k":
        return row(flags).cost, functools.partial(assign.top_k, k=flags["many"])
    strategy = assign.load_strategy(rule, "--many-assign")
    return row({**flags, "assign": rule}).cost, strategy


def many_weight(flags, progress):
    """What a second branch's loss weighs, times --many.  progress: of training, 0 to 1"""
    first, last = flags.get("many_weight", (1.0, 1.0))
    return first + (last - first) * progress
