"""Section 3.4 while a detector trains: where its positive samples lie, and how high they score.

Seven columns of log.csv, of the pictures of one micro-batch of process 0 (empty where a batch
cannot tell):

    gap         median score gap of the objects (Definition 3.3): the highest minus the second-
                highest score of the object's class, among predictions with IoU > 0.5 with it
    rank        median place of the positives among all predictions by the score of their object's
                class: 1 is the highest.  Objects of one class in a picture outrank each other
                (Figure 5)
    positives   positive samples an object
    shared      predictions that are the positive of more than one object
    moved       percent of the objects whose positive lies more than a grid step from where it lay
                when their picture was seen last: the matching is not stable.  Of objects with one
                positive
    background  percent of the positives whose grid point or anchor's centre lies on no creature
                (Observation 3.5).  Where silhouettes are known: the embedded scenes.
    agreed      dense detectors with --many: percent of the positives that are, of their object's
                positives in the second branch, the one with the highest score there (by chance
                1 in --many)
"""
import json
import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.ops import box_iou

PICTURES = 1000                 # whose positives are remembered, for `moved`
COLUMNS = "gap", "rank", "positives", "shared", "moved", "background", "agreed"


def class_scores(one):
    """Scores of the classes, (Q, C), of the Prediction of one image.

    As the classification cost sees them: without the centre-ness of the original FCOS.
    """
    return one.logits.softmax(-1)[:, :-1] if one.softmax else one.logits.sigmoid()


def score_gaps(one, target):
    """The score gap of each object; NaN where no prediction overlaps it by more than 0.5.  (G,)

    An object that a single prediction overlaps has 0 for the second score.
    """
    scores = class_scores(one)[:, target["labels"]]                      # (Q, G)
    near = box_iou(one.boxes, target["boxes"]) > 0.5
    top = scores.masked_fill(~near, 0).topk(min(2, len(scores)), dim=0).values
    return torch.where(near.any(0), top[0] - top[1:].sum(0), torch.nan)


def ranks(one, target, match):
    """The place of each positive among the scores of its object's class; 1 is the highest.  (K,)"""
    scores = class_scores(one)[:, target["labels"][match.object]]        # (Q, K)
    own = scores.gather(0, match.prediction[None])                       # (1, K)
    return 1 + (scores > own).sum(0)


def agreed(second, target, match, second_match):
    """Which positives are the best of their object's positives in the second branch.  (K,) bool

    second: Prediction of one image   match, second_match: the Match of each branch
    """
    prediction, which, _ = second_match                                  # (P,), (P,)
    scores = class_scores(second)[prediction, target["labels"][which]]   # (P,)
    highest = scores.new_zeros(len(target["boxes"])).scatter_reduce(0, which, scores, "amax")
    best = scores == highest[which]                                      # (P,)
    same = ((match.prediction[:, None] == prediction)
            & (match.object[:, None] == which))                          # (K, P)
    return (same & best).any(1)


def shared(matches):
    """How often a prediction of a batch is the positive of an object beside its first."""
    return sum(len(m.prediction) - len(m.prediction.unique()) for m in matches)


def places(prediction, target, match):
    """Where the positives lie: (K, 3), x, y and stride of their candidates in the original picture.

    The query detectors have no candidates: the number of the query, and 0, 0.
    """
    if prediction.candidates is None:
        query = match.prediction[:, None].float()
        return torch.cat([query, torch.zeros(len(query), 2, device=query.device)], 1)
    boxes = prediction.candidates[match.prediction]
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    edges, (height, width) = target["frame"], target["original_size"].tolist()
    scale = torch.tensor([width, height], device=edges.device) / (edges[2:] - edges[:2])
    # the frame of a mirrored picture runs from right to left, and scale[0] is negative
    xy = (centres - edges[:2]) * scale
    return torch.cat([xy, prediction.strides[match.prediction][:, None] * scale[1]], 1)


class Silhouettes:
    """What is on an object, by the polygons of a COCO file."""

    def __init__(self, file):
        self.polygons = {}
        with open(file) as stream:
            content = json.load(stream)
        for box in content["annotations"]:
            if isinstance(box.get("segmentation"), list):
                self.polygons.setdefault(box["image_id"], []).extend(box["segmentation"])

    def on_object(self, image, size, points):
        """(K,) bool: whether points (K, 2), x and y in the original picture, lie on an object.

        Their pixels are looked up; a point outside the picture lies on none.
        """
        height, width = size
        mask = Image.new("1", (width, height))
        for polygon in self.polygons.get(image, []):
            ImageDraw.Draw(mask).polygon(polygon, fill=1)
        x, y = np.floor(points.numpy()).astype(int).T
        inside = (0 <= x) & (x < width) & (0 <= y) & (y < height)
        pixels = np.asarray(mask)
        return torch.from_numpy(inside & pixels[y.clip(0, height - 1), x.clip(0, width - 1)])


