"""The query detectors: DETR, Deformable DETR, Sparse R-CNN.

They have as many object candidates as learned queries, none of them pre-defined, and return a
Prediction for every decoder layer.  Otherwise they are what models.py says of detectors, in the
same alphabet; S is the number of cells of all encoded maps.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import box_convert, roi_align

from models import (FPN, PRIOR_BIAS, Detector, Prediction, apply_deltas, grid_points, top_k,
                    with_nms)


def image_scale(mask):
    """Width, height, width, height of each image without its padding: (B, 1, 4)."""
    width, height = (~mask[:, 0]).sum(1), (~mask[:, :, 0]).sum(1)
    return torch.stack([width, height] * 2, 1)[:, None].float()


def mask_like(mask, x):
    """The padding mask (B, H, W) at the size of a feature map x, nearest neighbour as published."""
    return F.interpolate(mask[None].float(), size=x.shape[-2:])[0].bool()


def sine_code(position, width, temperature=10000):
    """Numbers (...) in radians as vectors (..., width): sine and cosine, at falling frequencies."""
    frequency = temperature ** (torch.arange(0, width, 2, device=position.device) / width)
    angle = position[..., None] / frequency                               # (..., width / 2)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)


def sine_position(mask, width, shift=0.0):
    """Where each cell lies in its image: codes of y, then of x, 0 to 2 pi over the unpadded part.

    mask: (B, H, W) true on padding   returns (B, HW, width)
    shift: of the count of cells, -0.5 in Deformable DETR
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
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
                         nn.Linear(width, 4))


def of_classes(boxes, scores, labels, num_classes):
    """Detections without those of outputs that are no class (`unused_ids`)."""
    keep = labels < num_classes
    return boxes[keep], scores[keep], labels[keep]


def from_layers(layers, scale, softmax=False):
    """Predictions of all decoder layers; the last one carries the others as aux.

    layers: pairs of logits (B, Q, C) and boxes (B, Q, 4), normalised (cx, cy, w, h)
    scale: (B, 1, 4) from image_scale
    """
    layers = [Prediction(logits.float(), box_convert(boxes, "cxcywh", "xyxy") * scale,
                         softmax=softmax, centre_l1=True) for logits, boxes in layers]
    layers[-1].aux = layers[:-1]
    return layers[-1]


class QueryDetector(Detector):
    """A detector whose second branch, if there is one, is a second group of queries (H-DETR).

    They share all layers with the first, and the two groups do not see each other.  What
    Detector calls the last layers are the embeddings that hold the queries.
    """

    def twin(self, name):
        """`many` times as many queries, which start afresh."""
        own = getattr(self, name)
        return nn.Embedding(self.many * own.num_embeddings, own.embedding_dim)

    def predictions(self, decode):
        """`decode` of the queries; in training that of the second group joins its aux."""
        prediction = decode(*(getattr(self, name).weight for name in self.last))
        if self.many and self.training:
            second = decode(*(twin.weight for twin in self.twins))
            layers, second.aux = [*second.aux, second], []
            for layer in layers:
                layer.second, layer.weight = True, self.many_weight / self.many
            prediction.aux += layers
        return prediction


# ------------------------------------------------------------------------------------------------
# transformer layers
# ------------------------------------------------------------------------------------------------

class FeedForward(nn.Module):
    """Two linear layers on each cell or query alone, a residual, a norm: (..., width)."""

    def __init__(self, width, hidden, dropout):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(width)

    def forward(self, x):
        y = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return self.norm(x + self.dropout(y))


class EncoderLayer(nn.Module):
    """Cells attend to cells, then a feed-forward network; residuals, norms behind ("post-norm")."""

    def __init__(self, attention, width, hidden, dropout):
        super().__init__()
        self.attention, self.dropout = attention, nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, hidden, dropout)

    def forward(self, x, attend):             # x: (B, S, width); attend: what attention is given
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


# ------------------------------------------------------------------------------------------------
# DETR
# ------------------------------------------------------------------------------------------------

