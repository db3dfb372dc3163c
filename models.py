"""The detectors: backbone, neck, heads, and decoding to boxes.

The paper (Section 3) takes detectors apart into object candidates, a classification sub-net, a
location sub-net and a rule that assigns positive samples.  Everything but the rule is in this file.
A detector comes in two forms: the one-to-one form of the paper (trained with assign.hungarian and
losses.set_loss), and its original one-to-many form (`original=True`), which the first rows of Table 1 train.

One alphabet, for the whole repository: B images in the batch, L pyramid levels, Q predictions of one
image (all levels joined; row by row within a level, anchors innermost), G ground-truth objects of one
image, C classes, K matched pairs, HxW a feature map.  Boxes are xyxy in pixels of the resized,
un-padded image.  Classes are 0 ... C-1, without a background column.

Images come in as uint8 RGB, padded at the right and at the bottom, with a mask that is true on padding.
"""
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import batched_nms, deform_conv2d
from torchvision.ops.misc import FrozenBatchNorm2d

PRIOR_BIAS = -math.log((1 - 0.01) / 0.01)     # every class starts at a score of 0.01 (focal loss paper, 4.1)
PIXELS = {                                    # mean and std of the three channels, 0-255 scale; the name gives their order
    "rgb": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),               # ImageNet: torchvision's ResNets
    "bgr": ((103.53, 116.28, 123.675), (1.0, 1.0, 1.0)),                       # MSRA's ResNets: detectron2's model zoo
    "bgr-unit": ((104.04, 113.985, 119.85), (73.695, 69.87, 70.89))}           # CenterNet's own: .408 .447 .470, .289 .274 .278


@dataclass
class Prediction:
    """What every detector returns, so that nothing downstream asks which detector it was."""
    logits: torch.Tensor                    # (B, Q, C)
    boxes: torch.Tensor                     # (B, Q, 4)
    candidates: torch.Tensor | None = None  # (Q, 4) anchors, or points as boxes without extent
    levels: torch.Tensor | None = None      # (Q,) pyramid level of each candidate
    aux: list = field(default_factory=list)  # Predictions of earlier decoder layers, matched on their own
    raw: dict = field(default_factory=dict)  # what only the original one-to-many recipe needs


# ------------------------------------------------------------------------------------------------
# backbones: a list of feature maps, fine to coarse; .strides and .channels describe them
# ------------------------------------------------------------------------------------------------

