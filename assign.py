"""Which prediction is the positive sample of which object: Eq. 2 to 5, the subject of the paper.

A matching cost C (Eq. 2) says for every prediction q and object g what it would cost to make q
the positive sample of g.  A strategy (Eq. 3) turns the costs of one image into pairs (q, g).  The
paper's two findings are two lines of this file:

  1. the strategy must be one-to-one                        -> `hungarian`
  2. the cost must contain the classification cost (Eq. 5)  -> `matching_cost`, class_cost

Read it in this order: `match`, which does it for a batch; the strategies; the costs.

To try an idea of your own, change a function here, or write `assign(cost)` in a file and run
`python train.py --assign my.py:assign`; `python grade.py my.py:assign` tells whether it keeps the
contract:

  cost: (Q, G) float32, finite, lower is better, or inf = forbidden; Q or G may be 0
  returns prediction (K,), object (K,), both long, the positive pairs, on any device.  A prediction
  appears at most once, unless the function says `my_function.shares_predictions = True`
  (`my_function.one_to_one = True` makes grade.py check that too); object IGNORE makes a prediction
  neither positive nor negative.  Predictions that do not appear are negative.  Leave cost as it is,
  and do not depend on the order of its rows and columns, or say `my_function.randomised = True`.
  Training checks shapes, types and ranges; the rest only grade.py does.

A cost of your own, `--cost my.py:f`, is f(one, target) -> (Q, G) floating point, inf = forbidden,
never NaN, from the Prediction of one image (models.py) and its target (data.py).  Both kinds are
told how far training is, from 0 to 1, if they name an argument `progress` (functions do, objects
that can be called are not asked).
"""
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert, box_iou, generalized_box_iou

import ideas
from ideas import AssignError

IGNORE = -1

# lambda_cls, lambda_L1 and lambda_iou: the weights of Eq. 4 and 5, and of the same three terms in
# the training loss.  Published for all six detectors, but that DETR's lambda_cls is 1.
LAMBDA_CLS, LAMBDA_L1, LAMBDA_IOU = 2.0, 5.0, 2.0


class Match(NamedTuple):
    """The positive samples of one image, and what is neither positive nor negative."""
    prediction: torch.Tensor    # (K,) long
    object: torch.Tensor        # (K,) long, whose sample prediction[k] is
    ignored: torch.Tensor       # (I,) long


# ------------------------------------------------------------------------------------------------
# match: all images and layers of a batch
# ------------------------------------------------------------------------------------------------

@torch.no_grad()
def match(prediction, targets, cost, assign, progress=0.0, second=None):
    """The positive samples of a batch: for every layer, a list with a Match per image.

        C[q, g] = cost(one, target)        Eq. 2 and 5
        P = {(q, g)} = assign(C)           Eq. 3

    Eq. 3 thresholds each object's costs by a theta(g).  min_cost is such a rule, theta just above
    the cheapest; others, the Hungarian among them (Section 3.2), choose for all objects at once.

    prediction: models.Prediction.  The first list of the answer is its own, the final layer's, the
    others are those of the earlier layers in its aux
    cost(one, target): (Q, G), from the Prediction of one image and its target
    assign(cost): the strategy, called as it is written, once an image and layer
    progress: how far training is, 0 to 1, for those that ask for it
    second: cost and strategy of the second branch (losses.many_row), which lies in aux too

    Without gradient, in float32, the costs of one image in memory at a time.  Raises AssignError
    with the image if a cost is NaN or -inf, a function fails, or its answer is not what it must be.
    Whether a prediction appears twice is left to the contract test.
    """
    layers, nan, images = [], [], []
    with torch.autocast(prediction.logits.device.type, enabled=False):
        for layer in [prediction, *prediction.aux]:
            matches = []
            layer_cost, layer_assign = second if layer.second else (cost, assign)
            for n, target in enumerate(targets):
                C = price(layer_cost, layer.image(n), target, progress)  # (Q, G)
                nan.append((~(C > -float("inf"))).any())                 # NaN compares false
                images.append(target["image_id"])
                try:
                    matches.append(ask(layer_assign, C, target["image_id"], progress))
                except AssignError:
                    check_nan(nan, images, prediction)   # NaN explains more than what it led to
                    raise
            layers.append(matches)
    check_nan(nan, images, prediction)
    return layers


