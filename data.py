"""From disk to batch: where a data set lies, its pictures transformed, its batches in their order.

    read -> Annotations -> Pictures[epoch, index] -> Transform -> collate

Order and augmentation are functions of (seed, epoch, index) alone, so the number of worker
processes, of GPUs or of interruptions changes nothing.  Pixels are uint8 tensors from the decoder
to the device, where the model normalises them; in memory the colours of a pixel lie side by side,
as they were decoded, also in a batch: rows are copied whole.

A target is a dict: boxes (G, 4) xyxy in pixels of the resized picture, labels (G,) in 0...C-1,
objects (G,) their numbers among the picture's boxes, image_id, size (2,) resized height and width,
original_size (2,), frame (4,) where the original's edges lie, ignore (I, 4) crowd regions, both in
pixels of the resized picture.  A picture without objects is an ordinary picture.
"""
import functools
import multiprocessing
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as v2

import annotations
import labels
import scenes
from pictures import load_picture


# ------------------------------------------------------------------------------------------------
# where the data lies
# ------------------------------------------------------------------------------------------------

def add_data_flags(group, train=True):
    """The flags that say what to read; train.py and evaluate.py share them."""
    group.add_argument("--data", choices=("scenes", "crowd", "coco", "crowdhuman", "custom"),
                       help="scenes: small embedded pictures, drawn when first needed; "
                            "crowd: the same with crowds; coco: COCO 2017; crowdhuman; "
                            "custom: any COCO-format files, or CrowdHuman's .odgt"
                            + (" (default: scenes)" if train else ""))
    group.add_argument("--data-dir", metavar="DIR",
                       help="folder of the data set itself (default: data/scenes, data/coco, ...; "
                            "into data/scenes and data/crowd pictures are drawn, once); COCO's "
                            "holds annotations/, train2017/ and val2017/, CrowdHuman's "
                            "annotation_train.odgt, annotation_val.odgt and Images/")
    for split in ("train", "val") if train else ("val",):
        group.add_argument(f"--{split}-json", metavar="F",
                           help=f"custom: annotations of the {split} split, COCO format")
        group.add_argument(f"--{split}-images", metavar="DIR",
                           help="custom: folder of its pictures")
    if train:
        group.add_argument("--val-share", type=float, metavar="X",
                           help="custom, without a val split: this share of the training pictures "
                                "is for evaluation alone, the same in every run")
    group.add_argument("--drop-bad-boxes", action="store_const", const=True,
                       help="leave out boxes without extent or outside their picture, "
                            "and say how many, instead of stopping (coco, crowdhuman: always)")
    group.add_argument("--drop-bad", action="store_const", const=True,
                       help="leave out all that is at fault, also pictures that cannot be read "
                            "(all are opened first), and say what")


OWN_FILES = ("train_json", "train_images", "val_json", "val_images")
# all of add_data_flags
FLAGS = ("data", "data_dir", *OWN_FILES, "val_share", "drop_bad_boxes", "drop_bad")


def data_set(given, default):
    """The data set that flags ask for: --data, or custom if they name files alone, or the default.

    given: dict of the flags of add_data_flags, None or absent where not given.  Raises DataError
    by name for a flag that goes with another data set.
    """
    own = [name for name in OWN_FILES if given.get(name) is not None]
    chosen = given.get("data") or ("custom" if own else default)
    if own and chosen != "custom":
        flag = "--" + own[0].replace("_", "-")
        raise annotations.DataError(f"{flag} names a file of your own: it goes with --data custom, "
                                    f"not with {chosen}")
    if chosen == "custom" and given.get("data_dir") is not None:
        raise annotations.DataError("--data-dir does not concern --data custom, whose files are "
                                    "named one by one")
    share = given.get("val_share")
    if share is not None:
        if chosen != "custom":
            raise annotations.DataError(f"--val-share goes with --data custom, not with {chosen}, "
                                        f"which has a val split")
        if given.get("val_json") or given.get("val_images"):
            raise annotations.DataError("--val-share cuts the val split off the training pictures: "
                                        "give it, or --val-json and --val-images")
        if not 0 < share < 1:
            raise annotations.DataError(f"--val-share {share}: must be above 0 and below 1")
    return chosen


