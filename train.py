"""Train a detector with the assignment and the matching cost of your choice: every row of Tables 1 and 2.

    python train.py                                                        the paper's detector, on embedded data
    python train.py --class-cost 0 --location-cost predefined              its "location only" row: duplicates return
    python train.py --assign one-to-many                                   the original FCOS: lives on NMS
    python train.py --assign my.py:my_function                             your own idea
    torchrun --nproc-per-node 8 train.py --data coco --detector retinanet --backbone-weights imagenet

Every flag has a default that suits the data set and the detector; what is in force is printed, and
saved in OUT/args.json.  A run leaves in OUT:

    args.json         every effective flag, versions
    training.png      some pictures as training sees them, with their target boxes
    log.csv           a row per logging step: losses, learning rate, gradient norm, seconds waiting for data
    eval.csv          a row per evaluation: AP and AP50 (crowds: AP50, mMR, recall, JI) without and with NMS
    last.pt           the checkpoint: `--resume` goes on from it, `python evaluate.py --weights` scores it
    detections.json   the detections of the last evaluation, COCO result format (and detections_nms.json)
    metrics.json      their figures, in percent
    detections.png    some of them, drawn beside the ground truth
"""
import argparse
import contextlib
import csv
import functools
import hashlib
import math
import os
import platform
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import annotations
import assign
import data
import evaluate
import figures
import losses
import models


class UsageError(ValueError):
    """Flags that cannot be followed: one sentence that says why."""


class TrainingStopped(RuntimeError):
    """NaN or Inf in the losses, or a strategy that fails: says at which step and for which images."""


class Interrupted(Exception):
    """Ctrl-C or a request to end; the checkpoint is written."""


# ------------------------------------------------------------------------------------------------
# recipes: the defaults of the flags, by data set, detector and form; any flag overrides them
# ------------------------------------------------------------------------------------------------

EVERYWHERE = {"assign": "hungarian", "location_cost": "predicted", "class_cost": 2.0, "seed": 0, "accumulate": 1,
              "precision": "fp32", "eval_every": 0, "log_every": 20, "checkpoint_every": 500, "momentum": 0.9,
              "weight_decay": 1e-4, "backbone_lr_factor": 1.0, "clip_grad": 0.0, "flip": 0.5, "crop": 0.0,
              "max_dets": 100, "warmup_steps": 0, "warmup_factor": 0.01, "milestones": [], "backbone_weights": "none",
              "deform": False, "drop_bad_boxes": False, "box_prior": 0.0, "tower_norm": False, "laterals": False,
              "neck_widths": [256, 128, 64], "anchor_scales": 3, "delta_weights": [1.0, 1.0, 1.0, 1.0], "resnet": "torchvision", "skip_empty": False, "square": 0, "colours": 0.0,
              "round_down": False, "layers": 6, "hidden": 2048, "dropout": 0.1, "queries": 100, "stride": 32, "levels": 4, "refine": False,
              "two_stage": False, "roi_size": 224, "dynamic": 64}

# OneNet's released configurations (projects/OneNet/configs), "3x"; CenterNet's differences below
ONENET = {"steps": 270_000, "batch_size": 16, "optimizer": "adamw", "lr": 4e-5, "schedule": "step", "milestones": [210_000, 250_000],
          "warmup_steps": 1000, "clip_grad": 1.0, "train_sizes": [640, 672, 704, 736, 768, 800, 832, 864, 896],
          "train_longest": 1500, "crop": 0.5}
# the "1x" of detectron2 (COCO-Detection/retinanet_R_50_FPN_1x) and of FCOS's authors (AdelaiDet, R_50_1x), which gave the 37.4 and 38.7 of Table 1's one-to-many column
ORIGINAL = {"steps": 90_000, "batch_size": 16, "optimizer": "sgd", "lr": 0.01, "schedule": "step", "milestones": [60_000, 80_000],
            "warmup_steps": 1000, "warmup_factor": 0.001, "clip_grad": 0.0, "train_sizes": [640, 672, 704, 736, 768, 800],
            "train_longest": 1333, "crop": 0.0, "skip_empty": True}
# CenterNet with a ResNet-50 as CenterNet-better trains it, which gave the 35.0
ORIGINAL_CENTERNET = {**ORIGINAL, "steps": 126_000, "batch_size": 128, "lr": 0.02, "milestones": [81_000, 108_000], "square": 512,
                      "colours": 0.4, "test_size": 0, "skip_empty": False}

# the defaults of DETR's and Deformable DETR's main.py: 300 and 50 epochs; both resize in DETR's way
DETR = {"steps": 554_400, "batch_size": 64, "lr": 1e-4, "backbone_lr_factor": 0.1, "milestones": [369_600], "warmup_steps": 0, "clip_grad": 0.1,
        "train_sizes": list(range(480, 801, 32)), "train_longest": 1333, "round_down": True, "class_cost": 1.0}
DEFORMABLE_DETR = {**DETR, "steps": 184_850, "batch_size": 32, "lr": 2e-4, "milestones": [147_880], "class_cost": 2.0, "hidden": 1024, "queries": 300}
# sparsercnn.res50.300pro.3x; the rest as OneNet, which descends from it
SPARSE_RCNN = {"lr": 2.5e-5, "train_sizes": list(range(480, 801, 32)), "train_longest": 1333, "queries": 300}

