"""The embedded data: small pictures of creatures, drawn by this file, written to disk as COCO.

The paper's argument (Section 3.4, Figure 6) turns on objects whose box centre is a poor place to
recognise them: the grid point nearest to the centre of a giraffe's box may lie on the grass between
its legs.  So a creature here is a body (one of six kinds) with one or two jointed limbs; its box
holds body and limbs, and the centre of the box often lies on background.  Such a candidate looks
like its neighbours, a detector told to single it out cannot, and duplicates follow, says the paper;
docs/why.md tells what of that was found here.

    python scenes.py --out data/scenes              draw 8,000 + 500 pictures (the default data set)
    python scenes.py --show sheet.png               look at them first
    python scenes.py --set crowd ...                the same for crowds: people that hide each
                                                    other, as CrowdHuman lies on disk

Everything is a function of (seed, split, index): the same seed gives the same bytes, whatever the
number of pictures.  What is written is read back by annotations.py, as any COCO file is.
"""
import argparse
import contextlib
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from pictures import DataError

KINDS = ("disk", "ring", "triangle", "star", "crescent", "hook")
VERSION = 2                     # raise it when the pictures change: they are drawn anew
SIZE = 128                      # pixels, height and width of a picture
COUNTS = {"train": 8000, "val": 500}
SUPERSAMPLE = 3                 # silhouettes are drawn larger and averaged: no jags
MAX_OBJECTS = 6
MAX_IOU = 0.2                   # of two boxes, so that NMS at 0.5 costs no recall
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
    if kind == "crescent":
        # the outer arc and, back again, the arc of a smaller disk moved right
        inner = arc(0.9, turn - 0.9, 0.78)[::-1] + [0.32, 0.0]
        return np.concatenate([arc(0.62, turn - 0.62), inner])
    if kind == "hook":
        corners = [-1, -1], [1, -1], [1, 0.9], [0.35, 0.9], [0.35, -0.4], [-1, -0.4]
        return np.array(corners, float)
    raise ValueError(f"unknown kind {kind!r}; the kinds are {', '.join(KINDS)}")


def limb(rng, size):
    """A jointed limb: two thick strokes in a row that start inside the body, as quadrilaterals."""
    angle = rng.uniform(0, 2 * np.pi)
    length = rng.uniform(0.5, 1.2) * size           # up to 1.2 bodies long ...
    half = max(size / 6, 3.0) / 2                   # ... and a sixth of a body thick
    start = 0.3 * size * np.array([np.cos(angle), np.sin(angle)])
    strokes = []
    for part in (0.55, 0.45):
        step = np.array([np.cos(angle), np.sin(angle)])
        side = half * np.array([-step[1], step[0]])
        # a stroke starts half its thickness early, so that the joint has no notch
        a = start - half * step
        b = start + part * (length + 0.2 * size) * step
        strokes.append(np.array([a + side, b + side, b - side, a - side]))
        start = b
        angle += rng.uniform(-1.2, 1.2)
    return strokes


def creature(rng):
    """One creature, not yet placed: its kind (an index) and its polygons, pixels around (0, 0)."""
    kind = int(rng.integers(len(KINDS)))
    size = rng.uniform(16, 40)                      # of the body, in pixels
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
    return np.concatenate([points.min(0), points.max(0)])  # xyxy


def overlap(box, others):
    """The largest IoU of `box` with `others`, 0 if there are none."""
    best = 0.0
    for other in others:
        w, h = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
        if w > 0 and h > 0:
            union = np.prod(box[2:] - box[:2]) + np.prod(other[2:] - other[:2]) - w * h
            best = max(best, w * h / union)
    return best


