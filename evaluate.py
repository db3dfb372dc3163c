"""Figures without and with NMS, from one inference pass (the two columns of Tables 1 and 2).

    python evaluate.py --weights runs/fcos/last.pt      the checkpoint alone is enough
                                                        (--per-class: the figures of each class)
    python evaluate.py results --gt instances.json --dt detections.json     any detector's results
    python evaluate.py nms --gt instances.json --dt detections.json     does it need NMS? (also of
                                                        a checkpoint: nms --weights last.pt)
    python evaluate.py annotations --data crowd         what NMS costs the annotation boxes alone

AP is pycocotools' (where it is installed, hotcoco's): box IoU 0.50 to 0.95, 101 recall points, the
100 best detections an image.
"With NMS" is what the detector's authors did: the one-to-one forms suppress, class by class at IoU
0.5, among the 100 best; the original forms suppress before they choose 100 (models.py,
`detections`).  On CrowdHuman's files the figures are those of crowd.py.
"""
import argparse
import contextlib
import io
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

try:
    import hotcoco              # the same figures in a tenth of the time or less, where installed
except ImportError:
    hotcoco = None

import annotations
import checkpoints
import coco
import crowd
import data
import duplicates
import figures
import models
import recipes
import runs


# ------------------------------------------------------------------------------------------------
# COCO's figures
# ------------------------------------------------------------------------------------------------

def percent(values):
    """Mean of the entries that exist, in percent; pycocotools marks the others with -1."""
    values = values[values > -1]
    return round(100 * float(values.mean()), 4) if values.size else -1.0


def quiet(make, *args):
    """pycocotools prints its progress; a training log does not want it."""
    with contextlib.redirect_stdout(io.StringIO()):
        return make(*args)


def coco_object(images, categories, boxes):
    """A COCO from lists of dicts: hotcoco's, or pycocotools' (whose loadRes fails on no detection).

    hotcoco knows no ids but whole numbers.
    """
    dataset = {"images": images, "categories": categories, "annotations": boxes, "info": {}}
    if hotcoco and all(type(one["id"]) is int and one["id"] >= 0 for one in images + categories):
        return hotcoco.COCO(dataset)
    gt = COCO()
    gt.dataset = dataset
    quiet(gt.createIndex)
    return gt


def coco_run(gt, detections, max_dets=100):
    """A COCOeval of a list of detections, with everything matched and accumulated.

    gt: of coco_object   detections: dicts with image_id, category_id, bbox (xywh), score
    """
    boxes = [{"id": n + 1, "image_id": d["image_id"], "category_id": d["category_id"],
              "bbox": d["bbox"], "score": d["score"], "area": d["bbox"][2] * d["bbox"][3],
              "iscrowd": 0} for n, d in enumerate(detections)]
    dt = coco_object(gt.dataset["images"], gt.dataset["categories"], boxes)
    evaluator = COCOeval if isinstance(gt, COCO) else hotcoco.COCOeval
    run = evaluator(gt, dt, "bbox")
    run.params.maxDets = [max_dets]
    quiet(run.evaluate)
    quiet(run.accumulate)
    return run


def coco_metrics(gt, detections, max_dets=100):
    """AP, AP50, AP75, APs, APm, APl and AR in percent; -1 where there is nothing to measure."""
    return coco_figures(coco_run(gt, detections, max_dets))


def coco_figures(run):
    """coco_metrics of a COCOeval.

    They are read at its own number of detections: the first summary line of pycocotools is
    hard-wired to 100 and says -1 for any other number.
    """
    precision = run.eval["precision"]            # (IoU, recall, class, area, 1)
    recall = run.eval["recall"]                  # (IoU, class, area, 1)
    return {"AP": percent(precision[:, :, :, 0]),
            "AP50": percent(precision[0, :, :, 0]),
            "AP75": percent(precision[5, :, :, 0]),
            "APs": percent(precision[:, :, :, 1]),
            "APm": percent(precision[:, :, :, 2]),
            "APl": percent(precision[:, :, :, 3]),
            "AR": percent(recall[:, :, 0])}


