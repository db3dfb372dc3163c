"""Checkpoints: build a detector, save it whole or not at all, read it without running its code.

A checkpoint of train.py is a dict of plain values and tensors:

    build                              what `build` needs: the detector's name and its options
    model, optimizer, step             the weights, the optimiser's state, steps done
    buffers, random                    of each process: batch norm's statistics, generators' states
    watch                              what positives.Watch remembers
    args                               every flag in force
    class_names, category_ids          the data set's classes, in the order of the scores
    boxes                              a digest of the training pictures' ids and boxes
    test_transform                     how pictures were resized in evaluation
"""
import contextlib
import functools
import hashlib
import io
import os
import re
from pathlib import Path

import torch
import torchvision

import data
import runs
from models import DENSE, ResNet, Tiny
from queries import QUERY
from variants import VARIANTS

DETECTORS = {**DENSE, **QUERY, **VARIANTS}
BACKBONES = ("tiny", "resnet18", "resnet34", "resnet50", "resnet101")


class CheckpointError(ValueError):
    """A weights file cannot be used: one sentence that says why."""


def detector_class(detector, original=False, variant=None):
    """The class of a detector by name; its original one-to-many form; a form of other code."""
    return DETECTORS[" ".join([detector] + ["one-to-many"] * original + [variant] * bool(variant))]


def build(detector, num_classes, backbone, original=False, variant=None, norm="frozen", freeze=2,
          resnet="torchvision", **options):
    """A detector by name.  norm, freeze, resnet concern ResNets; options go to its constructor.

    resnet: "torchvision", or "msra", whose pre-trained weights want BGR pixels and the stride in
    the first 1x1.  These arguments are all that a checkpoint needs to hold beside the weights.
    """
    msra = backbone != "tiny" and resnet == "msra"
    if backbone == "tiny":
        body = Tiny()
    else:
        body = ResNet(backbone, norm, freeze, stride_in_1x1=msra)
    options = {"pixels": "bgr" if msra else "rgb", **options}
    model = detector_class(detector, original, variant)(body, num_classes, **options)
    return model.to(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------
# saving and reading
# ------------------------------------------------------------------------------------------------

def save_whole(content, file):
    """torch.save that leaves the old file or the new one, never half of one.  Raises OSError."""
    # in memory first: torch.save itself has no word for a full disk
    buffer = io.BytesIO()
    torch.save(content, buffer)
    runs.write_whole(file, buffer.getbuffer())


def weights_file(given):
    """The file that --weights, --init or another such flag names: a folder means its last.pt."""
    named = isinstance(given, (str, os.PathLike))        # else it is an open file
    return Path(given) / "last.pt" if named and Path(given).is_dir() else given


def read(file, harmless=()):
    """A checkpoint, read without running any code in it.  Raises CheckpointError.

    file: also the folder of a run   harmless: classes it may hold beside tensors and plain values
    """
    file = weights_file(file)
    try:
        with torch.serialization.safe_globals(list(harmless)):
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error}); check the "
                              f"path") from None
    except Exception as error:       # cut short, not a checkpoint, or a pickle that would run code
        # PyTorch names the function or class that it would not call
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named:
            raise CheckpointError(f"{file}: refused: it holds objects other than tensors and plain "
                                  f"values ({named[1]}), which could run code when loaded; save "
                                  f"its state dict alone") from None
        raise CheckpointError(f"{file}: not a readable checkpoint (cut short, or another kind of "
                              f"file); copy it again") from None
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{file}: not a checkpoint: it holds a {type(checkpoint).__name__}")
    return modernise(checkpoint, file)


# names that options of a detector had before they were called as their flags are
RENAMED = {"extra": "extra_levels", "scales": "anchor_scales", "widths": "neck_widths"}