def silhouette(polygons, size=SIZE):
    """How much of each pixel the polygons cover, (size, size) in 0...255."""
    mask = Image.new("L", (size * SUPERSAMPLE,) * 2)
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
    objects = []
    visible = []                                    # masks: what is not yet covered

    for _ in range(int(rng.integers(0, MAX_OBJECTS + 1))):
        kind, polygons = creature(rng)
        box = extent(polygons)
        room = SIZE - 2 - (box[2:] - box[:2])
        if room.min() <= 0:                         # longer than the picture is wide
            continue

        # Eight tries to find a free place: boxes that overlap more would cost recall under NMS,
        # and a creature that is hidden would be an annotation of nothing.
        for _ in range(8):
            shift = 1 + rng.uniform(0, 1, 2) * room - box[:2]
            placed = box + np.tile(shift, 2)
            if overlap(placed, [o["box"] for o in objects]) >= MAX_IOU:
                continue
            mask = silhouette([polygon + shift for polygon in polygons])
            covers = np.asarray(mask) > 127
            still = [v & ~covers for v in visible]
            if all(v.sum() >= MIN_VISIBLE * o["area"] for v, o in zip(still, objects)):
                break
        else:
            continue
        polygons = [polygon + shift for polygon in polygons]
        visible = still + [covers]

        # a colour that stands out from what it covers, so that a person can find every creature
        covered = np.asarray(picture.resize((1, 1), box=tuple(placed)), float).ravel()
        colour = rng.uniform(0, 255, 3)
        while np.abs(colour - covered).sum() < 240:
            colour = rng.uniform(0, 255, 3)
        picture.paste(tuple(int(c) for c in colour), mask=mask)
        objects.append({"kind": kind, "box": placed, "polygons": polygons,
                        "area": float(np.asarray(mask, float).sum() / 255)})
    return noisy(picture, rng), objects


def noisy(picture, rng):
    """The picture with a camera's noise, so that no colour is flat."""
    noise = rng.normal(0, 5, (picture.height, picture.width, 3)).astype(np.float32)
    pixels = np.asarray(picture, np.float32) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def drawn(folder, name):
    """Whether a folder holds a finished data set of this file's version, of any seed and size.

    name: "scenes" or "crowd"
    """
    recipe = completed(Path(folder) / "complete.json")
    version = {"scenes": VERSION, "crowd": CROWD_VERSION}[name]
    return recipe.get("version") == version and recipe.get("set", "scenes") == name


def completed(marker):
    """What a data set's complete.json says; {} if there is none, or it was cut off by a kill."""
    with contextlib.suppress(OSError, ValueError):
        said = json.loads(marker.read_text())
        return said if isinstance(said, dict) else {}
    return {}


def begin(marker, recipe):
    """Whether a data set has to be drawn.

    Its folder's marker, written last, says if this very one is there already; a file `drawing` lies
    in it meanwhile and says which it will be.  Raises DataError if the folder holds anything else,
    which would be drawn over; pictures of an older version may be.
    """
    folder, begun = marker.parent, marker.with_name("drawing")
    if marker.exists() and marker.read_text() == recipe:
        return False

    ours = json.loads(recipe)
    said = completed(marker) or completed(begun)
    theirs = said.get("set", "scenes") if said else ours["set"]
    if not (marker.exists() or begun.exists()) and folder.is_dir() and any(folder.iterdir()):
        theirs = "other files"
    if theirs != ours["set"]:
        raise DataError(f"{folder} holds {theirs}, over which the pictures would be drawn; choose "
                        f"an empty folder, or --data custom for files of your own")
    if said and said != ours and said.get("version") == ours["version"]:
        counts = " + ".join(map(str, said["counts"].values()))
        raise DataError(f"{folder} holds the pictures of --seed {said['seed']} --counts {counts}, "
                        f"over which others would be drawn; choose another --out, or remove it")

    folder.mkdir(parents=True, exist_ok=True)
    begun.write_text(recipe)
    marker.unlink(missing_ok=True)
    print(f"drawing pictures into {folder} (once)", flush=True)
    return True


def finish(marker, recipe):
    marker.write_text(recipe)
    marker.with_name("drawing").unlink()


