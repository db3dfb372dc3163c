"""Speed, side by side with peers in the same run: ratios of alternating calls, medians.

    python bench.py                                 everything, about a quarter of an hour of a core
    python bench.py matching loading                only these
    python bench.py --device cuda --json bench.json     on a GPU, with a file to send in

Peers: torchvision's RetinaNet, FCOS and pipeline of pictures, transformers' DETR and Deformable
DETR, scipy's solver on the whole cost, pycocotools.  A peer that is not installed is skipped, with
a word (pip install transformers hotcoco).  Timings are noisy, ratios less so.
"""
import argparse
import contextlib
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torchvision import tv_tensors
from torchvision.models import detection
from torchvision.transforms import v2

import annotations
import assign
import checkpoints
import crowd
import data
import evaluate
import losses
import models
import recipes
import runs
import scenes


# ------------------------------------------------------------------------------------------------
# timing
# ------------------------------------------------------------------------------------------------

class Row(NamedTuple):
    """One line of the table.  Seconds are medians; ratio is the median of ours to the peer's."""
    what: str
    ours: float                 # seconds, or as unit says
    peer: str = ""
    theirs: float | None = None
    ratio: float | None = None
    unit: str = "s"


def clock(function, device="cpu"):
    """Seconds of a call, the GPU's work included, and none of what it was at before."""
    if device != "cpu":
        torch.accelerator.synchronize()
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def seconds(function, device="cpu", repeats=3):
    """Median time of a call, after one that does not count."""
    function()
    return statistics.median(clock(function, device) for _ in range(repeats))


def versus(what, ours, peer, theirs, device="cpu", repeats=3):
    """A Row of two functions, called in turn after one call each that does not count."""
    ours()
    theirs()
    pairs = [(clock(ours, device), clock(theirs, device)) for _ in range(repeats)]
    ratio = statistics.median(a / b for a, b in pairs)
    a, b = (statistics.median(times) for times in zip(*pairs))
    return Row(what, a, peer, b, ratio)


def skipped(peer):
    print(f"{peer} is not installed: left out (pip install {peer})", file=sys.stderr)


def told(row):
    """A Row as a line of text."""
    def amount(value):
        if row.unit != "s":
            return f"{value:9.0f} {row.unit}"
        return f"{1000 * value:9.1f} ms" if value < 10 else f"{value:9.1f} s "

    theirs = "" if row.theirs is None else f"{row.peer:28} {amount(row.theirs)} {row.ratio:7.2f}"
    return f"{row.what:58} {amount(row.ours)}   {theirs}".rstrip()


# ------------------------------------------------------------------------------------------------
# training steps and inference
# ------------------------------------------------------------------------------------------------

def batch(device, B=2, height=256, width=320, objects=7):
    """Random pictures with boxes of 10 to 70 pixels."""
    r = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (B, 3, height, width), dtype=torch.uint8, generator=r)
    room = torch.tensor([width - 80.0, height - 80.0])
    targets = []
    for n in range(B):
        centre = torch.rand(objects, 2, generator=r) * room + 40
        side = torch.rand(objects, 2, generator=r) * 60 + 10
        target = {"boxes": torch.cat([centre - side / 2, centre + side / 2], 1),
                  "labels": torch.randint(0, 80, (objects,), generator=r)}
        target = {name: value.to(device) for name, value in target.items()}
        targets.append({**target, "size": torch.tensor([height, width]), "image_id": n})
    mask = torch.zeros(B, height, width, dtype=torch.bool)
    return images.to(device), mask.to(device), targets


def autocast(device):
    """bfloat16 where the device computes in it."""
    precision = runs.native_precision(device)
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