class DETR(QueryDetector):
    """Carion et al., 2020: one coarse map, a transformer, softmax classes with one "no object".

    stride: of the map that is encoded (published: 32).
    unused_ids: outputs between the C classes and "no object" that are no class.  The published
    files have 11, for the ids between COCO's 80: they take their part of the softmax.
    """
    divisor = 1                               # to the largest picture of the batch, as published

    def __init__(self, backbone, num_classes, width=256, heads=8, layers=6, hidden=2048,
                 dropout=0.1, queries=100, stride=32, unused_ids=0, many=0, pixels="rgb"):
        super().__init__(backbone, pixels)
        self.num_classes = num_classes
        self.count = backbone.strides.index(stride) + 1       # stages of the backbone that are used
        for stage in backbone.stages()[self.count:]:
            stage.requires_grad_(False)
        self.project = nn.Conv2d(backbone.channels[self.count - 1], width, 1)

        def attention():
            return nn.MultiheadAttention(width, heads, dropout, batch_first=True)

        self.encoder = nn.ModuleList(EncoderLayer(attention(), width, hidden, dropout)
                                     for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(attention(), width, heads, hidden, dropout)
                                     for _ in range(layers))
        self.norm = nn.LayerNorm(width)                       # shared: behind every decoder layer
        self.query = nn.Embedding(queries, width)
        xavier(self.encoder)
        xavier(self.decoder)
        self.score = nn.Linear(width, num_classes + unused_ids + 1)
        self.box = box_head(width)
        self.second_branch(many, "query")

    def forward(self, images, mask):
        x = self.features(images, mask, count=self.count)[-1]
        small = mask_like(mask, x)
        position, padding = sine_position(small, self.query.embedding_dim), small.flatten(1)
        memory = self.project(x).flatten(2).mT                            # (B, HW, width)

        def among_cells(attention, y):
            return attention(y + position, y + position, y, key_padding_mask=padding,
                             need_weights=False)[0]

        for layer in self.encoder:
            memory = layer(memory, among_cells)

        def to_image(attention, q):
            return attention(q, memory + position, memory, key_padding_mask=padding,
                             need_weights=False)[0]

        def decode(queries):
            query = queries.expand(x.shape[0], -1, -1)                    # (B, Q, width)
            h, layers = torch.zeros_like(query), []
            for layer in self.decoder:
                h = layer(h, query, to_image)
                y = self.norm(h)
                layers.append((self.score(y), self.box(y).float().sigmoid()))
            return from_layers(layers, image_scale(mask), softmax=True)

        return self.predictions(decode)

    def scores(self, prediction):
        return prediction.logits.softmax(-1)[..., :self.num_classes]

    def detections(self, one, k=100):
        """Each query's best class: at most one detection a query, without threshold.

        As published, a query whose best output is no class is not reported.
        """
        scores, labels = one.logits.softmax(-1)[:, :-1].max(-1)
        scores, order = scores.topk(min(k, len(scores)))
        plain = of_classes(one.boxes[order], scores, labels[order], self.num_classes)
        return {"plain": plain, "nms": with_nms(*plain, 0.5, k)}


# ------------------------------------------------------------------------------------------------
# Deformable DETR
# ------------------------------------------------------------------------------------------------