# trained from scratch on two CPU cores in minutes; what the data sets below it add is theirs alone
SMALL_QUERIES = {"width": 128, "layers": 3, "hidden": 256, "lr": 5e-4, "weight_decay": 0.1}
SMALL = {
    "": {"backbone": "tiny", "width": 64, "depth": 3, "extra_levels": 0, "steps": 4500, "batch_size": 16, "optimizer": "adamw", "lr": 1e-3,
         "schedule": "one-cycle", "clip_grad": 1.0, "workers": 0, "precision": "auto"},
    "fcos": {"box_prior": 3.0},
    "retinanet": {"tower_norm": True, "delta_weights": [10.0, 10.0, 5.0, 5.0]},
    "centernet": {"box_prior": 12.0, "neck_widths": [128, 64]},
    "detr": {**SMALL_QUERIES, "class_cost": 1.0, "stride": 16, "dropout": 0.0},
    "deformable-detr": {**SMALL_QUERIES, "dropout": 0.0, "levels": 3, "refine": True},
    "sparse-rcnn": {**SMALL_QUERIES, "roi_size": 64, "dynamic": 32},
}

RECIPES = {
    # chosen as a demonstration for two CPU cores; all rows of a detector share everything but the row's flags
    "scenes": {
        **SMALL,
        "": {**SMALL[""], "train_sizes": [128], "train_longest": 128, "test_size": 128, "test_longest": 128},
        "retinanet": {**SMALL["retinanet"], "anchor_scales": 1},
        "centernet": {**SMALL["centernet"], "neck_widths": [128, 64, 64], "laterals": True, "steps": 5000, "weight_decay": 0.1},
        "detr": {**SMALL["detr"], "queries": 20, "steps": 8000},
        "deformable-detr": {**SMALL["deformable-detr"], "queries": 20, "levels": 2, "steps": 3000},
        "sparse-rcnn": {**SMALL["sparse-rcnn"], "width": 64, "queries": 16, "steps": 4000},
    },
    # for a few hundred photographs on the same machine; a GPU wants --backbone resnet50 --backbone-weights imagenet
    "custom": {
        **SMALL,
        "": {**SMALL[""], "depth": 2, "steps": 2000, "batch_size": 8, "train_sizes": [256], "train_longest": 448, "test_size": 256, "test_longest": 448},
    },
    # Section 5 in small: one class, pictures of 160 pixels
    "crowd": {
        **SMALL,
        "": {**SMALL[""], "steps": 3000, "train_sizes": [160], "train_longest": 160, "test_size": 160, "test_longest": 160, "max_dets": 500,
             "weight_decay": 0.1},
        "retinanet": {**SMALL["retinanet"], "anchor_scales": 1},
        "deformable-detr": {**SMALL["deformable-detr"], "queries": 100},
        "sparse-rcnn": {**SMALL["sparse-rcnn"], "queries": 100},
    },
    "coco": {
        "": {"backbone": "resnet50", "width": 256, "depth": 4, "extra_levels": 2, "workers": 4, "test_size": 800, "test_longest": 1333,
             "checkpoint_every": 2500, "drop_bad_boxes": True, "backbone_weights": "imagenet", "deform": True, **ONENET},
        "centernet": {"batch_size": 64, "lr": 5e-5, "train_sizes": [416, 448, 480, 512], "train_longest": 853,
                      "test_size": 512, "test_longest": 853},
        "retinanet one-to-many": ORIGINAL,
        "fcos one-to-many": {**ORIGINAL, "train_sizes": [800]},
        "centernet one-to-many": ORIGINAL_CENTERNET,
        "detr": DETR,
        "deformable-detr": DEFORMABLE_DETR,
        "sparse-rcnn": SPARSE_RCNN,
    },
}


# OneNet's and Sparse R-CNN's CrowdHuman configurations: 50 epochs of its 15,000 pictures, 500 detections, no crop
CROWDHUMAN = {"steps": 46_875, "milestones": [37_500], "crop": 0.0, "max_dets": 500, "test_longest": 1400}
RECIPES["crowdhuman"] = {
    **RECIPES["coco"],
    "": {**RECIPES["coco"][""], **CROWDHUMAN, "train_longest": 1400},
    "sparse-rcnn": {**SPARSE_RCNN, "train_sizes": list(range(640, 801, 32)), "train_longest": 1500, "test_longest": 1500, "queries": 500},
    # the one-to-many FCOS of Table 3 has DeFCN's schedule; RetinaNet's is not published and takes the same
    **dict.fromkeys(("fcos one-to-many", "retinanet one-to-many"),
                    {**ORIGINAL, "steps": 30_000, "milestones": [20_000, 25_000], "train_sizes": [800], "train_longest": 1400}),
    # nobody published these: COCO's recipes, for 50 epochs of CrowdHuman (DETR 300)
    "centernet": {**RECIPES["coco"]["centernet"], "steps": 11_719, "milestones": [9_375]},
    "centernet one-to-many": {**ORIGINAL_CENTERNET, "steps": 5_859, "milestones": [3_767, 5_022]},
    "detr": {**DETR, "steps": 70_313, "milestones": [46_875], "queries": 500},
    "deformable-detr": {**DEFORMABLE_DETR, "steps": 23_438, "milestones": [18_750], "queries": 500},
}