def locate(flags, split):
    """(annotation file, image folder) of a split, "train" or "val"; with --val-share one for both.

    flags: dict with data, data_dir, train_json, ...  Draws the embedded sets if they are not there
    yet, into their own folders alone.  Raises DataError with what is missing.
    """
    data = flags["data"]
    folder = Path(flags.get("data_dir") or f"data/{data}")
    if data in ("scenes", "crowd") and flags.get("data_dir") and not scenes.drawn(folder, data):
        raise annotations.DataError(f"--data-dir {folder}: holds no finished pictures; draw them "
                                    f"with  python scenes.py --set {data} --out {folder}")
    if data == "scenes":
        if not scenes.drawn(folder, "scenes"):
            scenes.write(folder)
        return str(folder / f"{split}.json"), str(folder / split)

    if data == "coco":
        json_file = folder / "annotations" / f"instances_{split}2017.json"
        image_dir = folder / f"{split}2017"
        for path, archive in ((json_file, "annotations_trainval2017.zip"),
                              (image_dir, f"{split}2017.zip")):
            if not path.exists():
                raise annotations.DataError(f"{path} does not exist; download {archive} from "
                                            f"cocodataset.org and unpack it in {folder}")
        return str(json_file), str(image_dir)

    if data in ("crowd", "crowdhuman"):
        if data == "crowd" and not scenes.drawn(folder, "crowd"):
            scenes.write_crowd(folder)
        odgt_file, image_dir = folder / f"annotation_{split}.odgt", folder / "Images"
        for path in (odgt_file, image_dir):
            if not path.exists():
                raise annotations.DataError(
                    f"{path} does not exist; download annotation_train.odgt, annotation_val.odgt "
                    f"and the archives CrowdHuman_train01.zip, ...02, ...03 and CrowdHuman_val.zip "
                    f"from crowdhuman.org, and unpack all pictures into {image_dir}")
        return str(odgt_file), str(image_dir)

    if is_cut(flags):
        split = "train"
    json_file, image_dir = flags.get(f"{split}_json"), flags.get(f"{split}_images")
    if not json_file or not image_dir:
        instead = ", or --val-share" if split == "val" else ""
        raise annotations.DataError(f"--data custom needs --{split}-json and --{split}-images"
                                    f"{instead}")
    return json_file, image_dir


def is_cut(flags):
    """Whether the val split is cut off the training pictures."""
    return bool(flags.get("val_share")) and not (flags.get("val_json") or flags.get("val_images"))


def read(flags, split, class_names=None, cache=None):
    """The Annotations of a split, "train" or "val".  Raises DataError.

    flags: as for `locate`   class_names: of the training file, whose places the labels are then
    cache: see annotations.read_annotations
    """
    found = annotations.read_annotations(*locate(flags, split), flags.get("drop_bad_boxes"), cache,
                                         flags.get("drop_bad"))
    if is_cut(flags):
        found = cut(found, flags["val_share"])[split]
    return found if class_names is None else annotations.with_classes(found, class_names)


def read_both(flags, cache=None):
    """The Annotations to train on and those to evaluate, whose classes are the former's."""
    if is_cut(flags):                            # one file is read once
        whole = read({**flags, "val_share": None}, "train", cache=cache)
        return tuple(cut(whole, flags["val_share"]).values())
    train = read(flags, "train", cache=cache)
    return train, read(flags, "val", train.class_names, cache)


def cut(whole, share):
    """{"train": ..., "val": ...}: Annotations in two parts, a function of the pictures' ids."""
    held = labels.held_out(whole.image_ids, share)
    is_held = torch.tensor([i in held for i in whole.image_ids])
    return {"train": whole.only(~is_held), "val": whole.only(is_held)}


# ------------------------------------------------------------------------------------------------
# transforms: boxes move with their pixels
# ------------------------------------------------------------------------------------------------

def resized_size(height, width, shortest, longest, round_down=False):
    """Size when the shorter side becomes `shortest`, unless the longer would exceed `longest`.

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
    # in two steps, as published: it decides where a side falls on a half
    if max(new) > longest:
        scale = longest / max(new)
        new = [side * scale for side in new]
    return max(1, int(new[0] + 0.5)), max(1, int(new[1] + 0.5))


def resize(image, boxes, shortest, longest, round_down=False):
    H, W = image.shape[1:]
    h, w = resized_size(H, W, shortest, longest, round_down)
    if (h, w) != (H, W):
        boxes = boxes * np.float32([w / W, h / H, w / W, h / H])
        image = v2.resize(image, [h, w], antialias=True)     # bilinear, as Pillow's
    return image, boxes


def clip(boxes, width, height):
    """Boxes cut at the picture's edges, and which still have extent (1e-5 as detectron2)."""
    limit = np.float32([width, height, width, height])
    boxes = np.minimum(np.maximum(boxes, 0), limit)      # of a few rows in a third of clip's time
    return boxes, (boxes[:, 2:] - boxes[:, :2] > 1e-5).all(1)


