"""Every picture: what a run leaves to look at, and the paper's Figures 4 to 6 from runs.

    python figures.py curves RUN [RUN ...]      AP, AP50, score gap, moving positives over training
    python figures.py scores RUN RUN            Figures 4 and 5: the scores of the samples
    python figures.py positives RUN RUN         Figure 6: where the positives lie
    python figures.py match RUN --image ID      a cost matrix, and what each strategy chooses
    python figures.py nms RUN [RUN ...]         AP by threshold of NMS, and the score gaps
    python figures.py hero RUN RUN RUN          detections without NMS, side by side
    python figures.py wander RUN RUN            positives over training, a GIF
    python figures.py detections --weights RUN --images FOLDER --out DIR    pictures of one's own

A RUN is a folder of train.py.
"""
import argparse
import csv
import json
import math
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")                        # files only, no window
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageDraw

import annotations
import assign
import checkpoints
import data
import losses
import positives
import runs
from detect import detect_files, draw_boxes
from scenes import contact_sheet


def caption(picture, text):
    """The picture with a line of text above it."""
    canvas = Image.new("RGB", (picture.width, picture.height + 14), "white")
    canvas.paste(picture, (0, 14))
    ImageDraw.Draw(canvas).text((2, 1), text, fill="black")
    return canvas


def save_sheet(cells, columns, file):
    """A PNG, whole or not at all; an error names the file, which Pillow's own would not."""
    with runs.whole(file) as temporary:
        # a third of the time of PNG's default level, and files no larger
        contact_sheet(cells, columns).save(temporary, "PNG", compress_level=4)


def training_pictures(pictures, file, count=12):
    """The first pictures of epoch 0 with their target boxes.

    They are as training sees them: flipped, cropped and resized.
    """
    class_names = pictures.annotations.class_names
    cells = []
    for i in range(min(count, len(pictures))):
        image, target = pictures[0, i]
        picture = data.as_picture(image)
        boxes, labels = target["boxes"].tolist(), target["labels"].tolist()
        cells.append(caption(draw_boxes(picture, boxes, labels, class_names),
                             f"image {target['image_id']}: {picture.width} x {picture.height}"))
    save_sheet(cells, 4, file)


def above(detections, threshold):
    """{image id: its detections that score at least `threshold`}, of COCO result dicts."""
    of_image = {}
    for d in detections:
        if d["score"] >= threshold:
            of_image.setdefault(d["image_id"], []).append(d)
    return of_image


def draw_detections(picture, found, a, class_names, with_scores=True, side=384):
    """The picture with detections on it.  found: COCO result dicts   a: their Annotations"""
    boxes = [(x, y, x + w, y + h) for x, y, w, h in (d["bbox"] for d in found)]
    labels = [a.category_ids.index(d["category_id"]) for d in found]
    scores = [d["score"] for d in found] if with_scores else None
    return draw_boxes(picture, boxes, labels, class_names, scores, side)


def detections_beside_truth(pictures, detections, file, count=12, threshold=0.3):
    """Pairs of pictures, left the ground truth, right the detections above `threshold`.

    pictures: data.Pictures   detections: COCO result dicts (evaluate.detect)
    """
    a = pictures.annotations
    of_image = above(detections, threshold)

    # pictures from the whole set, evenly, since neighbours in a file are often alike
    cells = []
    for i in torch.linspace(0, len(a) - 1, min(count, len(a))).long().tolist():
        picture = pictures.picture(i)
        name = f"image {a.image_ids[i]}"

        rows = slice(int(a.first[i]), int(a.first[i + 1]))
        labels = a.labels[rows].masked_fill(a.crowd[rows], -1).tolist()
        truth = draw_boxes(picture, a.boxes[rows].tolist(), labels, a.class_names)
        cells.append(caption(truth, f"{name}: ground truth"))

        ours = draw_detections(picture, of_image.get(a.image_ids[i], []), a, a.class_names)
        cells.append(caption(ours, f"{name}: detections, no NMS, score >= {threshold}"))
    save_sheet(cells, 6, file)