def class_figures(run):
    """{name of the class: objects, AP, AP50, F1, score} of a COCOeval, without matching again.

    F1 is the best at IoU 0.5, in percent, and score the threshold that gives it: what to show to
    people who want to see neither mistakes nor gaps.  Two classes of one name bear their ids too.
    """
    categories = run.cocoGt.dataset["categories"]
    names, found = [c["name"] for c in categories], {}
    # of each class the pictures with objects or detections; the first range of areas is "all"
    of_class, everything = {}, list(run.params.areaRng[0])
    for picture in run.evalImgs:
        if picture and list(picture["aRng"]) == everything:
            of_class.setdefault(picture["category_id"], []).append(picture)
    for k, category in enumerate(run.params.catIds):
        name = next(c["name"] for c in categories if c["id"] == category)
        if names.count(name) > 1:
            name = f"{name} ({category})"
        pictures = of_class.get(category, [])
        objects = sum(int((np.array(p["gtIgnore"]) == 0).sum()) for p in pictures)
        precision = run.eval["precision"][:, :, k, 0]                # (IoU, recall, 1)

        scores, hits = [np.zeros(0)], [np.zeros(0, bool)]
        for p in pictures:                           # IoU 0 of ten is 0.5; crowds do not count
            counts = ~np.array(p["dtIgnore"][0], bool)
            scores.append(np.array(p["dtScores"])[counts])
            hits.append(np.array(p["dtMatches"][0])[counts] > 0)
        scores, hits = np.concatenate(scores), np.concatenate(hits)
        f1, score = coco.best_f1(scores, hits, objects)
        found[name] = {"objects": objects, "AP": percent(precision), "AP50": percent(precision[0]),
                       "F1": f1, "score": score}
    return found


def ground_truth(a):
    """What the reader accepted, as the figures want it.

    Returns what coco_object makes and, of CrowdHuman's files, what crowd_metrics wants, else None.
    """
    image = torch.repeat_interleave(torch.arange(len(a)), a.first.diff()).tolist()
    columns = zip(image, a.labels.tolist(), a.crowd.tolist(), a.xywh.tolist(), a.area.tolist())
    # ids from 1: pycocotools takes an object with id 0 for an unmatched one
    boxes = [{"id": n, "image_id": a.image_ids[i], "category_id": a.category_ids[label],
              "iscrowd": int(ignore), "bbox": xywh, "area": area}
             for n, (i, label, ignore, xywh, area) in enumerate(columns, 1)]
    classes = [{"id": i, "name": name} for i, name in zip(a.category_ids, a.class_names)
               if i is not None]                 # what the file lacks
    gt = coco_object([{"id": i} for i in a.image_ids], classes, boxes)
    return gt, None if a.full_boxes is None else crowd.crowd_truth(a)


# ------------------------------------------------------------------------------------------------
# a detector's figures
# ------------------------------------------------------------------------------------------------

def at_once(data_set):
    """How many pictures `detect` shows a detector at a time, if nothing else is said.

    One, as the published codes: beside a larger picture a smaller one is padded, and most detectors
    see their padding (docs/published.md).  The embedded pictures are all of one size.
    """
    return 16 if data_set in ("scenes", "crowd") else 1


