"""Average precision without and with NMS, from one inference pass (the two columns of Tables 1 and 2).

    python evaluate.py --weights runs/fcos/last.pt            the checkpoint alone is enough
    python evaluate.py results --gt instances.json --dt detections.json      any detector's result file

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

import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
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
    """pycocotools COCO of what the reader accepted; boxes get the area pycocotools needs where the file gives none."""
    record = data.read_json(annotations.json_file)
    boxes = [record["annotations"][row] for row in sorted(annotations.rows.tolist())]
    for n, box in enumerate(boxes):
        box["id"] = n + 1                    # pycocotools takes an object with id 0 for an unmatched one
        box["iscrowd"] = int(bool(box.get("iscrowd", 0)))
        if not data.is_number(box.get("area")):
            box["area"] = box["bbox"][2] * box["bbox"][3]
    return coco_object(record["images"], record["categories"], boxes)


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


def metrics(gt, results, max_dets=100, image_ids=None):
    """metrics.json: figures without NMS, and under "nms" (and "box_nms", CenterNet) the ones with it."""
    figures = coco_metrics(gt, results["plain"], max_dets, image_ids)
    for variant in results:
        if variant != "plain":
            figures[variant] = coco_metrics(gt, results[variant], max_dets, image_ids)
    return figures


def describe(figures):
    """The two columns of the paper, as one line of text."""
    nms = figures["nms"]
    return (f"AP {figures['AP']:.1f}   AP(+NMS) {nms['AP']:.1f} ({nms['AP'] - figures['AP']:+.1f})   "
            f"AP50 {figures['AP50']:.1f}   AP50(+NMS) {nms['AP50']:.1f} ({nms['AP50'] - figures['AP50']:+.1f})")


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
        if not fault.box or "finite" in fault.kind:          # a box without extent does not count
            raise data.DataError(fault.text)
    found, listed = read_results(dt_file), set(annotations.image_ids)
    for n, d in enumerate(found):
        if d["image_id"] not in listed:
            raise data.DataError(f"{dt_file}: detection number {n} is of image {d['image_id']!r}, which {gt_file} "
                                 f"does not list")
        if d["category_id"] not in annotations.category_ids:
            raise data.DataError(f"{dt_file}: detection number {n} is of category {d['category_id']!r}, which {gt_file} "
                                 f"does not list; give the file's own category ids, not class indices")
    return coco_metrics(ground_truth(annotations), found, max_dets)


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
    c.add_argument("--gt", required=True, metavar="F", help="ground truth, COCO format")
    c.add_argument("--dt", required=True, metavar="F", help="detections, COCO result format")
    c.add_argument("--out", metavar="F", help="also write the figures to this file")
    c.add_argument("--max-dets", type=int, default=100, metavar="N", help="detections per image and class that count")
    parser.add_argument("--weights", metavar="F", help="a checkpoint of train.py: last.pt")
    g = parser.add_argument_group("data (default: what the checkpoint was validated on)")
    data.add_data_flags(g, train=False)
    g = parser.add_argument_group("how")
    g.add_argument("--max-dets", type=int, metavar="N", help="detections per image (default: the checkpoint's, 100)")
    g.add_argument("--batch-size", type=int, default=16, metavar="N", help="images at a time; changes speed only")
    g.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    g.add_argument("--precision", choices=("fp32", "bf16"), help="bf16 runs the network in bfloat16 (default: as it was trained)")
    g.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read pictures")
    g.add_argument("--out", metavar="DIR", help="write metrics.json, detections.json and detections_nms.json here")
    args = parser.parse_args()
    try:
        if args.command == "results":
            figures = score_file(args.gt, args.dt, args.max_dets)
            for name, value in figures.items():
                print(f"{name:5} {value:6.2f}")
            if args.out:
                write_json(args.out, figures, indent=1)
            return
        if not args.weights:
            parser.error("give --weights last.pt, or the sub-command results")
        checkpoint = models.read_checkpoint(args.weights)
        model = models.from_checkpoint(checkpoint, args.weights)
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        given = {key: getattr(args, key) for key in ("data", "data_dir", "val_json", "val_images", "drop_bad_boxes")}
        known = {} if given["data"] else {key: checkpoint["args"].get(key) for key in given}
        json_file, image_dir = data.locate({**known, **{k: v for k, v in given.items() if v is not None}}, "val")
        annotations = data.read_coco(json_file, image_dir, bool(given["drop_bad_boxes"] or known.get("drop_bad_boxes")))
        if annotations.class_names != checkpoint["class_names"]:
            raise data.DataError(f"{json_file}: its classes are {annotations.class_names}, the checkpoint {args.weights} "
                                 f"knows {checkpoint['class_names']}; evaluate on data with the same classes")
        max_dets = args.max_dets or checkpoint["args"].get("max_dets", 100)
        pictures = data.Pictures(annotations, data.Transform(**checkpoint["test_transform"]))
        results = detect(model.to(device), pictures, args.batch_size, max_dets, device,
                         args.precision or checkpoint["args"].get("precision", "fp32"), args.workers)
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