def saved_flags(run):
    """What a run's args.json holds.  Raises OSError, or ValueError if it is damaged."""
    file = Path(run) / "args.json"
    try:
        flags = json.loads(file.read_text())
        if not {"detector", "assign", "seed"} <= flags.keys():
            raise ValueError("no flags of a run")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: not the args.json of a run ({error}); its command anew, with "
                         f"--resume, writes it again") from None
    return flags


def row_name(run, with_seed=True):
    """A run in the words of Tables 1 and 2, from its args.json; without one, the folder's name."""
    if not (Path(run) / "args.json").exists():
        return Path(run).name
    flags = saved_flags(run)
    if flags["assign"] == "one-to-many":
        rule = "one-to-many"
    else:
        rule = "one-to-one" if flags["assign"] == "hungarian" else flags["assign"]
        if flags.get("cost"):
            rule += f", cost {flags['cost']}"
        if "class_cost" in flags:                    # else the rule judges what it was made for
            rule += ", class cost, " if flags["class_cost"] else ", location only, "
            rule += flags["location_cost"].replace("predefined", "pre-defined")
        if flags.get("many"):
            rule += f", {flags['many']} beside it by {flags['many_assign']}"
            weight = flags.get("many_weight", [1, 1])            # older runs have none
            rule += ", weighing {:g} to {:g}".format(*weight) if weight != [1, 1] else ""
            rule += ", detached" if flags.get("many_detach") else ""
    seed = f", seed {flags['seed']}" if flags["seed"] and with_seed else ""
    return f"{flags['detector']}, {rule}{seed}"


def titles(runs):
    """A title of each run, and what tells it from others but for its seed."""
    free = ("seed", "out", "resume", "versions", "processes", "precision", "device",
            "keep_checkpoints")
    kinds = {}
    for run in runs:
        there = (Path(run) / "args.json").exists()
        flags = saved_flags(run) if there else {"folder": str(run)}
        kinds[run] = json.dumps({k: v for k, v in flags.items() if k not in free}, sort_keys=True)
    names = {run: row_name(run, with_seed=False) for run in runs}
    for run, name in list(names.items()):    # one name, other flags: the folder tells them apart
        if len({kinds[other] for other in runs if row_name(other, with_seed=False) == name}) > 1:
            names[run] = f"{name} ({Path(run).name})"
    return names, kinds


def column(rows, name):
    """A column of a CSV file's rows as numbers; an empty field is NaN.  (rows,)"""
    try:
        return np.array([float(row.get(name) or "nan") for row in rows])
    except ValueError as error:
        raise ValueError(f"column {name} of eval.csv or log.csv: {error}; the file is damaged") \
            from error


def learning_curves(runs, file):
    """Figures over training, of runs side by side; runs that differ in the seed alone are one line.

    Above AP and AP50 (crowds: AP50 and recall) without NMS (full lines) and with it (dashed), from
    eval.csv; below the score gap and the share of positives that moved, from log.csv.  Lines are
    means over the seeds, bands their range.
    """
    groups, (names, kinds) = {}, titles(runs)
    for run in runs:
        name = next(names[other] for other in runs if kinds[other] == kinds[run])
        tables = [read_table(Path(run) / "eval.csv"), []]
        if (Path(run) / "log.csv").exists():
            tables[1] = read_table(Path(run) / "log.csv")
        groups.setdefault(name if len(runs) > 1 else row_name(run), []).append(tables)
    crowds, *others = ("mMR" in tables[0][0] for group in groups.values() for tables in group)
    if any(other != crowds for other in others):
        raise ValueError("runs on crowds are judged by other figures: draw them apart")
    plots = [("AP50", "recall") if crowds else ("AP", "AP50"), ("gap", "moved")]
    words = {"gap": "score gap, median of a batch", "moved": "positives that moved, percent"}
    figure, axes = plt.subplots(2, 2, figsize=(11, 8))
    for kind, (names, row) in enumerate(zip(plots, axes)):
        for name, plot in zip(names, row):
            for n, (title, seeds) in enumerate(groups.items()):
                for end, style in (("", "-"), ("_nms", "--")) if kind == 0 else (("", "-"),):
                    lines = [(column(tables[kind], "step"), column(tables[kind], name + end))
                             for tables in seeds]
                    label = f"{title} ({len(seeds)} runs)" if len(seeds) > 1 else title
                    draw_band(plot, lines, f"C{n}{style}", "    with NMS" if end else label)
            # from 0, so that a gap looks as large as it is
            top = max((line.get_ydata().max() for line in plot.lines), default=1)
            plot.set(xlabel="training step", ylabel=words.get(name, f"{name}, percent"),
                     xlim=(0, None), ylim=(0, 1.1 * top or 1))
            plot.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def read_table(file):
    with open(file, newline="") as stream:
        rows = list(csv.DictReader(stream))
    if not rows:
        raise ValueError(f"{file}: holds no row; the run was stopped before the first")
    return rows


