"""Annotation files, read without trusting them: COCO's, CrowdHuman's; and their check.

    python annotations.py check --json train.json --images train2017   all that is wrong with it
    python annotations.py voc2coco FOLDER --out DIR                    Pascal VOC XML to COCO JSON
    python annotations.py yolo2coco FOLDER --out DIR                   YOLO text to COCO JSON

A file is read once, into flat tensors that serve training (`boxes`, clipped) and evaluation
(`xywh`, `area`, and CrowdHuman's full boxes).  Whatever is wrong with it is a Fault, one sentence
that names file, image and annotation.  Training and evaluation stop at the first, the check lists
them all.
"""
import argparse
import contextlib
import json
import os
import shlex
import sys
from array import array
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from tqdm import tqdm

import labels
import runs
from pictures import DataError, load_picture, picture_size, read_text


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
    category_ids: list          # C, the file's own ids (COCO: 1...90 with gaps), None: none there

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

    def only(self, pictures):
        """The Annotations of some pictures alone.  pictures: (N,) bool"""
        counts = self.first.diff()
        boxes = pictures.repeat_interleave(counts)
        part = replace(
            self,
            image_ids=[i for i, wanted in zip(self.image_ids, pictures) if wanted],
            file_names=[name for name, wanted in zip(self.file_names, pictures) if wanted],
            sizes=self.sizes[pictures],
            first=starts(counts[pictures]),
            boxes=self.boxes[boxes],
            labels=self.labels[boxes],
            crowd=self.crowd[boxes],
            xywh=self.xywh[boxes],
            area=self.area[boxes])
        if self.full_boxes is None:
            return part
        counts = self.full_first.diff()
        boxes = pictures.repeat_interleave(counts)
        return replace(part, full_boxes=self.full_boxes[boxes], full_ignore=self.full_ignore[boxes],
                       full_first=starts(counts[pictures]))


@dataclass
class Fault:
    kind: str                   # what the counts of the check are grouped by
    text: str                   # one sentence naming file, image and annotation
    box: bool = False           # true: --drop-bad-boxes can live with it (--drop-bad: with all)
    extent: bool = False        # true: four finite numbers, but nothing lies in the picture


class Faults(list):
    """The Faults of one file, in its order; every text begins with the file's name."""

    def __init__(self, file):
        super().__init__()
        self.file = file

    def add(self, kind, text, box=False, extent=False):
        self.append(Fault(kind, f"{self.file}: {text}", box, extent))


def read_json(file):
    text = read_text(file)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:       # numbers of 5,000 digits, absurd nesting
        raise DataError(f"{file}: not valid JSON ({error}); download or export it again") from None


def is_number(value):
    """A number that is finite and of sensible size; NaN compares false, so it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 1e30


def is_side(value):
    """What can be a picture's height or width."""
    return is_number(value) and 1 <= value < 2 ** 31


def is_box(value):
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def is_id(value):
    """Text, or a whole number; some tools write 1.0 for 1."""
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def has_id(record):
    return isinstance(record, dict) and is_id(record.get("id"))


def plain(i):
    """An id as it is written out: 1 for 1.0."""
    return int(i) if isinstance(i, float) else i


# iscrowd and ignore, as tools write them
SAID = {**dict.fromkeys(("0", "0.0", "false", "no", "none", ""), False),
        **dict.fromkeys(("1", "1.0", "true", "yes"), True)}


def is_said(value):
    """Whether a mark like iscrowd is set; None if it is no such mark."""
    return SAID.get(str(value).lower())