def recipe(data_set, detector, one_to_many):
    """The defaults in force for a data set, a detector and a form."""
    known = RECIPES[data_set]
    return {**EVERYWHERE, **known[""], **known.get(detector, {}), **(known.get(f"{detector} one-to-many", {}) if one_to_many else {})}


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = parser.add_argument_group("detector (Section 3.1)")
    g.add_argument("--detector", choices=tuple(models.DETECTORS), help="which detector (default: fcos)")
    g.add_argument("--backbone", choices=models.BACKBONES, help="tiny is for pictures of about 128 pixels (scenes: tiny; coco: resnet50)")
    g.add_argument("--backbone-weights", metavar="W", help="none, imagenet (torchvision's), or a file: a torchvision ResNet or a last.pt")
    g.add_argument("--resnet", choices=("torchvision", "msra"), help="whose pre-trained ResNet: torchvision's (RGB, default), or MSRA's (BGR, stride in the "
                   "first 1x1), which detectron2's and AdelaiDet's one-to-many figures were made with; give its file, converted, as --backbone-weights")
    g.add_argument("--width", type=int, metavar="N", help="channels of pyramid and towers (RetinaNet, FCOS), or of the queries")
    g.add_argument("--depth", type=int, metavar="N", help="convolutions in a tower (RetinaNet, FCOS)")
    g.add_argument("--extra-levels", type=int, metavar="N", help="pyramid levels above the backbone's last map (2 gives P6 and P7)")
    g.add_argument("--neck-widths", type=int, nargs="+", metavar="N", help="channels of CenterNet's steps up from stride 32: three "
                   "(published: 256 128 64; scenes: 128 64 64) end at stride 4, two at stride 8")
    g.add_argument("--laterals", action=argparse.BooleanOptionalAction, default=None, help="give the original CenterNet's neck OneNet's laterals too "
                   "(published: no; scenes: yes, whose coarsest map has 4 x 4 cells)")
    g.add_argument("--deform", action=argparse.BooleanOptionalAction, default=None, help="deformable convolutions in CenterNet's neck")
    g.add_argument("--anchor-scales", type=int, metavar="N", help="sizes of RetinaNet's anchors per octave, each in three ratios (published: 3; scenes: 1)")
    g.add_argument("--delta-weights", type=float, nargs=4, metavar="W", help="RetinaNet's head output is divided by these before it is a delta dx, dy, dw, dh "
                   "(published: 1 1 1 1; scenes: 10 10 5 5, so that a step of the optimiser moves boxes less)")
    g.add_argument("--tower-norm", action=argparse.BooleanOptionalAction, default=None, help="group norm in RetinaNet's towers (scenes: yes; published: no)")
    g.add_argument("--box-prior", type=float, metavar="D", help="distance from point to box side before training: FCOS in strides (scenes: 3), CenterNet "
                   "in pixels (scenes: 12); published: 0, where half of the outputs start behind their ReLU")
    g = parser.add_argument_group("query detectors: DETR, Deformable DETR, Sparse R-CNN")
    g.add_argument("--queries", type=int, metavar="N", help="object queries, or proposals (published: 100, 300, 300)")
    g.add_argument("--layers", type=int, metavar="N", help="encoder and decoder layers, or stages (published: 6)")
    g.add_argument("--hidden", type=int, metavar="N", help="width of the feed-forward networks (published: 2048, 1024, 2048)")
    g.add_argument("--dropout", type=float, metavar="P", help="in the transformers (published: 0.1; scenes: 0)")
    g.add_argument("--stride", type=int, choices=(8, 16, 32), help="DETR: stride of the map that is encoded (published: 32; scenes: 16)")
    g.add_argument("--levels", type=int, metavar="N", help="Deformable DETR: levels of the pyramid, counted from the coarsest (published: 4; scenes: 2, strides 16 and 32)")
    g.add_argument("--refine", action=argparse.BooleanOptionalAction, default=None, help="Deformable DETR: each layer corrects the boxes of the last "
                   "(published base form: no; scenes: yes)")
    g.add_argument("--two-stage", action=argparse.BooleanOptionalAction, default=None, help="Deformable DETR: queries start from the encoder's own boxes")
    g.add_argument("--roi-size", type=int, metavar="N", help="Sparse R-CNN: boxes of this side are cut from the third level (published: 224; scenes: 64)")
    g.add_argument("--dynamic", type=int, metavar="N", help="Sparse R-CNN: inner width of the dynamic convolution (published: 64)")
    g = parser.add_argument_group("positive samples (Section 3.2, Table 1)")
    g.add_argument("--assign", metavar="A", help="one-to-many: the detector's original rule, form and losses; hungarian (default): one-to-one; "
                   "or another strategy with the one-to-one form and losses: min-cost, top-k, one-to-many-iou (RetinaNet's rule on anchors, or on predicted "
                   "boxes), one-to-many-points (FCOS's rule), my.py:my_function")
    g = parser.add_argument_group("matching cost (Section 3.3, Table 2)")
    g.add_argument("--class-cost", type=float, metavar="W", help="weight of the classification cost (default 2, DETR 1); 0 gives the 'location only' rows, "
                   "where duplicates return")
    g.add_argument("--location-cost", choices=("predefined", "predicted"), help="between objects and anchors or points, or predicted boxes (default)")
    g = parser.add_argument_group("data")
    data.add_data_flags(g)
    g.add_argument("--train-sizes", type=int, nargs="+", metavar="N", help="shorter sides to choose from in training, pixels")
    g.add_argument("--train-longest", type=int, metavar="N", help="limit of the longer side in training")
    g.add_argument("--round-down", action=argparse.BooleanOptionalAction, default=None, help="resize as DETR does, the longer side rounded down")
    g.add_argument("--square", type=int, metavar="N", help="cut squares of random place and size and scale them to N pixels instead, as the original "
                   "CenterNet does (coco, its one-to-many recipe: 512; else 0, off)")
    g.add_argument("--colours", type=float, metavar="S", help="vary brightness, contrast and saturation by up to this share (coco, CenterNet one-to-many: 0.4)")
    g.add_argument("--skip-empty", action=argparse.BooleanOptionalAction, default=None, help="leave pictures without objects out of training (coco, "
                   "one-to-many RetinaNet and FCOS: yes)")
    g.add_argument("--test-size", type=int, metavar="N", help="shorter side in evaluation; 0 keeps each picture's size")
    g.add_argument("--test-longest", type=int, metavar="N", help="limit of the longer side in evaluation")
    g.add_argument("--flip", type=float, metavar="P", help="probability of a horizontal flip (default 0.5)")
    g.add_argument("--crop", type=float, metavar="P", help="probability of DETR's resize-crop-resize (coco: 0.5)")
    g.add_argument("--workers", type=int, metavar="N", help="processes that read pictures, per training process (coco: 4, else 0)")
    g = parser.add_argument_group("optimisation")
    g.add_argument("--steps", type=int, metavar="N", help="optimiser steps (scenes: 4500, CenterNet 5000, DETR 8000, Deformable DETR 3000, Sparse R-CNN 4000)")
    g.add_argument("--batch-size", type=int, metavar="N", help="images per step, over all processes and micro-batches (scenes, coco: 16)")
    g.add_argument("--accumulate", type=int, metavar="N", help="micro-batches per step (default 1): less memory, the same step")
    g.add_argument("--optimizer", choices=("adamw", "sgd"), help="default adamw; the published one-to-many recipes use sgd")
    g.add_argument("--lr", type=float, help="peak learning rate (scenes: 1e-3, query detectors 5e-4; coco: as published)")
    g.add_argument("--backbone-lr-factor", type=float, metavar="F", help="the backbone's learning rate is this times --lr (default 1)")
    g.add_argument("--weight-decay", type=float, metavar="W", help="default 1e-4 (0.1: CenterNet and query detectors on scenes, all on crowd); SGD spares norm layers, as published")
    g.add_argument("--momentum", type=float, help="of SGD (default 0.9)")
    g.add_argument("--schedule", choices=("step", "one-cycle"), help="step: linear warm-up, then a tenth at each milestone; "
                   "one-cycle: up over the first tenth, then down a cosine")
    g.add_argument("--warmup-steps", type=int, metavar="N", help="steps until the learning rate is reached (step schedule; coco: 1000)")
    g.add_argument("--warmup-factor", type=float, metavar="F", help="of the learning rate at step 0 (step schedule)")
    g.add_argument("--milestones", type=int, nargs="*", metavar="N", help="steps at which the learning rate falls to a tenth")
    g.add_argument("--clip-grad", type=float, metavar="NORM", help="largest norm of the whole gradient; 0: no clipping")
    g = parser.add_argument_group("the run")
    g.add_argument("--out", metavar="DIR", help="folder for everything (default: runs/ and a name made of the row)")
    g.add_argument("--resume", action="store_true", help="go on from OUT/last.pt, exactly; flags not given are taken from it")
    g.add_argument("--init", metavar="FILE", help="start from these weights only; what did not fit is listed")
    g.add_argument("--seed", type=int, help="of weights, order and augmentation (default 0)")
    g.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    g.add_argument("--precision", choices=("auto", "fp32", "bf16"), help="bf16 runs the network in bfloat16, costs and losses stay float32; auto: bf16 "
                   "where the device computes in it natively (scenes, custom: auto; coco: fp32, as published)")
    g.add_argument("--eval-every", type=int, metavar="N", help="evaluate every N steps, and always at the end (default 0: only then)")
    g.add_argument("--max-dets", type=int, metavar="N", help="detections per image in evaluation (default 100; crowd, crowdhuman: 500, which suits a custom .odgt too)")
    g.add_argument("--log-every", type=int, metavar="N", help="steps between rows of log.csv (default 20)")
    g.add_argument("--checkpoint-every", type=int, metavar="N", help="steps between checkpoints (default 500; coco: 2500)")
    return parser