class Ours:
    """A detector with a ResNet-50 and COCO's classes, as a training step and as inference.

    matching: seconds that assign.match has taken in all timed steps
    """

    def __init__(self, detector, device, one_to_many=False, pictures=None, **options):
        flags = {**recipes.recipe("coco", detector, one_to_many), "detector": detector,
                 "assign": "one-to-many" if one_to_many else "hungarian"}
        flags["class_cost"] = flags["lambda_cls"]
        self.cost, self.strategy, self.loss = losses.row(flags)
        self.model = checkpoints.build(detector, 80, "resnet50", one_to_many, **options).to(device)
        self.device, self.matching = device, 0.0
        self.images, self.mask, self.targets = pictures or batch(device)

    def step(self, timed=False):
        """timed: matching too, for which a GPU is waited for twice more."""
        self.model.train().zero_grad()
        with autocast(self.device):
            prediction = self.model(self.images, self.mask)
        if timed:
            self.matching += clock(lambda: self.match(prediction), self.device)
        else:
            self.match(prediction)
        objects = sum(len(t["boxes"]) for t in self.targets)
        num_objects = torch.tensor(float(max(1, objects)), device=self.device)
        terms = self.loss(prediction, self.targets, self.matches, num_objects)
        sum(terms.values()).backward()

    def match(self, prediction):
        self.matches = assign.match(prediction, self.targets, self.cost, self.strategy)

    @torch.no_grad()
    def infer(self):
        self.model.eval()
        with autocast(self.device):
            prediction = self.model(self.images, self.mask)
        for n in range(len(self.images)):
            self.model.detections(prediction.image(n))


