"""What other code makes of the original detectors: torchvision's and detectron2's forms.

Their published checkpoints (convert.py) give their published detections only with their anchors,
points and thresholds.  No row of the paper uses these classes.
"""
import torch

from models import OriginalFCOS, OriginalRetinaNet, grid_points


def torchvision_points(x, images):
    """Corners of a map's cells as torchvision spaces them: by image size // map size.

    That is the stride but on odd coarse maps.  x: (B, c, h, w)   images: (B, 3, H, W)   (hw, 2)
    """
    along_x, along_y = images.shape[-1] // x.shape[-1], images.shape[-2] // x.shape[-2]
    return grid_points(x, 1, 0) * torch.tensor([along_x, along_y], device=x.device)


class TorchvisionRetinaNet(OriginalRetinaNet):
    """P6 from P5; anchors with sides cut to whole pixels and rounded corners."""
    extra_from = "p5"

    def half_sizes(self, sides):
        return super().half_sizes([int(side) for side in sides]).round()

    def centres(self, x, stride, images):
        return torchvision_points(x, images)


class Detectron2FCOS(OriginalFCOS):
    """No learned scales (here: all 1); a pair is accepted by its final score."""

    def accept(self, p, scores):
        return scores > 0.2


class TorchvisionFCOS(Detectron2FCOS):
    """The same, with points on the corners of cells."""

    def points(self, x, stride, images):
        return torchvision_points(x, images)


VARIANTS = {"retinanet one-to-many torchvision": TorchvisionRetinaNet,
            "fcos one-to-many torchvision": TorchvisionFCOS,
            "fcos one-to-many detectron2": Detectron2FCOS}
