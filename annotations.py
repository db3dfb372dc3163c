"""Annotations and pictures, read without trusting them: COCO's, CrowdHuman's; and their check.

    python annotations.py check --json train.json --images train2017   all that is wrong with it
    python annotations.py voc2coco VOC_FOLDER --out DIR                Pascal VOC XML to COCO JSON

A file is read once, into flat tensors that serve training (`boxes`, clipped) and evaluation
(`xywh`, `area`, and CrowdHuman's full boxes).  Whatever is wrong with it is a Fault, one sentence
that names file, image and annotation.  Training and evaluation stop at the first, the check lists
them all.
"""
import argparse
import contextlib
import json
import os
import sys
import xml.etree.ElementTree as ElementTree
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps


class DataError(ValueError):
    """Something is wrong with a file the user gave: one sentence that names it and what to do."""


@dataclass
class Annotations:
    """One data set as flat tensors: N pictures, M boxes; picture i's are first[i]:first[i+1]."""
    json_file: str
    image_dir: str
    image_ids: list             # N, as in the file (COCO: integers)
    file_names: list            # N
    sizes: torch.Tensor         # (N, 2) height, width
    first: torch.Tensor         # (N + 1,)
    boxes: torch.Tensor         # (M, 4) xyxy, clipped to the picture
    labels: torch.Tensor        # (M,) contiguous class 0...C-1: the rank of the category id
    crowd: torch.Tensor         # (M,) bool: never a training target, "ignore" in evaluation
    class_names: list           # C
    category_ids: list          # C, the file's own ids (COCO: 1...90 with gaps)

    # what COCO's evaluation compares with
    xywh: torch.Tensor          # (M, 4) float64; COCO's as in the file, CrowdHuman's clipped
    area: torch.Tensor          # (M,) float64, the file's (COCO: a mask's), else width x height

    # what CrowdHuman's evaluation compares with: F boxes as in the file, also outside the picture
    full_boxes: torch.Tensor | None = None      # (F, 4) float64 xyxy
    full_ignore: torch.Tensor | None = None     # (F,) bool
    full_first: torch.Tensor | None = None      # (N + 1,)

    def __len__(self):
        return len(self.image_ids)

    def path(self, i):
        return str(Path(self.image_dir) / self.file_names[i])


@dataclass
class Fault:
    kind: str                   # what the counts of the check are grouped by
    text: str                   # one sentence naming file, image and annotation
    box: bool = False           # true: --drop-bad-boxes can live with it
    extent: bool = False        # true: four finite numbers, but nothing lies in the picture


class Faults(list):
    """The Faults of one file, in its order; every text begins with the file's name."""

    def __init__(self, file):
        super().__init__()
        self.file = file

    def add(self, kind, text, box=False, extent=False):
        self.append(Fault(kind, f"{self.file}: {text}", box, extent))


def read_json(file):
    try:
        with open(file, encoding="utf-8") as stream:
            return json.load(stream)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError) as error:   # broken JSON, UTF-8, absurd nesting
        raise DataError(f"{file}: not valid JSON ({error}); download or export it again") from None


def is_number(value):
    """A number that is finite and of sensible size; NaN compares false, so it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 1e30


def is_box(value):
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def is_id(value):
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def has_id(record):
    return isinstance(record, dict) and is_id(record.get("id"))


def escapes(name):
    """True if joining `name` to the image folder could leave that folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    if not path.parts:
        return True
    return path.is_absolute() or ".." in path.parts or path.parts[0].endswith(":")


def cut(x, y, w, h, height, width):
    """What of a box lies in its picture, x1, y1, x2, y2; None if less than 1e-5 (as detectron2)."""
    x1, y1 = max(x, 0), max(y, 0)
    x2, y2 = min(x + w, width), min(y + h, height)
    return (x1, y1, x2, y2) if x2 - x1 > 1e-5 and y2 - y1 > 1e-5 else None


def require_folder(image_dir):
    if image_dir is not None and not Path(image_dir).is_dir():
        raise DataError(f"{image_dir}: no such folder of pictures; check --images (or --data-dir)")


# ------------------------------------------------------------------------------------------------
# COCO: one JSON object with the lists images, categories, annotations
# ------------------------------------------------------------------------------------------------

