"""Reading: COCO-format and CrowdHuman annotations and their pictures in, batches out, and a check of any data set.

    python data.py check --json train.json --images train2017      everything wrong with a data set
    python data.py voc2coco VOC_FOLDER --out DIR                   Pascal VOC XML to COCO JSON

How a picture becomes part of a batch:

    read_annotations -> Annotations (flat tensors) -> Pictures[epoch, index] -> augment -> collate -> Batch

Order and augmentation are functions of (seed, epoch, index) alone, so the number of worker
processes, of GPUs or of interruptions changes nothing.  Pixels stay uint8 until they are on the
device, where the model normalises them.

A target is a dict: boxes (G, 4) xyxy in pixels of the resized picture, labels (G,) in 0...C-1,
image_id, size (2,) resized height and width, original_size (2,), ignore (I, 4) crowd regions in
pixels of the resized picture.  A picture without objects is an ordinary picture.
"""
import argparse
import contextlib
import json
import os
import signal
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch.utils.data import DataLoader, Dataset

import scenes


class DataError(ValueError):
    """Something is wrong with a file the user gave: one sentence that names it and what to do."""


# ------------------------------------------------------------------------------------------------
# annotations
# ------------------------------------------------------------------------------------------------

@dataclass
class Annotations:
    """One data set as flat tensors: N pictures, M boxes; boxes of picture i are first[i]:first[i+1]."""
    json_file: str
    image_dir: str
    image_ids: list             # N, as in the file (COCO: integers)
    file_names: list            # N
    sizes: torch.Tensor         # (N, 2) height, width
    first: torch.Tensor         # (N + 1,)
    boxes: torch.Tensor         # (M, 4) xyxy, clipped to the picture
    labels: torch.Tensor        # (M,) contiguous class 0...C-1: the rank of the category id
    crowd: torch.Tensor         # (M,) bool: never a training target, "ignore" in evaluation
    rows: torch.Tensor          # (M,) which entry of the file's "annotations" a box is
    class_names: list           # C
    category_ids: list          # C, the file's own ids (COCO: 1...90 with gaps)

    def __len__(self):
        return len(self.image_ids)

    def path(self, i):
        return str(Path(self.image_dir) / self.file_names[i])


@dataclass
class Fault:
    kind: str                   # what the counts of the check are grouped by
    text: str                   # one sentence naming file, image and annotation
    box: bool = False           # true: --drop-bad-boxes can live with it
    extent: bool = False        # true: four finite numbers, but nothing of the box lies in the picture


def read_json(file):
    try:
        with open(file, encoding="utf-8") as stream:
            return json.load(stream)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError) as error:       # broken JSON, broken UTF-8, absurd nesting
        raise DataError(f"{file}: not valid JSON ({error}); download or export it again") from None


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30      # excludes NaN too


