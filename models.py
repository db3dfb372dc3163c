"""The dense detectors: backbone, neck, heads, and decoding to boxes.

The paper (Section 2.1) takes detectors apart into object candidates, a classification sub-net, a
location sub-net and a rule that assigns positive samples.  Everything but the rule is in this file
(DETR, Deformable DETR and Sparse R-CNN: queries.py).  One class, one network: `FCOS` is OneNet's,
trained one-to-one, and `OriginalFCOS` is its authors', Table 1's one-to-many column; so are
RetinaNet and CenterNet.  Constructors' defaults are the published values.

One alphabet, for the whole repository: B images in the batch, L pyramid levels, Q predictions of
one image (all levels joined; row by row within a level, anchors innermost), G ground-truth objects
of one image, C classes, K matched pairs (behind `detect` the detections that are kept), HxW a
feature map.  q and g are vectors of indices of predictions and objects.  Boxes are xyxy in pixels
of the resized, un-padded image.  Classes are 0 ... C-1, without a background column; DETR alone has
one more, "no object".  The paper's i, j, N and K are our q, g, Q and C; its C with two indices is
the matching cost.

Images come in as uint8 RGB, padded at the right and at the bottom, with a mask that is true on
padding.
"""
import copy
import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import batched_nms, deform_conv2d
from torchvision.ops.misc import FrozenBatchNorm2d

# every class starts at a score of 0.01 (focal loss paper, 4.1)
PRIOR_BIAS = -math.log((1 - 0.01) / 0.01)

# mean and std of the three channels, 0-255 scale; the name gives their order
PIXELS = {
    # ImageNet: torchvision's ResNets
    "rgb": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    # MSRA's ResNets: detectron2's model zoo
    "bgr": ((103.53, 116.28, 123.675), (1.0, 1.0, 1.0)),
    # CenterNet's own: .408 .447 .470, .289 .274 .278
    "bgr-unit": ((104.04, 113.985, 119.85), (73.695, 69.87, 70.89))}


@dataclass
class Prediction:
    """What every detector returns, so that nothing downstream asks which detector it was.

    That of one image, `image(n)`, is the same without the B.
    """
    logits: torch.Tensor                     # (B, Q, C); DETR: C + 1, the last one "no object"
    boxes: torch.Tensor                      # (B, Q, 4)
    candidates: torch.Tensor | None = None   # (Q, 4) anchors, or points as boxes without extent
    strides: torch.Tensor | None = None      # (Q,) stride of the pyramid level of each candidate
    aux: list = field(default_factory=list)  # earlier layers or a second branch, each matched
    raw: dict = field(default_factory=dict)  # (B, ...): what only an original recipe needs
    softmax: bool = False                    # DETR: scores are a softmax
    centre_l1: bool = False                  # (Deformable) DETR: L1 compares (cx, cy, w, h)
    second: bool = False                     # the second branch, with an assignment of its own
    weight: float = 1.0                      # of its loss

    def image(self, n):
        """The Prediction of image n, in float32; of its last layer, without aux."""
        raw = {name: value[n] for name, value in self.raw.items()}
        return Prediction(self.logits[n].float(), self.boxes[n].float(), self.candidates,
                          self.strides, [], raw, self.softmax, self.centre_l1)


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
        same = stride == 1 and cin == cout
        self.shortcut = nn.Identity() if same else nn.Conv2d(cin, cout, 1, stride)

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def run_stages(x, stages):
    """The maps [(B, c, H/4, W/4), ... (B, c, H/32, W/32)] behind each of a backbone's stages."""
    features = []
    for stage in stages:
        x = stage(x)
        features.append(x)
    return features