def draw_band(plot, lines, style, label):
    """The mean of lines (steps, values) and their range; runs of other steps line by line."""
    if any(not np.array_equal(steps, lines[0][0]) for steps, _ in lines):
        for n, line in enumerate(lines):
            draw_band(plot, [line], style, None if n else label)
        return
    values = np.array([values for _, values in lines])
    known = ~np.isnan(values).any(0)
    steps, values = lines[0][0][known], smooth(values[:, known])
    if not len(steps):
        return
    dot = {"marker": "o" if style[2:] == "-" else "_", "markersize": 6} if len(steps) == 1 else {}
    plot.plot(steps, values.mean(0), style, linewidth=1.5, label=label, **dot)
    if len(lines) > 1:
        plot.fill_between(steps, values.min(0), values.max(0), color=style[:2], alpha=0.15)


def smooth(values, window=5):
    """Running mean along the last axis where there are many points; batches are noisy."""
    if values.shape[-1] < 4 * window:
        return values
    padded = np.pad(values, ((0, 0), (window // 2, window // 2)), "edge")
    return np.lib.stride_tricks.sliding_window_view(padded, window, axis=-1).mean(-1)


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
                     label="    without NMS, if duplicates cost nothing")
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


def nms_of_runs(runs, file):
    names = {run: row_name(run) for run in runs}
    for run, name in list(names.items()):
        if list(names.values()).count(name) > 1:
            names[run] = f"{name} ({Path(run).name})"
    found = {names[run]: annotations.read_json(Path(run) / "nms.json") for run in runs}
    for run, figures in zip(runs, found.values()):
        if not isinstance(figures, dict) or "nms" not in figures:
            raise ValueError(f"{run}/nms.json: not what `evaluate.py nms` writes; write it anew")
    nms_curves(found, file)


# ------------------------------------------------------------------------------------------------
# the paper's figures, from runs
# ------------------------------------------------------------------------------------------------

class Trained(NamedTuple):
    """A detector of a run, at one of its steps."""
    title: str
    step: int
    model: torch.nn.Module
    row: NamedTuple             # losses.Row
    flags: dict
    pictures: data.Pictures     # as in evaluation: not flipped, not moved


def trained(run, split="val", file="last.pt"):
    """What a checkpoint of a run holds, and the pictures it is shown.  Raises CheckpointError."""
    model, checkpoint = checkpoints.load(Path(run) / file)
    flags = checkpoint["args"]
    known = data.read(flags, split, checkpoint["class_names"])
    pictures = data.Pictures(known, data.Transform(**checkpoint["test_transform"]))
    return Trained(row_name(run), checkpoint["step"], model, losses.row(flags), flags, pictures)


def of_same_pictures(detectors):
    """Raises ValueError if runs whose pictures stand one below the other have not the same."""
    first, *others = (one.pictures.annotations for one in detectors)
    for other in others:
        if other.image_ids != first.image_ids:
            raise ValueError(f"the runs were trained on other pictures: {first.json_file} and "
                             f"{other.json_file} do not list the same")


def stages(run, split="val"):
    """The detector at the steps that --keep-checkpoints kept, or at its last."""
    kept = sorted(Path(run).glob("step-*.pt")) or [Path(run) / "last.pt"]
    return [trained(run, split, file.name) for file in kept]


def early_middle_late(kept):
    """The stages nearest to a tenth, a half and all of the schedule; the paper names no numbers."""
    steps = kept[0].flags["steps"]
    nearest = [min(kept, key=lambda one: abs(one.step - share * steps)) for share in (0.1, 0.5, 1)]
    return list({one.step: one for one in nearest}.values())


@torch.no_grad()
def look(detector, i):
    """The Prediction for a picture, its target, and the positives that its row would choose."""
    images, mask, targets = data.collate([detector.pictures[0, i]], detector.model.divisor)
    prediction = detector.model(images, mask)
    matches = assign.match(prediction, targets, detector.row.cost, detector.row.strategy,
                           min(1.0, detector.step / detector.flags["steps"]))
    return prediction.image(0), targets[0], matches[0][0]


def index_of(pictures, image):
    """The number of the picture with this id, as the command line gives it.  Raises ValueError."""
    names = [str(name) for name in pictures.annotations.image_ids]
    if str(image) not in names:
        raise ValueError(f"image {image}: not among the pictures of "
                         f"{pictures.annotations.json_file}")
    return names.index(str(image))


def with_objects(pictures, least, most=math.inf):
    """The numbers of the pictures with so many objects, crowd regions not counted."""
    a = pictures.annotations
    counts = [int((~a.crowd[a.first[i]:a.first[i + 1]]).sum()) for i in range(len(a))]
    return [i for i, count in enumerate(counts) if least <= count <= most]


def chosen_picture(pictures, image, least, most):
    """The number of the picture `image`, or of the first with so many objects; or ValueError."""
    if image is None:
        return likely(pictures, least, most)[0]
    i = index_of(pictures, image)
    if i not in with_objects(pictures, 1):
        raise ValueError(f"image {image}: holds no object")
    return i


def likely(pictures, least, most):
    """The numbers of the pictures with so many objects, or else with any; or ValueError."""
    found = with_objects(pictures, least, most) or with_objects(pictures, 1)
    if not found:
        raise ValueError(f"{pictures.annotations.json_file}: holds no object to look at")
    return found


def in_step(detectors):
    """The stages of several runs side by side.  Raises ValueError if they are not as many."""
    if len({len(kept) for kept in detectors}) > 1:
        raise ValueError("the runs did not keep the same number of checkpoints; give all of them "
                         "the same --keep-checkpoints")
    return list(zip(*detectors))


def score_histograms(runs, file, image=None, count=200):
    """Figure 4; for runs that kept checkpoints Figure 5: early, middle, late, a row of plots each.

    Left the scores of the samples of one picture for its object's class, the positives marked;
    right the best scores of the samples of `count` validation pictures.  Scores are divided by the
    highest of their plot and run, the count axis is cut at 10,000, as in the paper.
    Returns lines of text with the figures behind it.
    """
    rows = in_step([early_middle_late(stages(run)) for run in runs])
    figure, axes = plt.subplots(len(rows), 2, figsize=(11, 3.2 * len(rows)), squeeze=False)
    bins, told = np.linspace(0, 1, 51), []
    for (left, right), row in zip(axes, rows):
        for n, detector in enumerate(row):
            pictures = detector.pictures
            one, target, match = look(detector, chosen_picture(pictures, image, 1, 1))
            scores = positives.class_scores(one)[:, target["labels"][0]]
            first, second = scores.topk(2).values.tolist()
            label = f"{detector.title}, step {detector.step}"
            left.hist((scores / first).numpy(), bins, color=f"C{n}", alpha=0.5, label=label)
            for q in match.prediction[match.object == 0].tolist():
                # the first run's is the widest, and is seen behind the others'
                left.axvline(float(scores[q]) / first, color=f"C{n}", linestyle="--",
                             linewidth=1.5 + 2.5 * (len(row) - 1 - n))
            place = positives.ranks(one, target, match)[match.object == 0].float().median()

            best = torch.cat([positives.class_scores(look(detector, i)[0]).amax(1)
                              for i in range(min(count, len(pictures)))])
            right.hist((best / best.max()).numpy(), bins, color=f"C{n}", alpha=0.5, label=label)
            told.append(f"{label}: image {target['image_id']}: highest score {first:.3f}, second "
                        f"{second:.3f}, gap {first - second:.3f}; the positive is number "
                        f"{place:.0f}")
        left.set(title=f"image {target['image_id']}; dashed: the positive", yscale="symlog",
                 xlabel="score of the object's class / highest", ylabel="samples")
        right.set(title=f"{min(count, len(pictures))} validation pictures", ylim=(0, 1e4),
                  xlabel="score of the best class / highest", ylabel="samples, cut at 10,000")
        left.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return told


def ring(canvas, at, colour, radius=9):
    """A ring and a dot in its middle, both with a black edge, so that they show on any colour."""
    pen = ImageDraw.Draw(canvas)
    x, y = at
    for edge, ink in ((1, "black"), (0, colour)):            # the black ones, wider, lie beneath
        r, dot = radius + edge, 2 + edge
        pen.ellipse((x - r, y - r, x + r, y + r), outline=ink, width=3 + 2 * edge)
        pen.ellipse((x - dot, y - dot, x + dot, y + dot), fill=ink)


def where_positives_lie(detector, silhouettes, i):
    """Points of the positives in the original picture (K, 2), and which are on an object (K,)."""
    one, target, match = look(detector, i)
    if one.candidates is None:
        raise ValueError(f"{detector.title}: its object candidates are learned and lie nowhere; "
                         f"Figure 6 is of RetinaNet, CenterNet and FCOS")
    at = positives.places(one, target, match)[:, :2]
    on_object = torch.ones(len(at), dtype=torch.bool)
    if silhouettes:
        size = target["original_size"].tolist()
        on_object = silhouettes.on_object(target["image_id"], size, at)
    return at, on_object


def positives_on_picture(detector, at, on_object, i, side=256):
    """A training picture with its objects' boxes and positives; yellow: on the background."""
    original = detector.pictures.picture(i)
    a = detector.pictures.annotations
    boxes = a.boxes[a.first[i]:a.first[i + 1]]
    canvas = draw_boxes(original, boxes.tolist(), [0] * len(boxes), [""], side=side)
    scale = canvas.width / original.width
    for point, good in zip((at * scale).tolist(), on_object.tolist()):
        ring(canvas, point, "red" if good else "yellow")
    return canvas


def positive_samples(runs, file, image=None, count=6, counted=300):
    """Figure 6: the positives on the same training pictures, one row of pictures a run.

    Chosen are the first pictures in which the first run has a positive on the background.  Returns
    lines of text: the share of positives on the background over `counted` training pictures.
    """
    detectors = [trained(run, "train") for run in runs]
    of_same_pictures(detectors)
    pictures = detectors[0].pictures
    file_of = pictures.annotations.json_file
    silhouettes = positives.Silhouettes(file_of) if file_of.endswith(".json") else None
    if silhouettes and not silhouettes.polygons:
        silhouettes = None
    some = with_objects(pictures, 1)[:counted]
    if image is not None and index_of(pictures, image) not in some:
        some.append(index_of(pictures, image))
    found, told = [], []
    for detector in detectors:
        found.append([where_positives_lie(detector, silhouettes, i) for i in some])
        on_object = torch.cat([on for _, on in found[-1]])
        share = 100 * (1 - float(on_object.float().mean()))
        told.append(f"{detector.title}, step {detector.step}: {share:.1f}% of {len(on_object)} "
                    f"positives in {len(some)} training pictures lie on the background"
                    if silhouettes else f"{detector.title}: {pictures.annotations.json_file} "
                    f"knows no silhouettes")

    chosen = [n for n, (_, on) in enumerate(found[0]) if not on.all()] or list(range(len(some)))
    chosen = [some.index(index_of(pictures, image))] if image is not None else chosen[:count]
    rows = [[caption(positives_on_picture(detector, *lie[n], some[n]),
                     f"image {pictures.annotations.image_ids[some[n]]}") for n in chosen]
            for detector, lie in zip(detectors, found)]
    sheets = []
    for row, line in zip(rows, told):
        sheet = contact_sheet(row, columns=len(row))
        sheets.append(caption(sheet, line))
    contact_sheet(sheets, columns=1).quantize(255).save(file)
    return told


def cost_and_choice(runs, file, image=None, shown=14):
    """What the strategies see in one picture: the cost matrix, what each chooses, the score map."""
    detector = trained(runs[0])
    pictures = detector.pictures
    i = chosen_picture(pictures, image, 2, 3)
    one, target, _ = look(detector, i)
    cost = assign.price(detector.row.cost, one, target, detector.step / detector.flags["steps"])
    chosen = {name: strategy(cost) for name, strategy in
              (("hungarian", assign.hungarian), ("min-cost", assign.min_cost),
               ("top-k (9)", assign.top_k))}
    cheapest = [cost[:, g].argsort()[:shown] for g in range(cost.shape[1])]
    rows = list(dict.fromkeys(torch.stack(cheapest, 1).flatten().tolist()))[:2 * shown]

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 5),
                                                 gridspec_kw={"width_ratios": (1, 1.2, 1)})
    picture = pictures.picture(i).resize(target["size"].flip(0).tolist())
    for plot in (left, right):
        plot.imshow(picture)
        plot.set(xticks=[], yticks=[])
        for g, (x1, y1, x2, y2) in enumerate(target["boxes"].tolist()):
            plot.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=f"C{g}",
                                         linewidth=2))
            plot.text(x1, y1, f"object {g}", color="white", backgroundcolor=f"C{g}", fontsize=7)
    # where the predictions lie: their candidates, or for the query detectors their boxes
    boxes = one.boxes if one.candidates is None else one.candidates
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    image_of_cost = middle.imshow(cost[rows].numpy(), aspect="auto", cmap="viridis_r")
    middle.set(xlabel="object", ylabel="prediction, the cheapest", xticks=range(cost.shape[1]),
               yticks=range(len(rows)), title="matching cost; what each strategy chooses")
    middle.set_yticklabels(rows, fontsize=6)
    figure.colorbar(image_of_cost, ax=middle)
    for (name, (predictions, objects)), marker in zip(chosen.items(), ("ro", "rx", "r+")):
        style = {"fillstyle": "none", "markersize": 11} if marker == "ro" else {"markersize": 6}
        pairs = [(g, rows.index(q)) for q, g in zip(predictions.tolist(), objects.tolist())
                 if q in rows]
        middle.plot(*zip(*pairs), marker, label=name, **style)
        left.plot(*centres[predictions].T.numpy(), marker, label=name, **style)
    left.legend(fontsize=7)
    left.set_title("where the chosen predictions lie", fontsize=9)

    scores = positives.class_scores(one)[:, target["labels"][0]]
    if one.strides is None:
        heat = right.scatter(*centres.T.numpy(), c=scores.numpy(), cmap="hot")
    else:                                                # the finest level, the best anchor a point
        stride = int(one.strides.min())
        height, width = (-(-side // stride) for side in target["size"].tolist())
        fine = one.strides == stride
        x, y = (centres[fine] / stride).long().T
        grid = torch.zeros(int(y.max()) + 1, int(x.max()) + 1)
        grid.view(-1).scatter_reduce_(0, y * grid.shape[1] + x, scores[fine], "amax")
        edges = 0, width * stride, height * stride, 0
        heat = right.imshow(grid[:height, :width].numpy(), extent=edges, cmap="hot", alpha=0.65)
    figure.colorbar(heat, ax=right)
    where = "" if one.strides is None else f" at the points of stride {stride}"
    right.set_title(f"score of object 0's class{where}", fontsize=9)
    figure.suptitle(f"{detector.title}, step {detector.step}, image {target['image_id']}",
                    fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def hero(runs, file, image=None, count=4, threshold=0.2):
    """The same validation pictures, a row a run, all without NMS: many, some, one box an object."""
    sheets = []
    for run in runs:
        flags = saved_flags(run)
        known = data.read(flags, "val")
        pictures = data.Pictures(known, data.Transform())
        some = ([index_of(pictures, image)] if image is not None
                else likely(pictures, 3, 5)[:count])
        of_image = above(annotations.read_json(Path(run) / "detections.json"), threshold)
        cells = [draw_detections(pictures.picture(i), of_image.get(known.image_ids[i], []), known,
                                 [""] * len(known.class_names), with_scores=False, side=256)
                 for i in some]
        line = f"{row_name(run)}: without NMS, score >= {threshold}"
        sheets.append(caption(contact_sheet(cells, columns=len(cells)), line))
    contact_sheet(sheets, columns=1).quantize(255).save(file)


def wandering(runs, file, image=None, count=3):
    """The positives of a few training pictures over the kept checkpoints, as a GIF."""
    detectors = [stages(run, "train") for run in runs]
    of_same_pictures([kept[0] for kept in detectors])
    pictures = detectors[0][0].pictures
    some = ([index_of(pictures, image)] if image is not None
            else likely(pictures, 2, 3)[:count])
    frames = []
    for row in in_step(detectors):
        sheets = []
        for detector in row:
            cells = [positives_on_picture(detector, *where_positives_lie(detector, None, i), i,
                                          side=192) for i in some]
            sheets.append(caption(contact_sheet(cells, columns=len(cells)),
                                  f"{detector.title}, step {detector.step}"))
        frames.append(contact_sheet(sheets, columns=1).quantize(48))
    if len(frames) < 2:
        raise ValueError("an animation needs runs that were trained with --keep-checkpoints")
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=400, loop=0)


# ------------------------------------------------------------------------------------------------
# the command line
# ------------------------------------------------------------------------------------------------

COMMANDS = {
    "curves": (learning_curves, "AP, score gap and moving positives over training; seeds together"),
    "scores": (score_histograms, "Figures 4 and 5: the scores of the samples"),
    "positives": (positive_samples, "Figure 6: the positives on training pictures"),
    "match": (cost_and_choice, "one picture: its cost matrix, what strategies choose, the scores"),
    "nms": (nms_of_runs, "AP against the threshold of NMS, and the score gaps"),
    "hero": (hero, "detections of several runs side by side, without NMS"),
    "wander": (wandering, "GIF of positives over training (runs with --keep-checkpoints)"),
}


def add_detections(commands):
    words = "boxes drawn on pictures of one's own, and detections.json, in COCO's result format"
    c = commands.add_parser("detections", help=words, description=words)
    c.add_argument("--weights", required=True, metavar="RUN",
                   help="a run's folder, or a checkpoint")
    c.add_argument("--images", required=True, nargs="+", metavar="PATH",
                   help="pictures, and folders of pictures")
    c.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    c.add_argument("--score", type=float, default=0.3, metavar="S",
                   help="what scores less is left out (default: 0.3; evaluate.py --per-class "
                        "tells what is best)")
    c.add_argument("--nms", action="store_true", help="with NMS")
    c.add_argument("--device", help="cpu, cuda, mps, ... (default: cuda if there is one)")


def run_detections(args):
    model, checkpoint = checkpoints.load(args.weights)
    model.to(runs.usable_device(args.device))
    if not 0 <= args.score <= 1:                 # NaN compares false
        raise ValueError(f"--score {args.score}: must be between 0 and 1")
    return detect_files(model, checkpoint, args.images, args.out, args.score, args.nms)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, words) in COMMANDS.items():
        end = "gif" if name == "wander" else "png"
        c = commands.add_parser(name, help=words, description=words)
        c.add_argument("runs", nargs=1 if name == "match" else "+", metavar="RUN",
                       help="output folder of train.py" + "; first: evaluate.py nms --weights "
                       "RUN/last.pt" * (name == "nms"))
        c.add_argument("--out", default=f"{name}.{end}", metavar="FILE",
                       help="the picture to write")
        if name not in ("curves", "nms"):
            c.add_argument("--image", metavar="ID", help="a picture of your choice")
    add_detections(commands)
    args = parser.parse_args()
    with runs.faults_told("figures.py", KeyError, ValueError):
        if args.command == "detections":
            told = run_detections(args)
        else:
            chosen = {"image": args.image} if getattr(args, "image", None) else {}
            told = COMMANDS[args.command][0](args.runs, args.out, **chosen) or []
        for line in told:
            print(line)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