def is_id(value):
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def escapes(name):
    """True if joining `name` to the image folder could leave that folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or path.parts[0].endswith(":") if path.parts else True


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
                        f"'images', 'annotations' and 'categories'; result files go to evaluate.py results")
    if not record["images"]:
        raise DataError(f"{json_file}: the data set is empty: it lists no images")
    if image_dir is not None and not Path(image_dir).is_dir():
        raise DataError(f"{image_dir}: no such folder of pictures; check --images (or --data-dir)")
    faults = []

    def fault(kind, text, box=False, extent=False):
        faults.append(Fault(kind, f"{json_file}: {text}", box, extent))

    names = {}                                               # category id -> name
    for category in record["categories"]:
        if not isinstance(category, dict) or not is_id(category.get("id")):
            fault("category without id", f"category {category!r} has no id")
        elif category["id"] in names:
            fault("duplicate category id", f"category id {category['id']} is listed twice")
        else:
            names[category["id"]] = str(category.get("name", category["id"]))
    try:
        category_ids = sorted(names)
    except TypeError:
        raise DataError(f"{json_file}: category ids mix numbers and text; use whole numbers") from None
    if len({type(image.get("id")) for image in record["images"] if isinstance(image, dict) and is_id(image.get("id"))}) > 1:
        raise DataError(f"{json_file}: image ids mix numbers and text; use whole numbers")
    label_of = {category: label for label, category in enumerate(category_ids)}

    images = {}                                              # image id -> (file name, height, width)
    for image in record["images"]:
        if not isinstance(image, dict) or not is_id(image.get("id")):
            fault("image without id", f"image entry {str(image)[:80]} has no id")
            continue
        i, name = image["id"], image.get("file_name")
        if i in images:
            fault("duplicate image id", f"image id {i} is listed twice")
        elif image_dir is None:
            images[i] = (str(name), 10 ** 9, 10 ** 9)
        elif not isinstance(name, str) or not name or escapes(name):
            fault("bad file name", f"image {i}: file_name {name!r} is missing or leaves the image folder; "
                                   f"give a path below --images")
        elif not all(is_number(image.get(k)) and 1 <= image[k] < 2 ** 31 for k in ("height", "width")):
            fault("bad image size", f"image {i} ({name}): height and width must be numbers of at least 1")
        else:
            images[i] = (name, int(image["height"]), int(image["width"]))
            if not os.path.isfile(Path(image_dir) / name):
                fault("missing picture", f"image {i}: the picture {Path(image_dir) / name} does not exist")

    of_image = {i: [] for i in images}                       # image id -> rows (box, label, crowd)
    listed = {image.get("id") for image in record["images"] if isinstance(image, dict)
              and is_id(image.get("id"))}
    seen = set()
    for n, annotation in enumerate(record["annotations"]):
        if not isinstance(annotation, dict):
            fault("broken annotation", f"annotation number {n} is not an object")
            continue
        i, image_id, category = (annotation.get(k) for k in ("id", "image_id", "category_id"))
        where = f"image {image_id}, annotation {i if i is not None else f'number {n}'}"
        if i is not None and is_id(i):
            if i in seen:
                fault("duplicate annotation id", f"{where}: the annotation id is used twice")
            seen.add(i)
        if not is_id(image_id) or image_id not in listed:
            fault("unknown image", f"{where}: no such image is listed")
            continue
        if image_id not in images:
            continue                                         # its image is already reported
        if not is_id(category) or category not in label_of:
            fault("unknown category", f"{where}: category id {category!r} is not in 'categories'")
            continue
        box = annotation.get("bbox")
        if not (isinstance(box, list) and len(box) == 4 and all(is_number(v) for v in box)):
            fault("box is not four finite numbers",
                  f"{where}: bbox {box!r} must be four finite numbers x, y, width, height", box=True)
            continue
        x, y, w, h = box
        if w <= 0 or h <= 0:
            fault("box without extent", f"{where}: bbox {box} has no extent; width and height must be "
                                        f"positive (--drop-bad-boxes leaves such boxes out)", box=True, extent=True)
            continue
        height, width = images[image_id][1:]
        x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
        if x2 - x1 <= 1e-5 or y2 - y1 <= 1e-5:
            fault("box outside the picture", f"{where}: bbox {box} lies outside the picture of {width} x "
                                             f"{height} (--drop-bad-boxes leaves such boxes out)", box=True, extent=True)
            continue
        of_image[image_id].append((x1, y1, x2, y2, label_of[category], bool(annotation.get("iscrowd", 0)), n))

    table = torch.tensor([row for i in images for row in of_image[i]], dtype=torch.float64).reshape(-1, 7)
    annotations = Annotations(
        str(json_file), str(image_dir), list(images), [v[0] for v in images.values()],
        torch.tensor([v[1:] for v in images.values()], dtype=torch.long).reshape(-1, 2),
        torch.tensor([0] + [len(of_image[i]) for i in images]).cumsum(0),
        table[:, :4].float(), table[:, 4].long(), table[:, 5].bool(), table[:, 6].long(),
        [names[c] for c in category_ids], category_ids)
    return annotations, faults


# ------------------------------------------------------------------------------------------------
# CrowdHuman: one JSON object per line, full boxes, no picture sizes (Section 5.1)
# ------------------------------------------------------------------------------------------------

def odgt_lines(file, boxes):
    """The lines of an .odgt file that are not blank: (number, record, (kind of fault, what is wrong)), nothing being "".

    A good record has an ID that could name a picture, not used before, and the list `boxes`.  Raises DataError.
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
        record, problem = None, ("", "")
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            problem = "broken line", f"is not valid JSON ({error})"
        else:
            name = record.get("ID") if isinstance(record, dict) else None
            if not isinstance(name, str) or not name or escapes(name) or not isinstance(record.get(boxes), list):
                problem = "missing field", f"lacks an ID that names a picture, or the list {boxes}"
            elif name in seen:
                problem = "duplicate ID", f"uses ID {name} a second time"
            else:
                seen.add(name)
        yield number, record, problem