def write(out, seed=0, counts=COUNTS):
    """Draw the data set into folder `out`: train.json, val.json, train/*.png, val/*.png (COCO).

    A finished data set leaves a file `complete.json`; a later call with the same arguments returns
    at once, and a call that was killed half-way is simply repeated.
    """
    out = Path(out)
    marker = out / "complete.json"
    recipe = json.dumps({"seed": seed, "counts": dict(counts), "set": "scenes", "version": VERSION})
    if not begin(marker, recipe):
        return out

    for split, count in counts.items():
        (out / split).mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for index in tqdm(range(count), f"{split} pictures", leave=False, disable=None):
            picture, objects = draw(seed, split, index)
            name = f"{index:05d}.png"
            picture.save(out / split / name, compress_level=1)
            images.append({"id": index + 1, "file_name": name, "height": SIZE, "width": SIZE})

            # COCO counts from 1 and writes boxes as x, y, width, height; a hundredth of a pixel
            # is finer than anything that is measured on them
            for o in objects:
                x1, y1, x2, y2 = (round(float(v), 2) for v in o["box"])
                annotations.append({
                    "id": len(annotations) + 1, "image_id": index + 1,
                    "category_id": o["kind"] + 1, "iscrowd": 0, "area": round(o["area"], 2),
                    "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
                    "segmentation": [p.round(2).ravel().tolist() for p in o["polygons"]]})

        categories = [{"id": k + 1, "name": name} for k, name in enumerate(KINDS)]
        record = {"images": images, "annotations": annotations, "categories": categories}
        (out / f"{split}.json").write_text(json.dumps(record))
    finish(marker, recipe)
    return out


# ------------------------------------------------------------------------------------------------
# crowds: figures of one class that overlap heavily, annotated as CrowdHuman is (Section 5)
# ------------------------------------------------------------------------------------------------

CROWD_VERSION = 3
CROWD_SIZE = 160
CROWD_COUNTS = {"train": 4000, "val": 400}
# between full boxes: of most figures, and of those that NMS at 0.5 costs
CROWD_MAX_IOU = 0.47, 0.7
# share of figures that may come so close; NMS then keeps 95% of the boxes
CROWD_CLOSE = 0.036
CROWD_MIN_VISIBLE = 0.3


def stroke(a, b, thick):
    """A thick line from a to b as a quadrilateral."""
    along = (b - a) / max(np.linalg.norm(b - a), 1e-6)
    side = thick / 2 * np.array([-along[1], along[0]])
    return np.array([a + side, b + side, b - side, a - side])


def figure(rng, height):
    """A standing figure around its feet at (0, 0).

    Returns its parts, a list of (name, polygon), the nearest last, and its skin's tone, 0 to 1.
    """
    wide = height * rng.uniform(0.16, 0.24)         # shoulders, half
    skin = rng.uniform(0, 1)
    hip, neck = -0.47 * height, -0.8 * height

    # two legs, the trunk over them, two arms over the trunk, and the head
    parts = []
    for side in (-1, 1):
        foot = np.array([side * wide * rng.uniform(0.2, 1.0), 0.0])
        parts.append(("legs", stroke(np.array([side * wide * 0.35, hip]), foot, 0.12 * height)))
    trunk = [-wide, neck], [wide, neck], [0.7 * wide, hip + 2], [-0.7 * wide, hip + 2]
    parts.append(("shirt", np.array(trunk)))
    for side in (-1, 1):
        angle = rng.uniform(0.1, 1.9)
        along = np.array([side * np.sin(angle), np.cos(angle)])
        hand = np.array([side * wide, neck + 2]) + 0.36 * height * along
        shoulder = np.array([side * wide * 0.9, neck + 2])
        parts.append(("shirt", stroke(shoulder, hand, 0.08 * height)))
    head = arc(0, 2 * np.pi, 0.105 * height)[:-1] * [0.9, 1.1] + [0, -0.89 * height]
    parts.append(("head", head))

    # nobody stands quite upright
    lean = rng.normal(0, 0.1)
    turn = np.array([[np.cos(lean), np.sin(lean)], [-np.sin(lean), np.cos(lean)]])
    return [(part, polygon @ turn) for part, polygon in parts], skin


def xywh(box):
    """A box as CrowdHuman writes it: x, y, width, height, to a hundredth of a pixel."""
    x1, y1, x2, y2 = box
    return [round(float(v), 2) for v in (x1, y1, x2 - x1, y2 - y1)]