def parse_coco(json_file, image_dir):
    """Read a COCO-format JSON without trusting it.

    Returns Annotations of everything usable and the list of Faults, in the file's order.  Raises
    DataError only where nothing can be read at all (no JSON, not COCO's layout, no pictures).
    With image_dir None, to score a result file, neither pictures nor their sizes need be there.
    """
    record = read_json(json_file)
    if not isinstance(record, dict) or not all(isinstance(record.get(key), list)
                                               for key in ("images", "annotations", "categories")):
        raise DataError(f"{json_file}: not a COCO data set: it must be an object with the lists "
                        f"'images', 'annotations' and 'categories'; "
                        f"result files go to evaluate.py results")
    if not record["images"]:
        raise DataError(f"{json_file}: the data set is empty: it lists no images")
    require_folder(image_dir)

    faults = Faults(json_file)
    names = coco_categories(record["categories"], faults)
    images = coco_images(record["images"], image_dir, faults)
    table = coco_boxes(record, images, list(names), faults)

    return Annotations(
        json_file=str(json_file),
        image_dir=str(image_dir),
        image_ids=list(images),
        file_names=[name for name, _, _ in images.values()],
        sizes=torch.tensor([size for _, *size in images.values()], dtype=torch.long).reshape(-1, 2),
        first=starts(table[:, 0], len(images)),
        boxes=table[:, 1:5].float(),
        labels=table[:, 5].long(),
        crowd=table[:, 6].bool(),
        class_names=list(names.values()),
        category_ids=list(names),
        xywh=table[:, 7:11].clone(),
        area=table[:, 11].clone()), faults


def coco_categories(categories, faults):
    """{category id: name}, in the order of the ids: a class is the rank of its id."""
    names = {}
    for category in categories:
        if not has_id(category):
            faults.add("category without id", f"category {category!r} has no id")
        elif category["id"] in names:
            faults.add("duplicate category id", f"category id {category['id']} is listed twice")
        else:
            names[category["id"]] = str(category.get("name", category["id"]))
    try:
        return {i: names[i] for i in sorted(names)}
    except TypeError:
        raise DataError(f"{faults.file}: category ids mix numbers and text; "
                        f"use whole numbers") from None


def coco_images(images, image_dir, faults):
    """{image id: (file name, height, width)} of the usable pictures, in the file's order."""
    if len({type(image["id"]) for image in images if has_id(image)}) > 1:
        raise DataError(f"{faults.file}: image ids mix numbers and text; use whole numbers")
    usable = {}
    for image in images:
        if not has_id(image):
            faults.add("image without id", f"image entry {str(image)[:80]} has no id")
            continue
        i, name = image["id"], image.get("file_name")

        if i in usable:
            faults.add("duplicate image id", f"image id {i} is listed twice")
        elif image_dir is None:                     # no picture is opened, no box cut
            usable[i] = (str(name), 10 ** 9, 10 ** 9)
        elif not isinstance(name, str) or not name or escapes(name):
            faults.add("bad file name",
                       f"image {i}: file_name {name!r} is missing or leaves the image folder; "
                       f"give a path below --images")
        elif not all(is_number(image.get(side)) and 1 <= image[side] < 2 ** 31
                     for side in ("height", "width")):
            faults.add("bad image size",
                       f"image {i} ({name}): height and width must be numbers of at least 1")
        else:
            # a missing picture is a fault, but its boxes are known: the check goes on with them
            usable[i] = (name, int(image["height"]), int(image["width"]))
            if not os.path.isfile(Path(image_dir) / name):
                faults.add("missing picture",
                           f"image {i}: the picture {Path(image_dir) / name} does not exist")
    return usable


def coco_boxes(record, images, category_ids, faults):
    """The usable boxes, picture after picture, in the file's order within one.

    Returns (M, 12) float64: index of the picture, x1, y1, x2, y2 cut to it, class, crowd, the
    file's own x, y, width, height, and the area.
    """
    listed = {image["id"] for image in record["images"] if has_id(image)}
    index_of = {i: n for n, i in enumerate(images)}
    label_of = {i: label for label, i in enumerate(category_ids)}
    seen = set()
    rows = array("d")                               # flat: COCO has 860,001 boxes

    for n, annotation in enumerate(record["annotations"]):
        if not isinstance(annotation, dict):
            faults.add("broken annotation", f"annotation number {n} is not an object")
            continue
        i, image_id, category = (annotation.get(k) for k in ("id", "image_id", "category_id"))
        where = f"image {image_id}, annotation {i if i is not None else f'number {n}'}"
        if is_id(i):
            if i in seen:
                faults.add("duplicate annotation id", f"{where}: the annotation id is used twice")
            seen.add(i)

        # what does it point to?
        if not is_id(image_id) or image_id not in listed:
            faults.add("unknown image", f"{where}: no such image is listed")
            continue
        if image_id not in images:
            continue                                # its image is already reported
        if not is_id(category) or category not in label_of:
            faults.add("unknown category",
                       f"{where}: category id {category!r} is not in 'categories'")
            continue

        # what of it lies in the picture?
        _, height, width = images[image_id]
        inside = coco_box(annotation.get("bbox"), where, height, width, faults)
        if inside:
            x, y, w, h = annotation["bbox"]
            area = annotation.get("area")
            rows.extend((index_of[image_id], *inside, label_of[category],
                         bool(annotation.get("iscrowd", 0)), x, y, w, h,
                         area if is_number(area) else w * h))

    return by_picture(rows, 12)