def parse_odgt(odgt_file, image_dir, sizes=None):
    """Read a CrowdHuman annotation file without trusting it: its full boxes (fbox).

    sizes: {ID: (height, width)} where a line does not say; what is still missing is read from the pictures and added.
    Returns Annotations of everything usable, the list of Faults, and per picture the boxes as the file gives them, (n, 4)
    xyxy, also outside the picture, with what to ignore, (n,) bool.  Raises DataError only if nothing can be read at all.

    As published, whatever carries extra.ignore is never a target and is ignored in evaluation; so is, as in CrowdDet,
    whatever is not tagged a person (the published masks all carry ignore).
    """
    sizes, faults = {} if sizes is None else sizes, []

    def fault(kind, text, box=False, extent=False):
        faults.append(Fault(kind, f"{odgt_file}: {text}", box, extent))

    if image_dir is not None and not Path(image_dir).is_dir():
        raise DataError(f"{image_dir}: no such folder of pictures; check --images (or --data-dir)")
    ids, names, given, table, raw = [], [], [], [], {}
    for number, record, (kind, wrong) in odgt_lines(odgt_file, "gtboxes"):
        if wrong:
            fault(kind, f"line {number} {wrong}")
            continue
        name = record["ID"]
        size = record.get("height"), record.get("width")
        file_name = name + ".jpg"
        if image_dir is not None and not os.path.isfile(Path(image_dir) / file_name):
            file_name = name + ".png"
            if not os.path.isfile(Path(image_dir) / file_name):
                fault("missing picture", f"line {number}, ID {name}: neither {name}.jpg nor {name}.png is in {image_dir}")
                continue
        if not all(is_number(v) and v >= 1 for v in size):
            size = sizes.get(name)
        if size is None:
            if image_dir is None:
                fault("missing field", f"line {number}, ID {name}: its height and width are in neither file; give the folder of its picture, --images")
                continue
            try:
                size = picture_size(Path(image_dir) / file_name)
            except DataError as error:
                fault("unreadable picture", f"line {number}, ID {name}: {error}")
                continue
        sizes[name] = tuple(map(int, size))
        height, width = sizes[name]
        boxes = []
        for n, entry in enumerate(record["gtboxes"]):
            where = f"line {number}, ID {name}, box {n}"
            box = entry.get("fbox") if isinstance(entry, dict) else None
            if not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box))):
                fault("box is not four finite numbers", f"{where}: fbox {box!r} must be four finite numbers x, y, width, height", box=True)
                continue
            if entry.get("tag") not in ("person", "mask"):
                fault("unknown tag", f"{where}: the tag {entry.get('tag')!r} is neither person nor mask")
                continue
            extra = entry.get("extra") if isinstance(entry.get("extra"), dict) else {}
            ignore = entry["tag"] != "person" or bool(extra.get("ignore", 0))
            x, y, w, h = box
            boxes.append((x, y, x + w, y + h, ignore))
            x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
            if x2 - x1 > 1e-5 and y2 - y1 > 1e-5:
                table.append((x1, y1, x2, y2, len(ids), ignore, n))
            elif not ignore:
                fault("box without extent in the picture", f"{where}: fbox {box} has no extent within the picture of {width} x {height} "
                                                           f"(--drop-bad-boxes leaves such boxes out)", box=True, extent=True)
        ids.append(name)
        names.append(file_name)
        given.append(sizes[name])
        boxes = np.array(boxes, np.float64).reshape(-1, 5)
        raw[name] = boxes[:, :4], boxes[:, 4].astype(bool)
    if not ids and not faults:
        raise DataError(f"{odgt_file}: the data set is empty: it has no lines")
    table = torch.tensor(table, dtype=torch.float64).reshape(-1, 7)
    first = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(table[:, 4].long(), minlength=len(ids)).cumsum(0)])
    return Annotations(str(odgt_file), str(image_dir), ids, names, torch.tensor(given, dtype=torch.long).reshape(-1, 2), first,
                       table[:, :4].float(), torch.zeros(len(table), dtype=torch.long), table[:, 5].bool(), table[:, 6].long(),
                       ["person"], [1]), faults, raw