def check_nan(nan, images, prediction):
    """Raises AssignError that names the images whose costs hold NaN.  One wait for the device."""
    bad = torch.stack(nan).tolist() if nan else []
    if any(bad):
        ids = dict.fromkeys(str(image) for image, is_nan in zip(images, bad) if is_nan)
        who = f"image {', '.join(ids)}: the matching cost holds NaN or -inf"
        layers = [prediction, *prediction.aux]
        if all(bool(part.isfinite().all()) for one in layers for part in (one.logits, one.boxes)):
            raise AssignError(f"{who}, but the network's output does not: the cost function makes "
                              f"it")
        raise AssignError(f"{who}, so the network's output does too; lower --lr, set --clip-grad, "
                          f"or use --precision fp32")


def price(cost, one, target, progress):
    """The costs of one image, checked, as float32 (Q, G).  Raises AssignError."""
    shape = len(one.logits), len(target["boxes"])
    name, who = getattr(cost, "__name__", "cost"), f"image {target['image_id']}"
    try:
        C = ideas.call(cost, one, target, progress=progress)
    except AssignError as error:
        raise AssignError(f"{who}: the cost {name} failed on {shape[0]} predictions and {shape[1]} "
                          f"objects: {error}") from error
    if not torch.is_tensor(C) or C.shape != shape or not C.is_floating_point():
        got = f"{C.dtype} of shape {tuple(C.shape)}" if torch.is_tensor(C) else type(C).__name__
        raise AssignError(f"{who}: {name} must return floating-point costs of shape {shape}; it "
                          f"returned {got}")
    return C.float()


def ask(assign, cost, image, progress):
    """A strategy's answer for one image, checked, as a Match on the device of cost.

    Checked on the host, where the answer travels in one copy (the Hungarian's is there already).
    Raises AssignError, in words for a student.
    """
    name = getattr(assign, "__name__", "assign")
    Q, G = cost.shape
    try:
        answer = ideas.call(assign, cost, progress=progress)
    except AssignError as error:
        raise AssignError(f"image {image}: the strategy {name} failed on a cost of {Q} x {G}: "
                          f"{error}") from error

    who, pair = f"image {image}: {name}", isinstance(answer, (tuple, list)) and len(answer) == 2
    if not pair or not all(torch.is_tensor(v) for v in answer):
        parts = f" of {' and '.join(type(v).__name__ for v in answer)}" if pair else ""
        raise AssignError(f"{who} must return two tensors, prediction and object; it returned "
                          f"{type(answer).__name__}{parts}")
    q, g = answer
    if q.ndim != 1 or q.shape != g.shape:
        raise AssignError(f"{who} must return two vectors of one length; it returned shapes "
                          f"{tuple(q.shape)} and {tuple(g.shape)} for a cost of {Q} x {G}")
    if q.dtype != torch.long or g.dtype != torch.long:
        raise AssignError(f"{who} must return long vectors (use .long()); it returned {q.dtype} "
                          f"and {g.dtype}")
    q, g = pairs = torch.stack([q.to(g.device), g]).cpu().numpy()            # (2, K)
    if len(q) and ((pairs.min(1) < (0, IGNORE)) | (pairs.max(1) >= (Q, G))).any():
        raise AssignError(f"{who} returned a prediction outside 0...{Q - 1} or an object outside "
                          f"0...{G - 1}")

    positive = g != IGNORE
    parts = q[positive], g[positive], q[~positive]
    return Match(*(torch.from_numpy(part).to(cost.device) for part in parts))