@torch.no_grad()
def detect(model, pictures, batch_size=1, max_dets=100, device="cpu", precision="fp32", workers=0,
           progress=True):
    """One pass over `pictures`.  Returns {"plain": [...], "nms": [...], ...}: COCO result dicts.

    batch_size: pictures at a time, of each process

    With several processes each sees its share, and process 0 gets all of it (the others get None).
    """
    rank, world = 0, 1
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    process, a = runs.Process(rank, world, device), pictures.annotations
    keys = data.evaluation_batches(a, batch_size, rank, world)
    batches = tqdm(data.loader(pictures, keys, model.divisor, workers), "evaluating", len(keys),
                   leave=False,
                   disable=None if progress and rank == 0 else True)     # None: on a terminal only
    results = {}
    was_training = model.training
    model.eval()
    own = [buffer.clone() for buffer in model.buffers()] if world > 1 else []
    for buffer in model.buffers() if own else ():        # batch norm's statistics: the checkpoint's
        dist.broadcast(buffer, 0)

    for images, mask, targets in batches:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
            prediction = model(images.to(device), mask.to(device))
        for n, target in enumerate(targets):
            for variant, found in model.detections(prediction.image(n), max_dets).items():
                boxes, scores, labels = (part.cpu() for part in models.to_original(found, target))
                xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
                results.setdefault(variant, []).extend(
                    {"image_id": target["image_id"], "category_id": a.category_ids[label],
                     "bbox": box, "score": score}
                    for box, score, label in zip(xywh.tolist(), scores.tolist(), labels.tolist())
                    if a.category_ids[label] is not None)        # a class that the file lacks

    for buffer, before in zip(model.buffers(), own):
        buffer.copy_(before)
    model.train(was_training)
    shares, results = runs.gather(results, process), {}
    if not process.is_main:
        return None
    for share in shares:
        for variant, found in share.items():
            results.setdefault(variant, []).extend(found)

    # the same order whatever the number of processes
    for found in results.values():
        found.sort(key=lambda d: (str(d["image_id"]), -d["score"]))
    return results


def metrics(truth, results, max_dets=100):
    """metrics.json: figures without NMS, and under "nms" (CenterNet: and "box_nms") those with it.

    On CrowdHuman's files they are AP50, mMR, recall and JI; COCO's figures then stand under "coco".
    Beside COCO's figures, "classes" has those of each class (class_figures).
    """
    gt, pictures = truth
    of_variant = {}
    for variant, found in tqdm(results.items(), "scoring", leave=False, disable=None):
        run = coco_run(gt, found, max_dets)
        of_variant[variant] = {**coco_figures(run), "classes": class_figures(run)}
        if pictures is not None:
            of_variant[variant] = {
                **crowd.crowd_metrics(pictures, crowd_lists(found), max_dets),
                "coco": of_variant[variant]}
    return {**of_variant.pop("plain"), **of_variant}


def crowd_lists(detections):
    """COCO result dicts as crowd.py wants them: {ID: rows of xyxy and score}."""
    of_picture = {}
    for d in detections:
        x, y, w, h = d["bbox"]
        of_picture.setdefault(d["image_id"], []).append((x, y, x + w, y + h, d["score"]))
    return of_picture


def describe(found):
    """Figures without and with NMS, the two columns of the paper's tables, as text."""
    nms = found["nms"]
    if "mMR" in found:
        return f"without NMS: {describe_crowd(found)}\nwith NMS:    {describe_crowd(nms)}"
    text = []
    for name in ("AP", "AP50"):
        gain = duplicates.gain(found[name], nms[name])
        text.append(f"{name} {found[name]:.1f}   {name}(+NMS) {nms[name]:.1f} ({gain:+.1f})")
    return "   ".join(text)


def describe_crowd(found):
    return (f"AP50 {found['AP50']:.1f}   mMR {found['mMR']:.1f}   recall {found['recall']:.1f}   "
            f"JI {found['JI']:.1f}   (COCO-style AP {found['coco']['AP']:.1f})")


def describe_classes(found):
    """The figures of each class as lines of text."""
    plain, nms = (part.get("coco", part)["classes"] for part in (found, found["nms"]))
    width = max(map(len, ("class", *plain)))
    text = [f"{'class':{width}}  objects      AP  AP(+NMS)    AP50  best F1  at score"]
    for name, row in plain.items():
        score = "-" if row["score"] is None else f"{row['score']:.3f}"
        text.append(f"{name:{width}}  {row['objects']:7}  {row['AP']:6.1f}  "
                    f"{nms[name]['AP']:8.1f}  {row['AP50']:6.1f}  {row['F1']:7.1f}  {score:>8}")
    return "\n".join([*text, "(F1 at IoU 0.5, without NMS)"])


# ------------------------------------------------------------------------------------------------
# a result file's figures
# ------------------------------------------------------------------------------------------------