def read_annotations(file, image_dir, drop_bad_boxes=False, cache=None):
    """Annotations of a COCO-format JSON, or of a CrowdHuman .odgt.  Raises DataError with the first fault there is.

    With drop_bad_boxes, boxes without extent, outside the picture or with NaN are left out and
    counted on standard error instead.  Pictures are opened, and their sizes compared, when they
    are first needed (`python data.py check` opens them all).
    cache: a file that keeps the sizes an .odgt does not hold, so that pictures are opened for them only once.
    """
    if str(file).endswith(".odgt"):
        known, folder = {}, str(Path(image_dir).resolve())
        if cache is not None and Path(cache).is_file():              # one that is broken, or of other pictures, is made anew
            with contextlib.suppress(ValueError, OSError, TypeError, AttributeError, KeyError):
                kept = json.loads(Path(cache).read_text())
                if kept["images"] == folder:
                    known = {name: (int(h), int(w)) for name, (h, w) in kept["sizes"].items()}
        sizes = dict(known)
        annotations, faults, _ = parse_odgt(file, image_dir, sizes)
        if cache is not None and len(sizes) > len(known):
            Path(cache).parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(f"{cache}.{os.getpid()}")               # several processes may write the same
            temporary.write_text(json.dumps({"images": folder, "sizes": sizes}))
            temporary.replace(cache)
    else:
        annotations, faults = parse_coco(file, image_dir)
    dropped = [f for f in faults if f.box and drop_bad_boxes]
    for f in faults:
        if not (f.box and drop_bad_boxes):
            raise DataError(f"{f.text}; `python data.py check --json {file} --images {image_dir}` "
                            f"lists all of its {len(faults)} fault(s)")
    if dropped:
        print(f"{file}: dropped {len(dropped)} bad box(es), the first: {dropped[0].text}", file=sys.stderr)
    return annotations


# ------------------------------------------------------------------------------------------------
# pictures
# ------------------------------------------------------------------------------------------------

def picture_size(path):
    """Height and width of a picture file, upright, from its header alone.  Raises DataError."""
    try:
        with Image.open(path) as picture:
            turned = picture.getexif().get(0x0112, 1) >= 5           # EXIF orientations that exchange the sides
            return picture.size if turned else picture.size[::-1]
    except Exception as error:                                       # Pillow raises many kinds for broken files
        raise DataError(f"{path}: the picture cannot be read ({error}); fetch it again") from None


def load_picture(path, height=None, width=None, image_id=None):
    """A picture file as upright RGB (PIL), whatever it holds: grey, palette, CMYK, alpha, 16 bit, EXIF.

    Raises DataError if it cannot be decoded to its end or is not of the given size.  Decoding is
    Pillow's; torchvision's own image reading is deprecated.
    """
    which = path if image_id is None else f"{path} (image {image_id})"
    try:
        with Image.open(path) as picture:
            picture = ImageOps.exif_transpose(picture)       # decodes the whole file
            if picture.mode.startswith("I") or picture.mode == "F":       # 16 or 32 bits, one channel
                grey = np.asarray(picture, np.float64)
                grey = grey / 257 if picture.mode.startswith("I;16") or grey.max() > 255 else grey
                picture = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
            picture = picture.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{which}: the picture does not exist; check the image folder") from None
    except Exception as error:                               # Pillow raises many kinds for broken files
        raise DataError(f"{which}: the picture cannot be decoded ({error}); fetch it again or take it "
                        f"out of the JSON") from None
    if height is not None and picture.size != (width, height):
        raise DataError(f"{which}: the picture is {picture.width} x {picture.height} (width x height, after "
                        f"its EXIF rotation) but the JSON says {width} x {height}; correct one of them")
    return picture


def resized_size(height, width, shortest, longest, round_down=False):
    """Size after scaling so that the shorter side is `shortest`, unless the longer exceeds `longest`.

    The published detectors round in two ways.  detectron2, and OneNet and Sparse R-CNN built on it:
    one scale for both sides, rounded half up.  DETR and Deformable DETR (`round_down`): the shorter
    side is exact, first limited to round(longest * short / long), the longer is rounded down.
    """
    short, long = min(height, width), max(height, width)
    if round_down:
        if long / short * shortest > longest:
            shortest = max(1, int(round(longest * short / long)))
        other = int(shortest * long / short)
        return (shortest, other) if height <= width else (other, shortest)
    scale = shortest / short
    new = [shortest, scale * width] if height < width else [scale * height, shortest]
    if max(new) > longest:                   # in two steps, as published: it decides where a side falls on a half
        scale = longest / max(new)
        new = [side * scale for side in new]
    return max(1, int(new[0] + 0.5)), max(1, int(new[1] + 0.5))