# ------------------------------------------------------------------------------------------------
# strategies: cost (Q, G) -> prediction (K,), object (K,)
# ------------------------------------------------------------------------------------------------

def hungarian(cost):
    """One-to-one: the pairs that are cheapest in total; every object gets one if there are enough.

        argmin over one-to-one P of  sum over (q, g) in P of  C[q, g]

    cost: (Q, G)   returns prediction (K,) ascending, object (K,), K = min(Q, G) less what inf
    forbids, on the host, where scipy solves it.
    """
    Q, G = cost.shape
    if min(Q, G) == 0:
        return torch.zeros(2, 0, dtype=torch.long).unbind()
    cost = cost if cost.dtype == torch.float64 else cost.float()     # holds row numbers, below

    # Each object's G cheapest predictions are enough, and the answer stays exact: were an object
    # given another one, one of those G would be free, as the others use at most G - 1, and cost no
    # more.  A few too many do no harm, so they need not be sorted out of all Q: the predictions are
    # dealt into groups, and the G-th cheapest of the groups' cheapest is a bound for those G.
    groups = min(Q, 4 * G)
    cheapest = cost[:Q - Q % groups].reshape(-1, groups, G).amin(0)          # (groups, G)
    bound = cheapest.topk(min(groups, G), dim=0, largest=False).values[-1]   # (G,)
    bound = bound.clamp(max=torch.finfo(cost.dtype).max)                     # inf is forbidden
    few = (cost <= bound).flatten()
    # numpy finds them in a fifth of PyTorch's time, but on the host alone
    at = (torch.from_numpy(np.flatnonzero(few.numpy())) if cost.device.type == "cpu"
          else few.nonzero()[:, 0])

    # One copy to the host; float32 holds row numbers exactly up to 2^24.  scipy wants float64,
    # which Apple's GPUs do not know: it is made on the host.
    q, g = at // G, at % G
    values, q, g = torch.stack([cost[q, g], q.to(cost), g.to(cost)]).cpu().double().numpy()
    used, column = np.unique(q.astype(int), return_inverse=True)

    # scipy cannot leave an object without a prediction: a forbidden pair is dearer than any set of
    # allowed ones (two sets differ by at most 2 G of the largest value; twice that, and 1e3 where
    # all are 0), so that it is taken only where nothing else is left, and dropped then
    forbidden = 1e3 + 4 * np.abs(values).max(initial=0.0) * (1 + G)
    small = np.full((G, len(used)), forbidden)
    small[g.astype(int), column] = values

    g, column = linear_sum_assignment(small)
    keep = small[g, column] < forbidden
    by_prediction = column[keep].argsort()
    return (torch.from_numpy(used[column[keep]][by_prediction]),
            torch.from_numpy(g[keep][by_prediction]))


hungarian.one_to_one = True          # what a strategy claims, the contract test checks


def min_cost(cost):
    """One positive per object: its cheapest prediction, without asking the other objects.

        P = {(argmin over q of C[q, g], g) for every g}

    The same answer as `hungarian` unless two objects want one prediction: then both get it, and of
    two classes it is a positive of both.  The rule of the authors' first release (which keeps one
    of the two classes); they report about equal AP.
    """
    if cost.shape[0] == 0:
        return cost.new_zeros(2, 0, dtype=torch.long).unbind()
    best, q = cost.min(dim=0)                                        # (G,)
    g = torch.arange(cost.shape[1], device=cost.device)
    return q[best < float("inf")], g[best < float("inf")]


min_cost.shares_predictions = True   # two objects may have one prediction