def escapes(name):
    """True if joining `name` to the image folder could leave that folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    if not path.parts:
        return True
    return path.is_absolute() or ".." in path.parts or path.parts[0].endswith(":")


def below(name, image_dir):
    """A file name as a path below the folder of pictures, None if it leads out of the folder.

    Backslashes, as Windows has them, and absolute paths into the folder are understood.
    """
    if not isinstance(name, str):
        return None
    if "\\" in name and not os.path.isfile(Path(image_dir) / name):
        name = name.replace("\\", "/")
    if escapes(name):
        for folder in (os.path.abspath(image_dir), os.path.realpath(image_dir)):
            start = Path(folder).as_posix() + "/"
            if name.startswith(start):
                name = name[len(start):]
    return None if escapes(name) else name


def cut(x, y, w, h, height, width):
    """What of a box lies in its picture, x1, y1, x2, y2; None if less than 1e-5 (as detectron2)."""
    x1, y1 = max(x, 0), max(y, 0)
    x2, y2 = min(x + w, width), min(y + h, height)
    return (x1, y1, x2, y2) if x2 - x1 > 1e-5 and y2 - y1 > 1e-5 else None


def require_folder(image_dir):
    if image_dir is not None and not Path(image_dir).is_dir():
        raise DataError(f"{image_dir}: no such folder of pictures; check the path")


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
        first=starts(count(table[:, 0], len(images))),
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
            faults.add("duplicate category id", f"category id {category['id']!r} is listed twice")
        else:
            i, name = plain(category["id"]), category.get("name")
            # on one line, and with nothing that cannot be written as UTF-8
            name = labels.one_line(str(i if name is None else name)) or str(i)
            names[i] = name.encode(errors="backslashreplace").decode()
    try:
        return {i: names[i] for i in sorted(names)}
    except TypeError:
        raise DataError(f"{faults.file}: category ids mix numbers and text; "
                        f"use whole numbers") from None


def coco_images(images, image_dir, faults):
    """{image id: (file name, height, width)} of the usable pictures, in the file's order."""
    if len({type(plain(image["id"])) for image in images if has_id(image)}) > 1:
        raise DataError(f"{faults.file}: image ids mix numbers and text; use whole numbers")
    usable = {}
    for image in images:
        if not has_id(image):
            faults.add("image without id", f"image entry {str(image)[:80]} has no id")
            continue
        i = plain(image["id"])
        if i in usable:
            faults.add("duplicate image id", f"image id {i!r} is listed twice")
        elif image_dir is None:                     # no picture is opened, no box cut
            usable[i] = (str(image.get("file_name")), 10 ** 9, 10 ** 9)
        else:
            picture = coco_picture(image, image_dir, faults)
            if picture:
                usable[i] = picture
    return usable


def coco_picture(image, image_dir, faults):
    """(file name, height, width) of an entry of `images`; None if it is at fault."""
    where, name = f"image {plain(image['id'])!r}", below(image.get("file_name"), image_dir)
    if name is None:
        faults.add("bad file name",
                   f"{where}: file_name {image.get('file_name')!r} is missing or leads out of the "
                   f"folder of pictures; give the part below that folder")
        return None
    path = Path(image_dir) / name
    size = image.get("height"), image.get("width")

    # a missing picture is a fault, but its boxes are known: the check goes on with them
    if not os.path.isfile(path):
        faults.add("missing picture", f"{where}: the picture {path} does not exist")
        if not all(size):
            return None
    elif not all(size):                             # absent or 0: the picture knows
        try:
            size = picture_size(path)
        except DataError as error:
            faults.add("unreadable picture", f"{where}: {error}")
            return None
    if not all(map(is_side, size)):
        faults.add("bad image size",
                   f"{where} ({name}): height and width must be numbers of at least 1, or be left "
                   f"out")
        return None
    return name, int(size[0]), int(size[1])


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
        named = repr(plain(i))[:80] if i is not None else f"number {n}"
        where = f"image {plain(image_id)!r:.80}, annotation {named}"
        if is_id(i):
            if i in seen:
                faults.add("duplicate annotation id", f"{where}: the annotation id is used twice")
                continue
            seen.add(i)

        # what does it point to?
        if not is_id(image_id) or image_id not in listed:
            faults.add("unknown image", f"{where}: no such image is listed")
            continue
        if image_id not in images:
            continue                                # its image is already reported
        if not is_id(category) or category not in label_of:
            faults.add("unknown category",
                       f"{where}: category id {category!r:.80} is not in 'categories'")
            continue
        crowd = is_said(annotation.get("iscrowd"))
        if crowd is None:
            faults.add("iscrowd is neither 0 nor 1",
                       f"{where}: iscrowd {annotation['iscrowd']!r:.80} must be 0 or 1")
            continue

        # what of it lies in the picture?
        _, height, width = images[image_id]
        inside = coco_box(annotation.get("bbox"), where, height, width, faults)
        if inside:
            x, y, w, h = annotation["bbox"]
            area = annotation.get("area")
            rows.extend((index_of[image_id], *inside, label_of[category], crowd, x, y, w, h,
                         area if is_number(area) and area >= 0 else w * h))

    return by_picture(rows, 12)


