"""Average precision without and with NMS, from one inference pass (the two columns of Tables 1 and 2).

    python evaluate.py --weights runs/fcos/last.pt            the checkpoint alone is enough
    python evaluate.py results --gt instances.json --dt detections.json      any detector's result file
    python evaluate.py annotations --data crowd               what NMS costs the annotation boxes themselves

AP is pycocotools': box IoU 0.50 to 0.95, 101 recall points, the 100 best detections an image.  "With NMS" is
what the detector's authors did: the one-to-one forms suppress, class by class at IoU 0.5, among the 100
best; the original forms suppress before they choose 100 (models.py, `detections`).
"""
import argparse
import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.optimize import linear_sum_assignment
from torchvision.ops import nms
from tqdm import tqdm

import data
import models


def percent(values):
    """Mean of the entries that exist, in percent; pycocotools marks the others with -1."""
    values = values[values > -1]
    return round(100 * float(values.mean()), 4) if values.size else -1.0


def quiet(make, *args):
    """pycocotools prints its progress; a training log does not want it."""
    with contextlib.redirect_stdout(io.StringIO()):
        return make(*args)


def coco_object(images, categories, annotations):
    """A pycocotools COCO from lists (its own loadRes fails on an empty list of detections)."""
    coco = COCO()
    coco.dataset = {"images": images, "categories": categories, "annotations": annotations, "info": {}}
    quiet(coco.createIndex)
    return coco


def coco_metrics(gt, detections, max_dets=100, image_ids=None):
    """AP, AP50, AP75, APs, APm, APl and AR in percent; -1 where there is nothing to measure.

    gt: pycocotools COCO   detections: dicts with image_id, category_id, bbox (xywh), score

    The figures are read at `max_dets` themselves: the first summary line of pycocotools is hard-wired to
    100 detections and says -1 for any other number.
    """
    annotations = [{"id": n + 1, "image_id": d["image_id"], "category_id": d["category_id"], "bbox": d["bbox"],
                    "score": d["score"], "area": d["bbox"][2] * d["bbox"][3], "iscrowd": 0}
                   for n, d in enumerate(detections)]
    dt = coco_object(gt.dataset["images"], gt.dataset["categories"], annotations)
    run = COCOeval(gt, dt, "bbox")
    run.params.maxDets = [max_dets]
    if image_ids is not None:
        run.params.imgIds = sorted(image_ids)
    quiet(run.evaluate)
    quiet(run.accumulate)
    precision, recall = run.eval["precision"], run.eval["recall"]        # (IoU, recall, class, area, 1), (IoU, class, area, 1)
    return {"AP": percent(precision[:, :, :, 0]), "AP50": percent(precision[0, :, :, 0]),
            "AP75": percent(precision[5, :, :, 0]), "APs": percent(precision[:, :, :, 1]),
            "APm": percent(precision[:, :, :, 2]), "APl": percent(precision[:, :, :, 3]),
            "AR": percent(recall[:, :, 0])}


def ground_truth(annotations):
    """What the reader accepted, as pycocotools wants it: (COCO, and for CrowdHuman's files what crowd_metrics wants, else None).

    Boxes get the area pycocotools needs where the file gives none.
    """
    a = annotations
    if str(a.json_file).endswith(".odgt"):
        _, _, raw = data.parse_odgt(a.json_file, None, dict(zip(a.image_ids, a.sizes.tolist())))
        pictures = crowd_truth(raw, a.sizes)
        image = torch.repeat_interleave(torch.arange(len(a)), a.first.diff()).tolist()
        boxes = [{"image_id": a.image_ids[i], "category_id": 1, "iscrowd": int(crowd), "bbox": [x1, y1, x2 - x1, y2 - y1]}
                 for i, crowd, (x1, y1, x2, y2) in zip(image, a.crowd.tolist(), a.boxes.tolist())]
        images, categories = [{"id": i} for i in a.image_ids], [{"id": 1, "name": "person"}]
    else:
        record, pictures = data.read_json(a.json_file), None
        boxes = [record["annotations"][row] for row in sorted(a.rows.tolist())]
        images, categories = record["images"], record["categories"]
    for n, box in enumerate(boxes):
        box["id"] = n + 1                    # pycocotools takes an object with id 0 for an unmatched one
        box["iscrowd"] = int(bool(box.get("iscrowd", 0)))
        if not data.is_number(box.get("area")):
            box["area"] = box["bbox"][2] * box["bbox"][3]
    return coco_object(images, categories, boxes), pictures