def resize(picture, boxes, shortest, longest, round_down=False):
    h, w = resized_size(picture.height, picture.width, shortest, longest, round_down)
    if (w, h) != picture.size:
        boxes = boxes * torch.tensor([w / picture.width, h / picture.height]).repeat(2)
        picture = picture.resize((w, h), Image.BILINEAR)
    return picture, boxes


def clip(boxes, width, height):
    """Boxes cut at the picture's edges, and which of them still have extent (1e-5 as detectron2)."""
    boxes = torch.stack([boxes[:, 0].clamp(0, width), boxes[:, 1].clamp(0, height),
                         boxes[:, 2].clamp(0, width), boxes[:, 3].clamp(0, height)], 1)
    return boxes, (boxes[:, 2:] - boxes[:, :2] > 1e-5).all(1)


# CenterNet's colour noise along the principal axes of ImageNet's colours (AlexNet's, in the order red, green, blue of 0-1 pixels)
COLOUR_AXES = np.array([[-0.56089297, 0.71832671, 0.41158938], [-0.5832747, 0.00994535, -0.81221408], [-0.58752847, -0.69563484, 0.41340352]])
COLOUR_VARIANCES = np.array([0.2141788, 0.01817699, 0.00341571])


def cut_square(picture, boxes, side, rng):
    """CenterNet's augmentation: a square around a random point, 0.6 to 1.3 times as large as the picture's longer side,
    becomes `side` x `side` pixels; black where it leaves the picture."""
    def border(length):                          # keeps the point 128 pixels off the edge, or less in small pictures
        margin = 128
        while length <= 2 * margin:
            margin //= 2
        return margin
    around = np.array([rng.integers(border(length), length - border(length)) for length in picture.size])
    square = max(picture.size) * rng.choice(np.arange(6, 14)) / 10
    x, y = around - square / 2
    picture = picture.transform((side, side), Image.AFFINE, (square / side, 0, x, 0, square / side, y), Image.BILINEAR)
    return picture, (boxes - torch.tensor([x, y, x, y], dtype=torch.float32)) * (side / square)


def vary_colours(picture, strength, noise, rng):
    """Brightness, contrast and saturation times 1 - strength ... 1 + strength, in random order, then noise along COLOUR_AXES."""
    for enhance in rng.permutation(3):
        factor = float(rng.uniform(1 - strength, 1 + strength))
        picture = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[enhance](picture).enhance(factor)
    shift = 255 * COLOUR_AXES @ (COLOUR_VARIANCES * rng.normal(0, noise, 3))
    return Image.fromarray((np.asarray(picture, np.float32) + shift).clip(0, 255).astype(np.uint8))


@dataclass
class Transform:
    """What happens to a picture on its way into a batch (the released configurations; the paper does not tell).

    Training: flip with probability `flip`; with probability `crop`, resize the shorter side to one
    of 400, 500, 600 and cut a window with sides of 384 to 600 (DETR's augmentation, which OneNet and
    Sparse R-CNN took over); then resize the shorter side to one of `shortest`.  The original CenterNet instead
    cuts a square (`square`, its side in pixels) and varies colours.  Evaluation: all of it 0, and one size, or
    none, which keeps the picture's own.
    """
    shortest: tuple = (800,)
    longest: int = 1333
    flip: float = 0.0
    crop: float = 0.0
    round_down: bool = False
    square: int = 0
    colours: float = 0.0

    def __call__(self, picture, boxes, rng):
        """picture: PIL   boxes: (G, 4)   rng: numpy Generator.   Returns picture, boxes, kept (G,) bool.

        Boxes are clipped, and emptied ones marked as dropped, after every step.
        """
        boxes, kept = clip(boxes, picture.width, picture.height)
        if rng.random() < self.flip:
            picture = picture.transpose(Image.FLIP_LEFT_RIGHT)
            boxes = torch.stack([picture.width - boxes[:, 2], boxes[:, 1],
                                 picture.width - boxes[:, 0], boxes[:, 3]], 1)
        if rng.random() < self.crop:
            picture, boxes = resize(picture, boxes, int(rng.choice([400, 500, 600])), 10 ** 9, self.round_down)
            w, h = (int(rng.integers(min(side, 384), min(side, 600) + 1)) for side in picture.size)
            x, y = int(rng.integers(picture.width - w + 1)), int(rng.integers(picture.height - h + 1))
            picture = picture.crop((x, y, x + w, y + h))
            boxes, inside = clip(boxes - torch.tensor([x, y, x, y]), w, h)
            kept = kept & inside
        if self.square:
            picture, boxes = cut_square(picture, boxes, self.square, rng)
        elif self.shortest:
            picture, boxes = resize(picture, boxes, int(rng.choice(self.shortest)), self.longest, self.round_down)
        if self.colours:
            picture = vary_colours(picture, self.colours, 0.1, rng)
        boxes, inside = clip(boxes, picture.width, picture.height)
        return picture, boxes, kept & inside


