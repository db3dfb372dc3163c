"""The detectors: backbone, neck, heads, and decoding to boxes.

The paper (Section 2.1) takes detectors apart into object candidates, a classification sub-net, a
location sub-net and a rule that assigns positive samples.  Everything but the rule is in this file.
A detector comes in two forms: the one-to-one form of the paper (trained with assign.hungarian and
losses.set_loss), and its original one-to-many form (`original=True`), Table 1's one-to-many column.

One alphabet, for the whole repository: B images in the batch, L pyramid levels, Q predictions of one
image (all levels joined; row by row within a level, anchors innermost), G ground-truth objects of one
image, C classes, K matched pairs, HxW a feature map.  Boxes are xyxy in pixels of the resized,
un-padded image.  Classes are 0 ... C-1, without a background column; DETR alone has one more, "no object".

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
from torchvision.ops import batched_nms, box_convert, deform_conv2d, roi_align
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
    softmax: bool = False                   # DETR: scores are a softmax, the last column is "no object"
    centre_l1: bool = False                 # DETR and Deformable DETR: L1 compares (cx, cy, w, h), not corners
    class_agnostic: bool = False            # two-stage Deformable DETR's proposals: every object is of class 0


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


def run_stages(x, stages):
    """The maps [(B, c, H/4, W/4), ... (B, c, H/32, W/32)] behind each of a backbone's stages; fewer of fewer stages."""
    features = []
    for stage in stages:
        x = stage(x)
        features.append(x)
    return features


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

    def stages(self):
        return [self.stage1, self.stage2, self.stage3, self.stage4]

    def forward(self, x, count=4):            # x: (B, 3, H, W)
        return run_stages(self.stem(x), self.stages()[:count])


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
        layers = self.stages()
        last = "conv2" if name in ("resnet18", "resnet34") else "conv3"
        if stride_in_1x1 and last == "conv3":
            for layer in layers[1:]:
                layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
        self.channels = tuple(getattr(layer[-1], last).out_channels for layer in layers)
        for part in [[body.conv1, body.bn1], *[[layer] for layer in layers]][:freeze]:
            for module in part:
                module.requires_grad_(False)

    def stages(self):
        return [self.body.layer1, self.body.layer2, self.body.layer3, self.body.layer4]

    def forward(self, x, count=4):            # x: (B, 3, H, W)
        b = self.body
        return run_stages(b.maxpool(b.relu(b.bn1(b.conv1(x)))), self.stages()[:count])


# ------------------------------------------------------------------------------------------------
# necks
# ------------------------------------------------------------------------------------------------

class FPN(nn.Module):
    """Feature pyramid (Lin et al., 2017a) on the backbone's last three or four maps, plus `extra` coarser levels.

    With a ResNet these are P3, P4, P5, and with extra = 2 P6 and P7, which RetinaNet and OneNet's FCOS
    take from C5 and the original FCOS from P5 (`extra_from`).  Sparse R-CNN has P2 to P5.
    """

    def __init__(self, backbone, width=256, extra=2, extra_from="c5", maps=3):
        super().__init__()
        channels = backbone.channels[-maps:]
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.output = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)
        self.extra_from = extra_from
        first = channels[-1] if extra_from == "c5" else width
        self.extra = nn.ModuleList(nn.Conv2d(width if n else first, width, 3, 2, 1) for n in range(extra))
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_uniform_(conv.weight, a=1)
                nn.init.zeros_(conv.bias)
        strides = list(backbone.strides[-maps:])
        self.strides = tuple(strides + [strides[-1] * 2 ** (n + 1) for n in range(extra)])

    def forward(self, features):
        c = features[-len(self.lateral):]
        top = self.lateral[-1](c[-1])                                 # (B, width, H/32, W/32)
        levels = [self.output[-1](top)]
        for lateral, output, x in zip(self.lateral[-2::-1], self.output[-2::-1], c[-2::-1]):
            top = lateral(x) + F.interpolate(top, scale_factor=2.0, mode="nearest")
            levels.insert(0, output(top))
        x = c[-1] if self.extra_from == "c5" else levels[-1]
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

    OneNet's form adds a 1x1 lateral of each finer map after the step's ReLU and ends in a 3x3
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
    along_x, along_y = stride if isinstance(stride, tuple) else (stride, stride)
    ys, xs = torch.meshgrid(torch.arange(h, device=x.device) * along_y, torch.arange(w, device=x.device) * along_x, indexing="ij")
    return torch.stack([xs, ys], -1).reshape(-1, 2).float() + offset