def as_tensor(picture):
    """(3, H, W) uint8 of an array (H, W, 3), or of a PIL picture, which is copied."""
    pixels = picture if isinstance(picture, np.ndarray) else np.array(picture)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def as_picture(image):
    """A PIL picture of (3, H, W) uint8."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


# CenterNet's colour noise along the principal axes of ImageNet's colours (AlexNet's, in the order
# red, green, blue of 0-1 pixels)
COLOUR_AXES = np.array([[-0.56089297, 0.71832671, 0.41158938],
                        [-0.5832747, 0.00994535, -0.81221408],
                        [-0.58752847, -0.69563484, 0.41340352]])
COLOUR_VARIANCES = np.array([0.2141788, 0.01817699, 0.00341571])


def cut_square(image, boxes, side, rng):
    """CenterNet's augmentation: a square around a random point becomes `side` x `side` pixels.

    It is 0.6 to 1.3 times as large as the picture's longer side; black where it leaves the picture.
    """
    picture = as_picture(image)          # Pillow cuts without another picture of floats
    around = np.zeros(2)
    for axis, length in enumerate(picture.size):
        # keeps the point 128 pixels off the edge, or less in small pictures
        margin = 128
        while length <= 2 * margin:
            margin //= 2
        around[axis] = rng.integers(margin, length - margin)

    square = max(picture.size) * rng.choice(np.arange(6, 14)) / 10
    x, y = around - square / 2
    scale = square / side
    picture = picture.transform((side, side), Image.AFFINE, (scale, 0, x, 0, scale, y),
                                Image.BILINEAR)
    return as_tensor(picture), (boxes - np.float32([x, y, x, y])) * np.float32(side / square)


def vary_colours(image, strength, noise, rng):
    """Brightness, contrast and saturation, in random order, then noise along COLOUR_AXES.

    Each of the three is multiplied by 1 - strength ... 1 + strength.
    """
    picture = as_picture(image)          # in Pillow they take a third of their time on tensors
    enhancers = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
    for n in rng.permutation(3):
        factor = float(rng.uniform(1 - strength, 1 + strength))
        picture = enhancers[n](picture).enhance(factor)
    shift = 255 * COLOUR_AXES @ (COLOUR_VARIANCES * rng.normal(0, noise, 3))
    return as_tensor((np.asarray(picture, np.float32) + shift).clip(0, 255).astype(np.uint8))


MEAN_COLOUR = 124, 116, 104                      # what becomes 0 in the network, as padding is


@functools.lru_cache(maxsize=16)
def blank(height, width):
    """The mean colour, (H, W, 3) uint8: to be copied, which takes a tenth of filling it anew."""
    colour = np.full((height, width, 3), MEAN_COLOUR, np.uint8)
    colour.setflags(write=False)
    return colour


def shift(image, boxes, dx, dy):
    """Everything moves right by dx and down by dy pixels; the mean colour fills the gap."""
    H, W = image.shape[1:]
    dx, dy = max(-W, min(W, dx)), max(-H, min(H, dy))    # further there is nothing left
    moved = blank(H, W).copy()
    moved[max(dy, 0):H + min(dy, 0), max(dx, 0):W + min(dx, 0)] = image.permute(1, 2, 0).numpy()[
        max(-dy, 0):H + min(-dy, 0), max(-dx, 0):W + min(-dx, 0)]
    return as_tensor(moved), boxes + np.float32([dx, dy, dx, dy])


class View(NamedTuple):
    """A picture on its way into a batch."""
    image: torch.Tensor         # (3, H, W) uint8
    boxes: np.ndarray           # (G, 4) float32
    kept: np.ndarray            # (G,) bool, false where a step has left nothing of the box
    frame: np.ndarray           # (4,) where the original's left, top, right and bottom edge lie


@dataclass
class Transform:
    """What happens to a picture on its way into a batch.

    Training, as in the released configurations (the paper does not tell): flip with probability
    `flip`; with probability `crop`, resize the shorter side to one of 400, 500, 600 and cut a
    window with sides of 384 to 600 (DETR's augmentation, which OneNet and Sparse R-CNN took over);
    then resize the shorter side to one of `shortest`.  The original CenterNet instead cuts a square
    (`square`, its side in pixels) and varies colours.  Last, for small pictures, a move of up to
    `shift` pixels, right or left and up or down: where all epochs show a picture at one place, a
    network can learn by heart which cell of its grid it chose there.

    Evaluation: all of it 0, and one size, or none, which keeps the picture's own.
    """
    shortest: tuple = (800,)
    longest: int = 1333
    flip: float = 0.0
    crop: float = 0.0
    round_down: bool = False
    square: int = 0
    colours: float = 0.0
    shift: int = 0

    def __call__(self, image, boxes, rng):
        """Boxes move with their pixels; after every step they are clipped.  Returns a View.

        image: (3, H, W) uint8 tensor   boxes: (G, 4) float32 array, on which small operations
        cost a tenth of what they do on tensors   rng: numpy Generator
        """
        H, W = image.shape[1:]
        boxes, kept = clip(boxes, W, H)
        # the last row is the frame, which moves along and is never clipped
        rows = np.concatenate([boxes, np.float32([[0, 0, W, H]])])
        if rng.random() < self.flip:
            image = image.flip(2)
            rows[:, 0::2] = W - rows[:, 2::-2]
            rows[-1, 0::2] = rows[-1, 2::-2].copy()      # its left edge now lies at the right

        if rng.random() < self.crop:
            shortest = int(rng.choice([400, 500, 600]))
            image, rows = resize(image, rows, shortest, 10 ** 9, self.round_down)
            H, W = image.shape[1:]
            w, h = (int(rng.integers(min(side, 384), min(side, 600) + 1)) for side in (W, H))
            x = int(rng.integers(W - w + 1))
            y = int(rng.integers(H - h + 1))
            # a copy, with the colours last again: views of it are slower to resize and to batch
            window = image[:, y:y + h, x:x + w].permute(1, 2, 0)
            image = as_tensor(np.ascontiguousarray(window.numpy()))
            rows = rows - np.float32([x, y, x, y])
            rows[:-1], inside = clip(rows[:-1], w, h)
            kept = kept & inside

        if self.square:
            image, rows = cut_square(image, rows, self.square, rng)
        elif self.shortest:
            shortest = self.shortest[rng.integers(len(self.shortest))]
            image, rows = resize(image, rows, shortest, self.longest, self.round_down)
        if self.colours:
            image = vary_colours(image, self.colours, 0.1, rng)
        if self.shift:
            dx, dy = rng.integers(-self.shift, self.shift + 1, 2).tolist()
            image, rows = shift(image, rows, dx, dy)
        boxes, inside = clip(rows[:-1], image.shape[2], image.shape[1])
        return View(image, boxes, kept & inside, rows[-1])


# ------------------------------------------------------------------------------------------------
# pictures and batches
# ------------------------------------------------------------------------------------------------

class Pictures(Dataset):
    """Annotations plus a transform.  Item (epoch, index) is (uint8 image (3, H, W), target)."""

    CACHE = 2 ** 30             # bytes; what decodes to less is kept decoded in memory

    def __init__(self, annotations, transform, seed=0):
        self.annotations, self.transform, self.seed = annotations, transform, seed
        self.cache = {} if 3 * int(annotations.sizes.prod(1).sum()) < self.CACHE else None

    def __len__(self):
        return len(self.annotations)

    def pixels(self, i):
        """(3, H, W) uint8 of picture i, as it is in its file, upright.  Raises DataError."""
        if self.cache is not None and i in self.cache:
            return self.cache[i]
        a = self.annotations
        # an .odgt has no sizes: those of its pictures are kept from run to run
        source = f"{a.json_file} or the file sizes-crowdhuman.json beside the runs"
        image = as_tensor(load_picture(a.path(i), *a.sizes[i].tolist(), a.image_ids[i],
                                       source if a.full_boxes is not None else "the JSON"))
        if self.cache is not None:
            self.cache[i] = image
        return image

    def picture(self, i):
        """The same to draw on, PIL."""
        return as_picture(self.pixels(i))

    def __getitem__(self, key):
        epoch, i = key
        a = self.annotations
        rows = slice(int(a.first[i]), int(a.first[i + 1]))
        boxes, labels, crowd = (t.numpy()[rows] for t in (a.boxes, a.labels, a.crowd))
        rng = np.random.default_rng((self.seed, epoch, i))
        view = self.transform(self.pixels(i), boxes, rng)
        target = view.kept & ~crowd
        arrays = {"boxes": view.boxes[target], "labels": labels[target],
                  "size": np.array(view.image.shape[1:]), "frame": view.frame,
                  "objects": target.nonzero()[0],            # numbers among the picture's boxes
                  "ignore": view.boxes[view.kept & crowd]}
        return view.image, {"image_id": a.image_ids[i], "original_size": a.sizes[i],
                            **{name: torch.from_numpy(array) for name, array in arrays.items()}}


def collate(samples, divisor):
    """Samples to images (B, 3, H, W) uint8, mask (B, H, W) true on padding, list of targets.

    Padding is at the right and at the bottom, to the largest picture, rounded up to a multiple of
    `divisor` pixels: the detector's own (models.Detector.divisor), for some see their padding.
    """
    largest = np.max([image.shape[1:] for image, _ in samples], axis=0)
    height, width = (-(-largest // divisor) * divisor).tolist()      # rounded up
    images = torch.zeros(len(samples), height, width, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    mask = torch.ones(len(samples), height, width, dtype=torch.bool)
    for n, (image, _) in enumerate(samples):
        images[n, :, :image.shape[1], :image.shape[2]] = image
        mask[n, :image.shape[1], :image.shape[2]] = False
    return images, mask, [target for _, target in samples]


def as_evaluated(picture, transform, divisor):
    """A picture of one's own as evaluation shows one to a detector: a batch of one.

    picture: a file's name, read upright, or a PIL picture, taken as its pixels lie
    transform: Transform of evaluation   divisor: of `collate`   Raises DataError.
    """
    if not isinstance(picture, Image.Image):
        picture = load_picture(picture)
    image = transform(as_tensor(picture.convert("RGB")), np.zeros((0, 4), np.float32),
                      np.random.default_rng(0)).image
    return collate([(image, {"size": torch.tensor(image.shape[1:]),
                             "original_size": torch.tensor(picture.size[::-1])})], divisor)


def batch_stream(annotations, batch_size, seed, skip_empty=False):
    """Endless lists of `batch_size` keys (epoch, index): the order of training, of all processes.

    Each epoch is a shuffle of its own.  Landscape and portrait pictures collect in separate
    buckets, so that a batch needs little padding; what an epoch leaves in a bucket opens the next.
    skip_empty: pictures without objects (crowd regions are none) are left out.
    """
    portrait = (annotations.sizes[:, 0] > annotations.sizes[:, 1]).tolist()
    used = np.arange(len(portrait))
    if skip_empty:
        before = torch.cat([torch.zeros(1, dtype=torch.long), (~annotations.crowd).cumsum(0)])
        objects = before[annotations.first].diff()                   # (N,) of each picture
        used = used[objects.numpy() > 0]

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


def training_batches(annotations, batch_size, seed, start=0, rank=0, world=1, accumulate=1,
                     skip_empty=False):
    """This process's share of `batch_stream`, from step `start` on.

    A step is a list of keys for each of its `accumulate` micro-batches.
    """
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
    """Ctrl-C reaches the workers too.

    They must live until the training process has taken what it needs to save.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Reported(Dataset):
    """Pictures whose faults are values: from a worker no exception arrives as it was raised."""

    def __init__(self, pictures):
        self.pictures = pictures

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, key):
        try:
            return self.pictures[key]
        except annotations.DataError as error:
            return error


def collate_or_report(samples, divisor):
    """A batch, or the first fault among its pictures."""
    faults = [sample for sample in samples if isinstance(sample, annotations.DataError)]
    return faults[0] if faults else collate(samples, divisor)


def loader(pictures, batches, divisor, workers=0, pin_memory=False):
    """Batches over lists of keys.  Its own generator leaves the global random state alone.

    divisor: of `collate`.  Raises DataError, the same with workers and without.
    """
    join = functools.partial(collate_or_report, divisor=divisor)
    read = DataLoader(Reported(pictures), batch_sampler=batches, collate_fn=join,
                      num_workers=workers, pin_memory=pin_memory, generator=torch.Generator(),
                      worker_init_fn=ignore_signals)
    for batch in read:
        if isinstance(batch, annotations.DataError):
            raise batch
        yield batch


def end_workers():
    """Ends the processes that read pictures, which heed no other signal; to be called at the end.

    Without it an error would wait for them for ever.
    """
    children = multiprocessing.active_children()
    if children:             # on a GPU a thread listens to them, and would print a traceback
        threading.excepthook = lambda told: None
    if children and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)    # PyTorch's handler would call it a fault
    for child in children:
        child.kill()
