"""Labels of other makes to COCO JSON: Pascal VOC's XML, YOLO's text.

    python annotations.py voc2coco FOLDER --out DIR     Annotations/NAME.xml, or XML anywhere below
    python annotations.py yolo2coco FOLDER --out DIR    NAME.txt, and data.yaml or classes.txt

People's folders differ: labels lie beside the pictures or in a sister folder, splits are lists,
folders, or none.  Both commands look for all files below FOLDER and pair pictures with labels by
name, those that share the most folders.  What is left out is named on standard error.
"""
import hashlib
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import yaml

import runs
from pictures import SUFFIXES, DataError, picture_size, read_text


class Labelled(NamedTuple):
    """A picture and its labels."""
    picture: Path
    size: tuple                 # height, width
    objects: list               # (class, x, y, width, height, whether it is a crowd region)


# ------------------------------------------------------------------------------------------------
# what lies in a folder
# ------------------------------------------------------------------------------------------------

def files_below(folder, *suffixes):
    """The files of these suffixes, sorted, links followed; what is hidden is no data.

    A folder that links lead to again is looked through once.
    """
    found, known = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in known:
            folders.clear()
            continue
        known.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name) for name in names
                  if not name.startswith(".") and Path(name).suffix.lower() in suffixes]
    return sorted(found)


