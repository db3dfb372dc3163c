"""Pictures to look at: what training sees, detections beside the ground truth, and learning curves.

    python figures.py curves RUN [RUN ...] --out curves.png    AP without and with NMS over training
    python figures.py nms RUN [RUN ...] --out nms.png          AP by NMS threshold, the score gaps
"""
import argparse
import csv
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")                        # files only, no window
import matplotlib.pyplot as plt
import torch
from PIL import Image, ImageDraw

from scenes import contact_sheet

COLOURS = ((230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48),
           (145, 30, 180), (70, 240, 240), (240, 50, 230), (210, 245, 60), (0, 128, 128))
IGNORED = (170, 170, 170)


def draw_boxes(picture, boxes, labels, class_names, scores=None, side=384):
    """A copy of a PIL picture with boxes (xyxy) and class names drawn on it.

    Its longer side becomes `side` to 2 `side` pixels.  A label of -1 marks a crowd or ignore
    region, in grey.
    """
    factor = min(max(1.0, side / max(picture.size)), 2 * side / max(picture.size))
    canvas = picture.resize([round(v * factor) for v in picture.size], Image.BILINEAR)
    pen = ImageDraw.Draw(canvas)
    for n, (box, label) in enumerate(zip(boxes, labels)):
        name = class_names[label] if label >= 0 else "ignored"
        colour = COLOURS[label % len(COLOURS)] if label >= 0 else IGNORED
        text = name if scores is None else f"{name} {scores[n]:.2f}"

        # a box of a wrong sign is drawn as a line, where PIL would stop with an error
        x1, y1, x2, y2 = (v * factor for v in box)
        pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=2)

        # the name inside the box's corner, pushed left where it would leave the picture
        at = (min(x1 + 3, canvas.width - pen.textlength(text) - 1), max(0, y1 + 1))
        pen.rectangle(pen.textbbox(at, text), fill=colour)
        pen.text(at, text, fill="black")
    return canvas


def caption(picture, text):
    """The picture with a line of text above it."""
    canvas = Image.new("RGB", (picture.width, picture.height + 14), "white")
    canvas.paste(picture, (0, 14))
    ImageDraw.Draw(canvas).text((2, 1), text, fill="black")
    return canvas


def training_pictures(pictures, file, count=12):
    """The first pictures of epoch 0 with their target boxes.

    They are as training sees them: flipped, cropped and resized.
    """
    class_names = pictures.annotations.class_names
    cells = []
    for i in range(min(count, len(pictures))):
        image, target = pictures[0, i]
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        boxes, labels = target["boxes"].tolist(), target["labels"].tolist()
        cells.append(caption(draw_boxes(picture, boxes, labels, class_names),
                             f"image {target['image_id']}: {picture.width} x {picture.height}"))
    contact_sheet(cells, columns=4).save(file)


def detections_beside_truth(pictures, detections, file, count=12, threshold=0.3):
    """Pairs of pictures, left the ground truth, right the detections above `threshold`.

    pictures: data.Pictures   detections: COCO result dicts (evaluate.detect)
    """
    a = pictures.annotations
    label_of = {category: label for label, category in enumerate(a.category_ids)}
    of_image = {}
    for d in detections:
        if d["score"] >= threshold:
            of_image.setdefault(d["image_id"], []).append(d)

    # pictures from the whole set, evenly, since neighbours in a file are often alike
    cells = []
    for i in torch.linspace(0, len(a) - 1, min(count, len(a))).long().tolist():
        picture = pictures.picture(i)
        name = f"image {a.image_ids[i]}"

        rows = slice(int(a.first[i]), int(a.first[i + 1]))
        labels = a.labels[rows].masked_fill(a.crowd[rows], -1).tolist()
        truth = draw_boxes(picture, a.boxes[rows].tolist(), labels, a.class_names)
        cells.append(caption(truth, f"{name}: ground truth"))

        found = of_image.get(a.image_ids[i], [])
        boxes = [(x, y, x + w, y + h) for x, y, w, h in (d["bbox"] for d in found)]
        labels = [label_of[d["category_id"]] for d in found]
        scores = [d["score"] for d in found]
        ours = draw_boxes(picture, boxes, labels, a.class_names, scores)
        cells.append(caption(ours, f"{name}: detections, no NMS, score >= {threshold}"))
    contact_sheet(cells, columns=6).save(file)