class Tiny(nn.Module):
    """A small backbone for pictures of about 128 pixels, fast on a CPU; pretrain.py trains it.

    A patchify stem goes to stride 4 in one step, which is what makes it fast; then residual stages
    as in a ResNet, with the same strides.  Batch norm, because group norm learned half as fast
    here; its statistics are those of a process's micro-batch.
    """
    strides, channels = (4, 8, 16, 32), (32, 64, 128, 192)

    def __init__(self):
        super().__init__()
        a, b, c, d = self.channels
        patchify = nn.Conv2d(3, a, 7, 4, 3, bias=False)
        self.stem = nn.Sequential(patchify, nn.BatchNorm2d(a), nn.ReLU())
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

    norm: "frozen" (fixed statistics and affine, the recipe of all but CenterNet) or "batch".
    freeze: how many of stem, layer1, layer2, ... receive no gradient (2 in the published recipes).
    stride_in_1x1: a bottleneck's stride lies in its first 1x1 convolution (MSRA's weights), not in
    the 3x3.
    """
    strides = (4, 8, 16, 32)

    def __init__(self, name, norm="frozen", freeze=2, stride_in_1x1=False):
        super().__init__()
        self.name, self.kind = name, "msra" if stride_in_1x1 else "torchvision"
        norm_layer = FrozenBatchNorm2d if norm == "frozen" else nn.BatchNorm2d
        body = getattr(torchvision.models, name)(weights=None, norm_layer=norm_layer)
        del body.fc, body.avgpool
        self.body = body

        layers = self.stages()
        last = "conv2" if name in ("resnet18", "resnet34") else "conv3"
        if stride_in_1x1 and last == "conv3":
            for layer in layers[1:]:
                layer[0].conv1.stride = (2, 2)
                layer[0].conv2.stride = (1, 1)
        self.channels = tuple(getattr(layer[-1], last).out_channels for layer in layers)

        stem = nn.ModuleList([body.conv1, body.bn1])
        for part in [stem, *layers][:freeze]:
            part.requires_grad_(False)

    def stages(self):
        return [self.body.layer1, self.body.layer2, self.body.layer3, self.body.layer4]

    def forward(self, x, count=4):            # x: (B, 3, H, W)
        b = self.body
        return run_stages(b.maxpool(b.relu(b.bn1(b.conv1(x)))), self.stages()[:count])


# ------------------------------------------------------------------------------------------------
# necks
# ------------------------------------------------------------------------------------------------

class FPN(nn.Module):
    """Feature pyramid (Lin et al., 2017a) on the backbone's last maps, plus `extra` coarser levels.

    With a ResNet these are P3, P4, P5, and with extra = 2 P6 and P7, which RetinaNet and OneNet's
    FCOS take from C5 and the original FCOS from P5 (`extra_from`).  Sparse R-CNN has P2 to P5.
    """

    def __init__(self, backbone, width=256, extra=2, extra_from="c5", maps=3):
        super().__init__()
        channels = backbone.channels[-maps:]
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.output = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)
        self.extra_from = extra_from
        first = channels[-1] if extra_from == "c5" else width
        self.extra = nn.ModuleList(nn.Conv2d(width if n else first, width, 3, 2, 1)
                                   for n in range(extra))
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
    """Modulated deformable 3x3 convolution (Zhu et al., 2019): it predicts where to look."""

    def __init__(self, cin, cout):
        super().__init__()
        self.offset = nn.Conv2d(cin, 27, 3, padding=1)        # 9 taps x (dy, dx), then 9 masks
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)
        self.weight = nn.Parameter(nn.Conv2d(cin, cout, 3, bias=False).weight.detach())

    def forward(self, x):
        where = self.offset(x).to(self.weight.dtype)                  # (B, 27, H, W)
        offset, weight = where[:, :18].contiguous(), where[:, 18:].sigmoid()
        with torch.autocast(x.device.type, enabled=False):            # it knows no bfloat16
            return deform_conv2d(x.to(self.weight.dtype), offset, self.weight, padding=1,
                                 mask=weight)


class Upsample(nn.Module):
    """CenterNet's step up: 3x3 convolution, deformable or plain, then a transposed one."""

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

    def __init__(self, backbone, widths, deform, laterals):
        super().__init__()
        channels = backbone.channels[::-1]                            # coarse to fine
        self.steps = nn.ModuleList(Upsample(cin, cout, deform)
                                   for cin, cout in zip((channels[0], *widths), widths))
        if laterals:
            self.lateral = nn.ModuleList(nn.Conv2d(c, w, 1) for c, w in zip(channels[1:], widths))
            self.output = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)
        else:
            self.lateral, self.output = None, nn.Identity()
        self.width, self.stride = widths[-1], backbone.strides[-1] // 2 ** len(widths)

    def forward(self, features):
        x = features[-1]
        for n, step in enumerate(self.steps):
            x = step(x)
            if self.lateral is not None:
                x = x + self.lateral[n](features[-2 - n])
        return self.output(x)                                 # (B, width, H/stride, W/stride)


