"""CrowdHuman's protocol (Section 5.1, Table 3), and what NMS costs its annotations (Section 5.2).

AP50, mMR and recall are as the authors' script computes them; JI, the Jaccard index, is CrowdDet's
addition.  Boxes are numpy arrays, xyxy in pixels of the original picture.  A picture has G persons,
I regions to ignore, and D detections, best first.
"""
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import nms

import annotations

# false positives per picture at which the miss rate is read; rounded, as published
FPPI = (0.0100, 0.0178, 0.03160, 0.0562, 0.1000, 0.1778, 0.3162, 0.5623, 1.000)


def clip_crowd(boxes, height, width):
    """Boxes (n, 4) cut to the picture; the near edges stop a pixel earlier, as published."""
    return np.stack([boxes[:, 0].clip(0, width - 1), boxes[:, 1].clip(0, height - 1),
                     boxes[:, 2].clip(0, width), boxes[:, 3].clip(0, height)], 1)


def areas(boxes):
    return (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(1)


def overlaps(boxes, others):
    """Intersection over union, and over the area of `boxes`: both (n, m).

    1e-6 keeps boxes without extent apart.
    """
    x1, y1, x2, y2 = boxes.T[:, :, None]                             # (n, 1) each
    X1, Y1, X2, Y2 = others.T[:, None]                               # (1, m)
    width = np.minimum(x2, X2) - np.maximum(x1, X1)
    height = np.minimum(y2, Y2) - np.maximum(y1, Y1)
    inter = width.clip(0) * height.clip(0)                           # (n, m)
    area = areas(boxes)[:, None]
    return inter / (area + areas(others)[None] - inter + 1e-6), inter / np.maximum(area, 1e-6)


def match_crowd(iou, over_ignored, threshold=0.5):
    """Each detection, best first, to the free person it overlaps most.

    iou: (D, G)   over_ignored: (D, I), intersection over the detection's area
    Returns true positive and counts, both (D,) bool.

    An unmatched detection that lies in an ignore region does not count; such a region is never
    used up.
    """
    true_positive, d = np.zeros(len(iou), bool), 0
    # column by column in memory, for the rows are short
    near = np.asfortranarray(iou > threshold)
    while (left := near[d:].any(1)).any():
        d += int(left.argmax())                              # those before it match nobody
        true_positive[d] = True
        near[:, np.where(near[d], iou[d], 0).argmax()] = False           # no longer free
        d += 1
    return true_positive, true_positive | ~(over_ignored > threshold).any(1)


def jaccard_index(iou, over_ignored, person_ignored, scores):
    """JI of one picture for score thresholds 0.0, 0.1, ... 0.9 (CrowdDet's addition).

    person_ignored: (G,) bool, the person lies in an ignore region   scores: (D,), highest first
    Returns a list of ten, NaN where there is nothing to compare.

    k pairs of a maximum-weight matching, out of m persons and n detections, those unmatched in
    ignore regions left out: k / (m + n - k).
    """
    weights = np.where(iou > 0.5, iou, 0.0).T                        # (G, D)
    ignored = (over_ignored > 0.5).any(1)
    values = []
    for threshold in np.arange(10) / 10:
        chosen = int((scores > threshold).sum())
        persons, detections = linear_sum_assignment(weights[:, :chosen], maximize=True)
        paired = weights[persons, detections] > 0
        k = int(paired.sum())

        # who is left without a partner, and may be ignored for it
        alone = np.ones(chosen, bool)
        alone[detections[paired]] = False
        missed = np.ones(len(weights), bool)
        missed[persons[paired]] = False
        n = chosen - int((alone & ignored[:chosen]).sum())
        m = len(weights) - int((missed & person_ignored).sum())
        values.append(k / (m + n - k + 1e-6) if m or n else np.nan)
    return values


def crowd_truth(a):
    """What crowd_metrics compares with, from Annotations of an .odgt.

    {ID: (persons (G, 4), ignored (I, 4), height, width)}, boxes as the file gives them.
    """
    pictures = {}
    for i, name in enumerate(a.image_ids):
        rows = slice(int(a.full_first[i]), int(a.full_first[i + 1]))
        boxes, ignore = a.full_boxes[rows].numpy(), a.full_ignore[rows].numpy()
        pictures[name] = (boxes[~ignore], boxes[ignore], *a.sizes[i].tolist())
    return pictures


def crowd_metrics(pictures, detections, max_dets=500, jaccard=True):
    """AP50, mMR and recall (Table 3) and CrowdDet's JI, in percent.  jaccard: False leaves JI out.

    pictures: {ID: (persons (G, 4), ignored (I, 4), height, width)}
    detections: {ID: (D, 5)}, xyxy and score; a picture without an entry is one without detections
    """
    scores, hits, indices = [], [], []
    total = 0
    for name, (persons, ignored, height, width) in pictures.items():
        total += len(persons)
        found = np.asarray(detections.get(name, ()), float).reshape(-1, 5)
        found = found[(-found[:, 4]).argsort(kind="stable")][:max_dets]
        persons = clip_crowd(persons, height, width)
        ignored = clip_crowd(ignored, height, width)
        boxes = clip_crowd(found[:, :4], height, width)

        iou, _ = overlaps(boxes, persons)
        _, over_ignored = overlaps(boxes, ignored)
        true_positive, counts = match_crowd(iou, over_ignored)
        scores.append(found[counts, 4])
        hits.append(true_positive[counts])
        if jaccard:
            person_ignored = (overlaps(persons, ignored)[1] > 0.5).any(1)
            indices.append(jaccard_index(iou, over_ignored, person_ignored, found[:, 4]))

    # one list over all pictures, best first
    scores, hits = np.concatenate(scores), np.concatenate(hits)
    hits = hits[(-scores).argsort(kind="stable")]

    ap, mmr, recall = curve(hits, total, len(pictures))
    figures = {"AP50": ap, "mMR": mmr, "recall": recall}
    if jaccard:
        # the best threshold's mean over pictures where there is something to compare
        indices = np.array(indices)                          # (pictures, thresholds)
        known = ~np.isnan(indices)
        ji = (np.where(known, indices, 0).sum(0) / known.sum(0).clip(1)).max()
        figures["JI"] = round(100 * float(ji), 4) if known.any() else -1.0
    return figures


def curve(hits, total, pictures):
    """AP50, mMR and recall in percent of the detections that count, best first: hits (n,) bool.

    total: persons   pictures: how many, those without detections included
    """
    if not total:                                # nobody to find: -1, as pycocotools
        return -1.0, -1.0, -1.0
    if not len(hits):
        return 0.0, 100.0, 0.0

    # AP50 is the area under the curve in trapezoids, from the second detection on
    positive = hits.cumsum()
    recall, precision = positive / total, positive / np.arange(1, len(hits) + 1)
    ap = np.diff(recall) @ ((precision[1:] + precision[:-1]) / 2)

    # mMR: the geometric mean of the miss rates where each reference is first reached
    fppi, miss = (~hits).cumsum() / pictures, 1 - recall
    at = np.searchsorted(fppi, FPPI).clip(max=len(fppi) - 1)
    mmr = float(np.exp(np.log(miss[at]).mean())) if (miss[at] > 0).all() else 0.0
    return tuple(round(100 * value, 4) for value in (float(ap), mmr, float(recall[-1])))


def annotation_recall(pictures, seed=0):
    """How many persons' boxes survive NMS among themselves, in percent, by threshold.

    It is the ceiling of Section 5.2 for a detector with NMS.  The boxes are clipped and their
    scores random; the paper states neither its threshold nor its scores.
    """
    generator = torch.Generator().manual_seed(seed)
    kept, total = dict.fromkeys((0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7), 0), 0
    for persons, _, height, width in pictures.values():
        boxes = torch.from_numpy(clip_crowd(persons, height, width))
        scores = torch.rand(len(boxes), generator=generator, dtype=boxes.dtype)
        total += len(boxes)
        for threshold in kept:
            kept[threshold] += len(nms(boxes, scores, threshold))
    return {threshold: round(100 * n / max(total, 1), 2) for threshold, n in kept.items()}


# ------------------------------------------------------------------------------------------------
# result files: lines {ID, dtboxes: [{box: [x, y, width, height], score}, ...]}
# ------------------------------------------------------------------------------------------------

def read_odgt_results(file):
    """A result file: {ID: (D, 5)}, xyxy and score, and {ID: (height, width)} where it says so."""
    found, sizes = {}, {}
    for number, record, (_, wrong) in annotations.odgt_lines(file, "dtboxes"):
        if wrong:
            raise annotations.DataError(f"{file}: line {number} {wrong}")
        name, rows = record["ID"], []
        for n, d in enumerate(record["dtboxes"]):
            if not (isinstance(d, dict) and annotations.is_number(d.get("score"))
                    and annotations.is_box(d.get("box"))):
                raise annotations.DataError(
                    f"{file}: line {number}, ID {name}: detection {n} lacks a valid box (four "
                    f"finite numbers x, y, width, height) or score: {str(d)[:120]}")
            x, y, w, h = d["box"]
            rows.append((x, y, x + w, y + h, d["score"]))
        found[name] = np.array(rows).reshape(-1, 5)
        size = record.get("height"), record.get("width")
        if all(map(annotations.is_side, size)):
            sizes[name] = size
    return found, sizes


def read_case(gt_file, dt_file, image_dir=None):
    """Pictures and detections of a pair of files, as crowd_metrics wants them.  Raises DataError.

    Sizes come from the ground truth's lines, the results' or the pictures.
    """
    found, sizes = read_odgt_results(dt_file)
    truth, faults = annotations.parse_odgt(gt_file, image_dir, sizes)
    for fault in faults:
        # a box without extent counts as the authors count it
        if not fault.extent:
            raise annotations.DataError(fault.text)
    pictures = crowd_truth(truth)
    for name in found:
        if name not in pictures:
            raise annotations.DataError(f"{dt_file}: ID {name!r} is not in {gt_file}")
    return pictures, found


def score_odgt(gt_file, dt_file, max_dets, image_dir=None):
    """CrowdHuman's figures of a result file.  Raises DataError."""
    return crowd_metrics(*read_case(gt_file, dt_file, image_dir), max_dets)
