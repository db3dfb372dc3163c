"""COCO's AP of many parts of one list of detections, with overlaps computed once; and best F1.

pycocotools is the judge, and makes the figures of metrics.json; tests hold this file to it.  It is
here because "what does NMS at IoU 0.3, 0.4, ... change?" asks for the AP of nine parts of one list,
and pycocotools would start from nothing nine times.
"""
from typing import NamedTuple

import numpy as np
from pycocotools import mask

THRESHOLDS = np.linspace(0.5, 0.95, 10)      # of IoU
RECALLS = np.linspace(0, 1, 101)


class Group(NamedTuple):
    """The detections and objects of one class in one picture."""
    rows: np.ndarray            # (d,) their numbers in the list, best score first
    scores: np.ndarray          # (d,)
    iou: np.ndarray             # (d, g) with the objects
    crowd: np.ndarray           # (d, c) with crowd regions: intersection over the detection's area


def in_order(key):
    """Of a class and a picture: ids are numbers or text."""
    return [(isinstance(part, str), part) for part in key]


def groups(detections, objects):
    """{class: [Group]} by lists of dicts: image_id, category_id, bbox (xywh), and score or iscrowd.

    Groups come in the order of the pictures' ids, and hold those with objects alone too.
    """
    found, known = {}, {}
    for n, d in enumerate(detections):
        found.setdefault((d["category_id"], d["image_id"]), []).append(n)
    for o in objects:
        known.setdefault((o["category_id"], o["image_id"]), []).append(o)

    by_class = {}
    for key in sorted(found.keys() | known.keys(), key=in_order):
        rows = np.array(found.get(key, ()), int)
        scores = np.array([detections[n]["score"] for n in rows], float)
        rows, scores = (part[np.argsort(-scores, kind="stable")] for part in (rows, scores))
        there, boxes = known.get(key, []), [detections[n]["bbox"] for n in rows]
        parts = []
        for crowd in (0, 1):
            these = [o["bbox"] for o in there if bool(o["iscrowd"]) == crowd]
            iou = mask.iou(boxes, these, [crowd] * len(these)) if boxes and these else []
            parts.append(np.reshape(iou, (len(rows), len(these))))
        by_class.setdefault(key[0], []).append(Group(rows, scores, *parts))
    return by_class


def match(iou, crowd):
    """Each detection, best first, takes the free object it overlaps most, at each threshold.

    Returns true positives and what does not count, since it lies in a crowd region: (10, d) bool.
    """
    hit = np.zeros((len(THRESHOLDS), len(iou)), bool)
    ignored = np.zeros_like(hit)
    limits = np.minimum(THRESHOLDS, 1 - 1e-10)
    free = np.ones((len(THRESHOLDS), iou.shape[1]), bool)
    near = iou.max(1, initial=0) >= limits[0]
    for d in near.nonzero()[0]:
        value = np.where(free & (iou[d] >= limits[:, None]), iou[d], -1.0)
        best = value.shape[1] - 1 - value[:, ::-1].argmax(1)             # of equals the last
        hit[:, d] = value[np.arange(len(value)), best] >= 0
        free[hit[:, d], best[hit[:, d]]] = False
    if crowd.size:
        ignored = ~hit & (crowd.max(1)[None] >= limits[:, None])
    return hit, ignored


def average_precision(by_class, keep, max_dets=100, matched=None, spared=None):
    """AP and AP50 in percent, -1 without objects, of the detections with keep[n].

    matched: a dict that remembers the matches of whole groups from call to call
    spared: bool, detections that may hit an object, but do not count as false
    """
    matched = {} if matched is None else matched
    precision = []                                       # (10, 101) of each class with objects
    for name, parts in by_class.items():
        total = sum(part.iou.shape[1] for part in parts)
        if not total:
            continue
        scores, hits, ignored = [], [], []
        for n, part in enumerate(parts):
            left = keep[part.rows].nonzero()[0][:max_dets]
            if len(left) < len(part.rows):
                hit, ignore = match(part.iou[left], part.crowd[left])
            else:
                if (name, n) not in matched:
                    matched[name, n] = match(part.iou, part.crowd)
                hit, ignore = matched[name, n]
            if spared is not None:
                ignore = ignore | (~hit & spared[part.rows[left]])
            scores.append(part.scores[left])
            hits.append(hit)
            ignored.append(ignore)
        precision.append(curve(np.concatenate(scores), np.concatenate(hits, 1),
                               np.concatenate(ignored, 1), total))
    if not precision:
        return {"AP": -1.0, "AP50": -1.0}
    precision = np.array(precision)
    return {"AP": round(100 * float(precision.mean()), 4),
            "AP50": round(100 * float(precision[:, 0].mean()), 4)}


def curve(scores, hits, ignored, total):
    """Precision at 101 recalls and 10 thresholds, (10, 101): the best that is still to come."""
    order = np.argsort(-scores, kind="stable")
    hits, counts = hits[:, order], ~ignored[:, order]
    true = (hits & counts).cumsum(1)
    false = (~hits & counts).cumsum(1)
    recall, precision = true / total, true / (true + false + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    values = np.zeros((len(THRESHOLDS), len(RECALLS)))
    for t in range(len(THRESHOLDS)):
        at = np.searchsorted(recall[t], RECALLS, side="left")
        inside = at < len(scores)
        values[t, inside] = precision[t, at[inside]]
    return values


def best_f1(scores, hits, total):
    """The highest F1 (percent) that a score threshold gives, and that threshold.

    scores: (D,)   hits: (D,) bool, true positives   total: how many objects there are

    F1 is the harmonic mean of precision and recall, 2 TP / (detections + objects).  Of thresholds
    that are equally good the highest; (-1, None) without objects, (0, None) where nothing hits.
    """
    if not total:
        return -1.0, None
    order = np.argsort(-scores, kind="stable")
    scores, true = scores[order], hits[order].cumsum()
    f1 = 2 * true / (np.arange(1, len(scores) + 1) + total)
    # a threshold lets equal scores in together: only the last of them is a place to stop
    f1[:-1][scores[:-1] == scores[1:]] = 0
    if not f1.any():
        return 0.0, None
    best = f1.argmax()
    return round(100 * float(f1[best]), 4), float(scores[best])