def torchvision_spacing(x, images):
    """Spacing (along x, along y) of torchvision's anchors: image size // map size, the stride but on odd coarse maps."""
    return images.shape[-1] // x.shape[-1], images.shape[-2] // x.shape[-2]


def apply_deltas(anchors, deltas, largest=math.log(1000 / 16)):
    """Anchors (..., Q, 4) moved and scaled by (dx, dy, dw, dh) (..., Q, 4): boxes (..., Q, 4).

    dx, dy are in units of the anchor's size, dw, dh are logarithms, cut at `largest` so that exp stays finite.
    """
    size = anchors[..., 2:] - anchors[..., :2]
    centre = anchors[..., :2] + 0.5 * size + deltas[..., :2] * size
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

    `candidates` says what the pre-defined object candidates are, "anchors" or "points", if there are any (Section 2.1).
    pixels: what the backbone's weights were trained on, a key of PIXELS.
    """
    candidates, original, strides = None, False, ()
    slow_parameters = ()                     # parts of names; their learning rate is a tenth

    def __init__(self, backbone, pixels="rgb"):
        super().__init__()
        self.backbone, self.pixels = backbone, pixels
        mean, std = PIXELS[pixels]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def features(self, images, mask, **options):
        images = images.flip(1) if self.pixels.startswith("bgr") else images
        x = (images.float() - self.mean) / self.std                   # (B, 3, H, W)
        x = x.masked_fill(mask[:, None], 0).contiguous(memory_format=torch.channels_last)
        return self.backbone(x, **options)

    def detections(self, prediction, n, k=100, nms=0.5):
        """Image n: its k best (prediction, class) pairs, and the same after NMS on those k (as OneNet's code)."""
        plain = top_k(prediction.boxes[n], prediction.logits[n].sigmoid(), k)
        return {"plain": plain, "nms": with_nms(*plain, nms, k)}


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
            deltas.append(delta.float().permute(0, 2, 3, 1).reshape(B, -1, 4) / self.delta_weights.float())       # (B, 9HW, 4)
            levels.append(torch.full((len(anchors[-1]),), level, device=x.device))
        logits, deltas, anchors = torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(anchors)
        raw = {"deltas": deltas, "positives_average": self.positives_average} if self.original else {}
        return Prediction(logits, apply_deltas(anchors, deltas), anchors, torch.cat(levels), raw=raw)

    def detections(self, prediction, n, k=100):
        if not self.original:
            return super().detections(prediction, n, k)
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
            return super().detections(prediction, n, k)
        p = prediction.logits[n].sigmoid()                                            # (Q, C)
        scores = (p * prediction.raw["centreness"][n].sigmoid()[:, None]).sqrt()
        accept = p > 0.05 if self.score_threshold is None else scores > self.score_threshold
        return candidate_detections(prediction, scores, n, k, nms=0.6, accept=accept)


class CenterNet(Detector):
    """Zhou et al., 2019: one map, at stride 4 with the published three steps up; an object is a point.

    The original predicts a heat map, the size and the offset of the centre within its cell; OneNet's predicts
    a class score and the distances to the four sides, in pixels, from one shared trunk.  The published original
    has no laterals in its neck; with `laterals`, for small pictures, it has OneNet's.
    """
    candidates = "points"

    def __init__(self, backbone, num_classes, original=False, widths=(256, 128, 64), deform=True, box_prior=0.0,
                 laterals=False, pixels="rgb"):
        super().__init__(backbone, pixels)
        self.original = original
        self.neck = DeconvNeck(backbone, widths, deform, laterals=laterals or not original)
        width, self.strides = self.neck.width, (self.neck.stride,)
        if original:
            self.score, self.size, self.offset = (
                nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, channels, 1))
                for channels in (num_classes, 2, 2))
            nn.init.constant_(self.score[-1].bias, -2.19)     # a score of 0.1 (CenterNet's own prior)
            if box_prior:                                     # in pixels, to each side; published: PyTorch's default
                nn.init.constant_(self.size[-1].bias, 2 * box_prior / self.neck.stride)
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
            return super().detections(prediction, n, k)
        scores = prediction.logits[n].sigmoid()                               # (HW, C)
        heat = scores.mT.unflatten(1, prediction.raw["grid"])[None]           # (1, C, H, W)
        peak = (F.max_pool2d(heat, 3, 1, 1) == heat)[0].flatten(1).mT         # (HW, C)
        plain = top_k(prediction.boxes[n], scores, k)
        return {"plain": plain, "nms": top_k(prediction.boxes[n], scores * peak, k), "box_nms": with_nms(*plain, 0.5, k)}