FREE_ON_RESUME = {"out", "resume", "init", "device", "workers", "log_every", "checkpoint_every"}


def effective_flags(given):
    """Every flag's value in force, from those given on the command line (None: not given) and the recipe.

    With --resume they come from the checkpoint, and a flag given with another value is refused by name.
    Returns flags (dict), checkpoint (dict or None).
    """
    if given["resume"]:
        if not given["out"]:
            raise UsageError("--resume needs --out, the folder of the run to go on with")
        checkpoint = models.read_checkpoint(Path(given["out"]) / "last.pt")
        saved = checkpoint.get("args")
        if not saved:
            raise models.CheckpointError(f"{given['out']}/last.pt: not a checkpoint of train.py")
        changed = [f"--{name.replace('_', '-')} (was {saved.get(name)}, now {value})" for name, value in given.items()
                   if value is not None and name not in FREE_ON_RESUME and value not in (saved.get(name), "auto")]
        if changed:
            raise UsageError(f"--resume continues the same run, but these flags changed: {', '.join(changed)}; leave them out, or "
                             f"start a new run with --init {given['out']}/last.pt")
        free = {name: value for name, value in given.items() if name in FREE_ON_RESUME and value is not None}
        return {**saved, **free}, checkpoint
    data_set, detector = given["data"] or "scenes", given["detector"] or "fcos"
    flags = {**given, **{k: v for k, v in recipe(data_set, detector, given["assign"] == "one-to-many").items() if given.get(k) is None}}
    flags["data"], flags["detector"] = data_set, detector
    return flags, None


