"""The embedded data: small pictures of creatures, drawn by this file, written to disk as COCO.

The paper's argument (Section 3.4, Figure 6) turns on objects whose box centre is a poor place to
recognise them: the grid point nearest to the centre of a giraffe's box may lie on the grass between
its legs.  So a creature here is a body (one of six kinds) with one or two jointed limbs; its box
holds body and limbs, and the centre of the box often lies on background.  Such a candidate looks
like its neighbours, a detector told to single it out cannot, and duplicates follow.

    python scenes.py --out data/scenes              draw 8,000 + 500 pictures (the default data set)
    python scenes.py --show sheet.png               look at them first

Everything is a function of (seed, split, index): the same seed gives the same bytes, whatever the
number of pictures.  What is written is read back by the ordinary COCO reader in data.py.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

KINDS = ("disk", "ring", "triangle", "star", "crescent", "hook")
VERSION = 2                     # raise it when the pictures change: old ones are then drawn anew
SIZE = 128                      # pixels, height and width of a picture
COUNTS = {"train": 8000, "val": 500}
SUPERSAMPLE = 3                 # silhouettes are drawn this much larger, then averaged: smooth edges
MAX_OBJECTS = 6
MAX_IOU = 0.2                   # two boxes overlap less than this, so that NMS at 0.5 costs no recall
MIN_VISIBLE = 0.75              # of every creature, once all are drawn


# ------------------------------------------------------------------------------------------------
# silhouettes: closed polygons of (x, y) in units of the body's radius, centred on the body
# ------------------------------------------------------------------------------------------------

def arc(start, stop, radius=1.0, n=24):
    t = np.linspace(start, stop, n)
    return radius * np.stack([np.cos(t), np.sin(t)], 1)


def body(kind):
    """The outline of a kind, (n, 2).  Holes are cut by a slit, since COCO polygons have none."""
    turn = 2 * np.pi
    if kind == "disk":
        return arc(0, turn)[:-1]
    if kind == "ring":
        return np.concatenate([arc(0, turn), arc(turn, 0, 0.58)])
    if kind == "triangle":
        return arc(0, turn, 1.15, 4)[:-1]
    if kind == "star":
        points = arc(0, turn, 1.15, 11)[:-1]
        points[1::2] *= 0.42
        return points
    if kind == "crescent":      # the outer arc and, back again, the arc of a smaller disk moved right
        inner = arc(0.9, turn - 0.9, 0.78)[::-1] + [0.32, 0.0]
        return np.concatenate([arc(0.62, turn - 0.62), inner])
    if kind == "hook":
        return np.array([[-1, -1], [1, -1], [1, 0.9], [0.35, 0.9], [0.35, -0.4], [-1, -0.4]], float)
    raise ValueError(f"unknown kind {kind!r}; the kinds are {', '.join(KINDS)}")


def limb(rng, size):
    """A jointed limb: two thick strokes in a row that start inside the body.  Two quadrilaterals."""
    angle = rng.uniform(0, 2 * np.pi)
    length = rng.uniform(0.5, 1.2) * size                    # up to 1.2 bodies long ...
    half = max(size / 6, 3.0) / 2                            # ... and a sixth of a body thick
    start = 0.3 * size * np.array([np.cos(angle), np.sin(angle)])
    strokes = []
    for part in (0.55, 0.45):
        step = np.array([np.cos(angle), np.sin(angle)])
        side = half * np.array([-step[1], step[0]])
        # a stroke starts half its thickness early, so that the joint has no notch
        a, b = start - half * step, start + part * (length + 0.2 * size) * step
        strokes.append(np.array([a + side, b + side, b - side, a - side]))
        start, angle = b, angle + rng.uniform(-1.2, 1.2)
    return strokes


def creature(rng):
    """One creature, not yet placed: its kind (an index) and its polygons in pixels around (0, 0)."""
    kind = int(rng.integers(len(KINDS)))
    size = rng.uniform(16, 40)                               # of the body, in pixels
    aspect = rng.uniform(0.8, 1.25)
    outline = body(KINDS[kind]) * (size / 2) * [aspect ** 0.5, aspect ** -0.5]
    angle = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    polygons = [outline @ rotation]
    for _ in range(int(rng.integers(1, 3))):
        polygons += limb(rng, size)
    return kind, polygons


# ------------------------------------------------------------------------------------------------
# pictures
# ------------------------------------------------------------------------------------------------

def extent(polygons):
    points = np.concatenate(polygons)
    return np.concatenate([points.min(0), points.max(0)])    # xyxy


def overlap(box, others):
    """The largest IoU of `box` with `others`, 0 if there are none."""
    best = 0.0
    for other in others:
        w, h = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
        if w > 0 and h > 0:
            union = np.prod(box[2:] - box[:2]) + np.prod(other[2:] - other[:2]) - w * h
            best = max(best, w * h / union)
    return best


def silhouette(polygons):
    """How much of each pixel a creature covers, (SIZE, SIZE) in 0...255."""
    mask = Image.new("L", (SIZE * SUPERSAMPLE,) * 2)
    pen = ImageDraw.Draw(mask)
    for polygon in polygons:
        pen.polygon([(float(x), float(y)) for x, y in polygon * SUPERSAMPLE], fill=255)
    return mask.reduce(SUPERSAMPLE)


def background(rng):
    """A few smooth, muted colours and some clutter strokes."""
    coarse = rng.uniform(0.25, 0.75, (4, 4, 3)).astype(np.float32)
    coarse = coarse.mean(2, keepdims=True) + 0.6 * (coarse - coarse.mean(2, keepdims=True))
    picture = Image.fromarray((255 * coarse).astype(np.uint8)).resize((SIZE, SIZE), Image.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(0, 5))):
        a = rng.uniform(0, SIZE, 2)
        b = a + rng.uniform(-50, 50, 2)
        pen.line([*a.tolist(), *b.tolist()], fill=tuple(rng.integers(40, 216, 3).tolist()),
                 width=int(rng.integers(1, 3)))
    return picture


def draw(seed, split, index):
    """Draw one picture.

    Returns the picture (PIL, RGB) and a list of objects: dicts with `kind` (an index into KINDS),
    `box` (xyxy, pixels), `polygons` (arrays (n, 2)) and `area` (pixels the creature covers, also
    where a later one hides it).
    """
    rng = np.random.default_rng((seed, sorted(COUNTS).index(split), index))
    picture = background(rng)
    objects, visible = [], []                                # visible: boolean masks, what is not yet covered
    for _ in range(int(rng.integers(0, MAX_OBJECTS + 1))):
        kind, polygons = creature(rng)
        box = extent(polygons)
        room = SIZE - 2 - (box[2:] - box[:2])
        if room.min() <= 0:                                  # limbs longer than the picture is wide
            continue
        for _ in range(8):                                   # tries to find a free place
            shift = 1 + rng.uniform(0, 1, 2) * room - box[:2]
            placed = box + np.tile(shift, 2)
            if overlap(placed, [o["box"] for o in objects]) >= MAX_IOU:
                continue
            mask = silhouette([polygon + shift for polygon in polygons])
            covers = np.asarray(mask) > 127
            if all((v & ~covers).sum() >= MIN_VISIBLE * o["area"] for v, o in zip(visible, objects)):
                break
        else:
            continue
        polygons = [polygon + shift for polygon in polygons]
        visible = [v & ~covers for v in visible] + [covers]
        # a colour that stands out from what it covers, so that a person can find every creature
        covered = np.asarray(picture.resize((1, 1), box=tuple(placed)), float).ravel()
        colour = rng.uniform(0, 255, 3)
        while np.abs(colour - covered).sum() < 240:
            colour = rng.uniform(0, 255, 3)
        picture.paste(tuple(int(c) for c in colour), mask=mask)
        objects.append({"kind": kind, "box": placed, "polygons": polygons,
                        "area": float(np.asarray(mask, float).sum() / 255)})
    noisy = np.asarray(picture, np.float32) + rng.normal(0, 5, (SIZE, SIZE, 3)).astype(np.float32)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), objects


def write(out, seed=0, counts=COUNTS):
    """Draw the data set into folder `out`: train.json, val.json, train/*.png, val/*.png (COCO).

    A finished data set leaves a file `complete.json`; a later call with the same arguments returns
    at once, and a call that was killed half-way is simply repeated.
    """
    out = Path(out)
    marker = out / "complete.json"
    recipe = {"seed": seed, "counts": dict(counts), "version": VERSION}
    if marker.exists() and marker.read_text() == json.dumps(recipe):
        return out
    marker.unlink(missing_ok=True)
    print(f"drawing {sum(counts.values()):,} pictures into {out} (once)", flush=True)
    for split, count in counts.items():
        (out / split).mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for index in range(count):
            picture, objects = draw(seed, split, index)
            name = f"{index:05d}.png"
            picture.save(out / split / name, compress_level=1)
            images.append({"id": index + 1, "file_name": name, "height": SIZE, "width": SIZE})
            for o in objects:
                x1, y1, x2, y2 = (round(float(v), 2) for v in o["box"])
                annotations.append({
                    "id": len(annotations) + 1, "image_id": index + 1,
                    "category_id": o["kind"] + 1, "iscrowd": 0, "area": round(o["area"], 2),
                    "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
                    "segmentation": [p.round(2).ravel().tolist() for p in o["polygons"]]})
        categories = [{"id": k + 1, "name": name} for k, name in enumerate(KINDS)]
        (out / f"{split}.json").write_text(json.dumps(
            {"images": images, "annotations": annotations, "categories": categories}))
    marker.write_text(json.dumps(recipe))
    return out


def contact_sheet(pictures, columns=8, gap=4):
    """Pictures of any sizes side by side on white, row by row, each in a cell of the largest size."""
    width = max(p.width for p in pictures) + gap
    height = max(p.height for p in pictures) + gap
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="data/scenes", metavar="DIR", help="where to write the data set")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other pictures")
    parser.add_argument("--show", metavar="PNG", help="only draw a contact sheet with boxes into this file")
    args = parser.parse_args()
    try:
        if args.show:
            pictures = []
            for index in range(40):
                picture, objects = draw(args.seed, "train", index)
                picture = picture.resize((2 * SIZE, 2 * SIZE), Image.NEAREST)
                pen = ImageDraw.Draw(picture)
                for o in objects:
                    pen.rectangle((2 * o["box"]).tolist(), outline="red")
                    pen.text(tuple(2 * o["box"][:2] + 2), KINDS[o["kind"]], fill="white")
                pictures.append(picture)
            contact_sheet(pictures).save(args.show)
            print(f"wrote {args.show}")
        else:
            print(f"wrote {write(args.out, args.seed)}")
    except (OSError, ValueError) as error:
        print(f"scenes.py: cannot write: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