def one_to_many_iou(cost, positive=0.5, negative=0.4):
    """RetinaNet's rule on -IoU: at least 0.5 is positive, 0.4 to 0.5 neither, below negative.

    Every object also gets the predictions that come closest to it, ties included, however poor; but
    such a prediction keeps its own best object, which may be another one (as published).
    """
    if min(cost.shape) == 0:
        return cost.new_zeros(2, 0, dtype=torch.long).unbind()
    best, g = cost.min(dim=1)                                        # (Q,)
    low_quality = ((cost == cost.amin(dim=0)) & (cost < float("inf"))).any(1)
    is_positive = (best <= -positive) | low_quality
    ignored = (best <= -negative) & ~is_positive
    q = torch.cat([is_positive.nonzero()[:, 0], ignored.nonzero()[:, 0]])
    return q, torch.where(ignored, IGNORE, g)[q]


def one_to_many_points(cost):
    """FCOS's rule: every prediction that may care for an object takes its cheapest one."""
    if min(cost.shape) == 0:
        return cost.new_zeros(2, 0, dtype=torch.long).unbind()
    best, g = cost.min(dim=1)                                        # (Q,)
    q = (best < float("inf")).nonzero()[:, 0]
    return q, g[q]


def top_k(cost, k=9):
    """Each object's k cheapest predictions (one-to-many).

    A prediction that several objects want goes to the one for which it is cheapest; an object that
    loses all k has no positive.
    """
    allowed = torch.full_like(cost, float("inf"))        # forbids all but an object's k cheapest
    values, rows = cost.topk(min(k, cost.shape[0]), dim=0, largest=False)
    return one_to_many_points(allowed.scatter(0, rows, values))


ASSIGNERS = {"hungarian": hungarian, "min-cost": min_cost, "one-to-many-iou": one_to_many_iou,
             "one-to-many-points": one_to_many_points, "top-k": top_k}


def load_strategy(name, flag="--assign"):
    """A strategy by name, or `file.py:function` from a file of one's own.  Raises AssignError."""
    if name in ASSIGNERS:
        listed = ASSIGNERS[name]
        # asked for by its name, so that `assign.hungarian = mine` acts
        return globals().get(listed.__name__, listed)
    if ":" not in name and not name.endswith(".py"):
        original = "one-to-many, " if flag == "--assign" else ""
        raise AssignError(f"{flag} {name}: no such strategy; use {original}"
                          f"{', '.join(ASSIGNERS)}, or my.py:my_function")
    return ideas.load(flag, name)


# ------------------------------------------------------------------------------------------------
# the matching cost, Eq. 5, and its two parts.  cost(one, target) -> (Q, G), lower is better;
# one: the models.Prediction of one image   target: boxes (G, 4), labels (G,), size (2,) h, w
# ------------------------------------------------------------------------------------------------

def predicted_location(one, target, lambda_l1=LAMBDA_L1, lambda_iou=LAMBDA_IOU):
    """Between predicted box and object: what all end-to-end rows of Table 2 use (box_location).

    No level rule here, for FCOS either: like the released code, only level_point_location has it.
    """
    return box_location(one.boxes, target, lambda_l1, lambda_iou, one.centre_l1)


def anchor_location(one, target, lambda_l1=LAMBDA_L1, lambda_iou=LAMBDA_IOU):
    """Between pre-defined anchor box and object (RetinaNet; box_location).

    Eq. 4 in full, as released; Section 3.2 describes it as the anchor of largest IoU.
    """
    return box_location(one.candidates, target, lambda_l1, lambda_iou)


def point_location(one, target, lambda_l1=LAMBDA_L1, lambda_iou=0.0):
    """Between pre-defined point and object's centre (CenterNet).

        C_loc = lambda_L1 C_L1                            Eq. 4: lambda_iou is 0 for points

    lambda_iou: taken, so that all location costs have one signature, and not used
    """
    return lambda_l1 * centre_cost(one.candidates, target["boxes"], target["size"])


def level_point_location(one, target, lambda_l1=LAMBDA_L1, lambda_iou=0.0):
    """The same, on the pre-defined pyramid level (FCOS)."""
    points = point_location(one, target, lambda_l1)
    return points + level_cost(one.candidates, one.strides, target["boxes"])