def check_flags(flags, world):
    """Raises UsageError for values that argparse lets through."""
    for name in ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every", "max_dets", "width", "depth", "layers", "hidden", "queries",
                 "levels", "dynamic", "roi_size", "anchor_scales"):
        if flags[name] < 1:
            raise UsageError(f"--{name.replace('_', '-')} {flags[name]}: must be at least 1")
    for name in ("seed", "workers", "eval_every", "extra_levels", "square"):
        if flags[name] < 0:
            raise UsageError(f"--{name.replace('_', '-')} {flags[name]}: must not be negative")
    if len(flags["neck_widths"]) > 3:
        raise UsageError(f"--neck-widths {flags['neck_widths']}: at most three steps lead up from stride 32")
    if not flags["lr"] > 0 or not math.isfinite(flags["lr"]):
        raise UsageError(f"--lr {flags['lr']}: must be positive")
    if flags["batch_size"] % (world * flags["accumulate"]):
        raise UsageError(f"--batch-size {flags['batch_size']}: must be a multiple of {world} process(es) x {flags['accumulate']} "
                         f"micro-batch(es)")
    if flags["detector"] not in models.DENSE and (flags["assign"] == "one-to-many" or flags["location_cost"] == "predefined"):
        raise UsageError(f"--detector {flags['detector']} has learned object candidates: it knows neither --assign one-to-many nor "
                         f"--location-cost predefined")
    groups = 8 if flags["detector"] in models.DENSE and flags["width"] < 256 else 32         # of the group norms; heads divide both
    if flags["width"] % groups:
        raise UsageError(f"--width {flags['width']}: must be a multiple of {groups}")
    if flags["assign"] == "one-to-many-points" and flags["detector"] not in ("fcos", "centernet"):
        raise UsageError(f"--assign one-to-many-points judges points: it goes with FCOS and CenterNet, not with --detector {flags['detector']}")
    if flags["assign"] == "one-to-many-iou" and flags["location_cost"] == "predefined" and flags["detector"] != "retinanet":
        raise UsageError("--assign one-to-many-iou with --location-cost predefined compares anchors: it goes with --detector retinanet")
    if flags["assign"] == "one-to-many" and (flags["class_cost"], flags["location_cost"]) != (
            EVERYWHERE["class_cost"], EVERYWHERE["location_cost"]):
        raise UsageError("--assign one-to-many is the detector's original rule; --class-cost and --location-cost do not apply to it")


def headline(flags, num_pictures, num_classes):
    """What this run trains, in the paper's words."""
    name = {"fcos": "FCOS", "retinanet": "RetinaNet", "centernet": "CenterNet", "detr": "DETR", "deformable-detr": "Deformable DETR",
            "sparse-rcnn": "Sparse R-CNN"}[flags["detector"]]
    if flags["assign"] == "one-to-many":
        rule = "its original one-to-many assignment and losses"
    else:
        kind = {"hungarian": "one-to-one", "min-cost": "minimum-cost"}.get(flags["assign"], flags["assign"])
        cost = f"{flags['class_cost']:g} x classification cost + " if flags["class_cost"] else "location cost only: "
        rule = f"{kind} positive sample assignment, matching cost = {cost}{flags['location_cost'].replace('predefined', 'pre-defined')} location cost"
    return f"{name} ({flags['backbone']}) with {rule}; {flags['data']}, {num_pictures} pictures, {num_classes} classes, {flags['steps']} steps"


def run_name(flags):
    rule = flags["assign"].replace("/", "_").replace(":", "-")
    if rule != "one-to-many":
        rule += f"-{flags['location_cost']}-class{flags['class_cost']:g}"
    return f"{flags['data']}-{flags['detector']}-{rule}"


# ------------------------------------------------------------------------------------------------
# the parts of a run
# ------------------------------------------------------------------------------------------------

def build_arguments(flags, num_classes):
    """What models.build needs; it travels in the checkpoint."""
    detector = flags["detector"]
    build = {"detector": detector, "num_classes": num_classes, "backbone": flags["backbone"], "original": flags["assign"] == "one-to-many"}
    if flags["backbone"] != "tiny":
        # without pre-trained weights there is nothing to freeze; CenterNet trains all of it, norms too
        pre_trained = flags["backbone_weights"] != "none" or flags.get("init")
        train_all = not pre_trained or flags["detector"] == "centernet"
        build.update(norm="batch" if train_all else "frozen", freeze=0 if train_all else 2, resnet=flags["resnet"])
    own = {"retinanet": {"tower_norm": flags["tower_norm"], "scales": flags["anchor_scales"], "delta_weights": tuple(flags["delta_weights"])},
           "fcos": {"box_prior": flags["box_prior"]},
           "centernet": {"box_prior": flags["box_prior"], "deform": flags["deform"], "widths": tuple(flags["neck_widths"]), "laterals": flags["laterals"]},
           "detr": {"dropout": flags["dropout"], "stride": flags["stride"]},
           "deformable-detr": {name: flags[name] for name in ("dropout", "levels", "refine", "two_stage")},
           "sparse-rcnn": {"roi_size": flags["roi_size"], "dynamic": flags["dynamic"]}}
    if detector in ("retinanet", "fcos"):
        build.update(width=flags["width"], depth=flags["depth"], extra=flags["extra_levels"])
    elif detector not in models.DENSE:
        build.update({name: flags[name] for name in ("width", "layers", "hidden", "queries")})
    return {**build, **own[detector]}


def make_cost(model, flags):
    """cost(one, target) -> (Q, G) for assign.match: Eq. 5, or what a one-to-many rule compares."""
    original = flags["assign"] == "one-to-many"
    strides = torch.tensor(model.strides, device=model.mean.device)  # copied to the device once, not for every image
    if original and flags["detector"] == "retinanet":
        return lambda one, target: assign.iou_cost(one["candidates"], target["boxes"])
    if original and flags["detector"] == "centernet":
        return None                                                  # its targets are a heat map
    if original or flags["assign"] == "one-to-many-points":
        return lambda one, target: assign.fcos_area_cost(one["candidates"], one["levels"], target["boxes"], strides)
    if flags["assign"] == "one-to-many-iou":                         # of anchors, or of predicted boxes
        compared = "candidates" if flags["location_cost"] == "predefined" else "boxes"
        return lambda one, target: assign.iou_cost(one[compared], target["boxes"])
    location = assign.predicted_location
    if flags["location_cost"] == "predefined":
        location = {"retinanet": assign.anchor_location, "centernet": assign.point_location,
                    "fcos": functools.partial(assign.level_point_location, strides=strides)}[flags["detector"]]
    return functools.partial(assign.matching_cost, location=location, class_weight=flags["class_cost"])