def read_results(file):
    """A result file in COCO's format: a list of dicts: image_id, category_id, bbox and score."""
    found = annotations.read_json(file)
    if not isinstance(found, list):
        raise annotations.DataError(f"{file}: not a COCO result file: "
                                    f"it must be a list of detections")
    for n, d in enumerate(found):
        if not (isinstance(d, dict) and annotations.is_id(d.get("image_id"))
                and annotations.is_id(d.get("category_id"))
                and annotations.is_number(d.get("score")) and annotations.is_box(d.get("bbox"))):
            raise annotations.DataError(
                f"{file}: detection number {n} lacks a valid image_id, category_id, bbox "
                f"(four finite numbers) or score: {str(d)[:120]}")
    return found


def read_case(gt_file, dt_file):
    """Annotations and detections of a COCO-format pair of files.  Raises DataError."""
    truth, faults = annotations.parse_coco(gt_file, None)
    for fault in faults:
        if not fault.extent:                     # a box without extent does not count
            raise annotations.DataError(fault.text)

    found, listed = read_results(dt_file), set(truth.image_ids)
    for n, d in enumerate(found):
        if d["image_id"] not in listed:
            raise annotations.DataError(f"{dt_file}: detection number {n} is of image "
                                        f"{d['image_id']!r}, which {gt_file} does not list")
        if d["category_id"] not in truth.category_ids:
            raise annotations.DataError(
                f"{dt_file}: detection number {n} is of category {d['category_id']!r}, which "
                f"{gt_file} does not list; give the file's own category ids, not class indices")
    tell_other_form(dt_file, [d["bbox"] for d in found], truth.xywh.tolist())
    return truth, found


def tell_other_form(file, detected, annotated):
    """Says on stderr if detected boxes are likely not x, y, width, height in pixels."""
    def wider_than_far(boxes):               # of corners: all of them
        return sum(w > x and h > y for x, y, w, h in boxes) / max(len(boxes), 1)

    form = ""
    if wider_than_far(detected) > 0.95 and wider_than_far(annotated) < 0.5:
        form = "x1, y1, x2, y2"
    if detected and max(max(box) for box in detected) <= 1:
        form = "shares of the picture, 0 to 1"
    if form:
        print(f"{file}: the boxes look like {form}; they are scored as x, y, width, height in "
              f"pixels", file=sys.stderr)


def score_file(gt_file, dt_file, max_dets):
    """Figures of a result file against a COCO-format ground truth.  Raises DataError."""
    truth, found = read_case(gt_file, dt_file)
    return coco_metrics(ground_truth(truth)[0], found, max_dets)


# ------------------------------------------------------------------------------------------------
# what NMS does to it
# ------------------------------------------------------------------------------------------------

def bar(sequence):
    return tqdm(sequence, "does it need NMS?", leave=False, disable=None)


def diagnose(truth, detections, max_dets, progress=iter):
    """duplicates.diagnose of Annotations and COCO result dicts."""
    of_image, pictures = {i: [] for i in truth.image_ids}, []
    for d in detections:
        of_image[d["image_id"]].append(d)
    label_of = {category: label for label, category in enumerate(truth.category_ids)}
    for i, image in enumerate(truth.image_ids):
        rows = torch.arange(int(truth.first[i]), int(truth.first[i + 1]))
        rows = rows[~truth.crowd[rows]]
        found = of_image[image]
        boxes = torch.tensor([d["bbox"] for d in found], dtype=torch.float64).view(-1, 4)
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        pictures.append(duplicates.Found(
            boxes, torch.tensor([d["score"] for d in found], dtype=torch.float64),
            torch.tensor([label_of[d["category_id"]] for d in found], dtype=torch.long),
            truth.boxes[rows].double(), truth.labels[rows]))

    objects = ground_truth(truth)[0].dataset["annotations"]
    by_class = coco.groups([d for found in of_image.values() for d in found], objects)
    matched = {}

    def measure(keep, spared=None):
        spared = None if spared is None else torch.cat(spared).numpy()
        return coco.average_precision(by_class, torch.cat(keep).numpy(), max_dets, matched, spared)

    return duplicates.diagnose(pictures, measure, progress)