# ------------------------------------------------------------------------------------------------
# the CrowdHuman protocol (Section 5.1), as the authors' script computes AP50, mMR and recall, and CrowdDet's JI
# ------------------------------------------------------------------------------------------------

FPPI = (0.0100, 0.0178, 0.03160, 0.0562, 0.1000, 0.1778, 0.3162, 0.5623, 1.000)     # rounded, as published


def clip_crowd(boxes, height, width):
    """Boxes (n, 4) xyxy cut to the picture; the near edges stop a pixel earlier than the far ones, as published."""
    return np.stack([boxes[:, 0].clip(0, width - 1), boxes[:, 1].clip(0, height - 1),
                     boxes[:, 2].clip(0, width), boxes[:, 3].clip(0, height)], 1)


def overlaps(boxes, others):
    """Intersection over union, and over the area of `boxes`: both (n, m).  1e-6 keeps boxes without extent apart."""
    size = lambda b: (b[:, 2:] - b[:, :2]).clip(0).prod(1)
    inter = (np.minimum(boxes[:, None, 2:], others[None, :, 2:]) - np.maximum(boxes[:, None, :2], others[None, :, :2])).clip(0).prod(2)
    area = size(boxes)[:, None]
    return inter / (area + size(others)[None] - inter + 1e-6), inter / np.maximum(area, 1e-6)


def match_crowd(iou, over_ignored, threshold=0.5):
    """Detections of one picture, best first, each to the free person it overlaps most: true positive, counts (D,) bool.

    iou: (D, G)   over_ignored: (D, I), intersection over the detection's area   An unmatched detection that lies in an
    ignore region does not count; such a region is never used up.
    """
    true_positive, free = np.zeros(len(iou), bool), np.ones(iou.shape[1], bool)
    for d in (iou > threshold).any(1).nonzero()[0]:                  # the others match nobody
        value = np.where(free, iou[d], 0.0)
        best = int(value.argmax())
        if value[best] > threshold:
            true_positive[d], free[best] = True, False
    return true_positive, true_positive | ~(over_ignored > threshold).any(1)


def jaccard_index(iou, over_ignored, person_ignored, scores):
    """JI of one picture for score thresholds 0.0, 0.1, ... 0.9 (CrowdDet's addition); NaN where there is nothing to compare.

    person_ignored: (G,) bool, the person lies in an ignore region.  k pairs of a maximum-weight matching, out of m persons
    and n detections, those unmatched in ignore regions left out: k / (m + n - k).
    """
    values = []
    for threshold in np.arange(10) / 10:
        chosen = scores > threshold
        weights = np.where(iou[chosen] > 0.5, iou[chosen], 0.0)
        rows, columns = linear_sum_assignment(weights, maximize=True)
        paired = weights[rows, columns] > 0
        k, free, missed = int(paired.sum()), np.ones(len(weights), bool), np.ones(iou.shape[1], bool)
        free[rows[paired]], missed[columns[paired]] = False, False
        n = len(weights) - int((free & (over_ignored[chosen] > 0.5).any(1)).sum())
        m = iou.shape[1] - int((missed & person_ignored).sum())
        values.append(k / (m + n - k + 1e-6) if m or n else np.nan)
    return values