def make_strategy(flags):
    if flags["assign"] == "one-to-many":
        return {"retinanet": assign.one_to_many_iou, "fcos": assign.one_to_many_points, "centernet": None}[flags["detector"]]
    return assign.load_strategy(flags["assign"])


def detection_loss(model, prediction, targets, num_objects, cost, strategy):
    """Positive samples, then Eq. 1.  Returns a dict of weighted terms."""
    if model.original and isinstance(model, models.CenterNet):
        return losses.centernet_loss(prediction, targets)
    matches = assign.match(prediction, targets, cost, strategy)      # <- the paper is this line (Eq. 3 and 5)
    if model.original:
        original_loss = losses.retinanet_loss if isinstance(model, models.RetinaNet) else losses.fcos_loss
        return original_loss(prediction, targets, matches)
    return losses.set_loss(prediction, targets, matches, num_objects)          # <- Eq. 1


def make_optimizer(model, flags, device):
    """AdamW or SGD; the backbone's parameters are a group of their own, so that they can learn more slowly."""
    norms = {id(p) for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)) for p in m.parameters()}
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            factor = flags["backbone_lr_factor"] if name.startswith("backbone.") else 0.1 if any(part in name for part in model.slow_parameters) else 1.0
            decay = 0.0 if flags["optimizer"] == "sgd" and id(p) in norms else flags["weight_decay"]
            groups.setdefault((factor, decay, name.startswith("backbone.")), []).append(p)
    groups = [{"params": ps, "lr": flags["lr"] * factor, "peak": flags["lr"] * factor, "weight_decay": decay}
              for (factor, decay, _), ps in groups.items()]
    if flags["optimizer"] == "sgd":
        return torch.optim.SGD(groups, momentum=flags["momentum"])
    return torch.optim.AdamW(groups, fused=torch.device(device).type in ("cuda", "cpu"))


def lr_factor(step, flags):
    """Learning rate of a step, in units of the peak."""
    if flags["schedule"] == "one-cycle":
        up = max(1, flags["steps"] // 10)
        if step < up:
            return (step + 1) / up
        return 0.5 * (1 + math.cos(math.pi * (step - up) / max(1, flags["steps"] - up)))
    factor = 0.1 ** sum(step >= m for m in flags["milestones"])
    if step < flags["warmup_steps"]:
        factor *= flags["warmup_factor"] + (1 - flags["warmup_factor"]) * step / flags["warmup_steps"]
    return factor


def random_states(device):
    states = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.device(device).type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states, device):
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.device(device).type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


class Log:
    """A CSV file, opened anew for each row.  On resume, rows after the checkpoint's step are cut off."""

    def __init__(self, file, step):
        self.file = Path(file)
        if self.file.exists():
            lines = self.file.read_text().splitlines()
            kept = lines[:1] + [line for line in lines[1:] if line and int(line.split(",")[0]) <= step]
            self.file.write_text("".join(line + "\n" for line in kept) if step else "")

    def row(self, values):
        new = not self.file.exists() or self.file.stat().st_size == 0
        with open(self.file, "a", newline="") as stream:
            writer = csv.DictWriter(stream, values, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()})


def versions(flags):
    weights = flags["backbone_weights"]
    return {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
            "backbone_weights_sha256": hashlib.sha256(Path(weights).read_bytes()).hexdigest() if os.path.isfile(weights) else None}


def to_device(targets, device):
    return [{k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in t.items()} for t in targets]


# ------------------------------------------------------------------------------------------------
# the run
# ------------------------------------------------------------------------------------------------