# ------------------------------------------------------------------------------------------------
# the query detectors: as many object candidates as there are learned queries, none of them pre-defined
# ------------------------------------------------------------------------------------------------

def image_scale(mask):
    """Width, height, width, height of each image without its padding: (B, 1, 4)."""
    return torch.stack([(~mask[:, 0]).sum(1), (~mask[:, :, 0]).sum(1)] * 2, 1)[:, None].float()


def mask_like(mask, x):
    """The padding mask (B, H, W) at the size of a feature map x, nearest neighbour as published."""
    return F.interpolate(mask[None].float(), size=x.shape[-2:])[0].bool()


def sine_code(position, width, temperature=10000):
    """Numbers (...) in radians as vectors (..., width): sine and cosine in turn, at falling frequencies."""
    frequency = temperature ** (torch.arange(0, width, 2, device=position.device) / width)
    angle = position[..., None] / frequency                               # (..., width / 2)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)


def sine_position(mask, width, shift=0.0):
    """Where each cell lies in its image: codes of y, then of x, each from 0 to 2 pi over the unpadded part.

    mask: (B, H, W) true on padding   returns (B, HW, width)   shift: of the count of cells, -0.5 in Deformable DETR
    """
    y, x = (~mask).cumsum(1).float(), (~mask).cumsum(2).float()
    y = (y + shift) / (y[:, -1:] + 1e-6) * 2 * math.pi
    x = (x + shift) / (x[:, :, -1:] + 1e-6) * 2 * math.pi
    return torch.cat([sine_code(y, width // 2), sine_code(x, width // 2)], -1).flatten(1, 2)


def inverse_sigmoid(p, eps=1e-5):
    """Logits of probabilities, which are cut at eps as published so that 0 and 1 stay finite."""
    p = p.clamp(0, 1)
    return (p.clamp(min=eps) / (1 - p).clamp(min=eps)).log()


def box_head(width):
    """Three linear layers: (..., width) to four numbers."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


def from_layers(layers, scale, **kind):
    """Predictions of all decoder layers; the last one carries the others as aux.

    layers: pairs of logits (B, Q, C) and boxes (B, Q, 4), normalised (cx, cy, w, h)   scale: (B, 1, 4) from image_scale
    """
    layers = [Prediction(logits.float(), box_convert(boxes, "cxcywh", "xyxy") * scale, centre_l1=True, **kind)
              for logits, boxes in layers]
    layers[-1].aux = layers[:-1]
    return layers[-1]


class FeedForward(nn.Module):
    """Two linear layers on each cell or query alone, a residual, a norm: (..., width) to (..., width)."""

    def __init__(self, width, hidden, dropout):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class EncoderLayer(nn.Module):
    """Cells attend to cells, then a feed-forward network; residuals, norms behind them ("post-norm")."""

    def __init__(self, attention, width, hidden, dropout):
        super().__init__()
        self.attention, self.dropout, self.norm = attention, nn.Dropout(dropout), nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, hidden, dropout)

    def forward(self, x, attend):             # x: (B, S, width); attend: says what the attention is given
        return self.feed_forward(self.norm(x + self.dropout(attend(self.attention, x))))


class DecoderLayer(nn.Module):
    """Queries attend to queries, which is how they learn of each other, then to the image."""

    def __init__(self, cross, width, heads, hidden, dropout):
        super().__init__()
        self.self_attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.cross, self.dropout = cross, nn.Dropout(dropout)
        self.self_norm, self.cross_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, hidden, dropout)

    def forward(self, h, position, attend):   # h, position: (B, Q, width)
        q = h + position
        h = self.self_norm(h + self.dropout(self.self_attention(q, q, h, need_weights=False)[0]))
        h = self.cross_norm(h + self.dropout(attend(self.cross, h + position)))
        return self.feed_forward(h)


def xavier(module):
    """Xavier-uniform for every matrix: how the three published transformers start."""
    for p in module.parameters():
        if p.dim() > 1:
            nn.init.xavier_uniform_(p)


class DETR(Detector):
    """Carion et al., 2020: one coarse map, a transformer, softmax classes with a last one for "no object".

    stride: of the map that is encoded (published: 32).
    """

    def __init__(self, backbone, num_classes, width=256, heads=8, layers=6, hidden=2048, dropout=0.1, queries=100,
                 stride=32, pixels="rgb"):
        super().__init__(backbone, pixels)
        self.count = backbone.strides.index(stride) + 1                   # stages of the backbone that are used
        for stage in backbone.stages()[self.count:]:
            stage.requires_grad_(False)
        self.project = nn.Conv2d(backbone.channels[self.count - 1], width, 1)
        self.encoder = nn.ModuleList(EncoderLayer(nn.MultiheadAttention(width, heads, dropout, batch_first=True), width, hidden, dropout)
                                     for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(nn.MultiheadAttention(width, heads, dropout, batch_first=True), width, heads, hidden, dropout)
                                     for _ in range(layers))
        self.norm = nn.LayerNorm(width)                                   # shared: behind every decoder layer
        self.query = nn.Embedding(queries, width)
        xavier(self.encoder), xavier(self.decoder)
        self.score, self.box = nn.Linear(width, num_classes + 1), box_head(width)

    def forward(self, images, mask):
        x = self.features(images, mask, count=self.count)[-1]
        small = mask_like(mask, x)
        position, padding = sine_position(small, self.query.embedding_dim), small.flatten(1)
        memory = self.project(x).flatten(2).mT                            # (B, HW, width)
        for layer in self.encoder:
            memory = layer(memory, lambda attention, y: attention(
                y + position, y + position, y, key_padding_mask=padding, need_weights=False)[0])
        query = self.query.weight.expand(len(x), -1, -1)                  # (B, Q, width)
        h, layers = torch.zeros_like(query), []
        for layer in self.decoder:
            h = layer(h, query, lambda attention, q: attention(
                q, memory + position, memory, key_padding_mask=padding, need_weights=False)[0])
            y = self.norm(h)
            layers.append((self.score(y), self.box(y).float().sigmoid()))
        return from_layers(layers, image_scale(mask), softmax=True)

    def detections(self, prediction, n, k=100):
        """Each query's best class: at most one detection a query, without threshold."""
        scores, labels = prediction.logits[n].softmax(-1)[:, :-1].max(-1)
        scores, order = scores.topk(min(k, len(scores)))
        plain = prediction.boxes[n][order], scores, labels[order]
        return {"plain": plain, "nms": with_nms(*plain, 0.5, k)}


def deformable_attention(value, shapes, where, weights):
    """What each query finds where it looks: Eq. 3 of Deformable DETR, bilinear, zero outside the maps.

    value: (B, S, H, D), all levels joined   shapes: (h, w) of each level   where: (B, Q, H, L, P, 2), x and y from 0 to 1
    weights: (B, Q, H, L, P), sum 1 over L and P   returns (B, Q, H * D)
    """
    B, Q, H = where.shape[:3]
    weights, found = weights.transpose(1, 2).flatten(0, 1), 0                                   # (BH, Q, L, P)
    for level, (v, (h, w)) in enumerate(zip(value.split([h * w for h, w in shapes], 1), shapes)):
        v = v.permute(0, 2, 3, 1).reshape(B * H, -1, h, w)                # (BH, D, h, w)
        grid = 2 * where[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1                      # (BH, Q, P, 2)
        samples = F.grid_sample(v, grid, mode="bilinear", padding_mode="zeros", align_corners=False)           # (BH, D, Q, P)
        found = found + (samples * weights[:, None, :, level]).sum(-1)    # level by level: the samples of all would be a large tensor
    return found.view(B, -1, Q).mT


class DeformableAttention(nn.Module):
    """Zhu et al., 2021: each query and head looks at a few points a level around its reference, not at every cell."""

    def __init__(self, width, heads, levels, points):
        super().__init__()
        self.shape = (heads, levels, points)
        self.offset = nn.Linear(width, heads * levels * points * 2)
        self.weight = nn.Linear(width, heads * levels * points)
        self.value, self.output = nn.Linear(width, width), nn.Linear(width, width)

    def reset(self):
        """Offsets start as a star: head h looks in direction h, point p at p cells' distance."""
        heads, levels, points = self.shape
        angle = torch.arange(heads) * 2 * math.pi / heads
        star = torch.stack([angle.cos(), angle.sin()], -1)
        star = star / star.abs().amax(-1, keepdim=True)                   # on the unit square
        star = star.view(heads, 1, 1, 2) * torch.arange(1, points + 1).view(1, 1, points, 1)
        nn.init.zeros_(self.offset.weight), nn.init.zeros_(self.weight.weight), nn.init.zeros_(self.weight.bias)
        with torch.no_grad():
            self.offset.bias.copy_(star.expand(heads, levels, points, 2).flatten())
        nn.init.zeros_(self.value.bias), nn.init.zeros_(self.output.bias)

    def forward(self, query, reference, memory, shapes, sizes, padding):
        """query: (B, Q, width)   reference: (B, Q, L, 2) points or (B, Q, L, 4) boxes, normalised   memory: (B, S, width)

        shapes: (h, w) of each level   sizes: the same on the device, (L, 2), width first   padding: (B, S)
        """
        heads, levels, points = self.shape
        value = self.value(memory).masked_fill(padding[..., None], 0).unflatten(-1, (heads, -1))       # (B, S, H, D)
        offset = self.offset(query).float().unflatten(-1, (heads, levels, points, 2))                  # (B, Q, H, L, P, 2)
        weight = self.weight(query).float().unflatten(-1, (heads, -1)).softmax(-1).unflatten(-1, (levels, points))
        at = reference[:, :, None, :, None]                                                            # (B, Q, 1, L, 1, 2 or 4)
        if reference.shape[-1] == 2:          # offsets in cells of each level
            where = at + offset / sizes[:, None]
        else:                                 # in shares of the box: the outermost point at half its size
            where = at[..., :2] + offset / points * at[..., 2:] * 0.5
        with torch.autocast(query.device.type, enabled=False):            # grid_sample mixes no types
            found = deformable_attention(value.to(offset.dtype), shapes, where, weight)
        return self.output(found)


class DeformableDETR(Detector):
    """Zhu et al., 2021: DETR on several levels with deformable attention, and sigmoid classes.

    refine: each decoder layer corrects the boxes of the one before, with heads of its own.
    two_stage (with refine): the queries start from the best of the encoder's own boxes.
    """
    slow_parameters = ("reference_points", "attention.offset", "cross.offset")

    def __init__(self, backbone, num_classes, width=256, heads=8, layers=6, hidden=1024, dropout=0.1, queries=300, levels=4,
                 points=4, refine=False, two_stage=False, pixels="rgb"):
        super().__init__(backbone, pixels)
        self.queries, self.refine, self.two_stage = queries, refine or two_stage, two_stage
        channels = backbone.channels[-min(levels, 3):]
        self.project = nn.ModuleList(nn.Sequential(nn.Conv2d(c, width, 1), nn.GroupNorm(32, width)) for c in channels)
        for n in range(levels - len(channels)):                           # more levels: from C5, not from its projection
            self.project.append(nn.Sequential(nn.Conv2d(width if n else channels[-1], width, 3, 2, 1), nn.GroupNorm(32, width)))
        self.level_code = nn.Parameter(torch.randn(levels, width))
        attention = lambda: DeformableAttention(width, heads, levels, points)
        self.encoder = nn.ModuleList(EncoderLayer(attention(), width, hidden, dropout) for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(attention(), width, heads, hidden, dropout) for _ in range(layers))
        copies = layers + two_stage if self.refine else 1                 # one of each serves all layers of the base form
        self.score = nn.ModuleList(nn.Linear(width, num_classes) for _ in range(copies))
        self.box = nn.ModuleList(box_head(width) for _ in range(copies))
        if two_stage:
            self.proposal, self.proposal_norm = nn.Linear(width, width), nn.LayerNorm(width)
            self.query_of_box, self.query_of_box_norm = nn.Linear(2 * width, 2 * width), nn.LayerNorm(2 * width)
        else:
            self.query, self.reference_points = nn.Embedding(queries, 2 * width), nn.Linear(width, 2)
        self.initialise()

    def initialise(self):
        transformer = [self.encoder, self.decoder, *([self.proposal, self.query_of_box] if self.two_stage else [self.reference_points])]
        for part in transformer:
            xavier(part)
        for m in self.modules():
            if isinstance(m, DeformableAttention):
                m.reset()
        for conv, _ in self.project:
            nn.init.xavier_uniform_(conv.weight), nn.init.zeros_(conv.bias)
        if not self.two_stage:
            nn.init.zeros_(self.reference_points.bias)
        for n, (score, box) in enumerate(zip(self.score, self.box)):
            nn.init.constant_(score.bias, PRIOR_BIAS)
            nn.init.zeros_(box[-1].weight), nn.init.zeros_(box[-1].bias)
            if n == 0 and not self.two_stage:
                nn.init.constant_(box[-1].bias[2:], -2.0)                 # first boxes an eighth of the image wide

    def encoder_inputs(self, images, mask):
        """Projected maps of all levels, joined: memory, position, padding (B, S, ...), shapes, sizes (L, 2), and each
        level's valid share (B, L, 2) along x and y."""
        features = self.features(images, mask)[-min(len(self.project), 3):]
        xs = [project(x) for project, x in zip(self.project, features)]
        for n, project in enumerate(self.project[len(features):]):
            xs.append(project(xs[-1] if n else features[-1]))
        masks = [mask_like(mask, x) for x in xs]
        position = torch.cat([sine_position(m, self.level_code.shape[1], -0.5) + code for m, code in zip(masks, self.level_code)], 1)
        valid = torch.stack([torch.stack([(~m[:, 0]).float().mean(1), (~m[:, :, 0]).float().mean(1)], -1) for m in masks], 1)
        shapes = [x.shape[-2:] for x in xs]
        sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32).to(images.device, non_blocking=True)   # once: a copy waits
        return (torch.cat([x.flatten(2).mT for x in xs], 1), position, torch.cat([m.flatten(1) for m in masks], 1), shapes, sizes, valid)

    def forward(self, images, mask):
        memory, position, padding, shapes, sizes, valid = self.encoder_inputs(images, mask)
        # centres of the cells, as shares of the unpadded image, then seen from every level
        centres = [grid_points(torch.empty(h, w, device=memory.device), 1, 0.5) / (valid[:, None, n] * sizes[n])
                   for n, (h, w) in enumerate(shapes)]
        reference = torch.cat(centres, 1)[:, :, None] * valid[:, None]    # (B, S, L, 2)
        for layer in self.encoder:
            memory = layer(memory, lambda attention, y: attention(y + position, reference, y, shapes, sizes, padding))

        layers = []
        if self.two_stage:
            h, query, box, first = self.proposals(memory, padding, centres)
        else:
            query, h = self.query.weight.expand(len(memory), -1, -1).chunk(2, -1)               # (B, Q, width)
            box = self.reference_points(query).float().sigmoid()                                # (B, Q, 2), later 4
        for n, layer in enumerate(self.decoder):
            seen = box[:, :, None] * valid.repeat(1, 1, box.shape[-1] // 2)[:, None]            # (B, Q, L, 2 or 4)
            h = layer(h, query, lambda attention, q: attention(q, seen, memory, shapes, sizes, padding))
            score, head = self.score[n % len(self.score)], self.box[n % len(self.box)]
            correction = head(h).float()                                                        # (B, Q, 4)
            at = F.pad(inverse_sigmoid(box), (0, 4 - box.shape[-1]))
            layers.append((score(h), (correction + at).sigmoid()))
            if self.refine:
                box = layers[-1][1].detach()
        prediction = from_layers(layers, image_scale(mask))
        if self.two_stage:                    # the encoder's own boxes learn to be objects, of whatever class
            prediction.aux.append(from_layers([first], image_scale(mask), class_agnostic=True))
        return prediction

    def proposals(self, memory, padding, centres):
        """Two-stage: every cell of every level proposes a box; the best become references and queries.

        memory: (B, S, width)   centres: of the cells, one (B, hw, 2) a level, normalised
        Returns content and position of the queries (B, Q, width), their boxes (B, Q, 4) as normalised (cx, cy, w, h), and
        all proposals: logits (B, S, C), boxes (B, S, 4).
        """
        start = torch.cat([torch.cat([c, torch.full_like(c, 0.05 * 2 ** n)], -1) for n, c in enumerate(centres)], 1)  # (B, S, 4)
        usable = ((start > 0.01) & (start < 0.99)).all(-1, keepdim=True) & ~padding[..., None]
        y = self.proposal_norm(self.proposal(memory.masked_fill(~usable, 0)))
        scores = self.score[-1](y)
        boxes = self.box[-1](y).float() + (start / (1 - start)).log().masked_fill(~usable, math.inf)
        best = scores[..., 0].topk(min(self.queries, scores.shape[1]), 1).indices[..., None]    # class 0 stands for any
        chosen = boxes.gather(1, best.expand(-1, -1, 4)).detach().sigmoid()
        code = sine_code(chosen * 2 * math.pi, self.level_code.shape[1] // 2).flatten(-2)            # (B, Q, 2 width)
        query, h = self.query_of_box_norm(self.query_of_box(code)).chunk(2, -1)
        return h, query, chosen, (scores, boxes.sigmoid())


class DynamicConv(nn.Module):
    """Sparse R-CNN's interaction: a proposal's feature writes two 1x1 convolutions for its own region."""

    def __init__(self, width, hidden=64, size=7):
        super().__init__()
        self.hidden, self.write = hidden, nn.Linear(width, 2 * width * hidden)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(hidden), nn.LayerNorm(width), nn.LayerNorm(width)
        self.out = nn.Linear(width * size ** 2, width)

    def forward(self, h, region):             # h: (N, width), region: (N, 49, width)
        first, second = self.write(h).chunk(2, -1)
        x = F.relu(self.norm1(region @ first.unflatten(-1, (-1, self.hidden))))                 # (N, 49, 64)
        x = F.relu(self.norm2(x @ second.unflatten(-1, (self.hidden, -1))))                     # (N, 49, width)
        return F.relu(self.norm3(self.out(x.flatten(1))))


def region_levels(boxes, size=224, levels=4):
    """Which pyramid level a box is cut from (FPN paper, Eq. 1): sides of `size` from the third, half as large from the second."""
    side = (boxes[..., 2:] - boxes[..., :2]).prod(-1).clamp(min=0).sqrt()
    return (2 + (side / size + 1e-8).log2()).floor().clamp(0, levels - 1).long()


def region_features(features, strides, boxes, size=224):
    """RoIAlign, 7x7 cells of 2x2 samples: boxes (B, Q, 4) to (BQ, width, 7, 7)."""
    image = torch.arange(len(boxes), device=boxes.device).repeat_interleave(boxes.shape[1])
    rois = torch.cat([image[:, None].to(boxes), boxes.flatten(0, 1)], 1)                        # (BQ, 5)
    level = region_levels(rois[:, 1:], size, len(features))
    out = boxes.new_zeros(len(rois), features[0].shape[1], 7, 7)
    for n, (x, stride) in enumerate(zip(features, strides)):
        at = (level == n).nonzero()[:, 0]     # waits for the device, as in detectron2
        out = out.index_copy(0, at, roi_align(x.to(boxes.dtype), rois[at], 7, 1 / stride, sampling_ratio=2, aligned=True))
    return out


class Stage(nn.Module):
    """One of Sparse R-CNN's stages: proposals attend to each other, look at their regions, classify and move."""

    def __init__(self, width, num_classes, heads, hidden, dynamic):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dynamic, self.feed_forward = DynamicConv(width, dynamic), FeedForward(width, hidden, 0.0)
        branch = lambda depth: nn.Sequential(*[layer for _ in range(depth) for layer in (
            nn.Linear(width, width, bias=False), nn.LayerNorm(width), nn.ReLU())])
        self.class_tower, self.box_tower = branch(1), branch(3)
        self.score, self.delta = nn.Linear(width, num_classes), nn.Linear(width, 4)
        self.register_buffer("delta_weights", torch.tensor([2.0, 2.0, 1.0, 1.0]), persistent=False)
        xavier(self)
        nn.init.constant_(self.score.bias, PRIOR_BIAS)

    def forward(self, h, boxes, regions):
        """Proposals (B, Q, width), boxes (B, Q, 4) pixels, regions (BQ, width, 7, 7) to proposals, logits (B, Q, C), boxes."""
        h = self.norm1(h + self.attention(h, h, h, need_weights=False)[0])
        h = self.norm2(h + self.dynamic(h.flatten(0, 1), regions.flatten(2).mT).view_as(h))
        h = self.feed_forward(h)
        deltas = self.delta(self.box_tower(h)).float() / self.delta_weights
        boxes = apply_deltas(boxes, deltas, largest=math.log(100000 / 16))
        return h, self.score(self.class_tower(h)).float(), boxes


class SparseRCNN(Detector):
    """Sun et al., 2021b: learned proposal boxes and features, refined in stages.

    roi_size: side of the boxes that are cut from the third level, P4 (published: 224, for images of 800 pixels).
    """

    def __init__(self, backbone, num_classes, width=256, heads=8, layers=6, hidden=2048, dynamic=64, queries=300, roi_size=224,
                 pixels="rgb"):
        super().__init__(backbone, pixels)
        self.roi_size, self.neck = roi_size, FPN(backbone, width, extra=0, maps=4)
        self.boxes, self.query = nn.Embedding(queries, 4), nn.Embedding(queries, width)
        with torch.no_grad():
            self.boxes.weight.copy_(torch.tensor([0.5, 0.5, 1.0, 1.0]))   # cx, cy, w, h: the whole image
        self.stages = nn.ModuleList(Stage(width, num_classes, heads, hidden, dynamic) for _ in range(layers))

    def forward(self, images, mask):
        features = self.neck(self.features(images, mask))
        boxes = box_convert(self.boxes.weight, "cxcywh", "xyxy") * image_scale(mask)            # (B, Q, 4)
        h, layers = self.query.weight.expand(len(images), -1, -1), []
        for stage in self.stages:
            h, logits, boxes = stage(h, boxes, region_features(features, self.neck.strides, boxes, self.roi_size))
            layers.append(Prediction(logits, boxes))
            boxes = boxes.detach()            # each stage learns its own correction
        layers[-1].aux = layers[:-1]
        return layers[-1]


DENSE = ("retinanet", "centernet", "fcos")
DETECTORS = {"retinanet": RetinaNet, "centernet": CenterNet, "fcos": FCOS,
             "detr": DETR, "deformable-detr": DeformableDETR, "sparse-rcnn": SparseRCNN}
BACKBONES = ("tiny", "resnet18", "resnet34", "resnet50", "resnet101")


def build(detector, num_classes, backbone, original=False, norm="frozen", freeze=2, resnet="torchvision", **options):
    """A detector by name.  norm, freeze and resnet concern ResNets; options go to the detector's constructor.

    resnet: "torchvision", or "msra", whose pre-trained weights want BGR pixels and the stride in the first 1x1.
    These arguments are all that a checkpoint needs to hold beside the weights.
    """
    msra = backbone != "tiny" and resnet == "msra"
    options = {"pixels": "bgr" if msra else "rgb", **({"original": True} if original else {}), **options}
    body = Tiny() if backbone == "tiny" else ResNet(backbone, norm, freeze, stride_in_1x1=msra)
    model = DETECTORS[detector](body, num_classes, **options)
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
        if backbone.kind == "msra":
            raise CheckpointError("--backbone-weights imagenet: those are torchvision's; --resnet msra needs a file of MSRA's weights (convert.py)")
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