def coco_box(box, where, height, width, faults):
    """A bbox cut to its picture, x1, y1, x2, y2; None if it is at fault."""
    if not is_box(box):
        faults.add("box is not four finite numbers",
                   f"{where}: bbox {box!r} must be four finite numbers x, y, width, height",
                   box=True)
        return None
    if box[2] <= 0 or box[3] <= 0:
        faults.add("box without extent",
                   f"{where}: bbox {box} has no extent; width and height must be positive "
                   f"(--drop-bad-boxes leaves such boxes out)", box=True, extent=True)
        return None
    inside = cut(*box, height, width)
    if inside is None:
        faults.add("box outside the picture",
                   f"{where}: bbox {box} lies outside the picture of {width} x {height} "
                   f"(--drop-bad-boxes leaves such boxes out)", box=True, extent=True)
    return inside


def by_picture(rows, columns):
    """Flat rows to (n, columns) float64, in the order of the first column, the picture's index."""
    table = torch.from_numpy(np.array(rows, np.float64).reshape(-1, columns))
    return table[table[:, 0].argsort(stable=True)]


def starts(index, pictures):
    """Where each picture's rows start, (pictures + 1,), from the sorted pictures of the rows."""
    counts = torch.bincount(index.long(), minlength=pictures)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


# ------------------------------------------------------------------------------------------------
# CrowdHuman: one JSON object per line, full boxes, no picture sizes (Section 5.1)
# ------------------------------------------------------------------------------------------------

