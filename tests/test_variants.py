"""Do torchvision's and detectron2's forms have their anchors, points and thresholds?

torchvision's own AnchorGenerator is the judge, also on maps whose stride is no power of two.
Figures of whole networks with published weights are in test_parity.py.
"""
import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

import checkpoints

# of P3 to P7; P7 has 3 x 4 cells of 106 x 112 pixels here
STRIDES = (8, 16, 32, 64, 128)
HEIGHT, WIDTH = 320, 448


def small(detector, variant):
    """An untrained detector that is quick to run."""
    torch.manual_seed(0)
    model = checkpoints.build(detector, 3, "tiny", True, variant, width=16, depth=1)
    return model.eval()


def run(model):
    images = torch.randint(0, 256, (2, 3, HEIGHT, WIDTH), dtype=torch.uint8)
    with torch.no_grad():
        return model(images, torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool))


def torchvisions_anchors(sizes, ratios):
    """(q, 4) of each level, from torchvision: sizes are those of P3's anchors."""
    of_levels = [tuple(int(size * 2 ** n) for size in sizes) for n in range(5)]
    generator = AnchorGenerator(tuple(of_levels), (ratios,) * 5)
    maps = [torch.zeros(1, 1, -(-HEIGHT // s), -(-WIDTH // s)) for s in STRIDES]
    images = ImageList(torch.zeros(1, 3, HEIGHT, WIDTH), [(HEIGHT, WIDTH)])
    (anchors,) = generator(images, maps)
    return anchors.split([x[0, 0].numel() * len(sizes) * len(ratios) for x in maps])


def test_retinanets_anchors_are_torchvisions():
    """Sides cut to whole pixels, corners rounded; torchvision has the ratio outside the size."""
    sizes = (32, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3))
    prediction = run(small("retinanet", "torchvision"))
    for stride, theirs in zip(STRIDES, torchvisions_anchors(sizes, (0.5, 1.0, 2.0)), strict=True):
        ours = prediction.candidates[prediction.strides == stride]
        theirs = theirs.view(-1, 3, 3, 4).transpose(1, 2).reshape(-1, 4)
        assert torch.equal(ours, theirs)
        assert torch.equal(ours, ours.round())

    # the authors' anchors differ: they are neither rounded nor spaced by a map's size
    authors = run(small("retinanet", None))
    assert authors.candidates.shape == prediction.candidates.shape
    for stride in STRIDES:
        at = prediction.strides == stride
        assert not torch.equal(authors.candidates[at], prediction.candidates[at])


def test_fcoss_points_are_torchvisions():
    """The middles of its square anchors, which are the corners of cells."""
    prediction = run(small("fcos", "torchvision"))
    for stride, theirs in zip(STRIDES, torchvisions_anchors((8,), (1.0,)), strict=True):
        points = (theirs[:, :2] + theirs[:, 2:]) / 2
        ours = prediction.candidates[prediction.strides == stride]
        assert torch.equal(ours, points.repeat(1, 2))
        assert ours[0].tolist() == [0, 0, 0, 0]
    # the authors' are the middles of cells
    assert run(small("fcos", None)).candidates[0].tolist() == [4, 4, 4, 4]


@pytest.mark.parametrize("variant, accepted", [
    (None, [True, True, False, False]),                # the class probability is over 0.05
    ("detectron2", [False, True, False, True]),        # the score is over 0.2
    ("torchvision", [False, True, False, True]),
])
def test_a_pair_is_accepted_by_what_the_code_compares(variant, accepted):
    """One prediction, four classes: pairs of class probability and score, made up."""
    p = torch.tensor([[0.06, 0.50, 0.04, 0.05]])
    scores = torch.tensor([[0.10, 0.40, 0.20, 0.21]])
    model = small("fcos", variant)
    assert model.accept(p, scores)[0].tolist() == accepted


def test_torchvisions_retinanet_takes_p6_from_p5():
    """256 channels (here 16), where detectron2's has those of C5; so its P6 has fewer weights."""
    for variant, channels in (("torchvision", 16), (None, 192)):
        model = small("retinanet", variant)
        assert model.neck.extra[0].weight.shape == (16, channels, 3, 3)