class Pictures(Dataset):
    """Annotations plus a transform.  Item (epoch, index) is (uint8 image (3, H, W), target)."""

    CACHE = 2 ** 30             # bytes: data sets that decode to less are kept decoded in memory

    def __init__(self, annotations, transform, seed=0):
        self.annotations, self.transform, self.seed = annotations, transform, seed
        self.cache = {} if 3 * int(annotations.sizes.prod(1).sum()) < self.CACHE else None

    def __len__(self):
        return len(self.annotations)

    def picture(self, i):
        a = self.annotations
        if self.cache is not None and i in self.cache:
            return self.cache[i]
        picture = load_picture(a.path(i), *a.sizes[i].tolist(), image_id=a.image_ids[i])
        if self.cache is not None:
            self.cache[i] = picture
        return picture

    def __getitem__(self, key):
        epoch, i = key
        a = self.annotations
        rows = slice(int(a.first[i]), int(a.first[i + 1]))
        picture, boxes, kept = self.transform(self.picture(i), a.boxes[rows],
                                              np.random.default_rng((self.seed, epoch, i)))
        target = kept & ~a.crowd[rows]
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)           # (3, H, W)
        return image, {"boxes": boxes[target], "labels": a.labels[rows][target],
                       "image_id": a.image_ids[i], "size": torch.tensor(image.shape[1:]),
                       "original_size": a.sizes[i], "ignore": boxes[kept & a.crowd[rows]]}


# ------------------------------------------------------------------------------------------------
# batches
# ------------------------------------------------------------------------------------------------

