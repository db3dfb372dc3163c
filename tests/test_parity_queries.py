"""Number-by-number parity with the published DETR, Deformable DETR (two forms) and Sparse R-CNN.

See test_parity.py.  The reference was made with DETR (commit 29901c51), Deformable DETR (11169a60)
and Sparse R-CNN (0e5028da), dropout 0.
"""
import pytest
import torch
from torchvision.ops import box_convert

import assign
import checkpoints
import convert
import data
import losses
import models
from test_parity import LAMBDAS, close, loaded, reference, value

NAMES = ("detr_r50", "deformable_detr_r50", "deformable_detr_r50_refine", "sparse_rcnn_r50")
LAYERS = ("aux0", "aux1", "aux2", "aux3", "aux4", "last")


class Published:
    """One published model under our roof:
    the reference figures, and our model with the same weights.

    The DETR family's published classifiers have outputs for all ids up to 90, convert.py keeps
    COCO's 80.  `model` is converted; `every` has the outputs of all ids, so that scores, matches
    and losses can be compared whole.
    """

    def __init__(self, name):
        self.name, self.expected = name, reference()[name]
        shapes, aliases = self.expected["shapes"], self.expected["aliases"]
        weights = {key: value(aliases.get(key, key), shape, shapes)
                   for key, shape in shapes.items()}
        _, checkpoint = convert.convert(weights)
        build, self.sparse = checkpoint["build"], name.startswith("sparse")
        if not self.sparse:
            build["dropout"] = 0.0
        self.model = loaded(checkpoint).eval()

        self.every, self.names = self.model, {}
        if not self.sparse:
            self.every = checkpoints.build(**{**build, "num_classes": 91}).eval()
            scores = {key.replace("class_embed", "score"): w for key, w in weights.items()
                      if key.startswith("class_embed")}
            own = self.every.state_dict()
            scores = {key: w for key, w in scores.items() if key in own}
            self.every.load_state_dict({**checkpoint["model"], **scores})

        # DETR pads to the largest picture, the others to a multiple of 32
        samples = [(image, {}) for image in reference()["images"]]
        self.images, self.mask, _ = data.collate(samples, divisor=32 if self.sparse else 1)
        self.prediction = self.every(self.images, self.mask)
        sizes = [image.shape[1:] for image in reference()["images"]]
        self.scale = torch.tensor([[w, h, w, h] for h, w in sizes])[:, None]

    def layers(self):
        return dict(zip(LAYERS, [*self.prediction.aux, self.prediction], strict=True))

    def targets(self, which):
        """The reference's labels; the DETR family counts from 1."""
        pairs = zip(reference()["targets"][which], reference()["images"])
        return [{**target, "labels": target["labels"] + (not self.sparse),
                 "size": torch.tensor(image.shape[1:]), "image_id": n}
                for n, (target, image) in enumerate(pairs)]


@pytest.fixture(scope="module", params=NAMES)
def published(request):
    return Published(request.param)


def test_every_layers_outputs_are_those_of_the_published_code(published):
    layers = published.layers()
    for name, sample in zip(LAYERS, published.expected["layers"], strict=True):
        close(layers[name].logits, sample["logits"])
        boxes = layers[name].boxes
        # Sparse R-CNN's are pixels, up to a few hundred
        if published.sparse:
            close(boxes, sample["boxes"])
        else:
            close(box_convert(boxes / published.scale, "xyxy", "cxcywh"), sample["boxes"], 2e-5)


def test_the_converted_model_has_the_outputs_of_cocos_80_classes(published):
    with torch.no_grad():
        ours = published.model(published.images, published.mask)
    kept = list(range(80)) if published.sparse else convert.COCO_IDS + [91] * ours.softmax
    assert (ours.boxes - published.prediction.boxes).abs().max() < 1e-3
    assert (ours.logits - published.prediction.logits[..., kept]).abs().max() < 1e-4