class Watch:
    """The columns of a run.  Remembers the positives of its first PICTURES pictures.

    strategies, say: what breaks the contract of a branch's strategy is said, once, by say(words)
    """

    def __init__(self, silhouettes=None, strategies=(), say=print):
        self.silhouettes, self.strategies = silhouettes, strategies
        self.say, self.said = say, set()
        # by image id and number of the object [x, y, stride]; and, since the last row, how many
        # positives moved and how many were compared
        self.state = {"seen": {}, "moved": 0, "compared": 0}

    def go_on(self, state):
        """From what `state` was in an earlier sitting.  Raises an error if it is no such thing."""
        seen = {image: {int(g): [float(x), float(y), float(stride)]
                        for g, (x, y, stride) in places.items()}
                for image, places in state["seen"].items()}
        self.state = {"seen": seen, "moved": int(state["moved"]),
                      "compared": int(state["compared"])}

    def note(self, prediction, targets, matches):
        """To be called with every batch: its matches are compared with the last ones."""
        for target, match in zip(targets, matches):
            seen = self.state["seen"]
            if target["image_id"] not in seen and len(seen) >= PICTURES:
                continue
            objects = target["objects"].tolist()
            at = places(prediction, target, match).tolist()
            now = {objects[g]: place for g, place in zip(match.object.tolist(), at)}
            if len(now) < len(at):                       # several positives an object
                continue
            before = seen.get(target["image_id"], {})
            for g in now.keys() & before.keys():
                (x, y, stride), (was_x, was_y, was_stride) = now[g], before[g]
                # a grid that moved with its picture has its points elsewhere; queries have none
                reach = max(stride, was_stride)
                self.state["moved"] += max(abs(x - was_x), abs(y - was_y)) > reach
                self.state["compared"] += 1
            seen[target["image_id"]] = {**before, **now}

    @torch.no_grad()
    def row(self, prediction, targets, matches):
        """The columns, of this batch; `moved` of all batches since the last row.

        matches: of all layers, as assign.match returns them
        """
        gaps, place, on_object = [], [], []
        agreement = []
        # dense detectors: the same candidates; the two groups of queries have none in common
        second = prediction.candidates is not None and any(aux.second for aux in prediction.aux)
        objects = sum(len(target["boxes"]) for target in targets)
        for n, (target, match) in enumerate(zip(targets, matches[0])):
            one = prediction.image(n)
            if len(target["boxes"]):
                gaps.append(score_gaps(one, target))
                place.append(ranks(one, target, match))
                if second:
                    agreement.append(agreed(prediction.aux[0].image(n), target, match,
                                            matches[1][n]))
            if self.silhouettes and one.candidates is not None:
                points = places(prediction, target, match)[:, :2].cpu()
                size = target["original_size"].tolist()
                on_object.append(self.silhouettes.on_object(target["image_id"], size, points))

        gap = torch.cat(gaps).nanmedian().item() if gaps else math.nan
        values = {"gap": None if math.isnan(gap) else gap,
                  "rank": torch.cat(place).float().median().item() if sum(map(len, place))
                  else None,
                  "positives": sum(map(len, place)) / objects if objects else None,
                  "shared": shared(matches[0]) if objects else None}
        if self.state["compared"]:
            values["moved"] = 100 * self.state["moved"] / self.state["compared"]
        if sum(map(len, on_object)):
            values["background"] = 100 * (1 - torch.cat(on_object).float().mean().item())
        if sum(map(len, agreement)):
            values["agreed"] = 100 * torch.cat(agreement).float().mean().item()
        self.state.update(moved=0, compared=0)
        branches = [matches[0]]
        branches += [m for aux, m in zip(prediction.aux, matches[1:]) if aux.second][:1]
        for strategy, of_images in zip(self.strategies, branches):
            self.check(getattr(strategy, "__name__", "top_k"), strategy, of_images, objects)
        return {name: values.get(name) for name in COLUMNS}

    def check(self, name, strategy, matches, objects):
        """Warns of a strategy that gave nothing, or a prediction twice without saying so."""
        if objects and not any(len(match.prediction) for match in matches):
            self.warn(name, "no", f"gives no positive sample to any of the {objects} objects of a "
                      f"batch: nothing is learned from them")
        if not getattr(strategy, "shares_predictions", False) and shared(matches):
            self.warn(name, "twice", f"gives a prediction to more than one object; if that is "
                      f"meant, set {name}.shares_predictions = True")

    def warn(self, name, kind, words):
        if (name, kind) not in self.said:
            self.say(f"warning: {name} {words}")
            self.said.add((name, kind))
