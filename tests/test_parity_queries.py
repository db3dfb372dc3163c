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
import losses
import models
from test_parity import (LAMBDAS, batch, close, compare_gradients, evaluated, loaded, reference,
                         value)

NAMES = ("detr_r50", "deformable_detr_r50", "deformable_detr_r50_refine", "sparse_rcnn_r50")
LAYERS = ("aux0", "aux1", "aux2", "aux3", "aux4", "last")


class Published:
    """One published model under our roof:
    the reference figures, and our model with the same weights.
    """

    def __init__(self, name):
        self.name, self.expected = name, reference()[name]
        shapes, aliases = self.expected["shapes"], self.expected["aliases"]
        weights = {key: value(aliases.get(key, key), shape, shapes)
                   for key, shape in shapes.items()}
        self.layout, checkpoint = convert.convert(weights)
        self.sparse = name.startswith("sparse")
        if not self.sparse:
            checkpoint["build"]["dropout"] = 0.0
        self.model = loaded(checkpoint).eval()
        self.images, self.mask = batch(self.model)
        self.prediction = self.model(self.images, self.mask)
        sizes = [image.shape[1:] for image in reference()["images"]]
        self.scale = torch.tensor([[w, h, w, h] for h, w in sizes])[:, None]

        # the DETR family's outputs are COCO's ids 0 ... 90, and DETR's "no object"; ours are the 80
        # classes first, then the other ids
        self.ids = list(range(80))
        if not self.sparse:
            self.ids = convert.COCO_IDS + [i for i in range(91) if i not in convert.COCO_IDS]
        self.output_of = torch.tensor(self.ids).argsort()                # published number -> ours

    def layers(self):
        return dict(zip(LAYERS, [*self.prediction.aux, self.prediction], strict=True))

    def targets(self, which):
        """The reference's labels, as numbers of our outputs; the DETR family counts from 1."""
        pairs = zip(reference()["targets"][which], reference()["images"])
        return [{**target, "labels": self.output_of[target["labels"] + (not self.sparse)],
                 "size": torch.tensor(image.shape[1:]), "image_id": n}
                for n, (target, image) in enumerate(pairs)]


@pytest.fixture(scope="module", params=NAMES)
def published(request):
    return Published(request.param)


def test_every_layers_outputs_are_those_of_the_published_code(published):
    layers = published.layers()
    for name, sample in zip(LAYERS, published.expected["layers"], strict=True):
        logits = layers[name].logits
        ours, no_object = logits[..., :len(published.ids)], logits[..., len(published.ids):]
        close(torch.cat([ours[..., published.output_of], no_object], -1), sample["logits"])
        boxes = layers[name].boxes
        # Sparse R-CNN's are pixels, up to a few hundred
        if published.sparse:
            close(boxes, sample["boxes"])
        else:
            close(box_convert(boxes / published.scale, "xyxy", "cxcywh"), sample["boxes"], 2e-5)


def test_evaluation_finds_what_the_published_code_found(published):
    """As sets, since the authors do not all sort them; ours are clipped to the picture.

    Theirs of ids that are no class do not count in COCO's evaluation, and ours are without them.
    """
    for n in (0, 1):
        expected = {k: torch.as_tensor(v) for k, v in published.expected["detections"][n].items()}
        h, w = reference()["original_sizes"][n]
        theirs = expected["boxes"].clamp(min=0).minimum(torch.tensor([w, h, w, h]))
        theirs_labels = published.output_of[expected["labels"]]
        kept = (theirs[:, 2:] > theirs[:, :2]).all(1) & (theirs_labels < 80)

        boxes, scores, labels = evaluated(published.model, "plain", n)
        order = expected["scores"][kept].argsort(descending=True, stable=True)
        assert len(scores) == len(order) > 40
        assert (scores - expected["scores"][kept][order]).abs().max() < 1e-5
        for box, score, label in zip(theirs[kept], expected["scores"][kept], theirs_labels[kept]):
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
            published.model.zero_grad()
            total.backward(retain_graph=True)
            compare_gradients(published, expected["gradient_norms"])


@pytest.mark.parametrize("detector, options, millions", [
    ("detr", {}, 41_524_768),
    ("deformable-detr", {}, 40_069_665),
])
def test_the_number_of_parameters_is_the_published_one(detector, options, millions):
    """With the published number of outputs, 91 ids (DETR: and no object),
    and torchvision's ResNet-50 with its frozen norms counted as buffers.
    """
    with torch.device("meta"):
        model = checkpoints.build(detector, 91, "resnet50", **options)
    assert sum(p.numel() for p in model.parameters()) == millions