def odgt_lines(file, boxes):
    """The lines of an .odgt file that are not blank: (number, record, (kind of fault, its words)).

    A good record has an ID that could name a picture, not used before, and the list `boxes`; its
    kind of fault and words are "".  Raises DataError.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); check the path") from None
    except ValueError as error:
        raise DataError(f"{file}: not a text file ({error})") from None

    seen = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, None, ("broken line", f"is not valid JSON ({error})")
            continue

        # the ID becomes a file name: it must not lead out of the image folder
        name = record.get("ID") if isinstance(record, dict) else None
        if (not isinstance(name, str) or not name or escapes(name)
                or not isinstance(record.get(boxes), list)):
            problem = "missing field", f"lacks an ID that names a picture, or the list {boxes}"
        elif name in seen:
            problem = "duplicate ID", f"uses ID {name} a second time"
        else:
            problem = "", ""
            seen.add(name)
        yield number, record, problem


def parse_odgt(odgt_file, image_dir, sizes=None):
    """Read a CrowdHuman annotation file without trusting it: its full boxes (fbox).

    sizes: {ID: (height, width)} where a line does not say; what is still missing is read from the
    pictures and added.  Returns Annotations of everything usable and the list of Faults.  Raises
    DataError only if nothing can be read at all.

    As published, whatever carries extra.ignore is never a target and is ignored in evaluation; so
    is, as in CrowdDet, whatever is not tagged a person (the published masks all carry ignore).
    """
    require_folder(image_dir)
    sizes = {} if sizes is None else sizes
    faults = Faults(odgt_file)
    ids, names, given = [], [], []
    # flat rows of six: index of the picture, x1, y1, x2, y2, ignore
    inside, full = array("d"), array("d")

    for number, record, (kind, wrong) in odgt_lines(odgt_file, "gtboxes"):
        if wrong:
            faults.add(kind, f"line {number} {wrong}")
            continue
        where = f"line {number}, ID {record['ID']}"
        name = odgt_picture(record, where, image_dir, sizes, faults)
        if name is None:
            continue
        height, width = sizes[record["ID"]]
        for (x, y, w, h), ignore, part in odgt_boxes(record, where, height, width, faults):
            full.extend((len(ids), x, y, x + w, y + h, ignore))
            if part:
                inside.extend((len(ids), *part, ignore))
        ids.append(record["ID"])
        names.append(name)
        given.append((height, width))
    if not ids and not faults:
        raise DataError(f"{odgt_file}: the data set is empty: it has no lines")

    inside, full = by_picture(inside, 6), by_picture(full, 6)
    boxes = inside[:, 1:5].float()
    xywh = boxes.double()
    xywh[:, 2:] -= xywh[:, :2]
    return Annotations(
        json_file=str(odgt_file),
        image_dir=str(image_dir),
        image_ids=ids,
        file_names=names,
        sizes=torch.tensor(given, dtype=torch.long).reshape(-1, 2),
        first=starts(inside[:, 0], len(ids)),
        boxes=boxes,
        labels=torch.zeros(len(boxes), dtype=torch.long),
        crowd=inside[:, 5].bool(),
        class_names=["person"],
        category_ids=[1],
        xywh=xywh,
        area=xywh[:, 2] * xywh[:, 3],
        full_boxes=full[:, 1:5].clone(),
        full_ignore=full[:, 5].bool(),
        full_first=starts(full[:, 0], len(ids))), faults


def odgt_picture(record, where, image_dir, sizes, faults):
    """The file name of a line's picture, with its size put into `sizes`; None if it is at fault."""
    name, size = record["ID"], (record.get("height"), record.get("width"))
    file_name = name + ".jpg"
    if image_dir is not None and not os.path.isfile(Path(image_dir) / file_name):
        file_name = name + ".png"
        if not os.path.isfile(Path(image_dir) / file_name):
            faults.add("missing picture",
                       f"{where}: neither {name}.jpg nor {name}.png is in {image_dir}")
            return None

    # the line's own size, else a known one, else the picture's
    if not all(is_number(v) and v >= 1 for v in size):
        size = sizes.get(name)
    if size is None and image_dir is None:
        faults.add("missing field", f"{where}: its height and width are in neither file; "
                                    f"give the folder of its picture, --images")
        return None
    if size is None:
        try:
            size = picture_size(Path(image_dir) / file_name)
        except DataError as error:
            faults.add("unreadable picture", f"{where}: {error}")
            return None
    sizes[name] = tuple(map(int, size))
    return file_name


def odgt_boxes(record, where, height, width, faults):
    """The boxes of a line: (fbox, whether to ignore it, what of it lies in the picture or None)."""
    for n, entry in enumerate(record["gtboxes"]):
        box = entry.get("fbox") if isinstance(entry, dict) else None
        if not is_box(box):
            faults.add("box is not four finite numbers",
                       f"{where}, box {n}: fbox {box!r} must be four finite numbers "
                       f"x, y, width, height", box=True)
            continue
        if entry.get("tag") not in ("person", "mask"):
            faults.add("unknown tag",
                       f"{where}, box {n}: the tag {entry.get('tag')!r} is neither person nor mask")
            continue
        extra = entry.get("extra") if isinstance(entry.get("extra"), dict) else {}
        ignore = entry["tag"] != "person" or bool(extra.get("ignore", 0))

        # the published masks often stick out altogether: that is no fault
        inside = cut(*box, height, width)
        if inside is None and not ignore:
            faults.add("box without extent in the picture",
                       f"{where}, box {n}: fbox {box} has no extent within the picture of "
                       f"{width} x {height} (--drop-bad-boxes leaves such boxes out)",
                       box=True, extent=True)
        yield box, ignore, inside


# ------------------------------------------------------------------------------------------------
# either of them
# ------------------------------------------------------------------------------------------------

def read_annotations(file, image_dir, drop_bad_boxes=False, cache=None):
    """Annotations of a COCO-format JSON, or of a CrowdHuman .odgt.

    Raises DataError with the first fault there is.
    With drop_bad_boxes, boxes without extent, outside the picture or with NaN are left out and
    counted on standard error instead.  Pictures are opened, and their sizes compared, when they
    are first needed (`python annotations.py check` opens them all).
    cache: a file that keeps the sizes an .odgt does not hold, so that pictures are opened for them
    only once.
    """
    if str(file).endswith(".odgt"):
        sizes = read_sizes(cache, image_dir)
        known = len(sizes)
        annotations, faults = parse_odgt(file, image_dir, sizes)
        if cache is not None and len(sizes) > known:
            write_sizes(cache, image_dir, sizes)
    else:
        annotations, faults = parse_coco(file, image_dir)

    dropped = [f for f in faults if f.box and drop_bad_boxes]
    for f in faults:
        if not (f.box and drop_bad_boxes):
            raise DataError(f"{f.text}; `python annotations.py check --json {file} "
                            f"--images {image_dir}` lists all of its {len(faults)} fault(s)")
    if dropped:
        print(f"{file}: dropped {len(dropped)} bad box(es), the first: {dropped[0].text}",
              file=sys.stderr)
    return annotations