def collate(samples, divisor=32):
    """Samples to images (B, 3, H, W) uint8, mask (B, H, W) true on padding, list of targets.

    Padding is at the right and at the bottom, to a multiple of `divisor` pixels.
    """
    height, width = (-(-max(image.shape[side] for image, _ in samples) // divisor) * divisor for side in (1, 2))
    images = torch.zeros(len(samples), 3, height, width, dtype=torch.uint8)
    mask = torch.ones(len(samples), height, width, dtype=torch.bool)
    for n, (image, _) in enumerate(samples):
        images[n, :, :image.shape[1], :image.shape[2]] = image
        mask[n, :image.shape[1], :image.shape[2]] = False
    return images, mask, [target for _, target in samples]


def batch_stream(annotations, batch_size, seed, skip_empty=False):
    """Endless lists of `batch_size` keys (epoch, index): the order of training, for all processes together.

    Each epoch is a shuffle of its own.  Landscape and portrait pictures collect in separate
    buckets, so that a batch needs little padding; what an epoch leaves in a bucket opens the next.
    skip_empty: pictures without objects (crowd regions are none) are left out.
    """
    portrait = (annotations.sizes[:, 0] > annotations.sizes[:, 1]).tolist()
    objects = torch.cat([torch.zeros(1, dtype=torch.long), (~annotations.crowd).long().cumsum(0)])[annotations.first].diff()
    used = (objects > 0).nonzero()[:, 0].numpy() if skip_empty else np.arange(len(portrait))
    buckets = ([], [])
    epoch = 0
    while True:
        for i in np.random.default_rng((seed, epoch)).permutation(used).tolist():
            bucket = buckets[portrait[i]]
            bucket.append((epoch, i))
            if len(bucket) == batch_size:
                yield bucket.copy()
                bucket.clear()
        epoch += 1


def training_batches(annotations, batch_size, seed, start=0, rank=0, world=1, accumulate=1, skip_empty=False):
    """This process's share of `batch_stream` from step `start` on: `accumulate` micro-batches per step."""
    for step, keys in enumerate(batch_stream(annotations, batch_size, seed, skip_empty)):
        if step >= start:
            mine = keys[rank::world]
            for part in range(accumulate):
                yield mine[part::accumulate]


def evaluation_batches(annotations, batch_size, rank=0, world=1):
    """Every picture once over all processes, pictures of similar shape together."""
    shape = (annotations.sizes[:, 0] / annotations.sizes[:, 1]).argsort(stable=True).tolist()
    mine = shape[rank::world]
    return [[(0, i) for i in mine[n:n + batch_size]] for n in range(0, len(mine), batch_size)]


def ignore_signals(worker):
    """Ctrl-C reaches the workers too; they must live until the training process has taken what it needs to save."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def loader(pictures, batches, workers=0, pin_memory=False):
    """A DataLoader over lists of keys.  Its own generator leaves the global random state alone."""
    return DataLoader(pictures, batch_sampler=batches, num_workers=workers, collate_fn=collate,
                      pin_memory=pin_memory, generator=torch.Generator(), worker_init_fn=ignore_signals)


# ------------------------------------------------------------------------------------------------
# where the data lies
# ------------------------------------------------------------------------------------------------

def add_data_flags(group, train=True):
    """The flags that say what to read; train.py and evaluate.py share them."""
    group.add_argument("--data", choices=("scenes", "crowd", "coco", "crowdhuman", "custom"),
                       help="scenes: small embedded pictures, drawn when first needed; crowd: the same with crowds; coco: COCO 2017; "
                            "crowdhuman; custom: any COCO-format files, or CrowdHuman's .odgt" + (" (default: scenes)" if train else ""))
    group.add_argument("--data-dir", metavar="DIR",
                       help="folder of the data set (default: data/scenes, data/coco, ...); COCO's holds annotations/, "
                            "train2017/ and val2017/, CrowdHuman's annotation_train.odgt, annotation_val.odgt and Images/")
    for split in ("train", "val") if train else ("val",):
        group.add_argument(f"--{split}-json", metavar="F", help=f"custom: annotations of the {split} split, COCO format")
        group.add_argument(f"--{split}-images", metavar="DIR", help="custom: folder of its pictures")
    group.add_argument("--drop-bad-boxes", action="store_const", const=True,
                       help="leave out boxes without extent or outside their picture, and say how many, instead of stopping")


def locate(flags, split):
    """(JSON file, image folder) of a split, "train" or "val".  flags: dict with data, data_dir, train_json, ...

    Draws the scenes if they are not there yet.  Raises DataError with what is missing.
    """
    data = flags["data"]
    if data == "scenes":
        folder = Path(flags.get("data_dir") or "data/scenes")
        if not scenes.drawn(folder, "scenes"):
            scenes.write(folder)
        return str(folder / f"{split}.json"), str(folder / split)
    if data == "coco":
        folder = Path(flags.get("data_dir") or "data/coco")
        json_file, image_dir = folder / "annotations" / f"instances_{split}2017.json", folder / f"{split}2017"
        archive = {"train": "train2017.zip", "val": "val2017.zip"}[split]
        for path, source in ((json_file, "annotations_trainval2017.zip"), (image_dir, archive)):
            if not path.exists():
                raise DataError(f"{path} does not exist; download {source} from cocodataset.org and unpack it in {folder}")
        return str(json_file), str(image_dir)
    if data in ("crowd", "crowdhuman"):
        folder = Path(flags.get("data_dir") or f"data/{data}")
        if data == "crowd" and not scenes.drawn(folder, "crowd"):
            scenes.write_crowd(folder)
        odgt_file, image_dir = folder / f"annotation_{split}.odgt", folder / "Images"
        for path in (odgt_file, image_dir):
            if not path.exists():
                raise DataError(f"{path} does not exist; download annotation_train.odgt, annotation_val.odgt and the archives CrowdHuman_train01.zip, "
                                f"...02, ...03 and CrowdHuman_val.zip from crowdhuman.org, and unpack all pictures into {image_dir}")
        return str(odgt_file), str(image_dir)
    json_file, image_dir = flags.get(f"{split}_json"), flags.get(f"{split}_images")
    if not json_file or not image_dir:
        raise DataError(f"--data custom needs --{split}-json and --{split}-images")
    return json_file, image_dir


# ------------------------------------------------------------------------------------------------
# the check, and Pascal VOC
# ------------------------------------------------------------------------------------------------

def check(json_file, image_dir, out=None):
    """Print every fault of a data set, then counts by kind.  Returns the number of faults."""
    annotations, faults = (parse_odgt if str(json_file).endswith(".odgt") else parse_coco)(json_file, image_dir)[:2]
    for i in range(len(annotations)):
        path = Path(annotations.path(i))
        if not path.is_file():
            continue                                         # parse_coco has said so
        try:
            load_picture(path, *annotations.sizes[i].tolist(), image_id=annotations.image_ids[i])
        except DataError as error:
            kind = "picture size differs" if "but the JSON says" in str(error) else "unreadable picture"
            faults.append(Fault(kind, str(error)))
    for fault in faults:
        print(fault.text, file=out)
    per_class = torch.bincount(annotations.labels[~annotations.crowd], minlength=len(annotations.class_names))
    print(f"{json_file}: {len(annotations)} pictures ({int((annotations.first.diff() == 0).sum())} without boxes), "
          f"{len(annotations.boxes)} usable boxes, {int(annotations.crowd.sum())} of them crowd regions", file=out)
    for name, count in zip(annotations.class_names, per_class.tolist()):
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
    # a line is a name; in the lists of one class that VOC ships beside them (dog_train.txt) also 1, 0 or -1: left out
    lines = {split: [line.split() for line in split.read_text().splitlines() if line.strip()] for split in splits}
    splits = [split for split in splits if all(len(words) == 1 for words in lines[split])]
    names = {split: [words[0] for words in lines[split]] for split in splits}
    content, classes = {}, set()
    for split in splits:
        for name in names[split]:
            if name in content:
                continue
            xml = folder / "Annotations" / f"{name}.xml"
            try:
                root = ElementTree.parse(xml).getroot()
                size = {k: int(root.find("size").findtext(k)) for k in ("height", "width")}
                objects = [(o.findtext("name"), *(float(o.find("bndbox").findtext(k))
                                                  for k in ("xmin", "ymin", "xmax", "ymax")),
                            int(o.findtext("difficult", "0"))) for o in root.iter("object")]
                content[name] = (root.findtext("filename"), size, objects)
            except (OSError, ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
                raise DataError(f"{xml}: not a readable VOC annotation ({error}); image {name} "
                                f"of {split.name}") from None
            if any(o[0] is None for o in objects):
                raise DataError(f"{xml}: an object has no name; image {name} of {split.name}")
            classes.update(o[0] for o in objects)
    classes = sorted(classes)
    written = []
    out.mkdir(parents=True, exist_ok=True)
    for split in splits:
        images, annotations = [], []
        for name in names[split]:
            file_name, size, objects = content[name]
            images.append({"id": len(images) + 1, "file_name": file_name, **size})
            for kind, x1, y1, x2, y2, difficult in objects:
                annotations.append({"id": len(annotations) + 1, "image_id": len(images),
                                    "category_id": classes.index(kind) + 1, "iscrowd": difficult,
                                    "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)})
        categories = [{"id": n + 1, "name": name} for n, name in enumerate(classes)]
        file = out / f"{split.stem}.json"
        file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
        written.append(str(file))
    return written


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    c = commands.add_parser("check", help="report everything wrong with a data set, in one pass")
    c.add_argument("--json", required=True, metavar="F", help="annotations in COCO format, or CrowdHuman's .odgt")
    c.add_argument("--images", required=True, metavar="DIR", help="folder that file_name is relative to, or that holds ID.jpg")
    c = commands.add_parser("voc2coco", help="convert Pascal VOC XML annotations to COCO JSON")
    c.add_argument("folder", metavar="VOC_FOLDER", help="holds Annotations/, JPEGImages/, ImageSets/Main/")
    c.add_argument("--out", required=True, metavar="DIR", help="one SPLIT.json per ImageSets/Main/SPLIT.txt")
    args = parser.parse_args()
    try:
        if args.command == "check":
            sys.exit(1 if check(args.json, args.images) else 0)
        print("\n".join(f"wrote {file}" for file in voc2coco(args.folder, args.out)))
    except (DataError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
