"""Pictures of one's own: what a detector finds in them, drawn on them and written to a file.

`python figures.py detections` is its command line.
"""
import sys
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import runs
from pictures import SUFFIXES, DataError, load_picture

COLOURS = ((230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48),
           (145, 30, 180), (70, 240, 240), (240, 50, 230), (210, 245, 60), (0, 128, 128))
IGNORED = (170, 170, 170)
# matplotlib brings it along, and it knows Latin, Greek and Cyrillic letters
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def draw_boxes(picture, boxes, labels, class_names, scores=None, side=384):
    """A copy of a PIL picture with boxes (xyxy) and class names drawn on it.

    Its longer side becomes `side` to 2 `side` pixels, and names grow with it.  The first boxes lie
    on top.  A label of -1 marks a crowd or ignore region, in grey.
    """
    factor = min(max(1.0, side / max(picture.size)), 2 * side / max(picture.size))
    size = [max(1, round(v * factor)) for v in picture.size]
    canvas = picture.resize(size, Image.BILINEAR)
    pen = ImageDraw.Draw(canvas)
    letters = max(11, max(size) // 45)                   # pixels
    font, line = ImageFont.truetype(str(FONT), letters), max(2, letters // 6)
    for n in reversed(range(len(boxes))):
        label = labels[n]
        name = class_names[label] if label >= 0 else "ignored"
        colour = COLOURS[label % len(COLOURS)] if label >= 0 else IGNORED
        text = name if scores is None else f"{name} {scores[n]:.2f}"
        text = " ".join(text.split())                    # a name may hold line breaks

        # a box of a wrong sign is drawn as a line, where PIL would stop with an error
        x1, y1, x2, y2 = (v * factor for v in boxes[n])
        pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=line)

        if not text:
            continue
        # the name inside the box's corner, pushed back where it would leave the picture
        width, height = pen.textlength(text, font), sum(font.getmetrics())
        x = max(0, min(x1 + line + 1, size[0] - width - 1))
        y = max(0, min(y1 + 1, size[1] - height - 1))
        red, green, blue = colour
        bright = 0.3 * red + 0.6 * green + 0.1 * blue > 100          # as the eye weighs them
        pen.rectangle((x, y, x + width, y + height), fill=colour)
        pen.text((x, y), text, fill="black" if bright else "white", font=font)
    return canvas


def picture_files(given):
    """(the picture files that are meant, how many others lie in the folders).  Raises DataError.

    given: files, which are taken as they are, and folders, of which the files with a picture's
    suffix are taken; folders in them are not entered.
    """
    files, others = [], 0
    for path in map(Path, given):
        if path.is_dir():
            inside = sorted(file for file in path.iterdir()
                            if not file.is_dir() and not file.name.startswith("."))
            pictures = [file for file in inside if file.suffix.lower() in SUFFIXES]
            if not pictures:
                raise DataError(f"{path}: holds no pictures ({', '.join(SUFFIXES)}); give their "
                                f"folder itself, folders in it are not entered")
            others += len(inside) - len(pictures)
            files += pictures
        elif path.exists():
            files.append(path)
        else:
            raise DataError(f"{path}: no such file or folder; check --images")

    # a name is what detections.json and --out know a picture by
    first = {}
    for file in files:
        if first.setdefault(file.name, file) != file:
            raise DataError(f"{first[file.name]} and {file} have the same name; give them one "
                            f"after the other, with an --out each")
    return list(first.values()), others


def detect_files(model, checkpoint, given, out, score, nms):
    """Draws what a detector finds in pictures, and writes it to OUT/detections.json.

    given: files and folders   score: what counts   nms: with NMS

    The JSON is COCO's result format; `image_id` is the picture's name.  A picture that cannot be
    read is told, and the others are done; what was found before an interruption is written to
    detections.partial.json.

    Returns lines of text that say what there is now.  Raises DataError at the end if pictures could
    not be read.
    """
    files, others = picture_files(given)
    out = Path(out)
    if (out / "last.pt").exists() or (out / "args.json").exists():
        raise DataError(f"--out {out} is a run's folder, whose detections.json would be "
                        f"overwritten; choose another")
    for file in files:
        if out.resolve() in (file.parent.resolve(), file.resolve().parent):      # also of a link
            raise DataError(f"--out {out} is the folder of {file}, which would be overwritten; "
                            f"choose another")
    out.mkdir(parents=True, exist_ok=True)

    names, k = checkpoint["class_names"], checkpoint["args"].get("max_dets", 100)
    ids = checkpoint.get("category_ids", list(range(1, len(names) + 1)))
    results, faults, written = [], [], out / "detections.partial.json"
    try:
        for file in tqdm(files, "detecting", unit="picture", disable=None):
            try:
                picture = load_picture(file)
            except DataError as error:
                faults.append(file)
                tqdm.write(f"figures.py: {error}", file=sys.stderr)
                continue
            boxes, scores, labels = model.detect(picture, k, nms)
            good = scores >= score
            boxes, scores, labels = (part[good].tolist() for part in (boxes, scores, labels))
            results += [{"image_id": file.name, "category_id": ids[label],
                         "bbox": [x1, y1, x2 - x1, y2 - y1], "score": s}
                        for (x1, y1, x2, y2), s, label in zip(boxes, scores, labels)]

            # small pictures are enlarged, so that names can be read
            drawn = draw_boxes(picture, boxes, labels, names, scores, max(640, *picture.size))
            known = file.suffix.lower() in SUFFIXES
            drawn.save(out / (file.name if known else f"{file.name}.png"))
        written.unlink(missing_ok=True)                  # of an earlier call
        written = out / "detections.json"
    finally:
        runs.write_json(written, results)

    said = f"{len(files) - len(faults)} pictures, {len(results)} detections that score {score:g} "
    said += f"or more, {'with' if nms else 'without'} NMS"
    said += f"; {others} other files left alone" if others else ""
    if faults:
        raise DataError(f"{said}; {len(faults)} pictures could not be read, the first: {faults[0]}")
    return [said]