def matching_cost(one, target, location=predicted_location, class_cost=LAMBDA_CLS):
    """What it costs to make prediction q the positive sample of object g.

        C = lambda_cls C_cls + C_loc                                 Eq. 5

    class_cost: its lambda_cls (the loss has one of its own); 0 is "location only" (Conclusion 3.1),
    where duplicates return.
    """
    C = location(one, target)
    if class_cost:
        C_cls = softmax_cost if one.softmax else classification_cost
        C = C + class_cost * C_cls(one.logits, target["labels"])
    return C


def classification_cost(logits, labels, alpha=0.25, gamma=2.0, eps=1e-8):
    """Price of calling prediction q the class of object g: C_cls in Eq. 5.

        C_cls = FL(p, object) - FL(p, background),   FL: the focal loss

    logits: (Q, C)   labels: (G,)   returns (Q, G).

    It is the change in focal loss when q stops being background and becomes g's class: pay the
    positive term, get the negative one back.  Without C_cls duplicates return (Table 2).
    """
    p = logits.float()[:, labels].sigmoid()                          # (Q, G)
    as_object = alpha * (1 - p) ** gamma * -(p + eps).log()
    as_background = (1 - alpha) * p ** gamma * -(1 - p + eps).log()
    return as_object - as_background


def softmax_cost(logits, labels):
    """DETR's classification cost: minus the probability of the object's class.

    logits: (Q, C + 1), the last column "no object"   labels: (G,)   returns (Q, G).
    """
    return -logits.float().softmax(-1)[:, labels]


# the parts of the location cost.  boxes, points (Q, 4), gt (G, 4) xyxy pixels; returns (Q, G)

def box_location(boxes, target, lambda_l1, lambda_iou, centre=False):
    """Between boxes, predicted or anchors, and objects.

        C_loc = lambda_iou C_iou + lambda_L1 C_L1                    Eq. 4
    """
    return (lambda_l1 * l1_cost(boxes, target["boxes"], target["size"], centre)
            + lambda_iou * giou_cost(boxes, target["boxes"]))


def l1_cost(boxes, gt, size, centre=False):
    """Sum of the four coordinate differences, in units of the image's sides: C_L1 in Eq. 4.

    Of the corners, or (`centre`, DETR and Deformable DETR) of centre, width and height.
    """
    if centre:
        boxes = box_convert(boxes, "xyxy", "cxcywh")
        gt = box_convert(gt, "xyxy", "cxcywh")
    scale = size.flip(0).repeat(2).to(gt)                            # w, h, w, h
    return l1_distance(boxes / scale, gt / scale)


def l1_distance(a, b):
    """Sum of the absolute differences of all pairs of rows, (Q, n) and (G, n): (Q, G)."""
    if a.is_cuda:                # whose cdist spends a block of threads on each pair
        return (a[:, None] - b).abs().sum(-1)
    return torch.cdist(a, b, p=1)            # on a CPU 8 to 16 times as fast as the line above


def giou_cost(boxes, gt):
    """Minus the generalised IoU: C_iou in Eq. 4 (the paper writes IoU, its code uses GIoU).

    Two boxes without extent give 0/0; such a pair counts as far apart (GIoU -1, so a cost of 1)
    rather than NaN, while what is no number among the coordinates gives NaN, for `match` to report.
    """
    giou = generalized_box_iou(boxes, gt)
    numbers = boxes.isfinite().all(1)[:, None] & gt.isfinite().all(1)
    return -torch.where(giou.isnan() & numbers, -1.0, giou)


