"""Section 3.4: duplicates and the score gap (Definition 3.3, Eq. 6), in any detector's detections.

A detection is *of* an object if both have the same class and their IoU is at least 0.5; if that
fits several objects, it is of the one it overlaps most.  The highest-scored detection of an object
is its first, the others are its duplicates.  The score gap of an object is its highest score minus
its second-highest; an object with one detection alone has 0 for the second, one without any has no
gap.

The paper's Eq. 6 is about one object and all samples.  Pictures hold several objects of a class, so
a sample's object has to be told: here the one that the detection is of; in positives.py, during
training, each that it overlaps by IoU > 0.5.  The picture of figures.py `scores` has one object.
"""
from typing import NamedTuple

import torch
from torchvision.ops import box_iou

from models import class_wise_nms

IOU = 0.5                                    # from which on a detection is of an object
SCORES = (0.05, 0.1, 0.3, 0.5)               # duplicates are counted from these on
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)         # of NMS
NEEDS, FREE = 1.0, 0.5                       # of the verdict: AP points (crowds: AP50)
WEAK = 10.0                                  # below it half a point is no small change
SMALL_GAP = 0.1                              # gaps below it are counted


class Found(NamedTuple):
    """One picture: D detections beside its G objects, boxes as xyxy."""
    boxes: torch.Tensor         # (D, 4)
    scores: torch.Tensor        # (D,)
    labels: torch.Tensor        # (D,) whole numbers, the same for the same class
    objects: torch.Tensor       # (G, 4)
    classes: torch.Tensor       # (G,) their labels


def belongs(boxes, labels, objects, classes):
    """Which object each detection is of, -1: of none.  (D,)"""
    if not len(objects):
        return torch.full((len(boxes),), -1)
    overlap = box_iou(boxes, objects) * (labels[:, None] == classes[None])       # (D, G)
    most, which = overlap.max(1)
    return torch.where(most >= IOU, which, -1)


def ranks(scores, of):
    """0 for the first detection of an object, 1 for its second, ...; -1 for one of no object.  (D,)

    of: (D,), from `belongs`
    """
    met, rank = {}, [-1] * len(scores)
    of = of.tolist()
    for d in (-scores).argsort(stable=True).tolist():
        if of[d] >= 0:
            rank[d] = met.get(of[d], 0)
            met[of[d]] = rank[d] + 1
    return torch.tensor(rank, dtype=torch.long)


def scores_by_rank(scores, of, rank, count, wanted):
    """The score of each object's detection of one rank, 0 where it has none.  (count,)"""
    by_object = scores.new_zeros(count)
    by_object[of[rank == wanted]] = scores[rank == wanted]
    return by_object


def kept_by_nms(picture, threshold):
    """(D,) bool: what NMS, class by class, leaves of the detections of a picture."""
    keep = torch.zeros(len(picture.scores), dtype=torch.bool)
    keep[class_wise_nms(picture.boxes, picture.scores, picture.labels, threshold)] = True
    return keep


def gain(without, with_nms):
    """What NMS adds to a figure, as it is printed: the difference of the two printed figures.

    60.50 -> 59.998 is 60.5 -> 60.0 on paper: a reader who subtracts finds -0.5, not -0.502.
    """
    return round(round(with_nms, 1) - round(without, 1), 1) + 0.0        # + 0.0: never -0.0


def quartiles(values):
    """25%, 50% and 75% of the values lie below these; None where there are no values."""
    if not len(values):
        return None
    at = torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype)
    return [round(v, 4) for v in values.quantile(at).tolist()]


def diagnose(pictures, measure, progress=iter):
    """Everything there is to say about detections that were made without NMS, as JSON has it.

    pictures: list of Found
    measure(keep, spared): figures, {"AP": ...}, of what a list of (D,) bool leaves of each picture;
    those in `spared`, if given, may hit an object, but do not count as false
    progress: what goes around the sequences that take long (tqdm)
    """
    firsts, seconds = [], []
    met, beyond = [], []                     # objects that are found; scores of the duplicates
    lost = 0
    of = [belongs(p.boxes, p.labels, p.objects, p.classes) for p in progress(pictures)]
    rank = [ranks(p.scores, which) for p, which in zip(pictures, of)]
    for p, which, place in zip(pictures, of, rank):
        count = len(p.objects)
        firsts.append(scores_by_rank(p.scores, which, place, count, 0))
        seconds.append(scores_by_rank(p.scores, which, place, count, 1))
        met.append(torch.bincount(which[which >= 0], minlength=count) > 0)
        kept = which[kept_by_nms(p, 0.5)]
        lost += int((met[-1] & (torch.bincount(kept[kept >= 0], minlength=count) == 0)).sum())
        beyond.append(p.scores[place > 0])

    met = torch.cat(met)
    first, second = torch.cat(firsts)[met], torch.cat(seconds)[met]
    gap, beyond = first - second, torch.cat(beyond)
    found = {"pictures": len(pictures), "detections": sum(map(len, of)), "objects": len(met),
             "found": len(gap), "lost to NMS at 0.5": lost,
             "duplicates per object": {str(score): round(int((beyond >= score).sum())
                                                         / max(len(met), 1), 4)
                                       for score in SCORES},
             "first score": quartiles(first), "second score": quartiles(second),
             "score gap": quartiles(gap),
             "score gaps below 0.1": round(100 * int((gap < SMALL_GAP).sum())
                                           / max(len(gap), 1), 2),
             "score gaps": torch.histc(gap.float(), 20, 0, 1).long().tolist()}

    # figures without NMS, with it, and with what an oracle leaves
    everything = [torch.ones(len(which), dtype=torch.bool) for which in of]
    found.update(measure(everything))
    found["nms"] = {str(threshold): measure([kept_by_nms(p, threshold) for p in pictures])
                    for threshold in progress(THRESHOLDS)}
    found["oracle"] = measure(everything, [place > 0 for place in rank])
    return found


def verdict(found, name="AP"):
    """One sentence, in the paper's words, and the thresholds behind it."""
    if not found["objects"] or not found["found"]:
        return f"cannot be told: {'nothing is found' if found['objects'] else 'no objects'}."
    gains = {threshold: figures[name] - found[name] for threshold, figures in found["nms"].items()}
    best = max(gains, key=gains.get)
    if found[name] + gains[best] < WEAK and gains[best] < NEEDS:
        return f"cannot be told: with NMS and without {name} is below {WEAK:g}."
    at_best, at_half = (gain(found[name], found["nms"][at][name]) for at in (best, "0.5"))
    gap = f"the median score gap is {found['score gap'][1]:.2f}"
    if gains[best] >= NEEDS:
        said = f"needs NMS: without it {at_best:.1f} {name} are lost (NMS at IoU {best}), and"
    elif gains[best] > FREE:
        said = f"nearly end-to-end: NMS still adds {at_best:.1f} {name} (at IoU {best}), and"
    else:
        said = f"end-to-end: NMS changes {name} by {at_half:+.1f} (at IoU 0.5), and"
    said += f" {gap}"
    if gains["0.5"] <= -NEEDS:
        said += f"; NMS at IoU 0.5 costs {-at_half:.1f} {name}"
    return (f"{said}.  (It needs NMS where NMS at its best threshold adds {NEEDS:g} {name} or "
            f"more; it is end-to-end where that is {FREE:g} or less.)")