def row_name(run):
    """A run in the words of Tables 1 and 2, from its args.json; without one, the folder's name."""
    file = Path(run) / "args.json"
    if not file.exists():
        return Path(run).name

    flags = json.loads(file.read_text())
    if flags["assign"] == "one-to-many":
        rule = "one-to-many"
    else:
        rule = "one-to-one" if flags["assign"] == "hungarian" else flags["assign"]
        if "class_cost" in flags:                    # else the rule judges what it was made for
            rule += ", class cost, " if flags["class_cost"] else ", location only, "
            rule += flags["location_cost"].replace("predefined", "pre-defined")
    seed = f", seed {flags['seed']}" if flags["seed"] else ""
    return f"{flags['detector']}, {rule}{seed}"


def learning_curves(runs, file):
    """AP (crowds: AP50) without (full line) and with NMS (dashed) over training, one colour a run.

    Reads each run's eval.csv and args.json.
    """
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for n, run in enumerate(runs):
        with open(Path(run) / "eval.csv", newline="") as stream:
            rows = list(csv.DictReader(stream))
        name = "AP" if "AP" in rows[0] else "AP50"
        step = [int(row["step"]) for row in rows]
        plain = [float(row[name]) for row in rows]
        with_nms = [float(row[f"{name}_nms"]) for row in rows]
        axes.plot(step, plain, f"C{n}-", label=row_name(run))
        axes.plot(step, with_nms, f"C{n}--", label="    the same with NMS")

    # from 0, so that a gap looks as large as it is
    axes.set_ylim(bottom=0)
    axes.set_xlabel("training step")
    axes.set_ylabel(f"{name} on the validation pictures")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def nms_curves(diagnoses, file):
    """Left AP against the threshold of NMS; right the score gaps.  One colour a detector.

    diagnoses: {name: what duplicates.diagnose says}
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for n, (title, found) in enumerate(diagnoses.items()):
        name = "AP" if "AP" in found else "AP50"
        at = [float(threshold) for threshold in found["nms"]]
        left.plot(at, [figures[name] for figures in found["nms"].values()], f"C{n}o-", label=title)
        left.axhline(found[name], color=f"C{n}", linestyle="--", label="    without NMS")
        left.axhline(found["oracle"][name], color=f"C{n}", linestyle=":",
                     label="    without NMS, duplicates removed by an oracle")
        share = torch.tensor(found["score gaps"]) / max(found["found"], 1) * 100
        right.stairs(share, torch.linspace(0, 1, len(share) + 1), color=f"C{n}", linewidth=2)
    left.set(xlabel="IoU threshold of NMS", ylabel=f"{name} in percent", ylim=(0, None))
    left.legend(fontsize=7)
    right.set(xlabel="score gap: highest minus second-highest score of an object",
              ylabel="objects that are found, percent", xlim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(f"{found['pictures']} pictures, {found['objects']} objects", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    c = commands.add_parser(
        "curves", help="AP over training, of one or more runs made with --eval-every")
    c.add_argument("runs", nargs="+", metavar="RUN", help="output folder of train.py")
    c.add_argument("--out", default="curves.png", metavar="PNG", help="the picture to write")
    c = commands.add_parser("nms", help="AP against the threshold of NMS, and the score gaps")
    c.add_argument("runs", nargs="+", metavar="RUN",
                   help="output folder of train.py, after evaluate.py nms --weights RUN/last.pt")
    c.add_argument("--out", default="nms.png", metavar="PNG", help="the picture to write")
    args = parser.parse_args()
    try:
        if args.command == "curves":
            learning_curves(args.runs, args.out)
        else:
            nms_curves({row_name(run): json.loads((Path(run) / "nms.json").read_text())
                        for run in args.runs}, args.out)
        print(f"wrote {args.out}")
    except (OSError, KeyError, ValueError) as error:
        print(f"figures.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
