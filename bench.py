"""Speed, side by side with peers in the same run: ratios and medians, because timings are noisy.

    python bench.py                     everything, a few minutes on one core
    python bench.py matching crowd      only these

Peers: torchvision's RetinaNet and FCOS, scipy's solver on the whole cost, and the published codes'
own ratios between detectors.
"""
import argparse
import statistics
import time

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.models import detection

import assign
import checkpoints
import crowd
import losses
import models
import recipes


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
    room = torch.tensor([width - 120.0, height - 106.0])
    targets = []
    for n in range(B):
        centre = torch.rand(objects, 2, generator=r) * room + 40
        side = torch.rand(objects, 2, generator=r) * 60 + 10
        targets.append({"boxes": torch.cat([centre - side / 2, centre + side / 2], 1),
                        "labels": torch.randint(0, 80, (objects,), generator=r),
                        "size": torch.tensor([height, width]), "image_id": n})
    return images, torch.zeros(B, height, width, dtype=torch.bool), targets


def step(detector, one_to_many=False, **options):
    """A function that does one training step of a detector with a ResNet-50.

    That is: forward, matching, losses, backward.
    """
    flags = {**recipes.recipe("coco", detector, one_to_many), "detector": detector,
             "assign": "one-to-many" if one_to_many else "hungarian"}
    flags["class_cost"] = flags["lambda_cls"]
    cost, strategy, loss = losses.row(flags)
    model = checkpoints.build(detector, 80, "resnet50", one_to_many, **options).train()
    images, mask, targets = batch()
    num_objects = torch.tensor(float(sum(len(t["boxes"]) for t in targets)))

    def run():
        model.zero_grad()
        prediction = model(images, mask)
        matches = assign.match(prediction, targets, cost, strategy)
        sum(loss(prediction, targets, matches, num_objects).values()).backward()
    return run


def keep_size(image, target=None):
    """Instead of torchvision's resizing: the pictures have the size that ours have."""
    return image, target


def torchvision_step(make):
    """The same for a detector of torchvision's."""
    model = make(weights=None, weights_backbone=None, num_classes=80).train()
    model.transform.resize = keep_size

    # frozen norms, stem and first stage, as in ours
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.eval().requires_grad_(False)
    model.backbone.body.conv1.requires_grad_(False)
    model.backbone.body.layer1.requires_grad_(False)

    # it wants 0 to 1, and takes the size of a picture from the picture
    images, _, targets = batch()
    pictures = [image / 255 for image in images]

    def run():
        model.zero_grad()
        truth = [{"boxes": t["boxes"], "labels": t["labels"]} for t in targets]
        sum(model(pictures, truth).values()).backward()
    return run


def dense():
    """The original one-to-many forms against torchvision's.

    Network, assignment and kind of loss are the same.
    """
    peers = (("retinanet", detection.retinanet_resnet50_fpn),
             ("fcos", detection.fcos_resnet50_fpn))
    for name, make in peers:
        ours = seconds(step(name, True, variant="torchvision"))
        theirs = seconds(torchvision_step(make))
        end_to_end = seconds(step(name))
        print(f"{name}: a training step takes {ours / theirs:.2f} of torchvision's ({ours:.2f} s); "
              f"its one-to-one form {end_to_end / theirs:.2f}")


def queries():
    """In units of DETR's step, beside the published codes' ratios.

    Those were taken on one core of another machine (256 x 320, 2 pictures).
    """
    unit = seconds(step("detr"))
    print(f"detr: {unit:.2f} s a training step")
    published = (("deformable-detr", 4.48 / 1.42, {}),
                 ("sparse-rcnn", 5.05 / 1.42, {"queries": 100}))
    for name, ratio, options in published:
        ours = seconds(step(name, **options)) / unit
        print(f"{name}: {ours:.2f} of DETR's step; the published code: {ratio:.2f}")


def dense_predictions(height=800, width=1344, B=16, num_classes=80):
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
    prediction = models.Prediction(logits, models.ltrb_to_xyxy(points, ltrb),
                                   points.repeat(1, 2), stride)

    targets = []
    room = torch.tensor([width, height])
    for n in range(B):
        G = int(torch.randint(1, 21, (1,), generator=r))
        side = torch.rand(G, 2, generator=r) * 390 + 10
        corner = torch.rand(G, 2, generator=r) * (room - side)
        targets.append({"boxes": torch.cat([corner, corner + side], 1),
                        "labels": torch.randint(0, num_classes, (G,), generator=r),
                        "size": torch.tensor([height, width]), "image_id": n})
    return prediction, targets


def matching():
    """Exact one-to-one assignment of a dense head's candidates, against scipy on the whole cost.

    Then all that matching is in a training step of 16 pictures: costs, strategy, checks.
    """
    for Q, G in ((22_400, 20), (22_400, 100), (201_600, 400)):
        cost = torch.rand(Q, G, generator=torch.Generator().manual_seed(0))
        ours = seconds(lambda: assign.hungarian(cost))
        beside = ""
        if Q * G < 5_000_000:               # a larger one would take scipy minutes
            theirs = seconds(lambda: linear_sum_assignment(cost.numpy()))
            beside = f", {ours / theirs:.2f} of scipy's on the whole matrix"
        print(f"matching {Q:,} x {G}: {1000 * ours:.0f} ms{beside}")

    prediction, targets = dense_predictions()
    (B, Q), counts = prediction.boxes.shape[:2], [len(t["boxes"]) for t in targets]
    whole = seconds(lambda: assign.match(prediction, targets, assign.matching_cost,
                                         assign.hungarian), repeats=7)
    print(f"matching a batch of {B} pictures, {Q:,} predictions and {min(counts)} to {max(counts)} "
          f"objects in each: {1000 * whole:.0f} ms")


def crowd_evaluation():
    """CrowdHuman's evaluation of a validation set's size.

    That is 4,370 pictures with 23 persons and 500 detections each.
    """
    r = np.random.default_rng(0)
    pictures, detections = {}, {}
    for n in range(4370):
        at = r.uniform(0, 700, (23, 2))
        persons = np.concatenate([at, at + r.uniform(30, 200, (23, 2))], 1)
        pictures[n] = persons, persons[:2] + 5, 900, 900

        # detections lie about the persons, so that each has many to be matched with
        close = persons[r.integers(0, 23, 500)] + r.normal(0, 12, (500, 4))
        corner, opposite = close[:, :2], np.maximum(close[:, 2:], close[:, :2] + 1)
        detections[n] = np.concatenate([corner, opposite, r.random((500, 1))], 1)

    start = time.perf_counter()
    crowd.crowd_metrics(pictures, detections)
    took = time.perf_counter() - start
    print(f"crowd: 4,370 pictures with 500 detections each are scored in {took:.0f} s")


PARTS = {"matching": matching, "crowd": crowd_evaluation, "dense": dense, "queries": queries}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART",
                        help=f"any of {', '.join(PARTS)} (default: all)")
    args = parser.parse_args()
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    for part in args.parts or PARTS:
        PARTS[part]()


if __name__ == "__main__":
    main()