def deformable_attention(value, shapes, where, weights):
    """What each query finds where it looks: Eq. 3 of Deformable DETR, bilinear, zero outside.

    Here H are the heads, of D channels each, and P the points that each looks at in a level.

    value: (B, S, H, D), all levels joined   shapes: (h, w) of each level
    where: (B, Q, H, L, P, 2), x and y from 0 to 1   weights: (B, Q, H, L, P), sum 1 over L and P
    returns (B, Q, H * D)
    """
    B, Q, H = where.shape[:3]
    weights, found = weights.transpose(1, 2).flatten(0, 1), 0                    # (BH, Q, L, P)
    # level by level: the samples of all of them would be a large tensor
    for level, (v, (h, w)) in enumerate(zip(value.split([h * w for h, w in shapes], 1), shapes)):
        v = v.permute(0, 2, 3, 1).reshape(B * H, -1, h, w)                       # (BH, D, h, w)
        grid = 2 * where[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1       # (BH, Q, P, 2)
        samples = F.grid_sample(v, grid, mode="bilinear", padding_mode="zeros",
                                align_corners=False)                             # (BH, D, Q, P)
        found = found + (samples * weights[:, None, :, level]).sum(-1)
    return found.view(B, -1, Q).mT


class DeformableAttention(nn.Module):
    """Each query and head looks at a few points a level around its reference, not at every cell."""

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
        distance = torch.arange(1, points + 1).view(1, 1, points, 1)
        star = star.view(heads, 1, 1, 2) * distance

        for zero in (self.offset.weight, self.weight.weight, self.weight.bias, self.value.bias,
                     self.output.bias):
            nn.init.zeros_(zero)
        with torch.no_grad():
            self.offset.bias.copy_(star.expand(heads, levels, points, 2).flatten())

    def forward(self, query, reference, memory, shapes, sizes, padding):
        """query: (B, Q, width)   memory: (B, S, width)   padding: (B, S)   returns (B, Q, width)

        reference: (B, Q, L, 2) points or (B, Q, L, 4) boxes, normalised
        shapes: (h, w) of each level   sizes: the same on the device, (L, 2), width first
        """
        heads, levels, points = self.shape
        value = self.value(memory).masked_fill(padding[..., None], 0)
        value = value.unflatten(-1, (heads, -1))                          # (B, S, H, D)
        offset = self.offset(query).float()
        offset = offset.unflatten(-1, (heads, levels, points, 2))         # (B, Q, H, L, P, 2)
        weight = self.weight(query).float().unflatten(-1, (heads, -1)).softmax(-1)
        weight = weight.unflatten(-1, (levels, points))                   # (B, Q, H, L, P)

        at = reference[:, :, None, :, None]                               # (B, Q, 1, L, 1, 2 or 4)
        if reference.shape[-1] == 2:          # offsets in cells of each level
            where = at + offset / sizes[:, None]
        else:                                 # in shares of the box: the outermost at half its size
            where = at[..., :2] + offset / points * at[..., 2:] * 0.5
        with torch.autocast(query.device.type, enabled=False):            # it mixes no types
            found = deformable_attention(value.to(offset.dtype), shapes, where, weight)
        return self.output(found)


class DeformableDETR(QueryDetector):
    """Zhu et al., 2020: DETR on several levels with deformable attention, and sigmoid classes.

    levels: of the pyramid, counted from the coarsest
    refine: each decoder layer corrects the boxes of the one before, with heads of its own
    unused_ids: outputs behind the C classes that are no class, as in DETR; they rank with the rest
    """
    divisor = 1                               # to the largest picture of the batch, as published
    slow_parameters = ("reference_points", "attention.offset", "cross.offset")

    def __init__(self, backbone, num_classes, width=256, heads=8, layers=6, hidden=1024,
                 dropout=0.1, queries=300, levels=4, points=4, refine=False, unused_ids=0,
                 many=0, pixels="rgb"):
        super().__init__(backbone, pixels)
        self.num_classes, self.refine = num_classes, refine
        channels = backbone.channels[-min(levels, 3):]
        convs = [nn.Conv2d(c, width, 1) for c in channels]
        for n in range(levels - len(channels)):   # more levels: from C5, not from its projection
            convs.append(nn.Conv2d(width if n else channels[-1], width, 3, 2, 1))
        self.project = nn.ModuleList(nn.Sequential(conv, nn.GroupNorm(32, width)) for conv in convs)
        self.level_code = nn.Parameter(torch.randn(levels, width))

        def attention():
            return DeformableAttention(width, heads, levels, points)

        self.encoder = nn.ModuleList(EncoderLayer(attention(), width, hidden, dropout)
                                     for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(attention(), width, heads, hidden, dropout)
                                     for _ in range(layers))
        copies = layers if refine else 1          # one of each serves all layers of the base form
        outputs = num_classes + unused_ids
        self.score = nn.ModuleList(nn.Linear(width, outputs) for _ in range(copies))
        self.box = nn.ModuleList(box_head(width) for _ in range(copies))
        self.query = nn.Embedding(queries, 2 * width)
        self.reference_points = nn.Linear(width, 2)
        self.initialise()
        self.second_branch(many, "query")

    def initialise(self):
        for part in (self.encoder, self.decoder, self.reference_points):
            xavier(part)
        for m in self.modules():
            if isinstance(m, DeformableAttention):
                m.reset()
        for conv, _ in self.project:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)
        nn.init.zeros_(self.reference_points.bias)

        for score, box in zip(self.score, self.box):
            nn.init.constant_(score.bias, PRIOR_BIAS)
            nn.init.zeros_(box[-1].weight)
            nn.init.zeros_(box[-1].bias)
        nn.init.constant_(self.box[0][-1].bias[2:], -2.0)     # first boxes an eighth of the image

    def encoder_inputs(self, images, mask):
        """The projected maps of all levels, joined.

        Returns memory, position, padding (B, S, ...), shapes, sizes (L, 2), and each level's valid
        share (B, L, 2) along x and y.
        """
        features = self.features(images, mask)[-min(len(self.project), 3):]
        xs = [project(x) for project, x in zip(self.project, features)]
        for n, project in enumerate(self.project[len(features):]):
            xs.append(project(xs[-1] if n else features[-1]))

        masks = [mask_like(mask, x) for x in xs]
        position = torch.cat([sine_position(m, self.level_code.shape[1], -0.5) + code
                              for m, code in zip(masks, self.level_code)], 1)
        valid = []
        for m in masks:
            along_x, along_y = (~m[:, 0]).float().mean(1), (~m[:, :, 0]).float().mean(1)
            valid.append(torch.stack([along_x, along_y], -1))
        valid = torch.stack(valid, 1)

        shapes = [x.shape[-2:] for x in xs]
        sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32)
        sizes = sizes.to(images.device, non_blocking=True)    # once: a copy waits
        memory = torch.cat([x.flatten(2).mT for x in xs], 1)
        padding = torch.cat([m.flatten(1) for m in masks], 1)
        return memory, position, padding, shapes, sizes, valid

    def forward(self, images, mask):
        memory, position, padding, shapes, sizes, valid = self.encoder_inputs(images, mask)
        # centres of the cells, as shares of the unpadded image, then seen from every level
        centres = [grid_points(memory.new_empty(h, w), 1, 0.5) / (valid[:, None, n] * sizes[n])
                   for n, (h, w) in enumerate(shapes)]
        reference = torch.cat(centres, 1)[:, :, None] * valid[:, None]    # (B, S, L, 2)

        def among_cells(attention, y):
            return attention(y + position, reference, y, shapes, sizes, padding)

        for layer in self.encoder:
            memory = layer(memory, among_cells)

        def decode(queries):
            # copies: torch.export takes the strides of expanded halves for a condition on B
            query, h = (half.repeat(memory.shape[0], 1, 1)                # (B, Q, width)
                        for half in queries.chunk(2, -1))
            box = self.reference_points(query).float().sigmoid()          # (B, Q, 2), later 4
            layers = []
            for n, layer in enumerate(self.decoder):
                seen = box[:, :, None] * valid.repeat(1, 1, box.shape[-1] // 2)[:, None]

                def to_image(attention, q):                               # seen: (B, Q, L, 2 or 4)
                    return attention(q, seen, memory, shapes, sizes, padding)

                h = layer(h, query, to_image)
                score, head = self.score[n % len(self.score)], self.box[n % len(self.box)]
                correction = head(h).float()                              # (B, Q, 4)
                at = F.pad(inverse_sigmoid(box), (0, 4 - box.shape[-1]))
                layers.append((score(h), (correction + at).sigmoid()))
                if self.refine:
                    box = layers[-1][1].detach()
            return from_layers(layers, image_scale(mask))

        return self.predictions(decode)

    def scores(self, prediction):
        return prediction.logits.sigmoid()[..., :self.num_classes]

    def detections(self, one, k=100):
        """The k best pairs of query and output, as published; of them, those of classes."""
        best = top_k(one.boxes, one.logits.sigmoid(), k)
        plain = of_classes(*best, self.num_classes)
        return {"plain": plain, "nms": with_nms(*plain, 0.5, k)}


# ------------------------------------------------------------------------------------------------
# Sparse R-CNN
# ------------------------------------------------------------------------------------------------

class DynamicConv(nn.Module):
    """A proposal's feature writes two 1x1 convolutions for its own region."""

    def __init__(self, width, hidden=64, size=7):
        super().__init__()
        self.hidden, self.write = hidden, nn.Linear(width, 2 * width * hidden)
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.out = nn.Linear(width * size ** 2, width)

    def forward(self, h, region):             # h: (N, width), region: (N, 49, width)
        first, second = self.write(h).chunk(2, -1)
        x = F.relu(self.norm1(region @ first.unflatten(-1, (-1, self.hidden))))     # (N, 49, 64)
        x = F.relu(self.norm2(x @ second.unflatten(-1, (self.hidden, -1))))         # (N, 49, width)
        return F.relu(self.norm3(self.out(x.flatten(1))))


def region_levels(boxes, size=224, levels=4):
    """Which pyramid level a box is cut from (FPN paper, Eq. 1): of side `size` from the third."""
    side = (boxes[..., 2:] - boxes[..., :2]).prod(-1).clamp(min=0).sqrt()
    return (2 + (side / size + 1e-8).log2()).floor().clamp(0, levels - 1).long()


def region_features(features, strides, boxes, size=224):
    """RoIAlign, 7x7 cells of 2x2 samples: boxes (B, Q, 4) to (BQ, width, 7, 7)."""
    image = torch.arange(boxes.shape[0], device=boxes.device).repeat_interleave(boxes.shape[1])
    rois = torch.cat([image[:, None].to(boxes), boxes.flatten(0, 1)], 1)            # (BQ, 5)
    level = region_levels(rois[:, 1:], size, len(features))
    out = boxes.new_zeros(rois.shape[0], features[0].shape[1], 7, 7)
    for n, (x, stride) in enumerate(zip(features, strides)):
        at = (level == n).nonzero()[:, 0]     # waits for the device, as in detectron2
        regions = roi_align(x.to(boxes.dtype), rois[at], 7, 1 / stride, sampling_ratio=2,
                            aligned=True)
        out = out.index_copy(0, at, regions)
    return out


class Stage(nn.Module):
    """Proposals attend to each other, look at their regions, classify and move."""

    def __init__(self, width, num_classes, heads, hidden, dynamic):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dynamic = DynamicConv(width, dynamic)
        self.feed_forward = FeedForward(width, hidden, 0.0)
        self.class_tower, self.box_tower = self.branch(width, 1), self.branch(width, 3)
        self.score, self.delta = nn.Linear(width, num_classes), nn.Linear(width, 4)
        weights = torch.tensor([2.0, 2.0, 1.0, 1.0])
        self.register_buffer("delta_weights", weights, persistent=False)
        xavier(self)
        nn.init.constant_(self.score.bias, PRIOR_BIAS)

    def branch(self, width, depth):
        layers = []
        for _ in range(depth):
            layers += [nn.Linear(width, width, bias=False), nn.LayerNorm(width), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, h, boxes, regions):
        """h: (B, Q, width)   boxes: (B, Q, 4) pixels   regions: (BQ, width, 7, 7)

        returns h, logits (B, Q, C), boxes
        """
        h = self.norm1(h + self.attention(h, h, h, need_weights=False)[0])
        seen = self.dynamic(h.flatten(0, 1), regions.flatten(2).mT)
        h = self.norm2(h + seen.view_as(h))
        h = self.feed_forward(h)
        deltas = self.delta(self.box_tower(h)).float() / self.delta_weights
        boxes = apply_deltas(boxes, deltas, largest=math.log(100000 / 16))
        return h, self.score(self.class_tower(h)).float(), boxes


class SparseRCNN(QueryDetector):
    """Sun et al., 2020a: learned proposal boxes and features, refined in stages (`layers`).

    dynamic: inner width of the dynamic convolution
    roi_size: side of the boxes that are cut from the third level, P4 (for images of 800 pixels)
    """

    def __init__(self, backbone, num_classes, width=256, heads=8, layers=6, hidden=2048, dynamic=64,
                 queries=300, roi_size=224, many=0, pixels="rgb"):
        super().__init__(backbone, pixels)
        self.roi_size, self.neck = roi_size, FPN(backbone, width, extra=0, maps=4)
        self.boxes, self.query = nn.Embedding(queries, 4), nn.Embedding(queries, width)
        self.start(self.boxes)
        self.stages = nn.ModuleList(Stage(width, num_classes, heads, hidden, dynamic)
                                    for _ in range(layers))
        self.second_branch(many, "boxes", "query")

    def start(self, boxes):
        """Proposals begin as the whole image: cx, cy, w, h."""
        nn.init.ones_(boxes.weight)
        nn.init.constant_(boxes.weight[:, :2], 0.5)

    def twin(self, name):
        twin = super().twin(name)
        if name == "boxes":
            self.start(twin)
        return twin

    def forward(self, images, mask):
        features = self.neck(self.features(images, mask))

        def decode(boxes, queries):
            boxes = box_convert(boxes, "cxcywh", "xyxy") * image_scale(mask)            # (B, Q, 4)
            h, layers = queries.expand(images.shape[0], -1, -1), []
            for stage in self.stages:
                regions = region_features(features, self.neck.strides, boxes, self.roi_size)
                h, logits, boxes = stage(h, boxes, regions)
                layers.append(Prediction(logits, boxes))
                boxes = boxes.detach()        # each stage learns its own correction
            layers[-1].aux = layers[:-1]
            return layers[-1]

        return self.predictions(decode)


QUERY = {"detr": DETR, "deformable-detr": DeformableDETR, "sparse-rcnn": SparseRCNN}
