"""Speed, side by side with peers in the same run: ratios and medians, because timings are noisy.

    python bench.py                     everything, a few minutes on one core
    python bench.py matching crowd      only these

Peers: torchvision's RetinaNet and FCOS, scipy's solver on the whole cost, and the published codes' own ratios between detectors.
"""
import argparse
import statistics
import time

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.models import detection

import assign
import evaluate
import models
import train


def seconds(function, repeats=3):
    """Median time of a call, after one that does not count."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def batch(height=256, width=320, objects=7, B=2):
    """Random pictures with boxes of 10 to 70 pixels."""
    r = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (B, 3, height, width), dtype=torch.uint8, generator=r)
    targets = []
    for n in range(B):
        centre = torch.rand(objects, 2, generator=r) * torch.tensor([width - 120.0, height - 106.0]) + 40
        side = torch.rand(objects, 2, generator=r) * 60 + 10
        targets.append({"boxes": torch.cat([centre - side / 2, centre + side / 2], 1), "labels": torch.randint(0, 80, (objects,), generator=r),
                        "size": torch.tensor([height, width]), "image_id": n})
    return images, torch.zeros(B, height, width, dtype=torch.bool), targets


def step(detector, one_to_many=False, **options):
    """A function that does one training step of a detector with a ResNet-50: forward, matching, losses, backward."""
    flags = train.recipe("coco", detector, one_to_many) | {"detector": detector, "assign": "one-to-many" if one_to_many else "hungarian"}
    model = models.build(detector, 80, "resnet50", original=one_to_many, **options).train()
    cost, strategy, (images, mask, targets) = train.make_cost(model, flags), train.make_strategy(flags), batch()
    objects = torch.tensor(float(sum(len(t["boxes"]) for t in targets)))

    def run():
        model.zero_grad()
        sum(train.detection_loss(model, model(images, mask), targets, objects, cost, strategy).values()).backward()
    return run


def torchvision_step(make):
    model = make(weights=None, weights_backbone=None, num_classes=80).train()
    model.transform.resize = lambda image, target=None: (image, target)
    for m in model.modules():                                        # frozen norms, stem and first stage, as in ours
        if isinstance(m, torch.nn.BatchNorm2d):
            m.eval().requires_grad_(False)
    model.backbone.body.conv1.requires_grad_(False), model.backbone.body.layer1.requires_grad_(False)
    images, _, targets = batch()
    pictures = [image / 255 for image in images]

    def run():
        model.zero_grad()
        sum(model(pictures, [{"boxes": t["boxes"], "labels": t["labels"]} for t in targets]).values()).backward()
    return run


def dense():
    """The original one-to-many forms against torchvision's: the same network, assignment and kind of loss."""
    for name, make, extra in (("retinanet", detection.retinanet_resnet50_fpn, {"extra_from": "p5"}), ("fcos", detection.fcos_resnet50_fpn, {})):
        ours, theirs, end_to_end = seconds(step(name, True, **extra)), seconds(torchvision_step(make)), seconds(step(name))
        print(f"{name}: a training step takes {ours / theirs:.2f} of torchvision's ({ours:.2f} s); its one-to-one form {end_to_end / theirs:.2f}")


def queries():
    """In units of DETR's step, beside the published codes' ratios on one core of another machine (256 x 320, 2 pictures)."""
    unit = seconds(step("detr"))
    print(f"detr: {unit:.2f} s a training step")
    for name, published, options in (("deformable-detr", 4.48 / 1.42, {}), ("sparse-rcnn", 5.05 / 1.42, {"queries": 100})):
        print(f"{name}: {seconds(step(name, **options)) / unit:.2f} of DETR's step; the published code: {published:.2f}")


def matching():
    """Exact one-to-one assignment on a dense head's candidates, against scipy on the whole matrix."""
    for Q, G in ((22_400, 20), (22_400, 100), (201_600, 400)):
        cost = torch.rand(Q, G, generator=torch.Generator().manual_seed(0))
        ours = seconds(lambda: assign.hungarian(cost))
        if Q * G < 5_000_000:
            theirs = seconds(lambda: linear_sum_assignment(cost.numpy()))
            print(f"matching {Q:,} x {G}: {1000 * ours:.0f} ms, {ours / theirs:.2f} of scipy's on the whole matrix")
        else:
            print(f"matching {Q:,} x {G}: {1000 * ours:.0f} ms")


def crowd():
    """CrowdHuman's evaluation of a validation set's size: 4,370 pictures with 23 persons and 500 detections each."""
    r = np.random.default_rng(0)
    pictures, detections = {}, {}
    for n in range(4370):
        at = r.uniform(0, 700, (23, 2))
        persons = np.concatenate([at, at + r.uniform(30, 200, (23, 2))], 1)
        close = persons[r.integers(0, 23, 500)] + r.normal(0, 12, (500, 4))
        pictures[n] = persons, persons[:2] + 5, 900, 900
        detections[n] = np.concatenate([close[:, :2], np.maximum(close[:, 2:], close[:, :2] + 1), r.random((500, 1))], 1)
    start = time.perf_counter()
    evaluate.crowd_metrics(pictures, detections)
    print(f"crowd: 4,370 pictures with 500 detections each are scored in {time.perf_counter() - start:.0f} s")


PARTS = {"matching": matching, "crowd": crowd, "dense": dense, "queries": queries}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)} (default: all)")
    args = parser.parse_args()
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    for part in args.parts or PARTS:
        PARTS[part]()


if __name__ == "__main__":
    main()