class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., 2016)."""

    def __init__(self, cin, cout, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(cout)
        self.shortcut = nn.Identity() if stride == 1 and cin == cout else nn.Conv2d(cin, cout, 1, stride)

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class Tiny(nn.Module):
    """A small backbone for pictures of about 128 pixels, trained from scratch on two CPU cores.

    A patchify stem goes to stride 4 in one step, which is what makes it fast; then residual stages as in a
    ResNet, with the same strides.  Batch norm, because group norm learned half as fast here; its
    statistics are those of a process's micro-batch.
    """
    strides, channels = (4, 8, 16, 32), (32, 64, 128, 192)

    def __init__(self):
        super().__init__()
        a, b, c, d = self.channels
        self.stem = nn.Sequential(nn.Conv2d(3, a, 7, 4, 3, bias=False), nn.BatchNorm2d(a), nn.ReLU())
        self.stage1 = ResidualBlock(a, a, 1)
        self.stage2 = nn.Sequential(ResidualBlock(a, b, 2), ResidualBlock(b, b, 1))
        self.stage3 = nn.Sequential(ResidualBlock(b, c, 2), ResidualBlock(c, c, 1))
        self.stage4 = nn.Sequential(ResidualBlock(c, d, 2), ResidualBlock(d, d, 1))

    def forward(self, x):                     # x: (B, 3, H, W)
        c2 = self.stage1(self.stem(x))        # (B, 32, H/4, W/4)
        c3 = self.stage2(c2)                  # (B, 64, H/8, W/8)
        c4 = self.stage3(c3)                  # (B, 128, H/16, W/16)
        c5 = self.stage4(c4)                  # (B, 192, H/32, W/32)
        return [c2, c3, c4, c5]


class ResNet(nn.Module):
    """torchvision's ResNet without its classifier, giving C2 ... C5 at strides 4, 8, 16, 32.

    norm: "frozen" (fixed statistics and affine, the recipe of all detectors but CenterNet) or "batch".
    freeze: how many of stem, layer1, layer2, ... receive no gradient (2 in the published recipes).
    stride_in_1x1: a bottleneck's stride lies in its first 1x1 convolution (MSRA's weights), not in the 3x3.
    """
    strides = (4, 8, 16, 32)

    def __init__(self, name, norm="frozen", freeze=2, stride_in_1x1=False):
        super().__init__()
        self.name, self.kind = name, "msra" if stride_in_1x1 else "torchvision"
        body = getattr(torchvision.models, name)(
            weights=None, norm_layer=FrozenBatchNorm2d if norm == "frozen" else nn.BatchNorm2d)
        del body.fc, body.avgpool
        self.body = body
        layers = [body.layer1, body.layer2, body.layer3, body.layer4]
        last = "conv2" if name in ("resnet18", "resnet34") else "conv3"
        if stride_in_1x1 and last == "conv3":
            for layer in layers[1:]:
                layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
        self.channels = tuple(getattr(layer[-1], last).out_channels for layer in layers)
        for part in [[body.conv1, body.bn1], *[[layer] for layer in layers]][:freeze]:
            for module in part:
                module.requires_grad_(False)

    def forward(self, x):                     # x: (B, 3, H, W)
        b = self.body
        x = b.maxpool(b.relu(b.bn1(b.conv1(x))))
        features = []
        for layer in (b.layer1, b.layer2, b.layer3, b.layer4):
            x = layer(x)
            features.append(x)
        return features                       # [(B, c, H/4, W/4), ... (B, c, H/32, W/32)]


# ------------------------------------------------------------------------------------------------
# necks
# ------------------------------------------------------------------------------------------------

class FPN(nn.Module):
    """Feature pyramid (Lin et al., 2017a) on the backbone's last three maps, plus `extra` coarser levels.

    With a ResNet these are P3, P4, P5, and with extra = 2 P6 and P7, which RetinaNet and OneNet's FCOS
    take from C5 and the original FCOS from P5 (`extra_from`).
    """

    def __init__(self, backbone, width=256, extra=2, extra_from="c5"):
        super().__init__()
        channels = backbone.channels[-3:]
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.output = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)
        self.extra_from = extra_from
        first = channels[-1] if extra_from == "c5" else width
        self.extra = nn.ModuleList(nn.Conv2d(width if n else first, width, 3, 2, 1) for n in range(extra))
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_uniform_(conv.weight, a=1)
                nn.init.zeros_(conv.bias)
        strides = list(backbone.strides[-3:])
        self.strides = tuple(strides + [strides[-1] * 2 ** (n + 1) for n in range(extra)])

    def forward(self, features):
        c = features[-3:]
        top = self.lateral[2](c[2])                                   # (B, width, H/32, W/32)
        levels = [self.output[2](top)]
        for lateral, output, x in zip(self.lateral[1::-1], self.output[1::-1], c[1::-1]):
            top = lateral(x) + F.interpolate(top, scale_factor=2.0, mode="nearest")
            levels.insert(0, output(top))
        x = c[2] if self.extra_from == "c5" else levels[-1]
        for n, conv in enumerate(self.extra):
            x = conv(F.relu(x) if n else x)                           # P6, then P7 on ReLU(P6)
            levels.append(x)
        return levels


class DeformConv(nn.Module):
    """Modulated deformable 3x3 convolution (Zhu et al., 2019): where to look, and how much, is predicted."""

    def __init__(self, cin, cout):
        super().__init__()
        self.offset = nn.Conv2d(cin, 27, 3, padding=1)                # 9 taps x (dy, dx), then 9 masks
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)
        self.weight = nn.Parameter(nn.Conv2d(cin, cout, 3, bias=False).weight.detach())

    def forward(self, x):
        where = self.offset(x).to(self.weight.dtype)                  # (B, 27, H, W)
        with torch.autocast(x.device.type, enabled=False):            # the operator knows no bfloat16
            return deform_conv2d(x.to(self.weight.dtype), where[:, :18].contiguous(), self.weight, padding=1,
                                 mask=where[:, 18:].sigmoid())


class Upsample(nn.Module):
    """CenterNet's step up: 3x3 convolution (deformable or plain), then transposed convolution, stride 2."""

    def __init__(self, cin, cout, deform):
        super().__init__()
        self.conv = DeformConv(cin, cout) if deform else nn.Conv2d(cin, cout, 3, padding=1)
        self.conv_norm = nn.BatchNorm2d(cout)
        self.up = nn.ConvTranspose2d(cout, cout, 4, 2, 1, bias=False)
        self.up_norm = nn.BatchNorm2d(cout)

    def forward(self, x):                                             # (B, cin, H, W)
        x = F.relu(self.conv_norm(self.conv(x)))
        return F.relu(self.up_norm(self.up(x)))                       # (B, cout, 2H, 2W)