def modernise(checkpoint, file):
    """A checkpoint of an earlier version as today's.  Raises CheckpointError."""
    if not isinstance(checkpoint.get("build"), dict):
        return checkpoint
    build = {RENAMED.get(name, name): value for name, value in checkpoint["build"].items()}
    if build.pop("two_stage", False):
        raise CheckpointError(f"{file}: two-stage Deformable DETR is not supported (no row of the "
                              f"paper uses it); train its one-stage form")

    threshold = build.pop("score_threshold", None)
    if build.pop("torchvision_grid", False):
        build["variant"] = "torchvision"
        build.pop("extra_from", None)        # the variant's own
    elif threshold:
        build["variant"] = "detectron2"
    if not build.get("original"):
        build.pop("laterals", None)          # OneNet's CenterNet always has them

    checkpoint = {**checkpoint, "build": build}
    model = checkpoint.get("model")
    if isinstance(model, dict):              # RetinaNet's loss keeps its moving average itself
        model = {name: value for name, value in model.items() if name != "positives_average"}
        checkpoint["model"] = model
    return checkpoint


DAMAGED = "of another version of train.py, or damaged"
# what must be in a checkpoint, by name and type: to build the detector, and to go on with its run
OF_DETECTOR = {"build": dict, "model": dict, "class_names": list, "test_transform": dict,
               "args": dict}
OF_RUN = {**OF_DETECTOR, "category_ids": list, "optimizer": dict, "step": int, "buffers": list,
          "random": list}


@contextlib.contextmanager
def understood(file):
    """Around what uses a checkpoint's content: whatever that lets fail is a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:               # a checkpoint made by hand may let anything fail
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{file}: {DAMAGED}: {type(error).__name__}: {reason}") from None


def check_layout(checkpoint, file, layout):
    """Raises CheckpointError."""
    wrong = [name for name, kind in layout.items() if type(checkpoint.get(name)) is not kind]
    if wrong:
        raise CheckpointError(f"{file}: {DAMAGED}, or not of train.py: it has no sound "
                              f"{', '.join(wrong)}")
    names, classes = checkpoint["class_names"], checkpoint["build"].get("num_classes")
    if not all(type(name) is str for name in names) or len(names) != classes:
        raise CheckpointError(f"{file}: {DAMAGED}: its {len(names)} class names are not those of "
                              f"its detector")
    with understood(file):
        transform = data.Transform(**checkpoint["test_transform"])
        numbers = *transform.shortest, transform.longest, checkpoint["args"].get("max_dets", 100)
        if not all(type(number) is int and number > 0 for number in numbers):
            raise CheckpointError(f"{file}: {DAMAGED}: the sizes of its test_transform, or its "
                                  f"max_dets, are no whole numbers above 0")


def read_run(file):
    """The checkpoint of a run to go on with.  Raises CheckpointError."""
    checkpoint = read(file)
    check_layout(checkpoint, file, OF_RUN)
    return checkpoint


def load(file):
    """The detector that a checkpoint of train.py or convert.py describes, ready to detect.

    file: or a run's folder, for its last.pt

    Returns (model, checkpoint), the model in evaluation mode.  Raises CheckpointError.
    """
    file = weights_file(file)
    checkpoint = read(file)
    check_layout(checkpoint, file, OF_DETECTOR)
    with understood(file):
        model = build(**checkpoint["build"])
        model.load_state_dict(checkpoint["model"])
        transform = data.Transform(**checkpoint["test_transform"])
    model.class_names = checkpoint["class_names"]
    model.prepare = functools.partial(data.as_evaluated, transform=transform,
                                      divisor=model.divisor)
    return model.eval(), checkpoint


# ------------------------------------------------------------------------------------------------
# weights for a new run
# ------------------------------------------------------------------------------------------------

def tensors_of(checkpoint):
    """The named tensors of a checkpoint of train.py, or of a plain state dict."""
    given = checkpoint.get("model", checkpoint)
    given = given if isinstance(given, dict) else {}
    return {k: v for k, v in given.items() if isinstance(k, str) and torch.is_tensor(v)}


def load_weights(model, file, spared=()):
    """Weights that fit, by name and shape, from a checkpoint into a model; the rest is returned.

    spared: names of the model's parts that get none

    Returns (missing, left over, of another shape): names of the model's own tensors that got
    nothing, and of the file's that were not used.
    """
    given, own = tensors_of(read(file)), model.state_dict()
    given = {k: v for k, v in given.items() if k.split(".")[0] not in spared}
    shapes = [k for k in own if k in given and own[k].shape != given[k].shape]
    fits = {k: given[k] for k in own if k in given and k not in shapes}
    if not fits:
        raise CheckpointError(f"{file}: none of its {len(given)} entries fits this detector; it is "
                              f"of another detector or not a checkpoint of train.py")
    model.load_state_dict(fits, strict=False)
    missing = [k for k in own if k not in fits]
    if any(k.startswith("twins.") for k in missing):
        model.second_branch(model.many, *model.last)     # as they always start, but for what fits
        twins = {k: v for k, v in fits.items() if k.startswith("twins.")}
        model.load_state_dict(twins, strict=False)
    return [k for k in own if k not in given], [k for k in given if k not in own], shapes


def imagenet(backbone):
    """torchvision's ImageNet weights (V1) for a backbone, downloaded.  Raises CheckpointError."""
    flag = "--backbone-weights imagenet"
    if isinstance(backbone, Tiny):
        raise CheckpointError(f"{flag}: there are none for the tiny backbone; use a resnet, or "
                              f"none")
    if backbone.kind == "msra":
        raise CheckpointError(f"{flag}: those are torchvision's; --resnet msra needs a file of "
                              f"MSRA's weights (convert.py)")
    weights = torchvision.models.get_model_weights(backbone.name)["IMAGENET1K_V1"]
    try:
        return weights.get_state_dict(progress=True, weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{flag}: cannot be downloaded ({error}); fetch torchvision's "
                              f"{backbone.name} on another machine and give its file") from None