def crowd_truth(raw, sizes):
    """What crowd_metrics compares with, from data.parse_odgt's raw boxes and sizes: {ID: (persons, ignored, height, width)}."""
    return {name: (boxes[~ignore], boxes[ignore], *size) for (name, (boxes, ignore)), size in zip(raw.items(), sizes.tolist())}


def crowd_metrics(pictures, detections, max_dets=500):
    """AP50, mMR and recall (Table 3) and CrowdDet's JI, in percent.

    pictures: {ID: (persons (G, 4), ignored (I, 4), height, width)}   detections: {ID: (D, 5)}, xyxy and score
    A picture without an entry in `detections` counts as one without detections.
    """
    scores, hits, jaccard, total = [], [], [], 0
    for name, (persons, ignored, height, width) in pictures.items():
        total += len(persons)
        found = np.asarray(detections.get(name, ()), float).reshape(-1, 5)
        found = found[(-found[:, 4]).argsort(kind="stable")][:max_dets]
        persons, ignored, boxes = (clip_crowd(b, height, width) for b in (persons, ignored, found[:, :4]))
        iou, over_ignored = overlaps(boxes, persons)[0], overlaps(boxes, ignored)[1]
        true_positive, counts = match_crowd(iou, over_ignored)
        scores.append(found[counts, 4])
        hits.append(true_positive[counts])
        jaccard.append(jaccard_index(iou, over_ignored, (overlaps(persons, ignored)[1] > 0.5).any(1), found[:, 4]))
    scores, hits = np.concatenate(scores), np.concatenate(hits)
    hits = hits[(-scores).argsort(kind="stable")]
    jaccard = np.array(jaccard)                                      # (pictures, thresholds)
    known = ~np.isnan(jaccard)
    ji = (np.where(known, jaccard, 0).sum(0) / known.sum(0).clip(1)).max()
    if not total:                                                    # nobody to find: -1, as pycocotools says it
        return {"AP50": -1.0, "mMR": -1.0, "recall": -1.0, "JI": round(100 * float(ji), 4)}
    if not len(hits):
        return {"AP50": 0.0, "mMR": 100.0, "recall": 0.0, "JI": round(100 * float(ji), 4)}
    positive = hits.cumsum()
    recall, precision = positive / total, positive / np.arange(1, len(hits) + 1)
    ap = np.diff(recall) @ ((precision[1:] + precision[:-1]) / 2)    # trapezoids, from the second detection on
    fppi, miss = (~hits).cumsum() / len(pictures), 1 - recall
    at = [min(int(np.searchsorted(fppi, reference)), len(fppi) - 1) for reference in FPPI]        # the first that reaches it
    mmr = float(np.exp(np.log(miss[at]).mean())) if (miss[at] > 0).all() else 0.0
    return {"AP50": round(100 * float(ap), 4), "mMR": round(100 * mmr, 4), "recall": round(100 * float(recall[-1]), 4), "JI": round(100 * float(ji), 4)}