def centre_cost(points, gt, size):
    """Distance from candidate point to box centre, C_L1 of pre-defined points.

    points: (Q, 4) boxes without extent.  |dx| / width + |dy| / height, times 2: the released code
    compares x1 + x2 of the point with that of the box, without halving, and the published numbers
    have that weight.
    """
    scale = size.flip(0).to(gt)                                      # w, h
    twice = (points[:, :2] + points[:, 2:]) / scale                  # (Q, 2) twice the centre
    return l1_distance(twice, (gt[:, :2] + gt[:, 2:]) / scale)


def side_distances(points, gt):
    """Left, top, right, bottom distance of each point to the sides of each box: (Q, G, 4)."""
    at = points[:, None]                                             # (Q, 1, 4)
    return torch.cat([at[..., :2] - gt[:, :2], gt[:, 2:] - at[..., 2:]], -1)


def in_level_range(points, strides, gt):
    """True where FCOS lets a point's pyramid level care for an object: (Q, G) bool.

    strides: (Q,) of each point's level.  The largest of the four distances must lie within [4, 8]
    strides, the finest level reaching down to, and the coarsest up to, any distance: [-1, 64],
    [64, 128], ... [512, inf] for P3 to P7.
    """
    reach = side_distances(points, gt).amax(-1)                      # (Q, G)
    low = (4 * strides).masked_fill(strides == strides.min(), -1)[:, None]
    high = (8 * strides).masked_fill(strides == strides.max(), float("inf"))[:, None]
    return (low <= reach) & (reach <= high)


def level_cost(points, strides, gt):
    """Keeps FCOS's candidates on the level that suits the object's size ("pre-defined layer", 3.2).

    A finite 9,999, so that an object no level cares for still gets its nearest point.  This uses
    the true four distances; the released code overwrites the top one with the bottom one.
    """
    return 9999.0 * ~in_level_range(points, strides, gt)


# ------------------------------------------------------------------------------------------------
# what the detectors' original one-to-many rules compare: cost(one, target) -> (Q, G)
# ------------------------------------------------------------------------------------------------

def anchor_iou_cost(one, target):
    """Minus the IoU of anchor and object: what RetinaNet's `one_to_many_iou` judges."""
    return -box_iou(one.candidates, target["boxes"])


def predicted_iou_cost(one, target):
    """Minus the IoU of predicted box and object, for the same rule on other detectors.

    Pairs without overlap are forbidden: to an object that no box meets all would come equally
    close, and be its positives.
    """
    iou = box_iou(one.boxes, target["boxes"])
    return -iou.masked_fill(iou == 0, -float("inf"))


def fcos_area_cost(one, target, radius=1.5):
    """FCOS's rule as a cost: the area of the box where the point may care for it, else inf.

    A point may care for an object if it lies inside the box, within `radius` strides of its centre,
    and on the level for its size.  Of several objects it takes the smallest: the cheapest.
    """
    points, gt = one.candidates, target["boxes"]
    inside = side_distances(points, gt).amin(-1) > 0                 # (Q, G)
    centre = (gt[:, :2] + gt[:, 2:]) / 2
    near = (points[:, None, :2] - centre).abs().amax(-1) < radius * one.strides[:, None]
    area = (gt[:, 2:] - gt[:, :2]).prod(1).expand(len(points), -1)
    cares = inside & near & in_level_range(points, one.strides, gt)
    return torch.where(cares, area, float("inf"))


def cell_cost(one, target):
    """CenterNet's rule as a cost: 0 for the cell that holds the object's centre, else inf.

    With `min_cost` each object gets its cell, and two objects may share one.  The Gaussian around
    it only softens negatives; it belongs to losses.centernet_loss.
    """
    stride, gt = one.strides[0], target["boxes"] / one.strides[0]    # boxes in cells
    cell = one.candidates[:, :2] // stride                           # (Q, 2) x, y
    centre = ((gt[:, :2] + gt[:, 2:]) / 2).floor().clamp(min=0)      # (G, 2) the cell that holds it
    centre = torch.minimum(centre, cell.amax(0))
    return torch.where((cell[:, None] == centre).all(-1), 0.0, float("inf"))