def home_of(folder):
    """The folder below which the pictures of `folder` lie: itself, or the one that holds it.

    Raises DataError if there are none.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    for home in (folder, folder.parent):
        if files_below(home, *SUFFIXES):
            return home
    raise DataError(f"{folder}: neither in it nor beside it are there any pictures")


def by_name(files):
    """{name without its suffix, and with it: the files of that name}"""
    named = {}
    for file in files:
        for name in {file.stem, file.name}:
            named.setdefault(name, []).append(file)
    return named


def nearest(files, other):
    """The one of several files that shares the most folders with another; None if there is none.

    images/train/a.jpg goes with labels/train/a.txt.  VOC's JPEGImages/a.jpg goes before its mask,
    SegmentationClass/a.png.
    """
    return max(files, key=lambda file: likeness(file, other), default=None)


def like_line(line, files, listing):
    """Of several files with the name that a line of a list ends with, the one that it means.

    It is in the folders that the line gives, else in one called like the list, or near it.
    """
    folders = line.strip().replace("\\", "/").split("/")[-2::-1]      # from the last one on

    def meant(file):
        alike = [a == b for a, b in zip(folders, file.parent.parts[::-1])] + [False]
        return alike.index(False), listing.stem in file.parts, likeness(file, listing)
    return max(files, key=meant)


def likeness(file, other):
    shared = set(file.parent.parts) & set(other.parent.parts)
    return len(shared), file.parent == other.parent, "image" in file.parent.name.lower()


def is_split(name):
    return re.fullmatch(r"(train|val|trainval|valid|validation|dev|test)(ing)?[-_]?\d*",
                        name.lower()) is not None


def split_of(file, folder):
    """The folder on the way to a file that is called like a split (train2017, valid), or "all"."""
    return next(filter(is_split, file.relative_to(folder).parts[:-1]), "all")


def last_part(path):
    """What a path, also one of Windows, ends with."""
    return path.strip().replace("\\", "/").rpartition("/")[2]


def leave_out(folder, what, names):
    """Says on standard error what of a folder is left out."""
    names = list(map(str, names))
    if names:
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        print(f"{folder}: left out {len(names)} {what}: {', '.join(names[:20])}{more}",
              file=sys.stderr)


def held_out(ids, share, seed=0):
    """Which of some pictures are for validation: a set of a share of them, at least one.

    A function of the seed and of the ids alone, not of their order.  Raises DataError.
    """
    if not 0 < share < 1:
        raise DataError(f"--val-share {share}: must be above 0 and below 1")
    if len(ids) < 2:
        raise DataError(f"--val-share {share}: of {len(ids)} picture(s) nothing can be cut off")
    drawn = sorted(ids, key=lambda i: hashlib.sha256(f"{seed} {i}".encode(
        errors="backslashreplace")).digest())
    return set(drawn[:min(max(1, round(share * len(ids))), len(ids) - 1)])


def write(out, splits, classes, val_share, seed):
    """A COCO JSON for each split.  Returns {JSON file: folder of its pictures}.

    splits: {name: Labelled pictures}   classes: {category id: name}
    val_share: this share of the only split becomes val.json, the rest train.json.  Raises DataError
    """
    if not splits:
        raise DataError(f"{out}: nothing to write: no labelled pictures were found")
    folders = {split: Path(os.path.commonpath([one.picture.parent for one in several]))
               for split, several in splits.items()}
    if val_share is not None:
        if len(splits) > 1:
            raise DataError(f"--val-share: the splits are made already ({', '.join(splits)}); "
                            f"leave it out")
        (split, several), = splits.items()
        names = [str(one.picture.relative_to(folders[split])) for one in several]
        held = held_out(names, val_share, seed)
        splits = {"train": [one for one, name in zip(several, names) if name not in held],
                  "val": [one for one, name in zip(several, names) if name in held]}
        folders = dict.fromkeys(splits, folders[split])

    written = {}
    Path(out).mkdir(parents=True, exist_ok=True)
    for split, several in splits.items():
        images, boxes = [], []
        for n, (picture, (height, width), objects) in enumerate(several, 1):
            images.append({"id": n, "file_name": picture.relative_to(folders[split]).as_posix(),
                           "height": height, "width": width})
            boxes += [{"id": len(boxes) + k, "image_id": n, "category_id": category,
                       "iscrowd": int(crowd), "bbox": [x, y, w, h], "area": w * h}
                      for k, (category, x, y, w, h, crowd) in enumerate(objects, 1)]
        file = Path(out) / f"{split}.json"
        runs.write_json(file, {"images": images, "annotations": boxes,
                               "categories": [{"id": i, "name": name}
                                              for i, name in classes.items()]})
        written[str(file)] = str(folders[split])
    return written


# ------------------------------------------------------------------------------------------------
# Pascal VOC: an XML a picture, and lists of names
# ------------------------------------------------------------------------------------------------

def voc2coco(folder, out, val_share=None, seed=0):
    """Pascal VOC to out/SPLIT.json, one for each ImageSets/Main/SPLIT.txt.

    Without such lists, folders named train, val, ... are the splits, or else all goes to all.json.
    Coordinates are taken as edges, as labelling tools write them: width = xmax - xmin.  `difficult`
    objects become crowd regions: never a target, ignored in evaluation.  Faulty boxes are carried
    over as they are, for the check to find.

    Returns {JSON file: folder of its pictures}.  Raises DataError.
    """
    folder = Path(os.path.abspath(folder))
    place = folder / "Annotations"
    files = files_below(place if place.is_dir() else folder, ".xml")
    if not files:
        raise DataError(f"{folder}: not a Pascal VOC folder: it holds no XML")
    pictures = files_below(home_of(folder), *SUFFIXES)
    lists = voc_lists(folder, by_name(files))
    splits = lists or {split: [file for file in files if split_of(file, folder) == split]
                       for split in sorted({split_of(file, folder) for file in files})}
    listed = {file for several in splits.values() for file in several}
    leave_out(folder, "XML files that are in no list",
              [file.name for file in files if file not in listed])

    called = by_name(pictures)
    read = {file: voc_file(file, called) for file in sorted(listed)}
    of_picture = {}
    for file, labelled in read.items():
        other = of_picture.setdefault(labelled.picture, file)
        if other != file:
            raise DataError(f"{file}: is of the picture {labelled.picture}, as is {other}; remove "
                            f"one of them")
    if not lists:
        leave_out(folder, "pictures without XML",
                  [file.name for file in pictures if file not in of_picture])

    # class ids are ranks of names, over all splits, so that the files of one folder agree
    names = sorted({kind for labelled in read.values() for kind, *_ in labelled.objects})
    id_of = {name: n for n, name in enumerate(names, 1)}
    numbered = {file: one._replace(objects=[(id_of[kind], *rest) for kind, *rest in one.objects])
                for file, one in read.items()}
    return write(out, {split: [numbered[file] for file in several]
                       for split, several in splits.items()},
                 {n: name for name, n in id_of.items()}, val_share, seed)


def voc_lists(folder, xml_of):
    """{split: its XML files} of the lists in ImageSets/Main; {} if there are no lists.

    xml_of: as by_name gives.   Raises DataError for a name without XML.
    """
    lists = (sorted((folder / "ImageSets" / "Main").glob("*.txt"))
             or sorted((folder / "ImageSets").glob("*.txt")))
    splits, of_class, empty = {}, [], []
    for file in lists:
        lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
        # VOC ships a list for each class too (dog_train.txt), with 1, 0 or -1 behind each name
        ends = [line.split()[1:] and line.split()[-1] in ("1", "0", "-1") for line in lines]
        if not lines:
            empty.append(file.name)
        elif all(ends) and not all(line in xml_of for line in lines):
            of_class.append(file.name)
        else:
            splits[file.stem] = [voc_listed(line, xml_of, file) for line in dict.fromkeys(lines)]
    leave_out(folder, "lists of one class", of_class)
    leave_out(folder, "empty lists", empty)
    if lists and not splits:
        raise DataError(f"{folder}: none of the lists in ImageSets names pictures alone; remove "
                        f"ImageSets to convert all XML")
    return splits


def voc_listed(line, xml_of, file):
    """The XML of a line, which may also be the name or the path of the picture."""
    last = last_part(line)
    for name in (line, last, Path(last).stem):
        if name in xml_of:
            return like_line(line, xml_of[name], file)
    raise DataError(f"{file}: names {line!r}, but there is no {last}.xml in Annotations")


def voc_file(xml, pictures):
    """An XML file as Labelled, its classes by name.  pictures: as by_name gives; raises DataError.

    The picture is the one that the XML is called like, since <filename> is often stale, else the
    one that <filename> names.
    """
    root = voc_root(xml)
    try:
        objects = [voc_object(o) for o in root.iter("object")]
        size = [int(float(root.findtext(f"size/{side}") or 0)) for side in ("height", "width")]
    except (ValueError, OverflowError) as error:
        raise DataError(f"{xml}: not a readable VOC annotation ({error})") from None
    said = last_part(root.findtext("filename") or "")
    named = pictures.get(said) or pictures.get(Path(said).stem, [])
    own = pictures.get(xml.stem, [])
    picture = nearest([file for file in own if file.name == said] or own or named, xml)
    if picture is None:
        raise DataError(f"{xml}: its picture is not there: neither <filename> {said!r} nor "
                        f"{xml.stem} with a suffix of pictures")
    return Labelled(picture, tuple(size) if min(size) > 0 else picture_size(picture), objects)


def voc_root(xml):
    """The <annotation> of an XML file, in whatever encoding it says.  Raises DataError."""
    head = re.match(rb"[^<]*<\?xml[^>]*encoding=[\"']([\w.-]+)", xml.read_bytes()[:200])
    encoding = head[1].decode() if head else "utf-8"
    if encoding.lower().startswith(("utf-16", "utf-32")):
        encoding = "utf-8"                          # it would not be readable so far
    try:
        root = ElementTree.fromstring(read_text(xml, encoding).strip())
    except ElementTree.ParseError as error:
        raise DataError(f"{xml}: not readable XML ({error})") from None
    if root.tag != "annotation":
        raise DataError(f"{xml}: not a VOC annotation: it is <{root.tag}>, not <annotation>")
    return root


def voc_object(o):
    """(class, x, y, width, height, whether it is difficult) of an <object>.  Raises ValueError."""
    name = one_line(o.findtext("name"))
    if not name:
        raise ValueError("an object has no name")
    corners = [o.findtext(f"bndbox/{k}") for k in ("xmin", "ymin", "xmax", "ymax")]
    if None in corners:
        raise ValueError(f"an object {name!r} has no <bndbox> of xmin, ymin, xmax and ymax")
    x1, y1, x2, y2 = map(float, corners)
    return name, x1, y1, x2 - x1, y2 - y1, is_difficult(one_line(o.findtext("difficult")))


def is_difficult(text):
    if text.lower() in ("", "0", "0.0", "false", "no", "n", "unspecified"):
        return False
    if text.lower() in ("1", "1.0", "true", "yes", "y", "difficult"):
        return True
    raise ValueError(f"<difficult> is {text!r}, neither 0 nor 1")


def one_line(text):
    """Without spaces at the ends, and without line breaks."""
    return " ".join((text or "").split())


# ------------------------------------------------------------------------------------------------
# YOLO: a text a picture, an object a line, in shares of the picture
# ------------------------------------------------------------------------------------------------

NAMES = ("data.yaml", "dataset.yaml", "*.yaml", "*.yml", "classes.txt", "obj.names", "*.names",
         "names.txt", "labels.txt", "predefined_classes.txt", "_darknet.labels")


def yolo2coco(folder, out, val_share=None, seed=0):
    """YOLO's text files to out/SPLIT.json; folders or lists named train, val, ... are the splits.

    A line is a class number, and a box: the centre's x and y, width, height, all in shares of the
    picture; or a polygon's points, which give their box.  A picture without a text has no objects,
    as YOLO itself takes it.  Category ids are YOLO's class numbers.

    Returns {JSON file: folder of its pictures}.  Raises DataError that names the bad lines.
    """
    folder = Path(os.path.abspath(folder))
    names, keypoints, source = yolo_names(folder)
    home = home_of(folder)
    pictures = files_below(home, *SUFFIXES)
    texts = [file for file in files_below(folder, ".txt")
             if file != source and not file.stem.lower().startswith("readme")]
    lists, texts = yolo_lists(texts, pictures)
    splits_by = {picture: lists.get(picture) or [split_of(picture, home)] for picture in pictures}
    text_by = yolo_pairs(pictures, texts)
    used = set(text_by.values()) - {None}
    if not used:
        raise DataError(f"{folder}: no text file is called like a picture")

    # what lies beside the splits and has no text is a preview or the like
    any_split = any(splits != ["all"] for splits in splits_by.values())
    stray = [picture for picture in pictures
             if any_split and text_by[picture] is None and splits_by[picture] == ["all"]]
    leave_out(folder, "pictures beside the splits", [picture.name for picture in stray])
    leave_out(folder, "text files without a picture",
              [file.name for file in texts if file not in used])

    splits, bare, bad = {}, [], []
    for picture in [picture for picture in pictures if picture not in stray]:
        file, size = text_by[picture], picture_size(picture)
        if file is None:
            bare.append(picture.name)
        objects = yolo_file(file, size, names, keypoints, bad) if file else []
        for split in splits_by[picture]:
            splits.setdefault(split, []).append(Labelled(picture, size, objects))
    if bad:
        more = f" (and {len(bad) - 5} more)" if len(bad) > 5 else ""
        raise DataError(f"{len(bad)} bad line(s): {'; '.join(bad[:5])}{more}")
    if bare:
        print(f"{folder}: {len(bare)} picture(s) without a text file are taken as pictures "
              f"without objects, the first: {bare[0]}", file=sys.stderr)
    return write(out, splits, names, val_share, seed)


def yolo_pairs(pictures, texts):
    """{picture: its text, or None}: each text goes with the pictures of its name nearest to it."""
    text_of = by_name(texts)
    text_by = {picture: nearest(text_of.get(picture.stem, []), picture) for picture in pictures}
    closest = {}
    for picture, text in text_by.items():
        if text:
            shared = likeness(picture, text)[:2]
            closest[text] = max(shared, closest.get(text, shared))
    return {picture: text if text and likeness(picture, text)[:2] == closest[text] else None
            for picture, text in text_by.items()}


def yolo_lists(texts, pictures):
    """Lists of pictures, train.txt or the like: ({picture: its splits}, the other texts).

    A list is a text called like a split whose lines are mostly names or paths of pictures.
    Raises DataError if one of them is not there.
    """
    named, lists, others = by_name(pictures), {}, []
    for file in texts:
        lines = read_text(file).splitlines() if is_split(file.stem) else []
        lines = [line for line in dict.fromkeys(lines) if line.strip()]
        missing = [line for line in lines if last_part(line) not in named]
        if 2 * len(missing) >= len(lines):
            others.append(file)
            continue
        if missing:
            raise DataError(f"{file}: names {missing[0]!r}, but there is no picture of that name "
                            f"({len(missing)} of {len(lines)} lines); take such lines out")
        for picture in dict.fromkeys(like_line(line, named[last_part(line)], file)
                                     for line in lines):
            lists.setdefault(picture, []).append(file.stem)
    return lists, others


def yolo_names(folder):
    """({class number: name}, whether lines hold keypoints, the file).  Raises DataError."""
    inside = [file for pattern in NAMES for file in sorted(folder.rglob(pattern))]
    beside = [file for pattern in NAMES for file in sorted(folder.parent.glob(pattern))]
    for file in inside + beside:
        text = read_text(file)
        if file.suffix not in (".yaml", ".yml"):
            lines = [one_line(line) for line in text.strip().splitlines()]
            return dict(enumerate(lines)), False, file
        names, keypoints = yaml_names(file, text)
        if names:
            return names, keypoints, file
    raise DataError(f"{folder}: no names of classes: neither a data.yaml with `names`, nor "
                    f"classes.txt or obj.names with a name a line; write one")


def yaml_names(file, text):
    """({class number: name} of the key `names`, whether lines hold keypoints); {} without the key.

    `names` is a list or a mapping.  All that stands there is text: a class may be called "no".
    Raises DataError.
    """
    try:
        content = yaml.load(text, yaml.BaseLoader)       # which runs nothing, whatever tags say
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise DataError(f"{file}: not valid YAML ({one_line(str(error))}); mend it") from error
    content = content if isinstance(content, dict) else {}
    names = content.get("names") or []
    try:
        if isinstance(names, str):
            raise ValueError(f"it is {names!r}")
        pairs = names.items() if isinstance(names, dict) else enumerate(names)
        return {int(n): one_line(name) for n, name in pairs if name}, "kpt_shape" in content
    except (ValueError, AttributeError) as error:
        raise DataError(f"{file}: `names` must be a list of names, or a mapping of class numbers "
                        f"to names ({error})") from error


def yolo_file(file, size, names, keypoints, bad):
    """The objects of a text file, in pixels.  Lines at fault are added to `bad`, as sentences."""
    height, width = size
    objects = []
    for n, line in enumerate(read_text(file).splitlines(), 1):
        try:
            if line.strip():
                kind, x, y, w, h = yolo_line(line.split(), names, keypoints)
                objects.append((kind, x * width, y * height, w * width, h * height, False))
        except ValueError as error:
            bad.append(f"{file}, line {n}: {error}")
    return objects


def yolo_line(words, names, keypoints):
    """(class, x, y, width, height) of a line, in shares of the picture.  Raises ValueError."""
    kind, *numbers = map(float, words)
    if keypoints:
        numbers = numbers[:4]
    if len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2):
        raise ValueError(f"{len(words)} numbers; it must be a class and a box of 4, or a class and "
                         f"a polygon of at least 3 points")
    if kind not in names:
        raise ValueError(f"class {words[0]} has no name; there are {len(names)}")
    if not all(-0.01 <= v <= 1.01 for v in numbers):        # rounding; NaN compares false
        raise ValueError("coordinates must be shares of the picture, 0 to 1, not pixels")
    if len(numbers) == 4:
        x, y, w, h = numbers
        return int(kind), x - w / 2, y - h / 2, w, h
    xs, ys = numbers[::2], numbers[1::2]
    return int(kind), min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