@torch.no_grad()
def detect(model, pictures, batch_size=16, max_dets=100, device="cpu", precision="fp32", workers=0, progress=True):
    """One pass over `pictures`.  Returns {"plain": [...], "nms": [...], ...}: COCO result dicts.

    With several processes each sees its share, and process 0 gets all of it (the others get None).
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    a = pictures.annotations
    batches = data.evaluation_batches(a, batch_size, rank, world)
    results = {}
    was_training = model.training
    model.eval()
    for images, mask, targets in tqdm(data.loader(pictures, batches, workers), "evaluating", leave=False,
                                      disable=None if progress and rank == 0 else True):
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
            prediction = model(images.to(device), mask.to(device))
        for n, target in enumerate(targets):
            for variant, found in model.detections(prediction, n, max_dets).items():
                boxes, scores, labels = (part.cpu() for part in models.to_original(found, target))
                boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)            # xywh
                results.setdefault(variant, []).extend(
                    {"image_id": target["image_id"], "category_id": a.category_ids[label], "bbox": box, "score": score}
                    for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist()))
    model.train(was_training)
    if world > 1:
        shares = [None] * world if rank == 0 else None
        dist.gather_object(results, shares)
        if rank != 0:
            return None
        results = {variant: [d for share in shares for d in share.get(variant, [])] for variant in
                   dict.fromkeys(v for share in shares for v in share)}
    for found in results.values():                           # the same order whatever the number of processes
        found.sort(key=lambda d: (str(d["image_id"]), -d["score"]))
    return results


def metrics(truth, results, max_dets=100, image_ids=None):
    """metrics.json: figures without NMS, and under "nms" (and "box_nms", CenterNet) the ones with it.

    On CrowdHuman's files they are AP50, mMR, recall and JI; COCO's figures then stand under "coco".
    """
    coco, pictures = truth
    figures = {}
    for variant, found in results.items():
        figures[variant] = coco_metrics(coco, found, max_dets, image_ids)
        if pictures is not None:
            of_picture = {}
            for d in found:
                x, y, w, h = d["bbox"]
                of_picture.setdefault(d["image_id"], []).append((x, y, x + w, y + h, d["score"]))
            figures[variant] = {**crowd_metrics(pictures, {name: of_picture.get(name, []) for name in pictures}, max_dets), "coco": figures[variant]}
    return {**figures.pop("plain"), **figures}


def describe(figures):
    """Figures without and with NMS, the two columns of the paper's tables, as text."""
    nms = figures["nms"]
    if "mMR" in figures:
        row = lambda f: f"AP50 {f['AP50']:.1f}   mMR {f['mMR']:.1f}   recall {f['recall']:.1f}   JI {f['JI']:.1f}   (COCO-style AP {f['coco']['AP']:.1f})"
        return f"without NMS: {row(figures)}\nwith NMS:    {row(nms)}"
    return (f"AP {figures['AP']:.1f}   AP(+NMS) {nms['AP']:.1f} ({nms['AP'] - figures['AP']:+.1f})   "
            f"AP50 {figures['AP50']:.1f}   AP50(+NMS) {nms['AP50']:.1f} ({nms['AP50'] - figures['AP50']:+.1f})")


def read_odgt_results(file):
    """A result file in CrowdHuman's format: {ID: (D, 5)}, xyxy and score, and the {ID: (height, width)} it states."""
    found, sizes = {}, {}
    for number, record, (_, wrong) in data.odgt_lines(file, "dtboxes"):
        if wrong:
            raise data.DataError(f"{file}: line {number} {wrong}")
        rows = []
        for n, d in enumerate(record["dtboxes"]):
            if not (isinstance(d, dict) and data.is_number(d.get("score")) and isinstance(d.get("box"), list) and len(d["box"]) == 4
                    and all(map(data.is_number, d["box"]))):
                raise data.DataError(f"{file}: line {number}, ID {record['ID']}: detection {n} lacks a valid box (four finite numbers x, y, "
                                     f"width, height) or score: {str(d)[:120]}")
            x, y, w, h = d["box"]
            rows.append((x, y, x + w, y + h, d["score"]))
        found[record["ID"]] = np.array(rows).reshape(-1, 5)
        if all(data.is_number(record.get(k)) and record[k] >= 1 for k in ("height", "width")):
            sizes[record["ID"]] = record["height"], record["width"]
    return found, sizes


def score_odgt(gt_file, dt_file, max_dets, image_dir=None):
    """CrowdHuman's figures of a result file.  Sizes come from the ground truth's lines, the results' or the pictures."""
    found, sizes = read_odgt_results(dt_file)
    annotations, faults, raw = data.parse_odgt(gt_file, image_dir, sizes)
    for fault in faults:
        if not fault.extent:                                 # a box without extent counts as the authors count it
            raise data.DataError(fault.text)
    unknown = [name for name in found if name not in raw]
    if unknown:
        raise data.DataError(f"{dt_file}: ID {unknown[0]!r} is not in {gt_file}")
    return crowd_metrics(crowd_truth(raw, annotations.sizes), found, max_dets)