def read_sizes(cache, image_dir):
    """{ID: (height, width)} as kept; nothing if that is broken, or of another folder's pictures."""
    if cache is not None and Path(cache).is_file():
        with contextlib.suppress(ValueError, OSError, TypeError, AttributeError, KeyError):
            kept = json.loads(Path(cache).read_text())
            if kept["images"] == str(Path(image_dir).resolve()):
                return {name: (int(h), int(w)) for name, (h, w) in kept["sizes"].items()}
    return {}


def write_sizes(cache, image_dir, sizes):
    Path(cache).parent.mkdir(parents=True, exist_ok=True)
    # one temporary file a process: several may write the same
    temporary = Path(f"{cache}.{os.getpid()}")
    temporary.write_text(json.dumps({"images": str(Path(image_dir).resolve()), "sizes": sizes}))
    temporary.replace(cache)


# ------------------------------------------------------------------------------------------------
# pictures
# ------------------------------------------------------------------------------------------------

def picture_size(path):
    """Height and width of a picture file, upright, from its header alone.  Raises DataError."""
    try:
        with Image.open(path) as picture:
            # EXIF orientations from 5 on exchange the sides
            turned = picture.getexif().get(0x0112, 1) >= 5
            return picture.size if turned else picture.size[::-1]
    except Exception as error:                      # Pillow raises many kinds
        raise DataError(f"{path}: the picture cannot be read ({error}); fetch it again") from None


def load_picture(path, height=None, width=None, image_id=None):
    """A picture file as upright RGB (PIL): grey, palette, CMYK, alpha, 16 bit, EXIF, all of it.

    Raises DataError if it cannot be decoded to its end or is not of the given size.  Decoding is
    Pillow's; torchvision's own image reading is deprecated.
    """
    which = path if image_id is None else f"{path} (image {image_id})"
    try:
        with Image.open(path) as picture:
            picture = ImageOps.exif_transpose(picture)      # decodes the whole file
            # one channel of 16 or 32 bits: scaled to 8, unless its values fit into them anyway
            if picture.mode.startswith("I") or picture.mode == "F":
                grey = np.asarray(picture, np.float64)
                if picture.mode.startswith("I;16") or grey.max() > 255:
                    grey = grey / 257
                picture = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
            picture = picture.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{which}: the picture does not exist; check the image folder") from None
    except Exception as error:                      # Pillow raises many kinds
        raise DataError(f"{which}: the picture cannot be decoded ({error}); "
                        f"fetch it again or take it out of the JSON") from None
    if height is not None and picture.size != (width, height):
        raise DataError(f"{which}: the picture is {picture.width} x {picture.height} "
                        f"(width x height, after its EXIF rotation) but the JSON says "
                        f"{width} x {height}; correct one of them")
    return picture


# ------------------------------------------------------------------------------------------------
# the check, and Pascal VOC
# ------------------------------------------------------------------------------------------------

def check(json_file, image_dir, out=None):
    """Print every fault of a data set, then counts by kind.  Returns the number of faults."""
    parse = parse_odgt if str(json_file).endswith(".odgt") else parse_coco
    annotations, faults = parse(json_file, image_dir)
    for i in range(len(annotations)):
        path = Path(annotations.path(i))
        if not path.is_file():
            continue                                # parse_coco has said so
        try:
            load_picture(path, *annotations.sizes[i].tolist(), image_id=annotations.image_ids[i])
        except DataError as error:
            differs = "but the JSON says" in str(error)
            kind = "picture size differs" if differs else "unreadable picture"
            faults.append(Fault(kind, str(error)))
    for fault in faults:
        print(fault.text, file=out)

    # last, where it is still to be seen: what is there, and how often what is wrong
    objects = annotations.labels[~annotations.crowd]
    per_class = torch.bincount(objects, minlength=len(annotations.class_names)).tolist()
    print(f"{json_file}: {len(annotations)} pictures "
          f"({int((annotations.first.diff() == 0).sum())} without boxes), "
          f"{len(annotations.boxes)} usable boxes, "
          f"{int(annotations.crowd.sum())} of them crowd regions", file=out)
    for name, count in zip(annotations.class_names, per_class):
        print(f"  {name}: {count}", file=out)
    print(f"{len(faults)} fault(s)", file=out)
    for kind, count in Counter(fault.kind for fault in faults).most_common():
        print(f"  {kind}: {count}", file=out)
    return len(faults)