class DeconvNeck(nn.Module):
    """CenterNet's neck: from the coarsest map up, one step per width; three end at stride 4.

    The one-to-one form adds a 1x1 lateral of each finer map after the step's ReLU and ends in a 3x3
    convolution; the original form does neither.
    """

    def __init__(self, backbone, widths=(256, 128, 64), deform=True, laterals=True):
        super().__init__()
        channels = backbone.channels[::-1]                            # coarse to fine
        self.steps = nn.ModuleList(Upsample(cin, cout, deform)
                                   for cin, cout in zip((channels[0], *widths), widths))
        self.lateral = nn.ModuleList(nn.Conv2d(c, w, 1) for c, w in zip(channels[1:], widths)) if laterals else None
        self.output = nn.Conv2d(widths[-1], widths[-1], 3, padding=1) if laterals else nn.Identity()
        self.width, self.stride = widths[-1], backbone.strides[-1] // 2 ** len(widths)

    def forward(self, features):
        x = features[-1]
        for n, step in enumerate(self.steps):
            x = step(x)
            if self.lateral is not None:
                x = x + self.lateral[n](features[-2 - n])
        return self.output(x)                                         # (B, width, H/stride, W/stride)


# ------------------------------------------------------------------------------------------------
# candidates and boxes
# ------------------------------------------------------------------------------------------------

def grid_points(x, stride, offset):
    """Points (j * stride + offset, i * stride + offset), one per cell of a map: (HW, 2), rows outer.

    stride: a number, or a pair (along x, along y).
    """
    h, w = x.shape[-2:]
    ys, xs = torch.meshgrid(torch.arange(h, device=x.device), torch.arange(w, device=x.device), indexing="ij")
    return torch.stack([xs, ys], -1).reshape(-1, 2).float() * torch.as_tensor(stride, device=x.device) + offset


def torchvision_spacing(x, images):
    """Spacing (along x, along y) of torchvision's anchors: image size // map size, the stride but on odd coarse maps."""
    return images.shape[-1] // x.shape[-1], images.shape[-2] // x.shape[-2]


def apply_deltas(anchors, deltas, largest=math.log(1000 / 16)):
    """Anchors (Q, 4) moved and scaled by (dx, dy, dw, dh) (..., Q, 4): boxes (..., Q, 4).

    dx, dy are in units of the anchor's size, dw, dh are logarithms, cut at `largest` so that exp stays finite.
    """
    size = anchors[:, 2:] - anchors[:, :2]
    centre = anchors[:, :2] + 0.5 * size + deltas[..., :2] * size
    half = 0.5 * deltas[..., 2:].clamp(max=largest).exp() * size
    return torch.cat([centre - half, centre + half], -1)


def get_deltas(anchors, boxes):
    """The inverse of apply_deltas: (K, 4) anchors and (K, 4) boxes to (K, 4) deltas."""
    size, target = anchors[:, 2:] - anchors[:, :2], boxes[:, 2:] - boxes[:, :2]
    shift = (boxes[:, :2] + 0.5 * target - anchors[:, :2] - 0.5 * size) / size
    return torch.cat([shift, (target / size).log()], -1)


def ltrb_to_xyxy(points, ltrb):
    """Distances to the four sides (B, Q, 4), seen from points (Q, 2): boxes (B, Q, 4)."""
    return torch.cat([points - ltrb[..., :2], points + ltrb[..., 2:]], -1)