def read_results(file):
    """A result file in COCO's format: a list of dicts with image_id, category_id, bbox and score."""
    found = data.read_json(file)
    if not isinstance(found, list):
        raise data.DataError(f"{file}: not a COCO result file: it must be a list of detections")
    for n, d in enumerate(found):
        if not (isinstance(d, dict) and data.is_id(d.get("image_id")) and data.is_id(d.get("category_id"))
                and data.is_number(d.get("score"))
                and isinstance(d.get("bbox"), list) and len(d["bbox"]) == 4 and all(map(data.is_number, d["bbox"]))):
            raise data.DataError(f"{file}: detection number {n} lacks a valid image_id, category_id, bbox "
                                 f"(four finite numbers) or score: {str(d)[:120]}")
    return found


def score_file(gt_file, dt_file, max_dets):
    """Figures of a result file against a COCO-format ground truth.  Raises DataError."""
    annotations, faults = data.parse_coco(gt_file, None)
    for fault in faults:
        if not fault.extent:                                 # a box without extent does not count
            raise data.DataError(fault.text)
    found, listed = read_results(dt_file), set(annotations.image_ids)
    for n, d in enumerate(found):
        if d["image_id"] not in listed:
            raise data.DataError(f"{dt_file}: detection number {n} is of image {d['image_id']!r}, which {gt_file} "
                                 f"does not list")
        if d["category_id"] not in annotations.category_ids:
            raise data.DataError(f"{dt_file}: detection number {n} is of category {d['category_id']!r}, which {gt_file} "
                                 f"does not list; give the file's own category ids, not class indices")
    return coco_metrics(ground_truth(annotations)[0], found, max_dets)


def annotation_recall(pictures, seed=0):
    """How many persons' boxes survive NMS among themselves, in percent, by threshold: the ceiling of Section 5.2.

    The boxes are clipped and their scores random; the paper states neither its threshold nor its scores.
    """
    generator, kept, total = torch.Generator().manual_seed(seed), dict.fromkeys((0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7), 0), 0
    for persons, _, height, width in pictures.values():
        boxes = torch.from_numpy(clip_crowd(persons, height, width))
        scores = torch.rand(len(boxes), generator=generator, dtype=boxes.dtype)
        total += len(boxes)
        for threshold in kept:
            kept[threshold] += len(nms(boxes, scores, threshold))
    return {threshold: round(100 * n / max(total, 1), 2) for threshold, n in kept.items()}