def voc2coco(folder, out):
    """Pascal VOC (Annotations/*.xml, ImageSets/Main/SPLIT.txt) to out/SPLIT.json, one per split.

    Coordinates are taken as edges, as labelling tools write them: width = xmax - xmin.  `difficult`
    objects become crowd regions: never a target, ignored in evaluation.  Faulty boxes are carried
    over as they are, for the check to find.  Returns the files written.
    """
    folder, out = Path(folder), Path(out)
    splits = sorted((folder / "ImageSets" / "Main").glob("*.txt"))
    if not splits:
        raise DataError(f"{folder}: not a Pascal VOC folder: ImageSets/Main/*.txt is missing")

    # a line is a name; in the lists of one class that VOC ships beside them (dog_train.txt) also
    # 1, 0 or -1: those are left out
    names, pictures = {}, {}
    for split in splits:
        lines = [line.split() for line in split.read_text().splitlines() if line.strip()]
        if all(len(words) == 1 for words in lines):
            names[split] = [words[0] for words in lines]
    for split in names:
        for name in names[split]:
            if name not in pictures:
                pictures[name] = voc_picture(folder / "Annotations" / f"{name}.xml", name, split)

    # class ids are ranks of names, over all splits, so that the files of one folder agree
    classes = sorted({kind for _, objects in pictures.values() for kind, *_ in objects})
    written = []
    out.mkdir(parents=True, exist_ok=True)
    for split in names:
        images, annotations = [], []
        for name in names[split]:
            image, objects = pictures[name]
            images.append({"id": len(images) + 1, **image})
            for kind, x1, y1, x2, y2, difficult in objects:
                w, h = x2 - x1, y2 - y1
                annotations.append({"id": len(annotations) + 1, "image_id": len(images),
                                    "category_id": classes.index(kind) + 1, "iscrowd": difficult,
                                    "bbox": [x1, y1, w, h], "area": w * h})
        categories = [{"id": n + 1, "name": name} for n, name in enumerate(classes)]
        file = out / f"{split.stem}.json"
        file.write_text(json.dumps({"images": images, "annotations": annotations,
                                    "categories": categories}))
        written.append(str(file))
    return written


def voc_picture(xml, name, split):
    """A VOC file: {file_name, height, width}, and objects (class, x1, y1, x2, y2, difficult)."""
    try:
        root = ElementTree.parse(xml).getroot()
        image = {"file_name": root.findtext("filename"),
                 **{k: int(root.find("size").findtext(k)) for k in ("height", "width")}}
        objects = []
        for o in root.iter("object"):
            box = [float(o.find("bndbox").findtext(k)) for k in ("xmin", "ymin", "xmax", "ymax")]
            objects.append((o.findtext("name"), *box, int(o.findtext("difficult", "0"))))
    except (OSError, ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{xml}: not a readable VOC annotation ({error}); image {name} "
                        f"of {split.name}") from None
    if any(kind is None for kind, *_ in objects):
        raise DataError(f"{xml}: an object has no name; image {name} of {split.name}")
    return image, objects


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    c = commands.add_parser("check", help="report everything wrong with a data set, in one pass")
    c.add_argument("--json", required=True, metavar="F",
                   help="annotations in COCO format, or CrowdHuman's .odgt")
    c.add_argument("--images", required=True, metavar="DIR",
                   help="folder that file_name is relative to, or that holds ID.jpg")
    c = commands.add_parser("voc2coco", help="convert Pascal VOC XML annotations to COCO JSON")
    c.add_argument("folder", metavar="VOC_FOLDER",
                   help="holds Annotations/, JPEGImages/, ImageSets/Main/")
    c.add_argument("--out", required=True, metavar="DIR",
                   help="one SPLIT.json per ImageSets/Main/SPLIT.txt")
    args = parser.parse_args()
    try:
        if args.command == "check":
            sys.exit(1 if check(args.json, args.images) else 0)
        print("\n".join(f"wrote {file}" for file in voc2coco(args.folder, args.out)))
    except (DataError, OSError) as error:
        print(f"annotations.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
