"""Training losses (Eq. 1): classification over all samples, location over the positive ones.

`set_loss` trains every one-to-one row of Tables 1 and 2.  The others are the detectors' original
losses, for the one-to-many rows: in the published numbers the two differ, and so they do here.

Each returns a dict of already weighted terms whose sum is the loss.  All are float32, and finite, with
finite gradients, for images without objects too.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss

from assign import heat_map
from models import get_deltas


def mean_over_processes(x):
    """A tensor's mean over all training processes, without gradient."""
    x = x.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def positives(targets, matches):
    """The positive samples of a batch, joined over its images.

    Returns their index (image (K,), prediction (K,)) into tensors of shape (B, Q, ...), and their
    objects' boxes (K, 4) and labels (K,).
    """
    image = torch.cat([torch.full_like(m.prediction, n) for n, m in enumerate(matches)])
    prediction = torch.cat([m.prediction for m in matches])
    boxes = torch.cat([t["boxes"][m.object] for t, m in zip(targets, matches)])
    labels = torch.cat([t["labels"][m.object] for t, m in zip(targets, matches)])
    return (image, prediction), boxes, labels


def focal_loss(logits, index, labels, matches):
    """Sigmoid focal loss (alpha 0.25, gamma 2), summed over all predictions and classes.

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
    """DETR's classification loss: cross entropy over C classes and "no object", which weighs a tenth; their weighted mean.

    logits: (B, Q, C + 1)   index, labels: of the positives; all others are "no object", except those a strategy
    told to ignore.
    """
    target = torch.full(logits.shape[:2], logits.shape[2] - 1, device=logits.device)
    target[index] = labels
    for n, m in enumerate(matches):
        target[n, m.ignored] = -100          # cross_entropy's own mark for what does not count
    weight = logits.new_ones(logits.shape[2])
    weight[-1] = no_object
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), weight)


def set_loss(prediction, targets, matches, num_objects, class_weight=2.0, l1_weight=5.0, giou_weight=2.0):
    """Focal + L1 + GIoU of the matched pairs: the paper's training loss (Eq. 1).

    matches: as assign.match returns them, one list per layer; each layer pays the full loss
    num_objects: of the whole step, all processes together, divided by their number, at least 1

    DETR's softmax loss is a mean over the queries of the micro-batch instead, with weight 1.
    """
    terms = {"class": 0.0, "l1": 0.0, "giou": 0.0}
    scale = torch.stack([t["size"].flip(0).repeat(2) for t in targets]).to(prediction.boxes)   # (B, 4) w, h, w, h
    for layer, layer_matches in zip([prediction, *prediction.aux], matches):
        index, gt, labels = positives(targets, layer_matches)
        boxes, size = layer.boxes[index], scale[index[0]]                                      # (K, 4)
        if layer.softmax:
            terms["class"] += softmax_loss(layer.logits, index, labels, layer_matches)
        else:
            labels = torch.zeros_like(labels) if layer.class_agnostic else labels
            terms["class"] += class_weight * focal_loss(layer.logits, index, labels, layer_matches) / num_objects
        terms["giou"] += giou_weight * generalized_box_iou_loss(boxes, gt, reduction="sum") / num_objects
        if layer.centre_l1:
            boxes, gt = (box_convert(b, "xyxy", "cxcywh") for b in (boxes, gt))
        terms["l1"] += l1_weight * (boxes / size - gt / size).abs().sum() / num_objects
    return terms


def retinanet_loss(prediction, targets, matches):
    """RetinaNet's original losses: focal, and L1 between deltas (detectron2's form).

    Both are divided by a moving average of the number of positives (momentum 0.9, starting from 100), which each
    process keeps for itself in the model's buffer `positives_average`.
    """
    index, gt, labels = positives(targets, matches[0])
    deltas, anchors = prediction.raw["deltas"][index], prediction.candidates[index[1]]        # (K, 4)
    average = prediction.raw["positives_average"]
    average.mul_(0.9).add_(0.1 * max(len(anchors), 1))
    normaliser = average.clone()             # the buffer itself moves on before backward
    return {"class": focal_loss(prediction.logits, index, labels, matches[0]) / normaliser,
            "l1": (deltas - get_deltas(anchors, gt)).abs().sum() / normaliser}


def centreness_target(points, gt):
    """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) for points inside their boxes: (K,)."""
    lt, rb = points[:, :2] - gt[:, :2], gt[:, 2:] - points[:, 2:]
    return (torch.minimum(lt, rb) / torch.maximum(lt, rb)).prod(1).sqrt()


def fcos_loss(prediction, targets, matches):
    """FCOS's original losses: focal, GIoU weighted by centre-ness, centre-ness (the authors' form).

    Normalised by the number of positives, and the sum of their centre-ness, averaged over the processes.
    """
    index, gt, labels = positives(targets, matches[0])
    boxes, logit = prediction.boxes[index], prediction.raw["centreness"][index]
    points = prediction.candidates[index[1]]
    centreness = centreness_target(points, gt)                                     # (K,)
    count, total = mean_over_processes(torch.stack([centreness.new_tensor(len(gt)), centreness.sum()]))
    count, total = count.clamp(min=1), total.clamp(min=1e-6)
    giou = generalized_box_iou_loss(boxes, gt, reduction="none")
    return {"class": focal_loss(prediction.logits, index, labels, matches[0]) / count,
            "giou": (giou * centreness).sum() / total,
            "centreness": F.binary_cross_entropy_with_logits(logit, centreness, reduction="sum") / count}


def centernet_loss(prediction, targets):
    """CenterNet's original losses: penalty-reduced focal on the heat map, L1 on size (0.1) and offset.

    Sizes and offsets are in cells of the output map, and learned at the centre cells only.
    """
    raw = prediction.raw
    (H, W), stride, C = raw["grid"], raw["stride"], prediction.logits.shape[2]
    heats, size, offset, count = [], 0.0, 0.0, 0
    for n, target in enumerate(targets):
        boxes = target["boxes"] / stride
        heat, cell = heat_map(boxes, target["labels"], C, (H, W))
        heats.append(heat.flatten(1).mT)                                           # (HW, C)
        at = cell[:, 1] * W + cell[:, 0]                                           # (G,)
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2
        size = size + (raw["size"][n][at] - (boxes[:, 2:] - boxes[:, :2])).abs().sum()
        offset = offset + (raw["offset"][n][at] - (centre - cell)).abs().sum()
        count += len(at)
    heat = torch.stack(heats)                                                      # (B, HW, C)
    p = prediction.logits.sigmoid().clamp(1e-4, 1 - 1e-4)
    centre = heat == 1
    penalty = torch.where(centre, (1 - p) ** 2 * p.log(), (1 - heat) ** 4 * p ** 2 * (1 - p).log())
    return {"class": -penalty.sum() / centre.sum().clamp(min=1),
            # two numbers an object, as published
            "size": 0.1 * size / (2 * count + 1e-4), "offset": offset / (2 * count + 1e-4)}