# ------------------------------------------------------------------------------------------------
# candidates and boxes
# ------------------------------------------------------------------------------------------------

def grid_points(x, stride, offset):
    """Points (j * stride + offset, i * stride + offset) of a map's cells: (HW, 2), rows outer."""
    h, w = x.shape[-2:]
    ys, xs = torch.meshgrid(torch.arange(h, device=x.device) * stride,
                            torch.arange(w, device=x.device) * stride, indexing="ij")
    return torch.stack([xs, ys], -1).reshape(-1, 2).float() + offset


def join_levels(levels, strides):
    """Candidates of each level (q, ...) to those of all, (Q, ...), and the stride of each, (Q,)."""
    of_each = [level.new_full((len(level),), stride) for level, stride in zip(levels, strides)]
    return torch.cat(levels), torch.cat(of_each)


def apply_deltas(anchors, deltas, largest=math.log(1000 / 16)):
    """Anchors (..., Q, 4) moved and scaled by (dx, dy, dw, dh) (..., Q, 4): boxes (..., Q, 4).

    dx, dy are in units of the anchor's size, dw, dh are logarithms, cut at `largest` so that exp
    stays finite.
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
    keep = class_wise_nms(boxes.float(), scores.float(), labels, threshold)[:k]
    return boxes[keep], scores[keep], labels[keep]


def class_wise_nms(boxes, scores, labels, threshold):
    """The numbers of the boxes that are kept, best first, wherever the boxes lie."""
    if len(boxes):           # torchvision moves classes apart, which wants coordinates from 0 on
        boxes = boxes - boxes.min().clamp(max=0)
    return batched_nms(boxes, scores, labels, threshold)


def candidate_detections(one, scores, accept, k, nms, per_level=1000):
    """What an original RetinaNet or FCOS finds in the Prediction of one image.

    scores: (Q, C)   accept: (Q, C) true where a pair may be reported

    Per level the 1,000 best accepted pairs; with NMS over all of them, the k best remain.  "Without
    NMS" is the k best of the very same pairs (the paper does not say how Table 1's 7.7 of
    RetinaNet and 17.3 of FCOS were made).
    """
    scores = scores.masked_fill(~accept, 0)
    levels = [one.strides == stride for stride in one.strides.unique()]
    best_of_each = [top_k(one.boxes[at], scores[at], per_level) for at in levels]
    boxes, best, labels = (torch.cat(part) for part in zip(*best_of_each))

    order = best.argsort(descending=True, stable=True)[:int((best > 0).sum())]
    plain = boxes[order], best[order], labels[order]
    return {"plain": tuple(part[:k] for part in plain), "nms": with_nms(*plain, nms, k)}


def to_original(detections, target):
    """Detections of a resized image in pixels of its original, clipped, empty boxes dropped.

    The codes of DETR and CenterNet do not clip.
    """
    boxes, scores, labels = detections
    h, w = target["size"].tolist()
    original_h, original_w = target["original_size"].tolist()
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

    pixels: what the backbone's weights were trained on, a key of PIXELS.
    """
    divisor = 32                             # batches are padded to a multiple of so many pixels
    slow_parameters = ()                     # parts of names; their learning rate is a tenth
    class_branch = ()                        # modules that only the scores of classes go through
    # of a detector that checkpoints.load has read: its classes, and how pictures become a batch
    class_names, prepare = (), None
    # of a second branch, if there is one: its positives an object (`many`); the weight of its loss,
    # times `many`; whether the features in front of both branches learn by it alone
    many, many_weight, many_detach = 0, 1.0, False

    def __init__(self, backbone, pixels="rgb"):
        super().__init__()
        self.backbone, self.pixels, self.frozen = backbone, pixels, False
        mean, std = PIXELS[pixels]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def features(self, images, mask, **options):
        images = images.flip(1) if self.pixels.startswith("bgr") else images
        # a colour at a time: a CPU normalises three interleaved values at a fifth of the speed
        x = images.to(torch.float32, memory_format=torch.contiguous_format)
        x = (x - self.mean) / self.std                                # (B, 3, H, W)
        x = x.masked_fill(mask[:, None], 0).contiguous(memory_format=torch.channels_last)
        return self.backbone(x, **options)

    def second_branch(self, many, *last):
        """Copies of the last layers (twins), which train beside them.  Not in the paper.

        They learn from `many` positives an object, so that the features in front of both are not
        trained by one positive alone; inference never computes them.  last: the layers' names
        """
        self.many, self.last = many, last
        self.twins = nn.ModuleList(map(self.twin, last if many else ()))

    def twin(self, name):
        return copy.deepcopy(getattr(self, name))

    def predictions(self, *given):
        """`predict` behind the last layers, and in training behind their twins, as its aux."""
        layers = [getattr(self, name) for name in self.last]
        if not (self.many and self.training):
            return self.predict(*layers, *given)
        second = replace(self.predict(*self.twins, *given), second=True,
                         weight=self.many_weight / self.many)
        if self.many_detach:
            layers = [lambda x, layer=layer: layer(x.detach()) for layer in layers]
        return replace(self.predict(*layers, *given), aux=[second])

    def freeze_location(self):
        """Observation 4.1: only the classification sub-net learns from now on.

        All else keeps its weights and the statistics of its norms: the boxes stay what they are.
        """
        self.frozen = True
        for name, part in self.named_children():
            part.requires_grad_(name in self.class_branch)
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(False)
        self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        for name, part in self.named_children() if self.frozen else ():
            part.train(mode and name in self.class_branch)
        return self

    @torch.no_grad()
    def detect(self, picture, k=100, nms=False):
        """What a loaded detector finds in one picture: boxes (K, 4), scores (K,), labels (K,).

        picture: a file's name, or PIL   k: at most so many   nms: with NMS as its authors have it

        Boxes are xyxy in pixels of the picture, the best first; `class_names[label]` is a class.
        """
        images, mask, targets = self.prepare(picture)
        prediction = self(images.to(self.mean.device), mask.to(self.mean.device))
        found = self.detections(prediction.image(0), k)["nms" if nms else "plain"]
        return tuple(part.cpu() for part in to_original(found, targets[0]))

    def scores(self, prediction):
        """How sure it is of each class: (Q, C) of an image's Prediction, (B, Q, C) of a batch's."""
        return prediction.logits.sigmoid()

    def detections(self, one, k=100):
        """The k best (prediction, class) pairs of one image's Prediction, without and with NMS.

        As OneNet's code: no threshold, and NMS at IoU 0.5 among those k.
        """
        plain = top_k(one.boxes, one.logits.sigmoid(), k)
        return {"plain": plain, "nms": with_nms(*plain, 0.5, k)}