def train(flags, checkpoint, strategy, rank, world, device):
    """Everything from flags to figures.  Returns metrics (process 0) or None."""
    main_process = rank == 0
    say = print if main_process else lambda *args, **kwargs: None
    if not main_process:
        dist.barrier()                                               # process 0 draws the pictures, and reads their sizes, first
    train_files, val_files = data.locate(flags, "train"), data.locate(flags, "val")
    cache = Path(flags["out"]).parent / "sizes-crowdhuman.json" if flags["data"] == "crowdhuman" else None
    train_set, val_set = (annotations.read_annotations(*files, flags["drop_bad_boxes"], cache) for files in (train_files, val_files))
    if main_process and world > 1:
        dist.barrier()
    if not (~train_set.crowd).any():
        raise annotations.DataError(f"{train_files[0]}: holds no boxes to learn from")
    if train_set.class_names != val_set.class_names:
        raise annotations.DataError(f"{val_files[0]}: its classes {val_set.class_names} are not those of {train_files[0]}: {train_set.class_names}")

    test_transform = {"shortest": [flags["test_size"]] if flags["test_size"] else [], "longest": flags["test_longest"], "round_down": flags["round_down"]}
    transform = data.Transform(flags["train_sizes"], flags["train_longest"], flags["flip"], flags["crop"], flags["round_down"], square=flags["square"], colours=flags["colours"])
    train_pictures = data.Pictures(train_set, transform, flags["seed"])
    val_pictures = data.Pictures(val_set, data.Transform(**test_transform))

    torch.manual_seed(flags["seed"])
    random.seed(flags["seed"])
    build = build_arguments(flags, len(train_set.class_names))
    model = models.build(**build)
    first_step = 0
    if checkpoint:
        if checkpoint["build"] != build:
            raise models.CheckpointError(f"{flags['out']}/last.pt is of another detector: {checkpoint['build']}")
        model.load_state_dict(checkpoint["model"])
        first_step = checkpoint["step"]
    else:
        if flags["backbone_weights"] != "none":
            models.load_backbone(model.backbone, flags["backbone_weights"])
        if flags["init"]:
            for what, names in zip(("got no weights", "left over", "of another shape"), models.load_weights(model, flags["init"])):
                if names:
                    say(f"--init {flags['init']}: {len(names)} {what}: {', '.join(names)}")
    torch.manual_seed(flags["seed"] + rank)                          # dropout differs from process to process
    model.to(device).train()
    cost = make_cost(model, flags)
    optimizer = make_optimizer(model, flags, device)
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        model.load_state_dict(checkpoint["buffers"][rank % len(checkpoint["buffers"])], strict=False)
    network = model
    if world > 1:
        network = DistributedDataParallel(model, broadcast_buffers=False, device_ids=[torch.device(device).index] if "cuda" in device else None)

    out = Path(flags["out"])
    if main_process:
        out.mkdir(parents=True, exist_ok=True)
        evaluate.write_json(out / "args.json", {**flags, "versions": versions(flags), "processes": world}, indent=1)
        if not checkpoint:
            figures.training_pictures(train_pictures, out / "training.png")
        log, eval_log = Log(out / "log.csv", first_step), Log(out / "eval.csv", first_step)
    say(headline(flags, len(train_set), len(train_set.class_names)))
    say("  " + "  ".join(f"{k}={v}" for k, v in sorted(flags.items()) if v is not None))
    say(f"  {sum(p.numel() for p in model.parameters() if p.requires_grad):,} trainable parameters, {world} process(es) on {device}, writing to {out}"
        + (f", going on from step {first_step}" if checkpoint else ""))

    def save(step):
        buffers = {k: v.cpu() for k, v in model.named_buffers() if k in model.state_dict()}
        states = random_states(device)
        shares = [(buffers, states)]
        if world > 1:                                                # both differ from process to process
            shares = [None] * world if main_process else None
            dist.gather_object((buffers, states), shares)
        if main_process:
            models.save_whole({"model": {k: v.cpu() for k, v in model.state_dict().items()}, "optimizer": optimizer.state_dict(),
                        "step": step, "args": flags, "build": build, "buffers": [b for b, _ in shares], "random": [r for _, r in shares],
                        "class_names": train_set.class_names, "category_ids": train_set.category_ids,
                        "test_transform": test_transform}, out / "last.pt")

    def score(step):
        images = max(1, flags["batch_size"] // (world * flags["accumulate"]))
        results = evaluate.detect(model, val_pictures, images, flags["max_dets"], device, flags["precision"], flags["workers"])
        if not main_process:
            return None
        result = evaluate.metrics(val_gt, results, flags["max_dets"], val_set.image_ids)
        columns = [name for name in ("AP", "AP50", "mMR", "recall", "JI") if name in result]
        eval_log.row({"step": step, **{f"{name}{suffix}": figures[name] for name in columns for suffix, figures in (("", result), ("_nms", result["nms"]))}})
        evaluate.write_json(out / "detections.json", results["plain"])
        evaluate.write_json(out / "detections_nms.json", results["nms"])
        evaluate.write_json(out / "metrics.json", result, indent=1)
        figures.detections_beside_truth(val_pictures, results["plain"], out / "detections.png")
        return result

    val_gt = evaluate.ground_truth(val_set) if main_process else None
    batches = iter(data.loader(train_pictures, data.training_batches(
        train_set, flags["batch_size"], flags["seed"], first_step, rank, world, flags["accumulate"], flags["skip_empty"]), flags["workers"], "cuda" in device))
    if checkpoint:                                                   # last, so that nothing above disturbs them
        set_random_states(checkpoint["random"][rank % len(checkpoint["random"])], device)
    interrupted = []                                                 # filled by a signal; every process must see it at the same step
    result, waited, pending, stop, since = None, 0.0, None, False, time.perf_counter()
    began = since

    def read(pending):
        """The losses of a step on the host.  Raises TrainingStopped if they are not finite."""
        step, names, values, own, ids = pending
        values, own = values.tolist(), own.tolist()
        if not all(map(math.isfinite, values)):
            where = f"images {', '.join(map(str, ids))}" if not all(map(math.isfinite, own)) else "images of another process"
            raise TrainingStopped(f"step {step}: the losses are not finite ({', '.join(f'{n} {v:g}' for n, v in zip(names, values))}; {where}); "
                                  f"lower --lr, set --clip-grad, or use --precision fp32; {out}/last.pt is the last good checkpoint")
        return dict(zip(names, values))

    old_handlers = {s: signal.signal(s, lambda number, frame: interrupted.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=flags["steps"], initial=first_step, disable=None if main_process else True, unit="step", smoothing=0.05)
    try:
        for step in range(first_step, flags["steps"]):
            factor = lr_factor(step, flags)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor

            # the step's micro-batches, and how many objects they hold over all processes
            start = time.perf_counter()
            micro_batches = [next(batches) for _ in range(flags["accumulate"])]
            waited += time.perf_counter() - start
            num_objects = torch.tensor(float(sum(len(t["boxes"]) for _, _, targets in micro_batches for t in targets)), device=device)
            num_objects = losses.mean_over_processes(num_objects).clamp(min=1)

            optimizer.zero_grad(set_to_none=True)
            totals = {}
            for n, (images, mask, targets) in enumerate(micro_batches):
                targets = to_device(targets, device)
                last = n == len(micro_batches) - 1
                with contextlib.nullcontext() if last or world == 1 else network.no_sync():
                    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=flags["precision"] == "bf16"):
                        prediction = network(images.to(device, non_blocking=True), mask.to(device, non_blocking=True))
                    try:
                        terms = detection_loss(model, prediction, targets, num_objects, cost, strategy)
                    except assign.AssignError as error:
                        if pending:
                            read(pending)                            # the NaN may stem from the last step: it tells more
                        raise TrainingStopped(f"step {step}: {error}") from error
                    if n == 0 and pending:                           # matching has just waited for the device: reading costs nothing
                        stop = read(pending)["interrupted"] > 0
                    if model.original or prediction.softmax:         # normalised per micro-batch: take their mean
                        terms = {k: v / len(micro_batches) if model.original or k == "class" else v for k, v in terms.items()}
                    sum(terms.values()).backward()
                for k, v in terms.items():
                    totals[k] = totals.get(k, 0) + v.detach()
            norm = nn.utils.clip_grad_norm_(model.parameters(), flags["clip_grad"] or float("inf"))
            own = torch.stack([*totals.values(), norm.detach(), norm.new_tensor(float(len(interrupted)))])
            pending = (step, [*totals, "gradient_norm", "interrupted"], losses.mean_over_processes(own), own,
                       [t["image_id"] for _, _, targets in micro_batches for t in targets])
            optimizer.step()

            done = step + 1
            bar.update()
            if done % flags["log_every"] == 0 or done == flags["steps"]:
                values = read(pending)
                values.pop("interrupted")
                elapsed = time.perf_counter() - since
                steps = (done - 1) % flags["log_every"] + 1
                row = {"step": done, "loss": sum(v for k, v in values.items() if k != "gradient_norm"), **values, "lr": flags["lr"] * factor,
                       "images_per_second": steps * flags["batch_size"] / elapsed, "seconds_waiting": waited}
                bar.set_postfix_str(f"loss {row['loss']:.3f} ({', '.join(f'{k} {values[k]:.3f}' for k in totals)}), {row['images_per_second']:.0f} img/s, "
                                    f"waited {waited:.1f} s", refresh=False)
                if main_process:
                    log.row(row)
                    if bar.disable and done % (10 * flags["log_every"]) == 0:      # no terminal: a line now and then
                        left = (time.perf_counter() - began) / (done - first_step) * (flags["steps"] - done)
                        say(f"step {done}/{flags['steps']}  loss {row['loss']:.3f}  {row['images_per_second']:.0f} images/s  {left / 60:.1f} min left", flush=True)
                waited, since = 0.0, time.perf_counter()
            if done % flags["checkpoint_every"] == 0 or done == flags["steps"] or stop:
                read(pending)
                save(done)
                if stop:
                    raise Interrupted(f"interrupted; step {done} is saved: go on with  python train.py --resume --out {out}")
            if done == flags["steps"]:                               # all is saved: from here on Ctrl-C simply stops
                for s, handler in old_handlers.items():
                    signal.signal(s, handler)
            if (flags["eval_every"] and done % flags["eval_every"] == 0) or done == flags["steps"]:
                result = score(done)
                if main_process:
                    bar.clear()
                    say(f"step {done}: {evaluate.describe(result)}", flush=True)
                since = time.perf_counter()
        if first_step == flags["steps"]:                             # a finished run was resumed: score it again
            result = score(first_step)
    finally:
        for s, handler in old_handlers.items():
            signal.signal(s, handler)
        bar.close()
    return result


def free_name(wanted):
    """`wanted`, or with -2, -3, ... behind it the first folder that does not exist yet."""
    path, n = Path(wanted), 1
    while path.exists():
        n += 1
        path = Path(f"{wanted}-{n}")
    return str(path)


def main(argv=None):
    given = vars(make_parser().parse_args(argv))
    world, rank, local = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    started = time.time()
    try:
        flags, checkpoint = effective_flags(given)
        device = flags["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
        if world > 1:
            if device.startswith("cuda:"):
                raise UsageError(f"--device {device}: with several processes each takes a GPU of its own; leave --device out")
            dist.init_process_group("nccl" if "cuda" in device else "gloo")
        device = f"cuda:{local}" if device == "cuda" else device    # set_device wants an index
        if "cuda" in device:
            torch.cuda.set_device(device)
        if flags["precision"] == "auto":
            flags["precision"] = models.native_precision(device)
        check_flags(flags, world)
        strategy = make_strategy(flags)                              # a wrong name is told before anything is written
        if not flags["resume"]:
            names = [flags["out"] or free_name(Path("runs") / run_name(flags))]
            if world > 1:
                dist.broadcast_object_list(names)
            flags["out"] = names[0]
            if (Path(flags["out"]) / "last.pt").exists():
                raise UsageError(f"--out {flags['out']} holds a run already; add --resume to go on with it, or choose another folder")
        result = train(flags, checkpoint, strategy, rank, world, device)
    except (Interrupted, KeyboardInterrupt) as message:
        if rank == 0:
            print(f"train.py: {message or 'interrupted before the first step'}", file=sys.stderr)
        sys.exit(130)
    except (UsageError, TrainingStopped, annotations.DataError, assign.AssignError, models.CheckpointError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if rank == 0:
        print(f"{(time.time() - started) / 60:.1f} minutes; everything is in {flags['out']}: look at detections.png")
        print(evaluate.describe(result))


if __name__ == "__main__":
    main()