def backbone_file(weights):
    """The file that --backbone-weights names; one that is not there may lie beside the code."""
    beside = Path(__file__).parent / weights             # tiny.pt, whatever folder one works in
    return beside if beside.is_file() and not Path(weights).is_file() else Path(weights)


def backbone_digest(weights):
    """The SHA-256 of that file, which tells one from another of its name; None where it is none."""
    file = backbone_file(weights)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def load_backbone(backbone, weights):
    """Pre-trained weights into a backbone.  weights: "imagenet" (torchvision's, V1), or a file.

    A file is a torchvision ResNet's state dict, or a checkpoint of train.py with the same backbone.
    """
    if weights == "imagenet":
        given = imagenet(backbone)
    else:
        checkpoint = read(backbone_file(weights))
        given = tensors_of(checkpoint)
        build = checkpoint.get("build")
        described = build if isinstance(build, dict) else checkpoint      # convert.py's backbones
        kind = described.get("resnet", "torchvision")
        if not isinstance(backbone, Tiny) and kind != backbone.kind:
            raise CheckpointError(f"{weights}: the weights of {kind}'s kind of ResNet; give "
                                  f"--resnet {kind}")

    prefix = "backbone."
    if any(k.startswith(prefix) for k in given):             # a checkpoint of train.py
        given = {k.removeprefix(prefix): v for k, v in given.items() if k.startswith(prefix)}
    else:
        given = {f"body.{k}": v for k, v in given.items() if not k.startswith("fc.")}

    # batch norm's counters may be there or not: frozen norms have none
    own, counter = backbone.state_dict(), "num_batches_tracked"
    given = {k: v for k, v in given.items() if k in own or not k.endswith(counter)}
    missing = [k for k in own if k not in given and not k.endswith(counter)]
    wrong = [k for k in given if k not in own or own[k].shape != given[k].shape]
    if missing or wrong:
        raise CheckpointError(f"{weights}: not the weights of this backbone: {len(missing)} "
                              f"tensors missing, {len(wrong)} left over or of another shape "
                              f"(first: {(missing + wrong)[0]})")
    backbone.load_state_dict(given, strict=False)