def gather(rng, wanted):
    """Up to `wanted` figures, the farthest first: (feet's y, box, parts, skin).

    They come in groups of about one height, side by side: that is how full boxes get to overlap
    as much as CrowdHuman's do.
    """
    size = CROWD_SIZE
    people = []
    for _ in range(80):
        if len(people) >= wanted:
            break
        height = rng.uniform(30, 64)
        centre = rng.uniform([0.05 * size, 0.3 * size], [0.95 * size, 1.05 * size])

        for _ in range(int(rng.integers(2, 8))):
            parts, skin = figure(rng, height * rng.uniform(0.9, 1.1))
            feet = centre + rng.normal(0, 1, 2) * [0.55 * height, 0.1 * height]
            parts = [(part, polygon + feet) for part, polygon in parts]
            box = extent([polygon for _, polygon in parts])
            limit = CROWD_MAX_IOU[int(rng.random() < CROWD_CLOSE)]

            # more than half of its width and of its height must lie inside the picture
            inside = np.minimum(box[2:], size) - np.maximum(box[:2], 0)
            if len(people) >= wanted or (inside <= 0.5 * (box[2:] - box[:2])).any():
                continue
            if overlap(box, [other for _, other, _, _ in people]) < limit:
                people.append((feet[1], box, parts, skin))

    # the nearer stand lower, and in front
    people.sort(key=lambda person: person[0])
    return people


def far_crowd(rng, picture):
    """Paint a crowd too small to tell its figures apart; returns the region to ignore."""
    size = CROWD_SIZE
    w, h = rng.uniform(20, 44), rng.uniform(12, 20)
    x, y = rng.uniform(0, size - w), rng.uniform(0, 0.4 * size)
    pen = ImageDraw.Draw(picture)
    for _ in range(int(w * h / 22)):
        at = rng.uniform([x, y + 6], [x + w, y + h])
        parts, _ = figure(rng, rng.uniform(6, 9))
        for (_, polygon), colour in zip(parts, rng.uniform(0, 255, (6, 3))):
            corners = [tuple(map(float, p)) for p in polygon + at]
            pen.polygon(corners, fill=tuple(int(c) for c in colour))

    region = [round(float(v), 2) for v in (x, y, w, h)]
    return {"tag": "mask", "fbox": region, "vbox": region, "hbox": region,
            "head_attr": {}, "extra": {"ignore": 1}}