def test_the_detections_are_those_of_the_published_code(published):
    """As sets, since the authors do not all sort them; ours are clipped to the picture."""
    for n in (0, 1):
        expected = {k: torch.as_tensor(v) for k, v in published.expected["detections"][n].items()}
        h, w = reference()["original_sizes"][n]
        target = {"size": torch.tensor(reference()["images"][n].shape[1:]),
                  "original_size": torch.tensor([h, w])}
        with torch.no_grad():
            found = published.every.detections(published.prediction.image(n), 100)["plain"]
            boxes, scores, labels = models.to_original(found, target)

        clipped = expected["boxes"].clamp(min=0).minimum(torch.tensor([w, h, w, h]))
        kept = (clipped[:, 2:] > clipped[:, :2]).all(1)
        order = expected["scores"][kept].argsort(descending=True, stable=True)
        assert len(scores) == len(order) > 50
        assert (scores - expected["scores"][kept][order]).abs().max() < 1e-5
        every = zip(clipped[kept], expected["scores"][kept], expected["labels"][kept])
        for box, score, label in every:
            same = (labels == label) & ((scores - score).abs() < 2e-5)
            assert (boxes[same] - box).abs().amax(1).min() < 5e-3


def test_matches_losses_and_gradients_of_every_layer(published):
    detr = published.name == "detr_r50"
    weight = 1.0 if detr else 2.0
    cost, strategy, loss = losses.row({
        "detector": "detr" if detr else "deformable-detr", "assign": "hungarian",
        "location_cost": "predicted", "class_cost": weight, **LAMBDAS, "lambda_cls": weight})
    layers = published.layers()
    for which in ("t0", "t1", "t2", "t3"):
        targets = published.targets(which)
        expected = {k.removeprefix(which + "/"): v for k, v in published.expected["train"].items()
                    if k.startswith(which + "/")}
        num_objects = max(1, sum(len(t["boxes"]) for t in targets))
        matches = assign.match(published.prediction, targets, cost, strategy)
        inner = [name for name in layers if name != "last"]
        own = dict(zip(inner, matches[1:]), last=matches[0])

        released = {}
        for name, layer in layers.items():
            released[name] = []
            for n, ours in enumerate(own[name]):
                their_prediction, their_object = (
                    torch.tensor(expected.get(f"match/{name}/{n}/{part}", []), dtype=torch.long)
                    for part in ("src", "tgt"))
                released[name].append(
                    assign.Match(their_prediction, their_object, their_prediction[:0]))
                assert len(ours.prediction) == len(their_prediction) == len(targets[n]["boxes"])
                # else the assignment is not unique up to rounding
                if len(their_prediction) and expected[f"match/{name}/{n}/gap"] > 1e-4:
                    assert torch.equal(ours.prediction, their_prediction), (which, name, n)
                    assert torch.equal(ours.object, their_object), (which, name, n)

            alone = models.Prediction(layer.logits, layer.boxes, softmax=layer.softmax,
                                      centre_l1=layer.centre_l1)
            terms = loss(alone, targets, [released[name]], num_objects)
            suffix = "" if name == "last" else f"_{name[-1]}"
            for term, key, factor in [("class", "loss_ce", 1 if detr else 2),
                                      ("l1", "loss_bbox", 5), ("giou", "loss_giou", 2)]:
                # Sparse R-CNN's are weighted already
                theirs = float(expected[f"loss/{key}{suffix}"])
                theirs *= 1 if published.sparse else factor
                assert float(terms[term].detach()) == pytest.approx(theirs, rel=1e-4, abs=1e-5), \
                    (which, name, term)

        each = [released["last"], *[released[name] for name in inner]]
        total = sum(loss(published.prediction, targets, each, num_objects).values())
        assert float(total.detach()) == pytest.approx(float(expected["total"]), rel=1e-4)
        if "gradient_norms" in expected:
            published.every.zero_grad()
            total.backward(retain_graph=True)
            compare_gradients(published, expected["gradient_norms"])


def compare_gradients(p, expected):
    """The norms of all gradients, largest first:
    every parameter's, whatever its name (one head in six copies counts once).
    """
    ours = [float(x.grad.norm()) for x in p.every.parameters() if x.grad is not None]
    ours = sorted((norm for norm in ours if norm > 0), reverse=True)
    theirs = sorted((v for v in expected.values() if v > 0), reverse=True)
    assert len(ours) == len(theirs) > 100
    for a, b in zip(ours, theirs):
        assert a == pytest.approx(b, rel=2e-3, abs=1e-5 * theirs[0])


@pytest.mark.parametrize("detector, options, millions", [
    ("detr", {}, 41_524_768),
    ("deformable-detr", {}, 40_069_665),
])
def test_the_number_of_parameters_is_the_published_one(detector, options, millions):
    """With the published number of outputs, 91 ids (DETR: and no object),
    and torchvision's ResNet-50 with its frozen norms counted as buffers.
    """
    model = checkpoints.build(detector, 91, "resnet50", **options)
    assert sum(p.numel() for p in model.parameters()) == millions