def diagnose_crowd(pictures, detections, max_dets, progress=iter):
    """duplicates.diagnose on CrowdHuman's terms: what crowd.crowd_metrics compares."""
    listed, cases = {}, []
    for name, (persons, _, height, width) in pictures.items():
        found = np.asarray(detections.get(name, ()), float).reshape(-1, 5)
        listed[name] = found[(-found[:, 4]).argsort(kind="stable")][:max_dets]
        boxes, objects = (torch.from_numpy(crowd.clip_crowd(b, height, width))
                          for b in (listed[name][:, :4], persons.astype(float)))
        cases.append(duplicates.Found(boxes, torch.from_numpy(listed[name][:, 4]),
                                      torch.zeros(len(boxes), dtype=torch.long), objects,
                                      torch.zeros(len(objects), dtype=torch.long)))

    def measure(keep, spared=None):
        if spared is not None:               # at one IoU the first detection is the one that hits
            keep = [k & ~s for k, s in zip(keep, spared)]
        left = {name: listed[name][k.numpy()] for name, k in zip(listed, keep)}
        return crowd.crowd_metrics(pictures, left, max_dets, jaccard=False)

    return duplicates.diagnose(cases, measure, progress)


def describe_diagnosis(found):
    """The diagnosis as lines of text."""
    names = [name for name in ("AP", "AP50", "mMR", "recall") if name in found]
    rows = {"without NMS": found, **{f"NMS {at}": row for at, row in found["nms"].items()},
            "no duplicates": found["oracle"]}
    text = [f"{found['pictures']} pictures, {found['objects']} objects, {found['detections']} "
            f"detections", " " * 14 + "".join(f"{name:>8}" for name in names)]
    text += [f"{title:14}" + "".join(f"{row[name]:8.1f}" for name in names)
             for title, row in rows.items()]
    text.append("(no duplicates: an object's further detections may hit it, but do not count as "
                "false: what an NMS could reach that knows the objects)")
    per_object = ", ".join(f"{value:.2f} above {score}" for score, value in
                           found["duplicates per object"].items())
    text.append(f"duplicates an object: {per_object}")
    text.append(f"{found['found']} objects are found (class, IoU >= {duplicates.IOU}); NMS at 0.5 "
                f"loses {found['lost to NMS at 0.5']} of them")
    if found["found"]:
        for name in ("first score", "second score", "score gap"):
            low, middle, high = found[name]
            text.append(f"{name + ':':14}{middle:.2f} (quartiles {low:.2f}, {high:.2f})")
        text.append(f"score gap below {duplicates.SMALL_GAP}: {found['score gaps below 0.1']:.1f}% "
                    f"of the objects found")
    return "\n".join(text)


# ------------------------------------------------------------------------------------------------
# the command line: one function a sub-command
# ------------------------------------------------------------------------------------------------

def run_results(args):
    if args.protocol == "crowdhuman":
        found = crowd.score_odgt(args.gt, args.dt, args.max_dets or 500, args.images)
    else:
        found = score_file(args.gt, args.dt, args.max_dets or 100)
    for name, value in found.items():
        print(f"{name:5} {value:6.2f}")
    if args.out:
        runs.write_json(args.out, found, indent=1)


def run_annotations(args):
    given = data_flags(args)
    flags = {**given, "data": data.data_set(given, None)}
    if not flags["data"]:                    # nothing is drawn that nobody asked for
        raise annotations.DataError("annotations wants --data crowd, --data crowdhuman, or "
                                    "--val-json and --val-images")
    file, _ = data.locate(flags, "val")
    if not file.endswith(".odgt"):
        raise annotations.DataError(f"{file}: annotations are compared on CrowdHuman's files: "
                                    f"--data crowd, crowdhuman, or custom with an .odgt")
    truth = data.read(flags, "val")
    pictures = crowd.crowd_truth(truth)
    print(f"{file}: {len(pictures)} pictures")
    for threshold, value in crowd.annotation_recall(pictures).items():
        print(f"NMS at IoU {threshold:.2f} keeps {value:6.2f}% of the annotation boxes")