def paint(picture, mask, colour):
    """Colour the pixels under a mask, with a dark rim that sets a figure off from those behind."""
    covered = mask.getbbox()
    if covered is None:                             # it lies outside the picture
        return

    # only around the mask: filtering the whole picture for each part took half of the time
    left, top, right, bottom = covered
    at = (max(left - 2, 0), max(top - 2, 0),
          min(right + 2, picture.width), min(bottom + 2, picture.height))
    mask = mask.crop(at)
    rim = mask.filter(ImageFilter.MaxFilter(3)).point([v // 2 for v in range(256)])
    picture.paste((20, 20, 20), at, rim)
    picture.paste(tuple(int(c) for c in colour), at, mask)


def draw_crowd(seed, split, index):
    """Draw one crowd.

    Returns the picture (PIL, RGB) and CrowdHuman's list of boxes: dicts with tag, fbox, vbox, hbox
    (x, y, width, height; the full box also where the figure is hidden or outside the picture),
    head_attr, extra.
    """
    rng = np.random.default_rng((seed, 7, sorted(CROWD_COUNTS).index(split), index))
    size = CROWD_SIZE
    wanted = int(rng.integers(14, 32))
    picture = background(rng).resize((size, size), Image.BICUBIC)
    people = gather(rng, wanted)

    # from the front: who would be hidden by those before him is left out
    kept = []
    front = np.zeros((size, size), bool)            # what those already kept cover
    for _, box, parts, skin in people[::-1]:
        masks = [silhouette([polygon], size) for _, polygon in parts]
        whole = np.any([np.asarray(mask) > 127 for mask in masks], axis=0)
        visible = whole & ~front
        if whole.any() and visible.sum() >= CROWD_MIN_VISIBLE * whole.sum():
            kept.append((box, parts, skin, masks, visible, (whole & front).any()))
            front = front | whole

    # from the back: first the far crowds, then the figures, each over those behind it
    boxes = [far_crowd(rng, picture) for _ in range(int(rng.integers(0, 3)))]
    for order, (box, parts, skin, masks, visible, hidden) in enumerate(kept[::-1]):
        shirt, legs = rng.uniform(0, 255, (2, 3))
        head = np.array([255, 205, 160]) * (0.35 + 0.65 * skin)
        colours = {"shirt": shirt, "legs": legs, "head": head}
        for (part, _), mask in zip(parts, masks):
            paint(picture, mask, colours[part])

        # the visible box is of whole pixels, since it is what the picture shows
        ys, xs = np.nonzero(visible)
        seen = [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1]
        boxes.append({"tag": "person",
                      "fbox": xywh(box), "vbox": seen, "hbox": xywh(extent([parts[-1][1]])),
                      "head_attr": {"ignore": 0, "occ": 0, "unsure": 0},
                      "extra": {"box_id": order, "occ": int(hidden)}})
    return noisy(picture, rng), boxes


def write_crowd(out, seed=0, counts=CROWD_COUNTS):
    """Draw the crowds into folder `out` as CrowdHuman lies on disk.

    That is annotation_train.odgt, annotation_val.odgt, Images/ID.png, and `complete.json` as above.
    """
    out = Path(out)
    marker = out / "complete.json"
    recipe = json.dumps({"seed": seed, "counts": dict(counts),
                         "set": "crowd", "version": CROWD_VERSION})
    if not begin(marker, recipe):
        return out

    (out / "Images").mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        lines = []
        for index in tqdm(range(count), f"{split} pictures", leave=False, disable=None):
            picture, boxes = draw_crowd(seed, split, index)
            name = f"{split}-{index:05d}"
            picture.save(out / "Images" / f"{name}.png", compress_level=1)
            lines.append(json.dumps({"ID": name, "gtboxes": boxes}) + "\n")
        (out / f"annotation_{split}.odgt").write_text("".join(lines))
    finish(marker, recipe)
    return out


# ------------------------------------------------------------------------------------------------
# a look at them
# ------------------------------------------------------------------------------------------------

def contact_sheet(pictures, columns=8, gap=4):
    """Pictures side by side on white, row by row, each in a cell of the largest one's size."""
    width = max(p.width for p in pictures) + gap
    height = max(p.height for p in pictures) + gap
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def specimen(name, seed, index):
    """Picture `index` of a data set, "scenes" or "crowd", at twice its size, with its boxes."""
    boxes = []                                      # xyxy, colour, name
    if name == "scenes":
        picture, objects = draw(seed, "train", index)
        for o in objects:
            boxes.append((o["box"], "red", KINDS[o["kind"]]))
    else:
        picture, objects = draw_crowd(seed, "train", index)
        for o in objects:
            x, y, w, h = o["fbox"]
            colour = "red" if o["tag"] == "person" else "yellow"
            boxes.append((np.array([x, y, x + w, y + h]), colour, ""))

    # after enlarging, so that frames stay thin and names can be read
    picture = picture.resize((2 * picture.width, 2 * picture.height), Image.NEAREST)
    pen = ImageDraw.Draw(picture)
    for box, colour, kind in boxes:
        pen.rectangle((2 * box).tolist(), outline=colour)
        pen.text(tuple(2 * box[:2] + 2), kind, fill="white")
    return picture


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=("scenes", "crowd"), default="scenes",
                        help="which data set (default: scenes)")
    parser.add_argument("--out", metavar="DIR",
                        help="where to write it (default: data/scenes, data/crowd)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other pictures")
    parser.add_argument("--counts", type=int, nargs=2, metavar=("TRAIN", "VAL"),
                        help="how many pictures (default: scenes 8000 500, crowd 4000 400)")
    parser.add_argument("--show", metavar="PNG",
                        help="only draw a contact sheet with boxes into this file")
    args = parser.parse_args()

    # how many pictures a sheet shows, and in how many columns
    count, columns = (40, 8) if args.set == "scenes" else (15, 5)
    write_set, counts = (write, COUNTS) if args.set == "scenes" else (write_crowd, CROWD_COUNTS)
    if args.counts:
        if min(args.counts) < 1:
            parser.error(f"--counts {args.counts}: at least one picture of each")
        counts = dict(zip(("train", "val"), args.counts))
    try:
        if args.show:
            pictures = [specimen(args.set, args.seed, index) for index in range(count)]
            contact_sheet(pictures, columns).save(args.show)
            print(f"wrote {args.show}")
        else:
            print(f"wrote {write_set(args.out or Path('data') / args.set, args.seed, counts)}")
    except (OSError, ValueError) as error:
        print(f"scenes.py: cannot write: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("scenes.py: interrupted; the same command draws it anew", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