def tower(width, depth, norm, bias):
    """`depth` times 3x3 convolution, group norm if asked for, ReLU.  Shared over the levels."""
    layers = []
    for _ in range(depth):
        layers.append(nn.Conv2d(width, width, 3, padding=1, bias=bias))
        if norm:
            layers.append(nn.GroupNorm(32 if width >= 256 else 8, width))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def init_heads(parts, init):
    """Weights of all convolutions by `init`, which changes a tensor in place; biases 0.

    OneNet's code leaves those of its boxes as PyTorch draws them, within 1 / sqrt(fan-in).
    """
    for part in parts:
        for m in part.modules():
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, DeformConv)):
                init(m.weight)
                if getattr(m, "bias", None) is not None:
                    nn.init.zeros_(m.bias)


def small_normal(weight):
    """How the heads of the original detectors start (focal loss paper, 4.1); OneNet's: Xavier."""
    nn.init.normal_(weight, std=0.01)


class RetinaNet(Detector):
    """OneNet's RetinaNet (Lin et al., 2017b): nine anchors a point, deltas from anchor to box.

    anchor_scales: sizes of anchors per octave, each in three ratios
    tower_norm: group norm in the towers, for short training; neither published form has it
    delta_weights: divide what the head says before it is a delta (Fast R-CNN: 10 10 5 5)
    """
    init, tower_bias, extra_from = staticmethod(nn.init.xavier_uniform_), False, "c5"
    class_branch = "class_tower", "score"

    def __init__(self, backbone, num_classes, width=256, depth=4, extra_levels=2, anchor_scales=3,
                 tower_norm=False, delta_weights=(1.0, 1.0, 1.0, 1.0), many=0, pixels="rgb"):
        super().__init__(backbone, pixels)
        self.anchor_scales = anchor_scales
        self.neck = FPN(backbone, width, extra_levels, self.extra_from)
        self.strides = self.neck.strides
        self.class_tower = tower(width, depth, tower_norm, self.tower_bias)
        self.box_tower = tower(width, depth, tower_norm, self.tower_bias)
        self.score = nn.Conv2d(width, 3 * anchor_scales * num_classes, 3, padding=1)
        self.delta = nn.Conv2d(width, 3 * anchor_scales * 4, 3, padding=1)
        weights = torch.tensor(delta_weights, dtype=torch.float32)
        self.register_buffer("delta_weights", weights, persistent=False)

        init_heads([self.class_tower, self.box_tower, self.score, self.delta], self.init)
        nn.init.constant_(self.score.bias, PRIOR_BIAS)
        self.second_branch(many, "score", "delta")

    def anchors(self, x, stride, images):
        """(9HW, 4): sides 4 * stride * 2^(n / scales), outer; ratios h/w 0.5, 1, 2, inner.

        Nine a cell with the published three scales, three with one.

        Centred on (j * stride, i * stride), without half a cell's offset, as in detectron2.
        """
        sides = [4 * stride * 2 ** (n / self.anchor_scales) for n in range(self.anchor_scales)]
        half = self.half_sizes(sides).to(x.device)                            # (9, 2)
        centre = self.centres(x, stride, images)[:, None]                     # (HW, 1, 2)
        return torch.cat([centre - half, centre + half], -1).reshape(-1, 4)

    def centres(self, x, stride, images):
        """(HW, 2).  variants.py overrides it, and needs the images."""
        return grid_points(x, stride, 0)

    def half_sizes(self, sides):
        """Half of width and height for each side and ratio: (9, 2)."""
        return torch.tensor([[side / ratio ** 0.5 / 2, side * ratio ** 0.5 / 2]
                             for side in sides for ratio in (0.5, 1.0, 2.0)])

    def forward(self, images, mask):
        features = self.neck(self.features(images, mask))                     # (B, width, H, W)
        towers = [(self.class_tower(x), self.box_tower(x)) for x in features]
        return self.predictions(towers, images)

    def predict(self, last_score, last_delta, towers, images):
        """Behind the last layers of a branch.  towers: what is in front of them, of each level."""
        logits, deltas, anchors = [], [], []
        for (x, box_features), stride in zip(towers, self.strides):           # (B, width, H, W)
            B = x.shape[0]                      # len(x) is a constant to torch.export
            score = last_score(x).float().permute(0, 2, 3, 1)
            delta = last_delta(box_features).float().permute(0, 2, 3, 1)
            anchors.append(self.anchors(x, stride, images))                   # (9HW, 4)
            logits.append(score.reshape(B, len(anchors[-1]), -1))             # (B, 9HW, C)
            deltas.append(delta.reshape(B, -1, 4) / self.delta_weights.float())   # (B, 9HW, 4)

        logits, deltas = torch.cat(logits, 1), torch.cat(deltas, 1)
        anchors, strides = join_levels(anchors, self.strides)
        boxes = apply_deltas(anchors, deltas)
        return Prediction(logits, boxes, anchors, strides, raw={"deltas": deltas})