def run_nms(args):
    source = Path(checkpoints.weights_file(args.weights) if args.weights else args.dt)
    beside, folder, title = source.parent, Path(args.out or source.parent), source.name
    if args.weights:
        title = beside.name
        with contextlib.suppress(ValueError):            # an args.json of something else
            title = figures.row_name(beside)
    if args.weights:
        results, truth, max_dets = checkpoint_results(args)
        detections = results["plain"]
        if truth.full_boxes is not None:
            found = diagnose_crowd(crowd.crowd_truth(truth), crowd_lists(detections), max_dets, bar)
        else:
            found = diagnose(truth, detections, max_dets, bar)
    elif args.protocol == "crowdhuman":
        pictures, lists = crowd.read_case(args.gt, args.dt, args.images)
        found = diagnose_crowd(pictures, lists, args.max_dets or 500, bar)
    else:
        found = diagnose(*read_case(args.gt, args.dt), args.max_dets or 100, bar)

    if found["first score"] and not 0 <= found["first score"][0] <= found["first score"][2] <= 1:
        print("scores are expected between 0 and 1: the score gaps below are of another scale")
    name = "AP" if "AP" in found else "AP50"
    found["verdict"] = duplicates.verdict(found, name)
    print(f"{describe_diagnosis(found)}\n{found['verdict']}")
    folder.mkdir(parents=True, exist_ok=True)
    # one checkpoint of a run, or one detector's results, does not take another's place
    name = "nms" if source.stem in ("last", "detections") else f"nms-{source.stem}"
    runs.write_json(folder / f"{name}.json", found, indent=1)
    figures.nms_curves({title: found}, folder / f"{name}.png")
    print(f"wrote {folder / name}.json and .png")


def checkpoint_results(args):
    """What `detect` finds with a checkpoint, the Annotations it is judged by, and max_dets."""
    own, out = Path(checkpoints.weights_file(args.weights)).parent, Path(args.out or "")
    if args.out and (out / "args.json").exists() and out.resolve() != own.resolve():
        raise runs.RunError(f"--out {out}: holds another run, whose figures would be lost; choose "
                            f"another folder")
    model, checkpoint = checkpoints.load(args.weights)
    trained = recipes.saved_flags(checkpoint, args.weights)
    device = runs.usable_device(args.device)

    # the data it was validated on, unless other data are named
    given = data_flags(args)
    chosen = data.data_set(given, trained.get("data"))
    if chosen == "custom" == trained.get("data") and (
            bool(given.get("val_json")) != bool(given.get("val_images"))):
        raise annotations.DataError("--val-json and --val-images go together, or the pictures of "
                                    "one split would be judged by the boxes of another")
    known = {key: trained.get(key) for key in data.FLAGS if chosen == trained.get("data")}
    flags = {**known, **{key: value for key, value in given.items() if value is not None},
             "data": chosen}
    truth = data.read(flags, "val", checkpoint["class_names"])
    pictures = data.Pictures(truth, data.Transform(**checkpoint["test_transform"]))
    max_dets = args.max_dets or trained.get("max_dets", 100)
    precision = args.precision or trained.get("precision", "fp32")
    workers = trained.get("workers", 0) if args.workers is None else args.workers
    batch_size = at_once(chosen) if args.batch_size is None else args.batch_size
    results = detect(model.to(device), pictures, batch_size, max_dets, device, precision, workers)
    return results, truth, max_dets


def run_checkpoint(args):
    results, truth, max_dets = checkpoint_results(args)
    found = metrics(ground_truth(truth), results, max_dets)
    print(describe(found))
    if args.per_class:
        print(describe_classes(found))
    if args.out:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        runs.write_json(out / "metrics.json", found, indent=1)
        runs.write_json(out / "detections.json", results["plain"])
        runs.write_json(out / "detections_nms.json", results["nms"])