def write_json(file, content, indent=None):
    """Written whole or not at all."""
    file = Path(file)
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=indent))
    temporary.replace(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="results", help="score a result file instead (results --help)")
    c = commands.add_parser("results", help="score the result file of any detector")
    c.add_argument("--protocol", choices=("coco", "crowdhuman"), default="coco", help="whose figures (default: coco)")
    c.add_argument("--gt", required=True, metavar="F", help="ground truth, COCO format (crowdhuman: .odgt)")
    c.add_argument("--dt", required=True, metavar="F", help="detections, COCO result format (crowdhuman: lines {ID, dtboxes: [{box: [x, y, width, height], score}, ...]}, "
                   "with or without the picture's height and width)")
    c.add_argument("--images", metavar="DIR", help="crowdhuman: the pictures, for the sizes that neither file holds (CrowdHuman's own .odgt has none)")
    c.add_argument("--out", metavar="F", help="also write the figures to this file")
    c.add_argument("--max-dets", type=int, metavar="N", help="detections per image and class that count (default 100, crowdhuman 500)")
    c = commands.add_parser("annotations", help="the recall of the annotation boxes themselves after NMS (Section 5.2)",
                            argument_default=argparse.SUPPRESS)      # or it would undo flags given before the command
    data.add_data_flags(c, train=False)
    parser.add_argument("--weights", metavar="F", help="a checkpoint of train.py: last.pt")
    g = parser.add_argument_group("data (default: what the checkpoint was validated on)")
    data.add_data_flags(g, train=False)
    g = parser.add_argument_group("how")
    g.add_argument("--max-dets", type=int, metavar="N", help="detections per image (default: the checkpoint's, 100)")
    g.add_argument("--batch-size", type=int, default=16, metavar="N", help="images at a time; changes speed only")
    g.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    g.add_argument("--precision", choices=("fp32", "bf16"), help="bf16 runs the network in bfloat16 (default: as it was trained)")
    g.add_argument("--workers", type=int, metavar="N", help="processes that read pictures (default: as in training)")
    g.add_argument("--out", metavar="DIR", help="write metrics.json, detections.json and detections_nms.json here")
    args = parser.parse_args()
    try:
        if args.command == "results":
            if args.protocol == "crowdhuman":
                figures = score_odgt(args.gt, args.dt, args.max_dets or 500, args.images)
            else:
                figures = score_file(args.gt, args.dt, args.max_dets or 100)
            for name, value in figures.items():
                print(f"{name:5} {value:6.2f}")
            if args.out:
                write_json(args.out, figures, indent=1)
            return
        if args.command == "annotations":
            flags = {key: getattr(args, key) for key in ("data", "data_dir", "val_json", "val_images")}
            file, folder = data.locate({**flags, "data": args.data or "crowd"}, "val")
            if not file.endswith(".odgt"):
                raise data.DataError(f"{file}: annotations are compared on CrowdHuman's files: --data crowd, crowdhuman, or custom with an .odgt")
            _, pictures = ground_truth(data.read_annotations(file, folder, bool(args.drop_bad_boxes)))
            print(f"{file}: {len(pictures)} pictures")
            for threshold, value in annotation_recall(pictures).items():
                print(f"NMS at IoU {threshold:.2f} keeps {value:6.2f}% of the annotation boxes")
            return
        if not args.weights:
            parser.error("give --weights last.pt, or the sub-command results")
        checkpoint = models.read_checkpoint(args.weights)
        model = models.from_checkpoint(checkpoint, args.weights)
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        given = {key: getattr(args, key) for key in ("data", "data_dir", "val_json", "val_images", "drop_bad_boxes")}
        same = given["data"] in (None, checkpoint["args"].get("data"))
        known = {key: checkpoint["args"].get(key) for key in given} if same else {}
        json_file, image_dir = data.locate({**known, **{k: v for k, v in given.items() if v is not None}}, "val")
        annotations = data.read_annotations(json_file, image_dir, bool(given["drop_bad_boxes"] or known.get("drop_bad_boxes")))
        if annotations.class_names != checkpoint["class_names"]:
            raise data.DataError(f"{json_file}: its classes are {annotations.class_names}, the checkpoint {args.weights} "
                                 f"knows {checkpoint['class_names']}; evaluate on data with the same classes")
        max_dets = args.max_dets or checkpoint["args"].get("max_dets", 100)
        pictures = data.Pictures(annotations, data.Transform(**checkpoint["test_transform"]))
        results = detect(model.to(device), pictures, args.batch_size, max_dets, device,
                         args.precision or checkpoint["args"].get("precision", "fp32"),
                         checkpoint["args"].get("workers", 0) if args.workers is None else args.workers)
        figures = metrics(ground_truth(annotations), results, max_dets, annotations.image_ids)
        print(describe(figures))
        if args.out:
            Path(args.out).mkdir(parents=True, exist_ok=True)
            write_json(Path(args.out) / "metrics.json", figures, indent=1)
            write_json(Path(args.out) / "detections.json", results["plain"])
            write_json(Path(args.out) / "detections_nms.json", results["nms"])
    except (data.DataError, models.CheckpointError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