class OriginalRetinaNet(RetinaNet):
    """The authors' RetinaNet (detectron2's form): biases in the towers, normal(0, 0.01) weights."""
    init, tower_bias = staticmethod(small_normal), True

    def detections(self, one, k=100):
        scores = one.logits.sigmoid()
        return candidate_detections(one, scores, scores > 0.05, k, nms=0.5)


class FCOS(Detector):
    """OneNet's FCOS (Tian et al., 2019): every point predicts its distances to the box's sides.

    Group norm and one learned scale per level, as the original; no centre-ness, no biases in the
    towers, P6 from C5.

    box_prior: the distances before training, in strides (published: 0, where half of the outputs
    start behind their ReLU)
    """

    class_branch = "class_tower", "score"

    def __init__(self, backbone, num_classes, width=256, depth=4, extra_levels=2, box_prior=0.0,
                 many=0, pixels="rgb"):
        super().__init__(backbone, pixels)
        self.neck = FPN(backbone, width, extra_levels, extra_from="c5")
        self.strides = self.neck.strides
        self.class_tower = tower(width, depth, norm=True, bias=False)
        self.box_tower = tower(width, depth, norm=True, bias=False)
        self.score = nn.Conv2d(width, num_classes, 3, padding=1)
        self.ltrb = nn.Conv2d(width, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(len(self.strides)))

        init_heads([self.class_tower, self.box_tower, self.score, self.ltrb],
                   nn.init.xavier_uniform_)
        nn.init.constant_(self.score.bias, PRIOR_BIAS)
        nn.init.constant_(self.ltrb.bias, box_prior)
        self.second_branch(many, "score", "ltrb")

    def forward(self, images, mask):
        features = self.neck(self.features(images, mask))                     # (B, width, H, W)
        towers = [(self.class_tower(x), self.box_tower(x)) for x in features]
        return self.predictions(towers)

    def predict(self, last_score, last_ltrb, towers):
        """Behind the last layers of a branch.  towers: what is in front of them, of each level."""
        logits, boxes, points = [], [], []
        for (x, box_features), stride, scale in zip(towers, self.strides, self.scale):
            score = last_score(x).float()                                     # (B, C, H, W)
            ltrb = scale * last_ltrb(box_features).float()
            ltrb = F.relu(ltrb) * stride                                      # (B, 4, H, W) pixels
            points.append(grid_points(x, stride, stride // 2))                # (HW, 2)
            logits.append(score.flatten(2).mT)                                # (B, HW, C)
            boxes.append(ltrb_to_xyxy(points[-1], ltrb.flatten(2).mT))        # (B, HW, 4)

        points, strides = join_levels(points, self.strides)
        logits, boxes = torch.cat(logits, 1), torch.cat(boxes, 1)
        return Prediction(logits, boxes, points.repeat(1, 2), strides)


class OriginalFCOS(Detector):
    """The authors' FCOS (AdelaiDet's form).

    Four differences: centre-ness, biases in the towers, P6 from P5, and normal(0, 0.01) weights.
    """

    class_branch = "class_tower", "score"

    def __init__(self, backbone, num_classes, width=256, depth=4, extra_levels=2, box_prior=0.0,
                 pixels="rgb"):
        super().__init__(backbone, pixels)
        self.neck = FPN(backbone, width, extra_levels, extra_from="p5")
        self.strides = self.neck.strides
        self.class_tower = tower(width, depth, norm=True, bias=True)
        self.box_tower = tower(width, depth, norm=True, bias=True)
        self.score = nn.Conv2d(width, num_classes, 3, padding=1)
        self.ltrb = nn.Conv2d(width, 4, 3, padding=1)
        self.centreness = nn.Conv2d(width, 1, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(len(self.strides)))

        init_heads([self.class_tower, self.box_tower, self.score, self.ltrb, self.centreness],
                   small_normal)
        nn.init.constant_(self.score.bias, PRIOR_BIAS)
        nn.init.constant_(self.ltrb.bias, box_prior)

    def points(self, x, stride, images):
        """(HW, 2): the middles of the cells.  variants.py overrides it, and needs the images."""
        return grid_points(x, stride, stride // 2)

    def forward(self, images, mask):
        logits, boxes = [], []
        centreness, points = [], []
        features = self.neck(self.features(images, mask))
        for x, stride, scale in zip(features, self.strides, self.scale):      # (B, width, H, W)
            box_features = self.box_tower(x)
            score = self.score(self.class_tower(x)).float()                   # (B, C, H, W)
            ltrb = F.relu(scale * self.ltrb(box_features).float()) * stride   # (B, 4, H, W) pixels
            points.append(self.points(x, stride, images))                     # (HW, 2)
            logits.append(score.flatten(2).mT)                                # (B, HW, C)
            boxes.append(ltrb_to_xyxy(points[-1], ltrb.flatten(2).mT))        # (B, HW, 4)
            centreness.append(self.centreness(box_features).float().flatten(1))       # (B, HW)

        points, strides = join_levels(points, self.strides)
        logits, boxes = torch.cat(logits, 1), torch.cat(boxes, 1)
        raw = {"centreness": torch.cat(centreness, 1)}
        return Prediction(logits, boxes, points.repeat(1, 2), strides, raw=raw)

    def scores(self, prediction):
        """The geometric mean of a class's probability and the centre-ness."""
        centreness = prediction.raw["centreness"].sigmoid()                   # (B, Q) or (Q,)
        return (prediction.logits.sigmoid() * centreness[..., None]).sqrt()

    def accept(self, p, scores):
        """Which pairs may be reported, (Q, C): by class probability p, or by final score."""
        return p > 0.05

    def detections(self, one, k=100):
        p, scores = one.logits.sigmoid(), self.scores(one)                    # (Q, C)
        return candidate_detections(one, scores, self.accept(p, scores), k, nms=0.6)


class CenterNet(Detector):
    """OneNet's CenterNet (Zhou et al., 2019): one map, at stride 4 behind three steps up.

    A point predicts class scores and its distances to the four sides, in pixels, from one shared
    trunk.

    neck_widths: channels of the steps up from stride 32   deform: deformable convolutions in them
    box_prior: the distances before training, in strides (published: 0)
    """

    def __init__(self, backbone, num_classes, neck_widths=(256, 128, 64), deform=True,
                 box_prior=0.0, many=0, pixels="rgb"):
        super().__init__(backbone, pixels)
        self.neck = DeconvNeck(backbone, neck_widths, deform, laterals=True)
        self.strides = (self.neck.stride,)
        width = self.neck.width
        self.trunk = nn.Conv2d(width, width, 3, padding=1)
        self.score = nn.Conv2d(width, num_classes, 3, padding=1)
        self.ltrb = nn.Conv2d(width, 4, 3, padding=1)

        # OneNet's Xavier initialisation covers the neck too, even the deformable offsets' zeros
        init_heads([self.neck, self.trunk, self.score, self.ltrb], nn.init.xavier_uniform_)
        nn.init.constant_(self.score.bias, PRIOR_BIAS)
        nn.init.constant_(self.ltrb.bias, box_prior * self.neck.stride)
        self.second_branch(many, "score", "ltrb")

    def forward(self, images, mask):
        x = self.neck(self.features(images, mask))                            # (B, width, H, W)
        return self.predictions(F.relu(self.trunk(x)))

    def predict(self, last_score, last_ltrb, x):
        """Behind the last layers of a branch.  x: (B, width, H, W), what is in front of them."""
        (stride,) = self.strides
        points, strides = join_levels([grid_points(x, stride, stride // 2)], self.strides)
        logits = last_score(x).float().flatten(2).mT                          # (B, HW, C)
        ltrb = F.relu(last_ltrb(x).float()).flatten(2).mT                     # (B, HW, 4) pixels
        return Prediction(logits, ltrb_to_xyxy(points, ltrb), points.repeat(1, 2), strides)


class OriginalCenterNet(Detector):
    """The authors' CenterNet: a heat map, the object's size, and the centre's offset in its cell.

    laterals: OneNet's, in the neck too; the published form has none (for small pictures)
    box_prior: half of the size before training, in strides (published: PyTorch's default bias)
    """

    def __init__(self, backbone, num_classes, neck_widths=(256, 128, 64), deform=True,
                 laterals=False, box_prior=0.0, pixels="rgb"):
        super().__init__(backbone, pixels)
        self.neck = DeconvNeck(backbone, neck_widths, deform, laterals)
        self.strides = (self.neck.stride,)
        self.score = self.branch(num_classes)
        self.size = self.branch(2)
        self.offset = self.branch(2)
        nn.init.constant_(self.score[-1].bias, -2.19)     # a score of 0.1, CenterNet's own prior
        if box_prior:
            nn.init.constant_(self.size[-1].bias, 2 * box_prior)

    def branch(self, channels):
        width = self.neck.width
        return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
                             nn.Conv2d(width, channels, 1))

    def forward(self, images, mask):
        x = self.neck(self.features(images, mask))                            # (B, width, H, W)
        (stride,) = self.strides
        corner, strides = join_levels([grid_points(x, stride, 0)], self.strides)
        heat = self.score(x).float()                                          # (B, C, H, W)
        size = self.size(x).float().flatten(2).mT                             # (B, HW, 2) cells
        offset = self.offset(x).float().flatten(2).mT                         # (B, HW, 2) cells

        centre, half = corner + stride * offset, stride / 2 * size
        boxes = torch.cat([centre - half, centre + half], -1)
        points = (corner + stride // 2).repeat(1, 2)
        raw = {"heat": heat, "size": size, "offset": offset}
        return Prediction(heat.flatten(2).mT, boxes, points, strides, raw=raw)

    def detections(self, one, k=100):
        """Its "NMS" keeps the cells that are the maximum of their 3x3 neighbours, per class."""
        scores = one.logits.sigmoid()                                         # (HW, C)
        heat = scores.mT.unflatten(1, one.raw["heat"].shape[1:])[None]        # (1, C, H, W)
        peak = (F.max_pool2d(heat, 3, 1, 1) == heat)[0].flatten(1).mT         # (HW, C)
        plain = top_k(one.boxes, scores, k)
        return {"plain": plain, "nms": top_k(one.boxes, scores * peak, k),
                "box_nms": with_nms(*plain, 0.5, k)}


DENSE = {"retinanet": RetinaNet, "centernet": CenterNet, "fcos": FCOS,
         "retinanet one-to-many": OriginalRetinaNet, "centernet one-to-many": OriginalCenterNet,
         "fcos one-to-many": OriginalFCOS}