class Torchvision:
    """The same of a detector of torchvision's."""

    def __init__(self, make, device):
        self.model = make(weights=None, weights_backbone=None, num_classes=80).to(device)
        # the pictures have the size that ours have
        self.model.transform.resize = lambda image, target=None: (image, target)
        # frozen norms, stem and first stage, as in ours
        self.norms = [m for m in self.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        for norm in self.norms:
            norm.requires_grad_(False)
        self.model.backbone.body.conv1.requires_grad_(False)
        self.model.backbone.body.layer1.requires_grad_(False)

        # it wants 0 to 1, and takes the size of a picture from the picture
        images, _, targets = batch(device)
        self.device, self.pictures = device, [image / 255 for image in images]
        self.truth = [{"boxes": t["boxes"], "labels": t["labels"]} for t in targets]

    def step(self):
        self.model.train().zero_grad()
        for norm in self.norms:
            norm.eval()
        with autocast(self.device):
            terms = self.model(self.pictures, self.truth)
        sum(terms.values()).backward()

    @torch.no_grad()
    def infer(self):
        self.model.eval()
        with autocast(self.device):
            self.model(self.pictures)


class Transformers:
    """The same of a detector of the library transformers."""

    def __init__(self, transformers, name, stages, device):
        backbone = transformers.ResNetConfig(out_features=stages)
        config = getattr(transformers, f"{name}Config")(
            use_timm_backbone=False, backbone_config=backbone, use_pretrained_backbone=False,
            num_labels=80, auxiliary_loss=True)
        self.model = getattr(transformers, f"{name}ForObjectDetection")(config).to(device)
        for key, parameter in self.model.named_parameters():     # it freezes its own backbone
            parameter.requires_grad_("embedder" not in key and "stages.0" not in key)
        images, mask, targets = batch(device)
        sides = torch.tensor([images.shape[3], images.shape[2]] * 2, device=device)
        self.device, self.images, self.mask = device, images.float() / 255, (~mask).long()
        self.labels = [{"class_labels": t["labels"], "boxes": torchvision.ops.box_convert(
            t["boxes"], "xyxy", "cxcywh") / sides} for t in targets]

    def step(self):
        self.model.train().zero_grad()
        with autocast(self.device):
            self.model(pixel_values=self.images, pixel_mask=self.mask,
                       labels=self.labels).loss.backward()

    @torch.no_grad()
    def infer(self):
        self.model.eval()
        with autocast(self.device):
            self.model(pixel_values=self.images, pixel_mask=self.mask)


def dense(device):
    """The original one-to-many forms against torchvision's.

    Network, assignment and kind of loss are the same.
    """
    for name, make in (("retinanet", detection.retinanet_resnet50_fpn),
                       ("fcos", detection.fcos_resnet50_fpn)):
        ours, theirs = Ours(name, device, True, variant="torchvision"), Torchvision(make, device)
        yield versus(f"{name}, one-to-many, a training step", ours.step, "torchvision",
                     theirs.step, device)
        yield versus(f"{name}, one-to-many, inference", ours.infer, "torchvision", theirs.infer,
                     device)
        end_to_end = Ours(name, device)
        yield versus(f"{name}, one-to-one, a training step", end_to_end.step,
                     "torchvision, one-to-many", theirs.step, device)
        yield versus(f"{name}, one-to-one, inference", end_to_end.infer,
                     "torchvision, one-to-many", theirs.infer, device)


def queries(device):
    """DETR's family against transformers', and in units of DETR's step."""
    try:
        with contextlib.redirect_stderr(None):
            import transformers
    except ImportError:
        transformers = None
        skipped("transformers")
    detr = Ours("detr", device)
    peers = {"detr": ("Detr", ["stage4"]),
             "deformable-detr": ("DeformableDetr", ["stage2", "stage3", "stage4"])}
    for name, options in (("detr", {}), ("deformable-detr", {}), ("sparse-rcnn",
                                                                  {"queries": 100})):
        ours = Ours(name, device, **options)
        if transformers and name in peers:
            theirs = Transformers(transformers, *peers[name], device)
            yield versus(f"{name}, a training step", ours.step, "transformers", theirs.step, device)
            yield versus(f"{name}, inference", ours.infer, "transformers", theirs.infer, device)
        if name != "detr":
            yield versus(f"{name}, a training step", ours.step, "our DETR", detr.step, device)


def growth(device):
    """How a step of FCOS (end-to-end) grows with the batch, the picture and its objects."""
    kinds = [{"B": B} for B in (1, 2, 4)]
    kinds += [{"height": 192, "width": 256}, {"height": 384, "width": 512}]
    kinds += [{"objects": n} for n in (1, 30, 100)]
    for kind in kinds:
        ours = Ours("fcos", device, pictures=batch(device, **kind))
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        ours.step()                                      # does not count
        took = sum(clock(lambda: ours.step(timed=True), device) for _ in range(3)) / 3
        words = ", ".join(f"{name} {value}" for name, value in
                          {"B": 2, "height": 256, "width": 320, "objects": 7, **kind}.items())
        memory = ""
        if device.startswith("cuda"):
            memory = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
        yield Row(f"fcos: {words}{memory}", took)
        share = ours.matching / 3
        yield Row(f"    of it matching, {100 * share / took:.1f}%", share)


# ------------------------------------------------------------------------------------------------
# matching
# ------------------------------------------------------------------------------------------------

def dense_predictions(device, height=800, width=1344, B=16, num_classes=80):
    """What FCOS says of a batch of COCO's size before it is trained: 22,400 boxes a picture.

    Boxes reach a few strides from their points, scores are about 0.01; 1 to 20 objects a picture,
    of 10 to 400 pixels.
    """
    r = torch.Generator().manual_seed(0)
    strides = (8, 16, 32, 64, 128)
    levels = [models.grid_points(torch.empty(-(-height // s), -(-width // s)), s, s // 2)
              for s in strides]
    points, stride = models.join_levels(levels, strides)
    ltrb = torch.rand(B, len(points), 4, generator=r) * 4 * stride[:, None]
    logits = torch.randn(B, len(points), num_classes, generator=r) + models.PRIOR_BIAS
    parts = logits, models.ltrb_to_xyxy(points, ltrb), points.repeat(1, 2), stride
    prediction = models.Prediction(*(part.to(device) for part in parts))

    targets = []
    room = torch.tensor([width, height])
    for n in range(B):
        G = int(torch.randint(1, 21, (1,), generator=r))
        side = torch.rand(G, 2, generator=r) * 390 + 10
        corner = torch.rand(G, 2, generator=r) * (room - side)
        targets.append({"boxes": torch.cat([corner, corner + side], 1).to(device),
                        "labels": torch.randint(0, num_classes, (G,), generator=r).to(device),
                        "size": torch.tensor([height, width]), "image_id": n})
    return prediction, targets


def matching(device):
    """Exact one-to-one assignment of a dense head's candidates, against scipy on the whole cost.

    Then all that matching is in a training step of 16 pictures: costs, strategy, checks.
    """
    for Q, G in ((22_400, 1), (22_400, 20), (22_400, 100), (201_600, 20), (201_600, 400)):
        cost = torch.rand(Q, G, generator=torch.Generator().manual_seed(0)).to(device)
        what = f"hungarian, {Q:,} x {G}"
        if Q * G < 5_000_000:               # a larger one would take scipy minutes
            yield versus(what, lambda: assign.hungarian(cost), "scipy on the whole matrix",
                         lambda: linear_sum_assignment(cost.cpu().numpy()), device, repeats=15)
        else:
            yield Row(what, seconds(lambda: assign.hungarian(cost), device))

    prediction, targets = dense_predictions(device)
    (B, Q), counts = prediction.boxes.shape[:2], [len(t["boxes"]) for t in targets]
    whole = seconds(lambda: assign.match(prediction, targets, assign.matching_cost,
                                         assign.hungarian), device, repeats=7)
    yield Row(f"match, {B} pictures, {Q:,} x {min(counts)} to {max(counts)}", whole)


# ------------------------------------------------------------------------------------------------
# loading
# ------------------------------------------------------------------------------------------------

def photographs(folder, count=24, size=(640, 480)):
    """JPEGs of COCO's usual size with boxes: scenes, enlarged, with the noise of a camera."""
    r, images, boxes = np.random.default_rng(0), [], []
    (Path(folder) / "jpeg").mkdir()
    for n in range(count):
        picture, objects = scenes.draw(0, "train", n)
        scale = np.array(size) / picture.size
        pixels = np.asarray(picture.resize(size, Image.BICUBIC), float)
        noisy = (pixels + r.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(Path(folder) / "jpeg" / f"{n}.jpg", quality=90)
        images.append({"id": n, "file_name": f"{n}.jpg", "width": size[0], "height": size[1]})
        for creature in objects:
            x1, y1, x2, y2 = (np.asarray(creature["box"]) * np.tile(scale, 2)).tolist()
            boxes.append({"id": len(boxes) + 1, "image_id": n, "category_id": 1, "iscrowd": 0,
                          "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)})
    file = Path(folder) / "jpeg.json"
    runs.write_json(file, {"images": images, "annotations": boxes,
                           "categories": [{"id": 1, "name": "creature"}]})
    return annotations.read_annotations(file, Path(folder) / "jpeg")


class Pipeline:
    """torchvision's v2 transforms, as its own detection reference puts them together."""

    def __init__(self, known, sizes, longest):
        self.known = known
        self.transform = v2.Compose([
            v2.RandomHorizontalFlip(0.5), v2.RandomShortestSize(sizes, longest),
            v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()])

    def __getitem__(self, i):
        known = self.known
        rows = slice(int(known.first[i]), int(known.first[i + 1]))
        picture = Image.open(known.path(i)).convert("RGB")
        image = tv_tensors.Image(v2.functional.pil_to_tensor(picture))
        boxes = tv_tensors.BoundingBoxes(known.boxes[rows], format="XYXY",
                                         canvas_size=image.shape[1:])
        return self.transform(image, {"boxes": boxes, "labels": known.labels[rows]})


def loading(device):
    """From files to what the network is given, on one core."""
    with tempfile.TemporaryDirectory() as folder:
        known = photographs(folder)
        sizes, longest = recipes.ORIGINAL["train_sizes"], recipes.ORIGINAL["train_longest"]
        ours = data.Pictures(known, data.Transform(sizes, longest, flip=0.5))
        ours.cache = None                                # COCO does not fit into memory
        theirs = Pipeline(known, sizes, longest)
        count, epochs = len(known), iter(range(100))

        def all_ours():
            epoch = next(epochs)
            return [ours[epoch, i] for i in range(count)]

        row = versus("a photograph: decode, flip, resize", all_ours, "torchvision v2",
                     lambda: [theirs[i] for i in range(count)], repeats=5)
        yield row._replace(ours=row.ours / count, theirs=row.theirs / count)
        samples = all_ours()[:16]
        batched = seconds(lambda: data.collate(samples, 32), repeats=5)
        yield Row("a batch of 16 of them put together, a photograph", batched / 16)

        small = scenes.write(Path(folder) / "scenes", counts={"train": 64, "val": 1})
        small = annotations.read_annotations(small / "train.json", small / "train")
        cached = data.Pictures(small, data.Transform([128], 128, flip=0.5, shift=12))

        def all_small():
            epoch = next(epochs)
            for start in range(0, 64, 16):
                data.collate([cached[epoch, i] for i in range(start, start + 16)], 32)
        yield Row("a cached scene of 128 pixels, with its share of a batch",
                  seconds(all_small, repeats=9) / 64)


# ------------------------------------------------------------------------------------------------
# evaluation
# ------------------------------------------------------------------------------------------------

def evaluation(device):
    """COCO's figures of 500 pictures with 100 detections each; CrowdHuman's of its val set's size.

    The latter is 4,370 pictures with 23 persons and 500 detections each.
    """
    r, boxes, found = np.random.default_rng(0), [], []
    for image in range(500):
        for box in r.uniform(20, 200, (7, 4)).tolist():
            boxes.append({"id": len(boxes) + 1, "image_id": image, "bbox": box, "iscrowd": 0,
                          "category_id": int(r.integers(1, 81)), "area": box[2] * box[3]})
        for n in range(100):
            box = boxes[-1 - n % 7]
            near = (np.array(box["bbox"]) + r.normal(0, 10, 4)).clip(1).tolist()
            found.append({"image_id": image, "category_id": box["category_id"], "bbox": near,
                          "score": float(r.random())})
    images = [{"id": n} for n in range(500)]
    classes = [{"id": n, "name": str(n)} for n in range(1, 81)]

    def judge(module):
        evaluate.hotcoco = module
        gt = evaluate.coco_object(images, classes, boxes)
        return lambda: evaluate.coco_metrics(gt, found)

    installed = evaluate.hotcoco
    slow = judge(None)
    yield Row("COCO's AP, 500 x 100, by pycocotools", seconds(slow, repeats=1))
    if installed:
        yield Row("COCO's AP, 500 x 100, by hotcoco", seconds(judge(installed)))
    else:
        skipped("hotcoco")
    evaluate.hotcoco = installed

    pictures, detections = {}, {}
    for n in range(4370):
        at = r.uniform(0, 700, (23, 2))
        persons = np.concatenate([at, at + r.uniform(30, 200, (23, 2))], 1)
        pictures[n] = persons, persons[:2] + 5, 900, 900

        # detections lie about the persons, so that each has many to be matched with
        close = persons[r.integers(0, 23, 500)] + r.normal(0, 12, (500, 4))
        corner, opposite = close[:, :2], np.maximum(close[:, 2:], close[:, :2] + 1)
        detections[n] = np.concatenate([corner, opposite, r.random((500, 1))], 1)
    yield Row("CrowdHuman's figures, 4,370 x 500",
              clock(lambda: crowd.crowd_metrics(pictures, detections)))


# ------------------------------------------------------------------------------------------------
# memory
# ------------------------------------------------------------------------------------------------

def resident():
    """Megabytes of this process and its children, pages that they share counted once (Linux)."""
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    total = 0
    for pid in pids:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total += next(int(line.split()[1]) for line in text.splitlines() if "Pss:" in line)
    return total / 1024


class Touched(torch.utils.data.Dataset):
    """Reads of each picture's annotations all that data.Pictures does."""

    def __init__(self, known):
        self.known = known

    def __len__(self):
        return len(self.known)

    def __getitem__(self, i):
        known = self.known
        rows = slice(int(known.first[i]), int(known.first[i + 1]))
        return known.path(i), known.image_ids[i], known.boxes[rows].sum() + known.labels[rows].sum()


def held(file, workers=4):
    """Megabytes of a process that has read an annotation file and its workers, after an epoch."""
    known = annotations.read_annotations(file, Path(file).parent)
    warnings.simplefilter("ignore")                      # of more workers than cores
    batches = torch.utils.data.DataLoader(Touched(known), 1024, num_workers=workers,
                                          persistent_workers=True, collate_fn=len)
    list(batches)
    return resident()


def memory(device):
    """Annotations of COCO train2017's size in a process and four workers.  Linux alone tells."""
    if not Path("/proc/self/smaps_rollup").exists():
        return
    fresh = multiprocessing.get_context("spawn")         # a process that has done nothing yet
    r, megabytes = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as folder:
        for N, M in ((10, 70), (118_287, 860_001)):
            owner, at = np.sort(r.integers(0, N, M)).tolist(), r.integers(0, 400, (M, 2)).tolist()
            content = {
                "images": [{"id": n, "file_name": f"{n:012}.jpg", "width": 640, "height": 480}
                           for n in range(N)],
                "categories": [{"id": 1, "name": "thing"}],
                "annotations": [{"id": n + 1, "image_id": i, "category_id": 1, "iscrowd": 0,
                                 "bbox": [*xy, 60, 60], "area": 3600}
                                for n, (i, xy) in enumerate(zip(owner, at))]}
            file = Path(folder) / f"{N}.json"
            runs.write_json(file, content)
            for image in content["images"]:              # the reader looks whether they are there
                (Path(folder) / image["file_name"]).touch()
            del content
            with ProcessPoolExecutor(1, fresh) as alone:
                megabytes.append(alone.submit(held, file).result())
    few, many = megabytes
    yield Row("annotations: 118,287 pictures, 860,001 boxes, 5 processes", many - few, unit="MB")


def processor():
    """The processor's name where Linux tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


PARTS = {"loading": loading, "matching": matching, "evaluation": evaluation, "memory": memory,
         "dense": dense, "queries": queries, "growth": growth}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART",
                        help=f"any of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--device", default="cpu", metavar="D", help="of networks and matching")
    parser.add_argument("--json", metavar="FILE", help="write the table to this file as well")
    args = parser.parse_args()
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    with runs.faults_told("bench.py", runs.RunError):
        device = runs.join_processes(args.device).device
        torch.set_num_threads(1)
        name = torch.cuda.get_device_name() if device.startswith("cuda") else device
        machine = {"device": name, "processor": processor(),
                   "precision": runs.native_precision(device), "python":
                   platform.python_version(), "torch": torch.__version__,
                   "torchvision": torchvision.__version__}
        if args.json:                        # a wrong place is told now, not after all is measured
            runs.write_json(args.json, {"machine": machine, "rows": []}, indent=1)
        print("  ".join(f"{key} {value}" for key, value in machine.items()))
        print(f"{'':58} {'ours':>12}   {'peer':28} {'its':>12} {'ratio':>7}")
        rows = []
        for part in args.parts or PARTS:
            for row in PARTS[part](device):
                print(told(row), flush=True)
                rows.append({"part": part, **row._asdict()})
        if args.json:
            runs.write_json(args.json, {"machine": machine, "rows": rows}, indent=1)


if __name__ == "__main__":
    main()