# ------------------------------------------------------------------------------------------------
# from predictions to detections: (boxes (K, 4), scores (K,), labels (K,)), best first
# ------------------------------------------------------------------------------------------------

def top_k(boxes, scores, k):
    """The k best (prediction, class) pairs: boxes (Q, 4), scores (Q, C).

    No threshold, no arg-max over classes: one prediction may be reported under several classes.
    """
    best, flat = scores.flatten().topk(min(k, scores.numel()))
    return boxes[flat // scores.shape[1]], best, flat % scores.shape[1]


def with_nms(boxes, scores, labels, threshold, k):
    """Class-wise non-maximum suppression, then the k best."""
    keep = batched_nms(boxes.float(), scores.float(), labels, threshold)[:k]
    return boxes[keep], scores[keep], labels[keep]


def end_to_end_detections(prediction, n, k, nms=0.5):
    """Image n of a one-to-one detector: its k best, and the same after NMS on those k (as OneNet's code)."""
    plain = top_k(prediction.boxes[n], prediction.logits[n].sigmoid(), k)
    return {"plain": plain, "nms": with_nms(*plain, nms, k)}


def candidate_detections(prediction, scores, n, k, nms, accept, per_level=1000):
    """Image n of an original RetinaNet or FCOS.  scores (Q, C); accept (Q, C): true where a pair may be reported.

    Per level the 1,000 best accepted pairs; with NMS over all of them, the k best remain.  "Without NMS"
    is the k best of the very same pairs (the paper does not say how its 7.7 and 17.3 were made).
    """
    scores = scores.masked_fill(~accept, 0)
    per = [top_k(prediction.boxes[n][at], scores[at], per_level)
           for at in (prediction.levels == level for level in prediction.levels.unique())]
    boxes, best, labels = (torch.cat(part) for part in zip(*per))
    order = best.argsort(descending=True, stable=True)[:int((best > 0).sum())]
    plain = boxes[order], best[order], labels[order]
    return {"plain": tuple(part[:k] for part in plain), "nms": with_nms(*plain, nms, k)}


def to_original(detections, target):
    """Detections of a resized image in pixels of its original, clipped there, empty boxes dropped."""
    boxes, scores, labels = detections
    (h, w), (original_h, original_w) = target["size"].tolist(), target["original_size"].tolist()
    boxes = boxes * boxes.new_tensor([original_w / w, original_h / h] * 2)
    limit = boxes.new_tensor([original_w, original_h] * 2)
    boxes = torch.minimum(boxes.clamp(min=0), limit)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return boxes[keep], scores[keep], labels[keep]


# ------------------------------------------------------------------------------------------------
# the dense detectors
# ------------------------------------------------------------------------------------------------

class Detector(nn.Module):
    """Normalises images on the device and runs the backbone; the sub-classes add neck and heads.

    `candidates` says what the pre-defined object candidates are, "anchors" or "points" (Section 2.1).
    pixels: what the backbone's weights were trained on, a key of PIXELS.
    """

    def __init__(self, backbone, pixels="rgb"):
        super().__init__()
        self.backbone, self.pixels = backbone, pixels
        mean, std = PIXELS[pixels]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def features(self, images, mask):
        images = images.flip(1) if self.pixels.startswith("bgr") else images
        x = (images.float() - self.mean) / self.std                   # (B, 3, H, W)
        x = x.masked_fill(mask[:, None], 0).contiguous(memory_format=torch.channels_last)
        return self.backbone(x)


def tower(width, depth, norm, bias):
    """`depth` times 3x3 convolution, group norm if asked for, ReLU.  Shared over the levels."""
    layers = []
    for _ in range(depth):
        layers.append(nn.Conv2d(width, width, 3, padding=1, bias=bias))
        if norm:
            layers.append(nn.GroupNorm(32 if width >= 256 else 8, width))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def init_heads(parts, original):
    """Head weights: normal(0, 0.01) in the original detectors, Xavier in OneNet's; biases 0."""
    for part in parts:
        for m in part.modules():
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(m.weight, std=0.01) if original else nn.init.xavier_uniform_(m.weight)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
            elif isinstance(m, DeformConv) and not original:
                nn.init.xavier_uniform_(m.weight)


class RetinaNet(Detector):
    """Lin et al., 2017b: nine anchors a point (`scales` times three ratios), deltas from anchor to box.

    The original has biases in the towers and normal(0, 0.01) weights; OneNet's has no biases and Xavier
    weights.  Neither has norms in the towers; `tower_norm` adds them, for short training from scratch, and
    `delta_weights` divide what the head says before it is a delta (published: 1; Fast R-CNN: 10 10 5 5).

    torchvision's form (`torchvision_grid`) differs in its anchors, see `anchors`, and has P6 from P5.
    """
    candidates = "anchors"

    def __init__(self, backbone, num_classes, original=False, width=256, depth=4, extra=2, scales=3, tower_norm=False,
                 delta_weights=(1, 1, 1, 1), pixels="rgb", extra_from="c5", torchvision_grid=False):
        super().__init__(backbone, pixels)
        self.original, self.scales, self.torchvision_grid = original, scales, torchvision_grid
        self.neck = FPN(backbone, width, extra, extra_from)
        self.strides = self.neck.strides
        self.class_tower = tower(width, depth, norm=tower_norm, bias=original)
        self.box_tower = tower(width, depth, norm=tower_norm, bias=original)
        self.score = nn.Conv2d(width, 3 * scales * num_classes, 3, padding=1)
        self.delta = nn.Conv2d(width, 3 * scales * 4, 3, padding=1)
        self.register_buffer("delta_weights", torch.tensor(delta_weights, dtype=torch.float32), persistent=False)
        init_heads([self.class_tower, self.box_tower, self.score, self.delta], original)
        nn.init.constant_(self.score.bias, PRIOR_BIAS)
        if original:                          # losses.retinanet_loss keeps its moving average here
            self.register_buffer("positives_average", torch.tensor(100.0))

    def anchors(self, x, stride, images=None):
        """(9HW, 4): sides 4 * stride times 2^0, 2^(1/3), 2^(2/3), outer; ratios h/w 0.5, 1, 2, inner.

        Centred on (j * stride, i * stride), without half a cell's offset, as in detectron2.  torchvision
        cuts the sides to whole pixels, rounds the corners, and spaces by image size // map size.
        """
        sides = [4 * stride * 2 ** (n / self.scales) for n in range(self.scales)]
        if self.torchvision_grid:
            sides, stride = [int(side) for side in sides], torchvision_spacing(x, images)
        half = torch.tensor([[side / ratio ** 0.5 / 2, side * ratio ** 0.5 / 2] for side in sides
                             for ratio in (0.5, 1.0, 2.0)], device=x.device)                          # (9, 2)
        half = half.round() if self.torchvision_grid else half
        centre = grid_points(x, stride, 0)[:, None]                           # (HW, 1, 2)
        return torch.cat([centre - half, centre + half], -1).reshape(-1, 4)

    def forward(self, images, mask):
        logits, deltas, anchors, levels = [], [], [], []
        for level, (x, stride) in enumerate(zip(self.neck(self.features(images, mask)), self.strides)):
            B = len(x)
            score, delta = self.score(self.class_tower(x)), self.delta(self.box_tower(x))
            anchors.append(self.anchors(x, stride, images))                                          # (9HW, 4)
            logits.append(score.float().permute(0, 2, 3, 1).reshape(B, len(anchors[-1]), -1))        # (B, 9HW, C)
            deltas.append(delta.float().permute(0, 2, 3, 1).reshape(B, -1, 4) / self.delta_weights)  # (B, 9HW, 4)
            levels.append(torch.full((len(anchors[-1]),), level, device=x.device))
        logits, deltas, anchors = torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(anchors)
        raw = {"deltas": deltas, "positives_average": self.positives_average} if self.original else {}
        return Prediction(logits, apply_deltas(anchors, deltas), anchors, torch.cat(levels), raw=raw)

    def detections(self, prediction, n, k=100):
        if not self.original:
            return end_to_end_detections(prediction, n, k)
        scores = prediction.logits[n].sigmoid()
        return candidate_detections(prediction, scores, n, k, nms=0.5, accept=scores > 0.05)


class FCOS(Detector):
    """Tian et al., 2019: every point predicts its distances to the four sides of the box.

    OneNet's form has no centre-ness, no biases in the towers, and P6 from C5; the original has all three the
    other way round.  Both have group norm and one learned scale per level.

    detectron2's and torchvision's forms of the original have no scales (here: all 1) and accept a detection
    by its final score (`score_threshold` 0.2); torchvision's points lie on cell corners (`torchvision_grid`).
    """
    candidates = "points"

    def __init__(self, backbone, num_classes, original=False, width=256, depth=4, extra=2, box_prior=0.0,
                 pixels="rgb", torchvision_grid=False, score_threshold=None):
        super().__init__(backbone, pixels)
        self.original, self.torchvision_grid, self.score_threshold = original, torchvision_grid, score_threshold
        self.neck = FPN(backbone, width, extra, extra_from="p5" if original else "c5")
        self.strides = self.neck.strides
        self.class_tower = tower(width, depth, norm=True, bias=original)
        self.box_tower = tower(width, depth, norm=True, bias=original)
        self.score = nn.Conv2d(width, num_classes, 3, padding=1)
        self.ltrb = nn.Conv2d(width, 4, 3, padding=1)
        self.centreness = nn.Conv2d(width, 1, 3, padding=1) if original else None
        self.scale = nn.Parameter(torch.ones(len(self.strides)))
        heads = [self.class_tower, self.box_tower, self.score, self.ltrb]
        init_heads(heads + ([self.centreness] if original else []), original)
        nn.init.constant_(self.score.bias, PRIOR_BIAS)
        nn.init.constant_(self.ltrb.bias, box_prior)          # in strides; published: 0

    def forward(self, images, mask):
        logits, boxes, centreness, points, levels = [], [], [], [], []
        for level, (x, stride) in enumerate(zip(self.neck(self.features(images, mask)), self.strides)):
            box_features = self.box_tower(x)                                          # (B, width, H, W)
            logits.append(self.score(self.class_tower(x)).float().flatten(2).mT)      # (B, HW, C)
            ltrb = F.relu(self.scale[level] * self.ltrb(box_features).float()) * stride  # (B, 4, H, W) pixels
            points.append(grid_points(x, torchvision_spacing(x, images), 0) if self.torchvision_grid
                          else grid_points(x, stride, stride // 2))                   # (HW, 2)
            boxes.append(ltrb_to_xyxy(points[-1], ltrb.flatten(2).mT))                # (B, HW, 4)
            levels.append(torch.full((len(points[-1]),), level, device=x.device))
            if self.original:
                centreness.append(self.centreness(box_features).float().flatten(1))   # (B, HW)
        raw = {"centreness": torch.cat(centreness, 1)} if self.original else {}
        return Prediction(torch.cat(logits, 1), torch.cat(boxes, 1), torch.cat(points).repeat(1, 2),
                          torch.cat(levels), raw=raw)

    def detections(self, prediction, n, k=100):
        if not self.original:
            return end_to_end_detections(prediction, n, k)
        p = prediction.logits[n].sigmoid()                                            # (Q, C)
        scores = (p * prediction.raw["centreness"][n].sigmoid()[:, None]).sqrt()
        accept = p > 0.05 if self.score_threshold is None else scores > self.score_threshold
        return candidate_detections(prediction, scores, n, k, nms=0.6, accept=accept)


class CenterNet(Detector):
    """Zhou et al., 2019: one map, at stride 4 with the published three steps up; an object is a point.

    The original predicts a heat map, the size and the offset of the centre within its cell; OneNet's predicts
    a class score and the distances to the four sides, in pixels, from one shared trunk.
    """
    candidates = "points"

    def __init__(self, backbone, num_classes, original=False, widths=(256, 128, 64), deform=True, box_prior=0.0,
                 pixels="rgb"):
        super().__init__(backbone, pixels)
        self.original = original
        self.neck = DeconvNeck(backbone, widths, deform, laterals=not original)
        width, self.strides = self.neck.width, (self.neck.stride,)
        if original:
            self.score, self.size, self.offset = (
                nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, channels, 1))
                for channels in (num_classes, 2, 2))
            nn.init.constant_(self.score[-1].bias, -2.19)     # a score of 0.1 (CenterNet's own prior)
        else:
            self.trunk = nn.Conv2d(width, width, 3, padding=1)
            self.score = nn.Conv2d(width, num_classes, 3, padding=1)
            self.ltrb = nn.Conv2d(width, 4, 3, padding=1)
            # OneNet's Xavier initialisation covers the neck too, even the deformable offsets' zeros
            init_heads([self.neck, self.trunk, self.score, self.ltrb], original=False)
            nn.init.constant_(self.score.bias, PRIOR_BIAS)
            nn.init.constant_(self.ltrb.bias, box_prior)      # in pixels; published: 0

    def forward(self, images, mask):
        x = self.neck(self.features(images, mask))                            # (B, 64, H, W)
        (stride,) = self.strides
        corner, raw = grid_points(x, stride, 0), {}                      # (HW, 2)
        if self.original:
            logits = self.score(x).float().flatten(2).mT                      # (B, HW, C)
            size, offset = (part(x).float().flatten(2).mT for part in (self.size, self.offset))   # (B, HW, 2) cells
            centre = corner + stride * offset
            boxes = torch.cat([centre - stride / 2 * size, centre + stride / 2 * size], -1)
            raw = {"size": size, "offset": offset, "grid": x.shape[-2:], "stride": stride}
        else:
            x = F.relu(self.trunk(x))
            logits = self.score(x).float().flatten(2).mT                      # (B, HW, C)
            ltrb = F.relu(self.ltrb(x).float()).flatten(2).mT                 # (B, HW, 4) pixels of the image
            boxes = ltrb_to_xyxy(corner + stride // 2, ltrb)
        points = (corner + stride // 2).repeat(1, 2)
        return Prediction(logits, boxes, points, torch.zeros(len(points), dtype=torch.long, device=x.device), raw=raw)

    def detections(self, prediction, n, k=100):
        """The original's "NMS" keeps the cells that are the maximum of their 3x3 neighbours, per class."""
        if not self.original:
            return end_to_end_detections(prediction, n, k)
        scores = prediction.logits[n].sigmoid()                               # (HW, C)
        heat = scores.mT.unflatten(1, prediction.raw["grid"])[None]           # (1, C, H, W)
        peak = (F.max_pool2d(heat, 3, 1, 1) == heat)[0].flatten(1).mT         # (HW, C)
        plain = top_k(prediction.boxes[n], scores, k)
        return {"plain": plain, "nms": top_k(prediction.boxes[n], scores * peak, k), "box_nms": with_nms(*plain, 0.5, k)}


DETECTORS = {"retinanet": RetinaNet, "centernet": CenterNet, "fcos": FCOS}
BACKBONES = ("tiny", "resnet18", "resnet34", "resnet50", "resnet101")


def build(detector, num_classes, backbone, original=False, norm="frozen", freeze=2, resnet="torchvision", **options):
    """A detector by name.  norm, freeze and resnet concern ResNets; options go to the detector's constructor.

    resnet: "torchvision", or "msra", whose pre-trained weights want BGR pixels and the stride in the first 1x1.
    These arguments are all that a checkpoint needs to hold beside the weights.
    """
    msra = backbone != "tiny" and resnet == "msra"
    options = {"pixels": "bgr" if msra else "rgb", **options}
    body = Tiny() if backbone == "tiny" else ResNet(backbone, norm, freeze, stride_in_1x1=msra)
    model = DETECTORS[detector](body, num_classes, original=original, **options)
    return model.to(memory_format=torch.channels_last)


def native_precision(device):
    """"bf16" where the device computes in bfloat16 natively, so that it is faster there, else "fp32"."""
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    cpuinfo = Path("/proc/cpuinfo")          # the only public place to ask: Linux
    native = cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()
    return "bf16" if native and torch.device(device).type == "cpu" else "fp32"


# ------------------------------------------------------------------------------------------------
# checkpoints
# ------------------------------------------------------------------------------------------------

class CheckpointError(ValueError):
    """A weights file cannot be used: one sentence that says why."""


def save_whole(content, file):
    """torch.save that leaves the old file or the new one, never half of one."""
    temporary = file.with_name(file.name + ".tmp")
    with open(temporary, "wb") as stream:
        torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def read_checkpoint(file, harmless=()):
    """A checkpoint, read without running any code in it.  Raises CheckpointError.

    harmless: classes it may hold beside tensors and plain values.
    """
    try:
        with torch.serialization.safe_globals(list(harmless)):
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error}); check the path") from None
    except Exception as error:               # cut short, not a checkpoint, or a pickle that would run code
        if "GLOBAL" in str(error):           # PyTorch names the function or class that it would not call
            raise CheckpointError(f"{file}: refused: it holds objects other than tensors and plain values, which could "
                                  f"run code when loaded") from None
        raise CheckpointError(f"{file}: not a readable checkpoint (cut short, or another kind of file); copy it again") from None
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{file}: not a checkpoint: it holds a {type(checkpoint).__name__}")
    return checkpoint


def from_checkpoint(checkpoint, file):
    """The detector a checkpoint of train.py describes, with its weights."""
    if not {"build", "model", "class_names", "test_transform", "args"} <= checkpoint.keys():
        raise CheckpointError(f"{file}: not a checkpoint of train.py (it lacks the description of the detector)")
    try:
        model = build(**checkpoint["build"])
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:         # of another version, or made by hand
        raise CheckpointError(f"{file}: its weights do not fit its own description: {type(error).__name__}: {error}") from None
    return model


def tensors_of(checkpoint):
    """The named tensors of a checkpoint of train.py, or of a plain state dict."""
    given = checkpoint.get("model", checkpoint)
    given = given if isinstance(given, dict) else {}
    return {k: v for k, v in given.items() if isinstance(k, str) and torch.is_tensor(v)}


def load_weights(model, file):
    """Weights that fit, by name and shape, from a checkpoint into a model; the rest is returned.

    Returns (missing, left over, of another shape): names of the model's own tensors that got nothing, and of the file's
    that were not used.
    """
    given, own = tensors_of(read_checkpoint(file)), model.state_dict()
    shapes = [k for k in own if k in given and own[k].shape != given[k].shape]
    fits = {k: given[k] for k in own if k in given and k not in shapes}
    if not fits:
        raise CheckpointError(f"{file}: none of its {len(given)} entries fits this detector; it is of another detector "
                              f"or not a checkpoint of train.py")
    model.load_state_dict(fits, strict=False)
    return [k for k in own if k not in given], [k for k in given if k not in own], shapes


def load_backbone(backbone, weights):
    """Pre-trained weights into a backbone.  weights: "imagenet" (torchvision's, V1), or a file.

    A file is a torchvision ResNet's state dict, or a checkpoint of train.py with the same backbone.
    """
    if weights == "imagenet":
        if isinstance(backbone, Tiny):
            raise CheckpointError("--backbone-weights imagenet: there are none for the tiny backbone; use a resnet, or none")
        try:
            given = torchvision.models.get_model_weights(backbone.name)["IMAGENET1K_V1"].get_state_dict(progress=True, weights_only=True)
        except OSError as error:
            raise CheckpointError(f"--backbone-weights imagenet: cannot be downloaded ({error}); fetch torchvision's {backbone.name} "
                                  f"on another machine and give its file") from None
    else:
        checkpoint = read_checkpoint(weights)
        given, made_for = tensors_of(checkpoint), checkpoint.get("resnet") or checkpoint.get("build", {}).get("resnet", "torchvision")
        if not isinstance(backbone, Tiny) and made_for != backbone.kind:
            raise CheckpointError(f"{weights}: the weights of {made_for}'s kind of ResNet; give --resnet {made_for}")
    if any(k.startswith("backbone.") for k in given):        # a checkpoint of train.py
        given = {k.removeprefix("backbone."): v for k, v in given.items() if k.startswith("backbone.")}
    else:
        given = {f"body.{k}": v for k, v in given.items() if not k.startswith("fc.")}
    own = backbone.state_dict()
    given = {k: v for k, v in given.items() if k in own or not k.endswith("num_batches_tracked")}
    missing = [k for k in own if k not in given and not k.endswith("num_batches_tracked")]
    wrong = [k for k in given if k not in own or own[k].shape != given[k].shape]
    if missing or wrong:
        raise CheckpointError(f"{weights}: not the weights of this backbone: {len(missing)} tensors missing, {len(wrong)} left "
                              f"over or of another shape (first: {(missing + wrong)[0]})")
    backbone.load_state_dict(given, strict=False)