def coco_box(box, where, height, width, faults):
    """A bbox cut to its picture, x1, y1, x2, y2; None if it is at fault."""
    if not is_box(box):
        faults.add("box is not four finite numbers",
                   f"{where}: bbox {box!r:.80} must be four finite numbers x, y, width, height",
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


def count(index, pictures):
    """How many rows each picture has, (pictures,), from the rows' pictures."""
    return torch.bincount(index.long(), minlength=pictures)


def starts(counts):
    """Where each picture's rows start, (N + 1,), from how many each has, (N,)."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


# ------------------------------------------------------------------------------------------------
# CrowdHuman: one JSON object per line, full boxes, no picture sizes (Section 5.1)
# ------------------------------------------------------------------------------------------------

def odgt_lines(file, boxes):
    """The lines of an .odgt file that are not blank: (number, record, (kind of fault, its words)).

    A good record has an ID that could name a picture, not used before, and the list `boxes`; its
    kind of fault and words are "".  Raises DataError.
    """
    seen = set()
    for number, line in enumerate(read_text(file).splitlines(), 1):
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
        first=starts(count(inside[:, 0], len(ids))),
        boxes=boxes,
        labels=torch.zeros(len(boxes), dtype=torch.long),
        crowd=inside[:, 5].bool(),
        class_names=["person"],
        category_ids=[1],
        xywh=xywh,
        area=xywh[:, 2] * xywh[:, 3],
        full_boxes=full[:, 1:5].clone(),
        full_ignore=full[:, 5].bool(),
        full_first=starts(count(full[:, 0], len(ids)))), faults


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
    if not all(map(is_side, size)):
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
        ignore = is_said(extra.get("ignore"))
        if ignore is None:
            faults.add("ignore is neither 0 nor 1",
                       f"{where}, box {n}: ignore {extra['ignore']!r:.80} must be 0 or 1")
            continue
        ignore = ignore or entry["tag"] != "person"

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

def read_annotations(file, image_dir, drop_bad_boxes=False, cache=None, drop_bad=False):
    """Annotations of a COCO-format JSON, or of a CrowdHuman .odgt.

    Raises DataError with the first fault there is.
    With drop_bad_boxes, boxes without extent, outside the picture or with NaN are left out and
    counted on standard error instead; with drop_bad whatever is at fault.  Pictures are opened, and
    their sizes compared, when they are first needed; with drop_bad, and by
    `python annotations.py check`, all at once.
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

    if drop_bad:
        annotations = annotations.only(decodable(annotations, faults))
        if not len(annotations):
            raise DataError(f"{file}: --drop-bad leaves no picture of it; the first fault: "
                            f"{faults[0].text}")
        tell_dropped(faults)
        return annotations
    dropped = [f for f in faults if f.box and drop_bad_boxes]
    for f in faults:
        if not (f.box and drop_bad_boxes):
            paths = f"--json {shlex.quote(str(file))} --images {shlex.quote(str(image_dir))}"
            raise DataError(f"{f.text}; `python annotations.py check {paths}` lists all of its "
                            f"{len(faults)} fault(s), --drop-bad leaves out what is at fault")
    if dropped:
        print(f"{file}: dropped {len(dropped)} bad box(es), the first: {dropped[0].text}",
              file=sys.stderr)
    return annotations


def decodable(annotations, faults):
    """Decodes all pictures.  Returns which are good, (N,) bool; the others become Faults."""
    good = torch.ones(len(annotations), dtype=torch.bool)
    for i in tqdm(range(len(annotations)), "opening pictures", leave=False, disable=None):
        path, size = annotations.path(i), annotations.sizes[i].tolist()
        good[i] = os.path.isfile(path)              # else its Fault is there already
        try:
            if good[i]:
                load_picture(path, *size, image_id=annotations.image_ids[i])
        except DataError as error:
            good[i] = False
            differs = "but the JSON says" in str(error)
            faults.append(Fault("picture size differs" if differs else "unreadable picture",
                                str(error)))
    return good


def tell_dropped(faults):
    """Says on standard error what --drop-bad has left out."""
    if faults:
        kinds = Counter(fault.kind for fault in faults).most_common()
        told = ", ".join(f"{number} x {kind}" for kind, number in kinds)
        print(f"{faults.file}: left out {len(faults)} record(s) at fault: {told}", file=sys.stderr)
        for fault in faults[:20]:
            print(f"  {fault.text}", file=sys.stderr)
        if len(faults) > 20:
            print(f"  ... and {len(faults) - 20} more, which `python annotations.py check` lists",
                  file=sys.stderr)


def with_classes(annotations, class_names):
    """The same with labels by the place of their name in `class_names`, those of the training file.

    A class that the file lacks has the category id None.  Raises DataError for one that is not in
    `class_names`.
    """
    if annotations.class_names == class_names:
        return annotations
    unknown = [name for name in annotations.class_names if name not in class_names]
    if unknown:
        raise DataError(f"{annotations.json_file}: the detector does not know its class(es) "
                        f"{', '.join(map(repr, unknown))}, only {class_names}; give data with the "
                        f"same classes, or train with a file that lists them")
    places = [class_names.index(name) for name in annotations.class_names]
    category_ids = [None] * len(class_names)
    for place, category in zip(places, annotations.category_ids):
        category_ids[place] = category
    return replace(annotations, labels=torch.tensor(places, dtype=torch.long)[annotations.labels],
                   class_names=list(class_names), category_ids=category_ids)


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
    runs.write_json(cache, {"images": str(Path(image_dir).resolve()), "sizes": sizes})


# ------------------------------------------------------------------------------------------------
# the check
# ------------------------------------------------------------------------------------------------

def check(json_file, image_dir, out=None):
    """Print every fault of a data set, then counts by kind.  Returns the number of faults."""
    parse = parse_odgt if str(json_file).endswith(".odgt") else parse_coco
    annotations, faults = parse(json_file, image_dir)
    decodable(annotations, faults)
    suspect(annotations, faults)
    for fault in faults:
        print(fault.text, file=out)

    # last, where it is still to be seen: what is there, and how often what is wrong
    objects = annotations.labels[~annotations.crowd]
    per_class = torch.bincount(objects, minlength=len(annotations.class_names)).tolist()
    print(f"{json_file}: {len(annotations)} pictures "
          f"({int((annotations.first.diff() == 0).sum())} without boxes), "
          f"{len(annotations.boxes)} usable boxes, "
          f"{int(annotations.crowd.sum())} of them crowd regions", file=out)
    for name, number in zip(annotations.class_names, per_class):
        print(f"  {name}: {number}", file=out)
    print(f"{len(faults)} fault(s)", file=out)
    for kind, number in Counter(fault.kind for fault in faults).most_common():
        print(f"  {kind}: {number}", file=out)
    return len(faults)


def suspect(annotations, faults):
    """Adds what no box alone gives away: boxes in another form, a class that is listed twice."""
    x, y, w, h = annotations.xywh.T
    height, width = annotations.sizes.repeat_interleave(annotations.first.diff(), 0).T
    # a pixel beyond is rounding
    beyond = ((x + w > width + 1) | (y + h > height + 1)).double().mean()
    fit_as_corners = ((w > x) & (h > y) & (w <= width) & (h <= height)).double().mean()
    if beyond > 0.5 or beyond > 0.1 and fit_as_corners > 0.9:
        faults.add("boxes look like corners",
                   f"{100 * beyond:.0f}% of the boxes reach beyond their picture, as if they were "
                   f"x1, y1, x2, y2; bbox must be x, y, width, height")
    if len(w) and max(w.max(), h.max()) <= 1:
        faults.add("boxes below one pixel",
                   f"all {len(w)} boxes are below one pixel, as if in shares of the picture, 0 to "
                   f"1; bbox must be in pixels")
    for name, number in Counter(annotations.class_names).items():
        if number > 1:
            faults.add("duplicate category name",
                       f"the category name {name!r} is listed {number} times, as {number} classes")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    c = commands.add_parser("check", help="report everything wrong with a data set, in one pass")
    c.add_argument("--json", required=True, metavar="F",
                   help="annotations in COCO format, or CrowdHuman's .odgt")
    c.add_argument("--images", required=True, metavar="DIR",
                   help="folder that file_name is relative to, or that holds ID.jpg")

    for name, make, holds in (
            ("voc2coco", "Pascal VOC XML", "the XML files, in Annotations/ or elsewhere, pictures, "
             "and perhaps ImageSets/Main/SPLIT.txt"),
            ("yolo2coco", "YOLO text", "NAME.txt beside NAME.jpg, or in labels/ and images/; and "
             "data.yaml, or a file of names like classes.txt")):
        c = commands.add_parser(name, help=f"convert {make} annotations to COCO JSON")
        c.add_argument("folder", metavar="FOLDER", help=holds)
        c.add_argument("--out", required=True, metavar="DIR",
                       help="one SPLIT.json per split; without splits all.json")
        c.add_argument("--val-share", type=float, metavar="X",
                       help="where there are no splits: this share of the pictures, drawn at "
                            "random, to val.json, the others to train.json")
        c.add_argument("--seed", type=runs.at_least(0), default=0, metavar="N",
                       help="of that draw (default 0)")

    args = parser.parse_args()
    with runs.faults_told("annotations.py", DataError):
        if args.command == "check":
            sys.exit(1 if check(args.json, args.images) else 0)
        convert = labels.voc2coco if args.command == "voc2coco" else labels.yolo2coco
        written = convert(args.folder, args.out, args.val_share, args.seed)
        for file, pictures in written.items():
            print(f"wrote {file}, of the pictures in {pictures}")


if __name__ == "__main__":
    main()