def data_flags(args):
    """The flags of data.add_data_flags, as given."""
    return {key: getattr(args, key) for key in data.FLAGS if hasattr(args, key)}


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="{results,nms,annotations}",
                                     help="something else (COMMAND --help)")
    # SUPPRESS: a sub-command's defaults would undo flags that are given before its name
    c = commands.add_parser("results", argument_default=argparse.SUPPRESS,
                            help="score the result file of any detector")
    add_result_flags(c, required=True)
    c.add_argument("--out", metavar="F", help="also write the figures to this file")
    c.add_argument("--max-dets", type=runs.at_least(1), metavar="N",
                   help="detections per image and class that count (default 100, crowdhuman 500)")

    c = commands.add_parser("nms", argument_default=argparse.SUPPRESS,
                            help="does a detector need NMS?  AP by NMS threshold, duplicates, "
                                 "score gaps (Section 3.4)")
    add_result_flags(c.add_argument_group("of a result file, made without NMS"))
    add_checkpoint_flags(c, "write nms.json and nms.png here (default: beside the weights or the "
                            "result file)")

    c = commands.add_parser("annotations", argument_default=argparse.SUPPRESS,
                            help="the recall of the annotation boxes themselves after NMS "
                                 "(Section 5.2)")
    data.add_data_flags(c, train=False)

    add_checkpoint_flags(parser, "write metrics.json, detections.json and detections_nms.json here")
    parser.add_argument("--per-class", action="store_true",
                        help="also print AP, and the score that gives the best F1, of each class")
    parser.set_defaults(gt=None, dt=None, protocol="coco", images=None)
    return parser


def add_result_flags(g, required=False):
    g.add_argument("--protocol", choices=("coco", "crowdhuman"),
                   help="whose figures (default: coco)")
    g.add_argument("--gt", required=required, metavar="F",
                   help="ground truth, COCO format (crowdhuman: .odgt)")
    g.add_argument("--dt", required=required, metavar="F",
                   help="detections, COCO result format (crowdhuman: lines {ID, dtboxes: [{box: "
                        "[x, y, width, height], score}, ...]}, with or without the picture's "
                        "height and width)")
    g.add_argument("--images", metavar="DIR",
                   help="crowdhuman: the pictures, for the sizes that neither file holds "
                        "(CrowdHuman's own .odgt has none)")


def add_checkpoint_flags(parser, out):
    parser.add_argument("--weights", metavar="F",
                        help="a checkpoint of train.py: last.pt, or the run's folder")
    g = parser.add_argument_group("data (default: what the checkpoint was validated on)")
    data.add_data_flags(g, train=False)
    g = parser.add_argument_group("how")
    g.add_argument("--max-dets", type=runs.at_least(1), metavar="N",
                   help="detections per image (default: the checkpoint's; of a result file 100, "
                        "crowdhuman 500)")
    g.add_argument("--batch-size", type=runs.at_least(1), metavar="N",
                   help="pictures at a time, of each process (default: 1, as published, of scenes "
                        "and crowd 16); where their sizes differ, more than 1 changes the figures")
    g.add_argument("--device", help="cpu, cuda, mps, ... (default: cuda if there is one)")
    g.add_argument("--precision", choices=("fp32", "bf16"),
                   help="bf16 runs the network in bfloat16 (default: as it was trained)")
    g.add_argument("--workers", type=runs.at_least(0), metavar="N",
                   help="processes that read pictures (default: as in training)")
    g.add_argument("--out", metavar="DIR", help=out)


def main():
    parser = make_parser()
    args = parser.parse_args()
    faults = annotations.DataError, checkpoints.CheckpointError, runs.RunError
    try:
        with runs.faults_told("evaluate.py", *faults):
            if args.command and args.per_class:
                parser.error(f"--per-class is not of {args.command}, but of --weights alone")
            if args.command in ("results", "annotations") and args.weights:
                parser.error(f"{args.command} takes no --weights")
            if args.command == "results":
                run_results(args)
            elif args.command == "annotations":
                run_annotations(args)
            elif args.command == "nms":
                if bool(args.weights) == bool(args.gt or args.dt) or bool(args.gt) != bool(args.dt):
                    parser.error("nms wants --weights last.pt, or --gt and --dt")
                run_nms(args)
            elif args.weights:
                run_checkpoint(args)
            else:
                parser.error("give --weights last.pt, or one of the sub-commands results, nms, "
                             "annotations")
    finally:
        data.end_workers()


if __name__ == "__main__":
    main()
