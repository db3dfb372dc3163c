"""The flags, and their values for every row: data set x detector x assignment.

A flag's value is, in this order: what was given; the recipe of the data set, the detector and the
form (RECIPES); the constructor's default (the published value); EVERYWHERE.  The options of a
detector are those flags that its constructor knows.
"""
import argparse
import contextlib
import difflib
import inspect
import io
import shlex
from pathlib import Path

import checkpoints
import data
import ideas
from assign import LAMBDA_CLS, LAMBDA_IOU, LAMBDA_L1
from losses import ROWS


class UsageError(ValueError):
    """Flags that cannot be followed: one sentence that says why."""


NAMES = {"fcos": "FCOS", "retinanet": "RetinaNet", "centernet": "CenterNet", "detr": "DETR",
         "deformable-detr": "Deformable DETR", "sparse-rcnn": "Sparse R-CNN"}
DENSE = ("retinanet", "centernet", "fcos")


# ------------------------------------------------------------------------------------------------
# recipes: by data set, detector and form
# ------------------------------------------------------------------------------------------------

EVERYWHERE = {
    "backbone_weights": "none", "resnet": "torchvision",
    "assign": ROWS["one-to-one"][1], "location_cost": "predicted", "lambda_cls": LAMBDA_CLS,
    "lambda_l1": LAMBDA_L1, "lambda_iou": LAMBDA_IOU, "many_assign": "top-k",
    "many_weight": [1.0, 1.0], "many_detach": False,
    "flip": 0.5, "crop": 0.0, "square": 0, "colours": 0.0, "shift": 0, "round_down": False,
    "skip_empty": False, "drop_bad_boxes": False,
    "accumulate": 1, "backbone_lr_factor": 1.0, "weight_decay": 1e-4, "spare_norms": True,
    "momentum": 0.9,
    "warmup_steps": 0, "warmup_factor": 0.01, "milestones": [], "clip_grad": 0.0,
    "freeze": "nothing", "seed": 0, "precision": "fp32", "eval_every": 0, "max_dets": 100,
    "log_every": 20, "checkpoint_every": 500, "keep_checkpoints": [],
}

# OneNet's released configurations (projects/OneNet/configs), "3x"; CenterNet's differences below
ONENET = {
    "steps": 270_000, "batch_size": 16, "optimizer": "adamw", "lr": 4e-5, "clip_grad": 1.0,
    "schedule": "step", "milestones": [210_000, 250_000], "warmup_steps": 1000,
    "train_sizes": [640, 672, 704, 736, 768, 800, 832, 864, 896], "train_longest": 1500,
    "crop": 0.5,
}
# the "1x" of detectron2 (COCO-Detection/retinanet_R_50_FPN_1x) and of FCOS's authors (AdelaiDet,
# R_50_1x), which gave the 37.4 and 38.7 of Table 1's one-to-many column
ORIGINAL = {
    "steps": 90_000, "batch_size": 16, "optimizer": "sgd", "lr": 0.01, "clip_grad": 0.0,
    "schedule": "step", "milestones": [60_000, 80_000], "warmup_steps": 1000,
    "warmup_factor": 0.001,
    "train_sizes": [640, 672, 704, 736, 768, 800], "train_longest": 1333, "crop": 0.0,
    "skip_empty": True,
}
# CenterNet with a ResNet-50 as CenterNet-better trains it, which gave the 35.0
ORIGINAL_CENTERNET = {
    **ORIGINAL, "steps": 126_000, "batch_size": 128, "lr": 0.02, "milestones": [81_000, 108_000],
    "square": 512, "colours": 0.4, "test_size": 0, "spare_norms": False,
}
# DETR's and Deformable DETR's main.py: 300 and 50 epochs; both resize in DETR's way
DETR = {
    "steps": 554_400, "batch_size": 64, "lr": 1e-4, "backbone_lr_factor": 0.1, "clip_grad": 0.1,
    "milestones": [369_600], "warmup_steps": 0, "lambda_cls": 1.0,
    "train_sizes": list(range(480, 801, 32)), "train_longest": 1333, "round_down": True,
}
DEFORMABLE_DETR = {**DETR, "steps": 184_850, "batch_size": 32, "lr": 2e-4,
                   "milestones": [147_880], "lambda_cls": LAMBDA_CLS}
# sparsercnn.res50.300pro.3x; the rest as OneNet, which descends from it
SPARSE_RCNN = {"lr": 2.5e-5, "train_sizes": list(range(480, 801, 32)), "train_longest": 1333}

# trained on two CPU cores in minutes, from a backbone that can see (pretrain.py); what the data
# sets below it add is theirs alone
SMALL_QUERIES = {"width": 128, "layers": 3, "hidden": 256, "lr": 5e-4, "weight_decay": 0.1}
SMALL = {
    "": {"backbone": "tiny", "width": 64, "depth": 3, "extra_levels": 0, "steps": 2250,
         "batch_size": 16, "optimizer": "adamw", "lr": 1e-3, "schedule": "one-cycle",
         "clip_grad": 1.0, "workers": 0, "precision": "auto", "backbone_weights": "tiny.pt",
         "shift": 12},
    "fcos": {"box_prior": 3.0},
    "retinanet": {"tower_norm": True, "delta_weights": [10.0, 10.0, 5.0, 5.0]},
    "centernet": {"deform": False, "box_prior": 1.5, "neck_widths": [128, 64]},
    "detr": {**SMALL_QUERIES, "lambda_cls": 1.0, "stride": 16, "dropout": 0.0},
    "deformable-detr": {**SMALL_QUERIES, "dropout": 0.0, "levels": 3, "refine": True},
    "sparse-rcnn": {**SMALL_QUERIES, "roi_size": 64, "dynamic": 32},
}

RECIPES = {
    # chosen as a demonstration for two CPU cores; all rows of a detector share everything but the
    # row's flags
    "scenes": {
        **SMALL,
        "": {**SMALL[""], "train_sizes": [128], "train_longest": 128, "test_size": 128,
             "test_longest": 128},
        "retinanet": {**SMALL["retinanet"], "anchor_scales": 1, "steps": 1500, "lr": 2e-3,
                      "weight_decay": 0.1},
        "centernet": {**SMALL["centernet"], "neck_widths": [128, 64, 64], "box_prior": 3.0,
                      "laterals": True, "steps": 2000, "lr": 2e-3, "weight_decay": 0.1},
        "detr": {**SMALL["detr"], "queries": 20, "steps": 8000},
        "deformable-detr": {**SMALL["deformable-detr"], "queries": 20, "levels": 2, "steps": 1200,
                            "lr": 1e-3},
        "sparse-rcnn": {**SMALL["sparse-rcnn"], "width": 64, "queries": 16, "steps": 4000,
                        "lr": 1e-3},
    },
    # for a few hundred photographs on the same machine; a GPU wants --backbone resnet50
    # --backbone-weights imagenet
    "custom": {
        **SMALL,
        "": {**SMALL[""], "depth": 2, "steps": 2000, "batch_size": 8, "train_sizes": [256],
             "train_longest": 448, "test_size": 256, "test_longest": 448},
        **{name: {**SMALL[name], "queries": 100} for name in ("deformable-detr", "sparse-rcnn")},
    },
    # Section 5 in small: one class, pictures of 160 pixels
    "crowd": {
        **SMALL,
        "": {**SMALL[""], "steps": 3000, "train_sizes": [160], "train_longest": 160,
             "test_size": 160, "test_longest": 160, "max_dets": 500, "weight_decay": 0.1},
        "retinanet": {**SMALL["retinanet"], "anchor_scales": 1},
        **{name: {**SMALL[name], "queries": 100} for name in ("deformable-detr", "sparse-rcnn")},
    },
    "coco": {
        "": {"backbone": "resnet50", "backbone_weights": "imagenet", "workers": 4,
             "test_size": 800, "test_longest": 1333, "checkpoint_every": 2500,
             "drop_bad_boxes": True, **ONENET},
        "centernet": {"batch_size": 64, "lr": 5e-5, "train_sizes": [416, 448, 480, 512],
                      "train_longest": 853, "test_size": 512, "test_longest": 853},
        "retinanet one-to-many": ORIGINAL,
        "fcos one-to-many": {**ORIGINAL, "train_sizes": [800]},
        "centernet one-to-many": ORIGINAL_CENTERNET,
        "detr": DETR,
        "deformable-detr": DEFORMABLE_DETR,
        "sparse-rcnn": SPARSE_RCNN,
    },
}

# OneNet's and Sparse R-CNN's CrowdHuman configurations: 50 epochs of its 15,000 pictures, 500
# detections, no crop
CROWDHUMAN = {"steps": 46_875, "milestones": [37_500], "crop": 0.0, "max_dets": 500,
              "train_longest": 1400, "test_longest": 1400}
# the one-to-many FCOS of Table 3 has DeFCN's schedule; RetinaNet's is not published, takes the same
DEFCN = {**ORIGINAL, "steps": 30_000, "milestones": [20_000, 25_000], "train_sizes": [800],
         "train_longest": 1400}
RECIPES["crowdhuman"] = {
    **RECIPES["coco"],
    "": {**RECIPES["coco"][""], **CROWDHUMAN},
    "sparse-rcnn": {**SPARSE_RCNN, "train_sizes": list(range(640, 801, 32)), "train_longest": 1500,
                    "test_longest": 1500, "queries": 500},
    "fcos one-to-many": DEFCN,
    "retinanet one-to-many": DEFCN,
    # nobody published these: COCO's recipes, for 50 epochs of CrowdHuman (DETR 300)
    "centernet": {**RECIPES["coco"]["centernet"], "steps": 11_719, "milestones": [9_375]},
    "centernet one-to-many": {**ORIGINAL_CENTERNET, "steps": 5_859, "milestones": [3_767, 5_022]},
    "detr": {**DETR, "steps": 70_313, "milestones": [46_875], "queries": 500,
             "test_longest": 1333},
    "deformable-detr": {**DEFORMABLE_DETR, "steps": 23_438, "milestones": [18_750],
                        "queries": 500, "test_longest": 1333},
}


def options_of(detector, one_to_many=False):
    """The flags that a detector's constructor knows, with its defaults."""
    known = inspect.signature(checkpoints.detector_class(detector, one_to_many)).parameters
    inherited = ("many",) if one_to_many else ()         # by RetinaNet's original form
    return {name: list(p.default) if type(p.default) is tuple else p.default
            for name, p in known.items() if name in OPTIONS and name not in inherited}


def recipe(data_set, detector, one_to_many=False):
    """The defaults in force for a data set, a detector and a form."""
    known, options = RECIPES[data_set], options_of(detector, one_to_many)
    form = known.get(f"{detector} one-to-many", {}) if one_to_many else {}
    values = {**EVERYWHERE, **options, **known[""], **known.get(detector, {}), **form}
    return {name: value for name, value in values.items()
            if name not in OPTIONS or name in options}


# ------------------------------------------------------------------------------------------------
# flags
# ------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse, which says of an unknown flag what it may have meant."""

    # what the flags of other programs are here
    ELSEWHERE = {
        "--epochs": "training is counted in --steps: epochs = steps x --batch-size / pictures",
        "--iters": "training is counted in --steps", "--max-iter": "training is counted in --steps",
        "--learning-rate": "it is --lr", "--model": "it is --detector", "--num-workers":
        "it is --workers", "--gpus": "start with torchrun --nproc-per-node N train.py",
        "--matcher": "it is --assign", "--weights": "--init starts from a checkpoint, "
        "--backbone-weights from a pre-trained backbone", "--output": "it is --out",
        "--num-queries": "it is --queries", "--amp": "it is --precision bf16"}

    def parse_args(self, argv=None):
        args, unknown = self.parse_known_args(argv)
        for flag in unknown:
            name = flag.split("=")[0]
            if name in self.ELSEWHERE:
                self.error(f"there is no flag {name}: {self.ELSEWHERE[name]}")
            known = difflib.get_close_matches(name, self._option_string_actions, 1)
            hint = f"; did you mean {known[0]}?" if known else "; see --help"
            self.error(f"there is no flag {name}{hint}")
        return args


# kinds of flags: a whole number, a number, yes or no
N = {"type": int, "metavar": "N"}
X = {"type": float, "metavar": "X"}
YES = {"action": argparse.BooleanOptionalAction, "default": None}


def make_parser(description=None):
    parser = Parser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="train.py [--detector D] [--assign A] [--location-cost L] [--class-cost W] "
              "[--data S] [flags below]")
    add_paper_flags(parser.add_argument_group("the paper's axes (3.1 to 3.3, Tables 1 and 2)"))
    data.add_data_flags(parser.add_argument_group("data"))
    add_later_flags(parser.add_argument_group("what came after the paper"))
    add_optimisation_flags(parser.add_argument_group("optimisation"))
    add_picture_flags(parser.add_argument_group("pictures"))
    add_detector_flags(parser.add_argument_group("options of the detectors, of those named"))
    add_run_flags(parser.add_argument_group("the run"))
    return parser


def add_paper_flags(g):
    g.add_argument("--detector", choices=tuple(NAMES), help="which detector (default: fcos)")
    g.add_argument("--assign", metavar="A", help="one-to-many: the detector's original rule, form "
                   "and losses; hungarian (default): one-to-one; or another strategy with the "
                   "one-to-one form and losses: min-cost, top-k, one-to-many-iou (RetinaNet's rule "
                   "on anchors, or on predicted boxes), one-to-many-points (FCOS's rule), "
                   "my.py:my_function")
    g.add_argument("--cost", metavar="C", help="my.py:my_cost instead of Eq. 5: a function of one "
                   "image's prediction and target (assign.py); the losses stay")
    g.add_argument("--location-cost", choices=("predefined", "predicted"),
                   help="between objects and anchors or points, or predicted boxes (default)")
    g.add_argument("--class-cost", **X, help="weight of the classification cost (default: "
                   "--lambda-cls); 0 gives the 'location only' rows, where duplicates return")
    for name, default in (("cls", "2, DETR 1"), ("l1", "5"), ("iou", "2")):
        g.add_argument(f"--lambda-{name}", **X, help="weight of its term in the loss and in the "
                       f"cost, Eq. 1, 4 and 5 (default: {default})"
                       + ("; not in the cost of points" if name == "iou" else ""))


def add_later_flags(g):
    g.add_argument("--many", **N, help="one-to-one rows: in training a second branch learns from "
                   "the N cheapest predictions of each object (fewer where objects want the same). "
                   "RetinaNet, CenterNet, FCOS: copies of the last layers (scores, boxes); query "
                   "detectors: N times as many queries more. Its loss is divided by N; not used "
                   "afterwards (default 0: off, as in the paper)")
    g.add_argument("--many-assign", metavar="A", help="the second branch learns by this strategy, "
                   "with its cost, instead of the N cheapest; the values of --assign but "
                   "one-to-many; N then only divides its loss (default: top-k)")
    g.add_argument("--many-weight", type=float, nargs=2, metavar="X", help="the second branch's "
                   "loss weighs the first at the beginning and the second at the end, on a "
                   "straight line between them, over N (default: 1 1)")
    g.add_argument("--many-detach", **YES, help="RetinaNet, CenterNet, FCOS: the features in front "
                   "of the layers learn by the second branch alone (default: by both)")


def add_optimisation_flags(g):
    g.add_argument("--steps", **N, help="optimiser steps (scenes: 2250, RetinaNet 1500, CenterNet "
                   "2000, DETR 8000, Deformable DETR 1200, Sparse R-CNN 4000)")
    g.add_argument("--batch-size", **N, help="images per step, over all processes and "
                   "micro-batches (scenes, coco: 16)")
    g.add_argument("--accumulate", **N, help="micro-batches per step (default 1): less memory, the "
                   "same step (but for batch norm, DETR and the original losses, which average "
                   "over a micro-batch)")
    g.add_argument("--optimizer", choices=("adamw", "sgd"),
                   help="default adamw; the published one-to-many recipes use sgd")
    g.add_argument("--lr", **X, help="peak learning rate (scenes: 1e-3, RetinaNet and CenterNet "
                   "2e-3, DETR 5e-4, Deformable DETR and Sparse R-CNN 1e-3; coco: as "
                   "published)")
    g.add_argument("--backbone-lr-factor", **X, help="the backbone's learning rate is this times "
                   "--lr (default 1)")
    g.add_argument("--weight-decay", **X, help="default 1e-4 (0.1: RetinaNet and CenterNet on "
                   "scenes, query detectors on all small data, all on crowd)")
    g.add_argument("--spare-norms", **YES, help="SGD: no weight decay on norm layers (default, but "
                   "for coco's one-to-many CenterNet; as published)")
    g.add_argument("--momentum", **X, help="of SGD (default 0.9)")
    g.add_argument("--schedule", choices=("step", "one-cycle"), help="step: linear warm-up, then a "
                   "tenth at each milestone; one-cycle: up for a tenth, then down a cosine")
    g.add_argument("--warmup-steps", **N, help="step schedule: steps until the learning rate is "
                   "reached (coco: 1000)")
    g.add_argument("--warmup-factor", **X, help="step schedule: of the learning rate at step 0")
    g.add_argument("--milestones", type=int, nargs="*", metavar="N",
                   help="step schedule: steps at which the learning rate falls to a tenth")
    g.add_argument("--clip-grad", **X, help="largest norm of the whole gradient; 0: no clipping")


def add_picture_flags(g):
    g.add_argument("--train-sizes", type=int, nargs="+", metavar="N",
                   help="shorter sides to choose from in training, pixels")
    g.add_argument("--train-longest", **N, help="limit of the longer side in training")
    g.add_argument("--test-size", **N, help="shorter side in evaluation; 0 keeps each picture's")
    g.add_argument("--test-longest", **N, help="limit of the longer side in evaluation")
    g.add_argument("--round-down", **YES, help="resize as DETR does, the longer side rounded down")
    g.add_argument("--flip", **X, help="probability of a horizontal flip (default 0.5)")
    g.add_argument("--crop", **X, help="probability of DETR's resize-crop-resize (coco, but "
                   "one-to-many: 0.5)")
    g.add_argument("--square", **N, help="cut squares of random place and size and scale them to N "
                   "pixels instead, as the original CenterNet does (coco, CenterNet one-to-many: "
                   "512; else 0, off)")
    g.add_argument("--colours", **X, help="vary brightness, contrast and saturation by up to this "
                   "share (coco, CenterNet one-to-many: 0.4)")
    g.add_argument("--shift", **N, help="move each picture by up to N pixels, right or left and up "
                   "or down; one colour fills the gap (scenes, crowd, custom: 12, "
                   "else 0)")
    g.add_argument("--skip-empty", **YES, help="leave pictures without objects out of training "
                   "(coco, one-to-many: yes)")
    g.add_argument("--workers", **N, help="processes that read pictures, per training process "
                   "(coco, crowdhuman: 4, else 0)")


def add_detector_flags(g):
    """The options of the detectors; the published values are the constructors' defaults."""
    g.add_argument("--width", **N, help="channels of pyramid and towers (RetinaNet, FCOS), or of "
                   "the queries (published: 256)")
    g.add_argument("--depth", **N, help="RetinaNet, FCOS: convolutions in a tower (published: 4)")
    g.add_argument("--extra-levels", **N, help="RetinaNet, FCOS: pyramid levels above the "
                   "backbone's last map (published: 2, P6 and P7)")
    g.add_argument("--anchor-scales", **N, help="RetinaNet: sizes of anchors per octave, each in "
                   "three ratios (published: 3; scenes: 1)")
    g.add_argument("--delta-weights", type=float, nargs=4, metavar="X",
                   help="RetinaNet: the head's output is divided by these before it is a delta dx, "
                   "dy, dw, dh (published: 1 1 1 1; scenes: 10 10 5 5, for smaller steps)")
    g.add_argument("--tower-norm", **YES, help="RetinaNet: group norm in the towers (scenes: yes)")
    g.add_argument("--box-prior", **X, help="FCOS, CenterNet: distance from point to box side "
                   "before training, in strides (scenes: 3; published: 0)")
    g.add_argument("--neck-widths", type=int, nargs="+", metavar="N",
                   help="CenterNet: channels of its steps up from stride 32: three (published: 256 "
                   "128 64; scenes: 128 64 64) end at stride 4, two at stride 8")
    g.add_argument("--laterals", **YES, help="CenterNet, one-to-many: OneNet's laterals in the "
                   "original's neck too (scenes: yes, whose coarsest map has 4 x 4 cells)")
    g.add_argument("--deform", **YES, help="CenterNet: deformable convolutions in its neck "
                   "(scenes: no)")
    g.add_argument("--queries", **N, help="DETR, Deformable DETR, Sparse R-CNN: object queries, or "
                   "proposals (published: 100, 300, 300)")
    g.add_argument("--layers", **N, help="the same: encoder and decoder layers, or stages "
                   "(published: 6)")
    g.add_argument("--hidden", **N, help="the same: width of the feed-forward networks (published: "
                   "2048, 1024, 2048)")
    g.add_argument("--dropout", **X, help="DETR, Deformable DETR: in the transformer (published: "
                   "0.1; scenes: 0)")
    g.add_argument("--stride", type=int, choices=(8, 16, 32),
                   help="DETR: stride of the map that is encoded (published: 32; scenes: 16)")
    g.add_argument("--levels", **N, help="Deformable DETR: levels of the pyramid, counted from the "
                   "coarsest (published: 4; scenes: 2, strides 16 and 32)")
    g.add_argument("--refine", **YES, help="Deformable DETR: each layer corrects the boxes of the "
                   "last (published base form: no; scenes: yes)")
    g.add_argument("--roi-size", **N, help="Sparse R-CNN: boxes of this side are cut from the "
                   "third level (published: 224; scenes: 64)")
    g.add_argument("--dynamic", **N, help="Sparse R-CNN: inner width of the dynamic convolution "
                   "(published: 64)")


def add_run_flags(g):
    g.add_argument("--backbone", choices=checkpoints.BACKBONES,
                   help="tiny is for pictures of about 128 pixels (scenes: tiny; coco: resnet50)")
    g.add_argument("--backbone-weights", metavar="W", help="none, imagenet (torchvision's), or a "
                   "file: a torchvision ResNet, a last.pt, or tiny.pt (pretrain.py), where "
                   "scenes, crowd and custom start from (coco, crowdhuman: imagenet)")
    g.add_argument("--resnet", choices=("torchvision", "msra"), help="whose pre-trained ResNet: "
                   "torchvision's (RGB, default), or MSRA's (BGR, stride in the first 1x1), which "
                   "detectron2's and AdelaiDet's one-to-many figures were made with; give its "
                   "file, converted, as --backbone-weights")
    g.add_argument("--out", metavar="DIR",
                   help="folder for everything (default: runs/ and a name made of the row)")
    g.add_argument("--resume", nargs="?", const=True, choices=("auto",),
                   help="go on from OUT/last.pt, exactly; flags not given are taken from it; auto: "
                   "or start, where there is none yet, so that one command line survives restarts")
    g.add_argument("--init", metavar="FILE",
                   help="start from these weights only; what did not fit is listed")
    g.add_argument("--freeze", choices=("nothing", "location"), help="location: RetinaNet and FCOS "
                   "from --init keep all but their classification sub-net, which starts anew and "
                   "learns alone (Observation 4.1)")
    g.add_argument("--seed", **N, help="of weights, order and augmentation (default 0)")
    g.add_argument("--device", help="cpu, cuda, mps, ... (default: cuda if there is one)")
    g.add_argument("--precision", choices=("auto", "fp32", "bf16"), help="bf16 runs the network in "
                   "bfloat16, costs and losses stay float32; auto: bf16 where the device computes "
                   "in it natively (coco, crowdhuman: fp32, as published; else auto)")
    g.add_argument("--eval-every", **N, help="evaluate every N steps, and always at the end "
                   "(default 0: only then)")
    g.add_argument("--max-dets", **N, help="detections per image in evaluation (default 100; "
                   "crowd, crowdhuman: 500, which suits a custom .odgt too)")
    g.add_argument("--log-every", **N, help="steps between rows of log.csv (default 20)")
    g.add_argument("--checkpoint-every", **N, help="steps between checkpoints (default 500; coco, "
                   "crowdhuman: 2500)")
    g.add_argument("--keep-checkpoints", type=float, nargs="+", metavar="X",
                   help="keep OUT/step-N.pt at these shares of the steps: 0.1 0.5 1 are Figure 5's "
                   "early, middle and late (figures.py scores, wander)")


def names_of(add_flags):
    """The names of the flags that a function adds to a parser."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return set(vars(parser.parse_args([])))


OPTIONS = names_of(add_detector_flags) | {"many"}
OF_MANY = "many_assign", "many_weight", "many_detach"
# the machine, paths (the pictures' ids must agree), and what is written
FREE_ON_RESUME = {"out", "resume", "device", "workers", "accumulate", "data_dir",
                  "train_json", "train_images", "val_json", "val_images", "log_every",
                  "checkpoint_every", "eval_every", "keep_checkpoints"}


def flag(name):
    return "--" + name.replace("_", "-")


# ------------------------------------------------------------------------------------------------
# from what was given to what is in force
# ------------------------------------------------------------------------------------------------

def not_concerned(name, flags):
    """Why a flag has nothing to say in a run of these flags, in words; "" if it has."""
    detector, one_to_many = flags["detector"], flags["assign"] == "one-to-many"
    if (name in ("many", *OF_MANY) and flags["assign"] in
            ("one-to-many", "one-to-many-iou", "one-to-many-points", "top-k")):
        return f"does not concern --assign {flags['assign']}, which is one-to-many already"
    if name in OPTIONS and name not in options_of(detector, one_to_many):
        fits = [d for d in NAMES if name in options_of(d)]
        fits += [f"{d} --assign one-to-many" for d in DENSE
                 if d not in fits and name in options_of(d, one_to_many=True)]
        return f"does not concern {detector}; it goes with {', '.join(fits)}"
    if one_to_many and name in ("cost", "class_cost", "location_cost", "lambda_cls", "lambda_l1",
                                "lambda_iou"):
        return "does not concern --assign one-to-many, the detector's original rule and losses"
    if name in OF_MANY and not flags.get("many"):
        return "does not concern a run without --many"
    if name == "many_detach" and detector not in DENSE:
        return f"does not concern {detector}, whose two groups of queries share all layers"
    if flags.get("cost") and name in ("class_cost", "location_cost"):
        return f"does not concern --cost {flags['cost']}, which is the whole cost"
    rule = flags["assign"]
    if (rule == "one-to-many-points" and name in ("cost", "class_cost", "location_cost")
            or rule == "one-to-many-iou" and name in ("cost", "class_cost")):
        judged = "the area of boxes around points" if "points" in rule else "IoU alone"
        return f"does not concern --assign {rule}, which judges {judged}"
    if name in ("momentum", "spare_norms") and flags["optimizer"] != "sgd":
        return f"does not concern --optimizer {flags['optimizer']}; it goes with sgd"
    if name in ("warmup_steps", "warmup_factor", "milestones") and flags["schedule"] != "step":
        return f"does not concern --schedule {flags['schedule']}; it goes with step"
    if name in ("train_sizes", "train_longest") and flags["square"]:
        return f"does not concern --square {flags['square']}, which scales to its own size"
    if name == "test_longest" and not flags["test_size"]:
        return "does not concern --test-size 0, which keeps each picture's size"
    if name == "freeze" and not checkpoints.detector_class(detector, one_to_many).class_branch:
        return (f"does not concern {detector}; it goes with retinanet and fcos, which have a "
                f"sub-net for the classes")
    if name == "resnet" and flags["backbone"] == "tiny":
        return "does not concern --backbone tiny; it goes with the ResNets"
    return ""


def effective_flags(given):
    """Every flag in force, from those given on the command line (None: not given) and the recipe.

    Returns (flags, checkpoint): the checkpoint to go on from with --resume, else None.  Raises
    UsageError by name for flags that do not concern the run, or that changed on --resume, and
    DataError for those of another data set.
    """
    given = {name: value for name, value in given.items() if value is not None}
    saved, checkpoint = {}, None
    if given.get("resume"):
        if "out" not in given:
            raise UsageError("--resume needs --out, the folder of the run to go on with")
        file = Path(given["out"]) / "last.pt"
        if given["resume"] != "auto" or file.exists():
            checkpoint = checkpoints.read_run(file)
            saved = saved_flags(checkpoint, file)

    # what names the recipe
    choice = {"detector": "fcos", "assign": EVERYWHERE["assign"], **saved, **given,
              "data": data.data_set(given, saved.get("data", "scenes"))}
    detector, one_to_many = choice["detector"], choice["assign"] == "one-to-many"
    if detector not in DENSE and (one_to_many or choice.get("location_cost") == "predefined"):
        raise UsageError(f"--detector {detector} has learned object candidates: it knows neither "
                         f"--assign one-to-many nor --location-cost predefined")
    values = recipe(choice["data"], detector, one_to_many)
    if not saved:
        flags = {**choice, **values, **given}
    else:
        flags = {**values, **saved}
        changed = [f"{flag(name)} (was {flags.get(name)}, now {value})"
                   for name, value in given.items() if name not in FREE_ON_RESUME
                   and value not in (flags.get(name), "auto")]
        if changed:
            schedule = ("; other --steps are another schedule of the learning rate"
                        if given.get("steps", flags["steps"]) != flags["steps"] else "")
            raise UsageError(f"--resume continues the same run, but these flags changed: "
                             f"{', '.join(changed)}{schedule}; leave them out, or start a new run "
                             f"with --init {shlex.quote(given['out'] + '/last.pt')}")
        flags.update({name: value for name, value in given.items() if name in FREE_ON_RESUME})
    flags.setdefault("class_cost", flags["lambda_cls"])
    chosen = "backbone_weights" in {**saved, **given}
    if not chosen and flags["backbone"] != "tiny" and flags["backbone_weights"] == "tiny.pt":
        flags["backbone_weights"] = "none"               # the recipe's are another backbone's

    for name in given:
        why = not_concerned(name, flags)
        if why:
            raise UsageError(f"{flag(name)} {why}")
    for milestone in given.get("milestones", ()):
        if milestone > flags["steps"]:       # a recipe's own may, for a trial of 200 steps
            raise UsageError(f"--milestones {milestone}: the run ends before, after --steps "
                             f"{flags['steps']}")
    remember_own_files(flags)
    in_force = {name: flags[name] for name in flags if not not_concerned(name, flags)}
    return in_force, checkpoint


def saved_flags(checkpoint, file):
    """The flags that a checkpoint was trained with.  Raises CheckpointError.

    They are put to the parser once more: what no command line could say, no run has said.  A flag
    that is no more is left out, one that was not yet gets its default.
    """
    parser = make_parser()
    known, words, exact = vars(parser.parse_args([])), [], {}
    for name, value in checkpoint["args"].items():
        if name == "resume" or name not in known and not name.endswith("_sha256"):
            continue
        if name.endswith("_sha256") or type(value) is bool or value == []:
            exact[name] = value
        elif value is not None:
            words += ([flag(name), *map(str, value)] if type(value) is list
                      else [f"{flag(name)}={value}"])
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            parsed = vars(parser.parse_args(words))
    except SystemExit:
        raise checkpoints.CheckpointError(f"{file}: {checkpoints.DAMAGED}: its flags are none of "
                                          f"train.py") from None
    return {**exact, **{name: value for name, value in parsed.items() if value is not None}}


def remember_own_files(flags):
    """Adds the SHA-256 of the files that --assign and --cost name.

    Raises UsageError if such a file is not what it was when the run began.
    """
    for name in ("assign", "cost", "many_assign"):
        own, known = str(flags.get(name)), flags.get(f"{name}_sha256")
        if ":" in own and Path(own.rpartition(":")[0]).is_file():        # else losses.row tells it
            flags[f"{name}_sha256"] = ideas.digest(own)
            if known not in (None, flags[f"{name}_sha256"]):
                raise UsageError(f"--resume continues the same run, but the file of {flag(name)} "
                                 f"{own} has changed; undo that, or start a new run with --init "
                                 f"{flags['out']}/last.pt")


# of the values, or of each value in a list: (lowest, highest)
RANGES = {
    **dict.fromkeys(("steps", "batch_size", "accumulate", "log_every", "checkpoint_every",
                     "max_dets"), (1, 10 ** 9)),
    **dict.fromkeys(("eval_every", "warmup_steps", "milestones"), (0, 10 ** 9)),
    "many": (0, 100),
    **dict.fromkeys(("train_sizes", "train_longest", "test_longest", "width", "hidden", "queries",
                     "dynamic", "roi_size", "neck_widths"), (1, 10 ** 5)),
    **dict.fromkeys(("square", "shift", "test_size"), (0, 10 ** 5)),
    **dict.fromkeys(("depth", "layers", "anchor_scales"), (1, 100)),
    **dict.fromkeys(("flip", "crop", "colours", "warmup_factor"), (0, 1)),
    **dict.fromkeys(("lambda_cls", "lambda_l1", "lambda_iou", "class_cost", "clip_grad",
                     "weight_decay", "backbone_lr_factor", "box_prior", "many_weight"),
                    (0, 10 ** 9)),
    "seed": (0, 2 ** 63 - 1),
    "workers": (0, 1000),
    "extra_levels": (0, 4),
    "levels": (1, 4),                        # more would be maps of less than a cell
    "momentum": (0, 0.9999),
    "dropout": (0, 0.9999),
    # not 0: nothing would be learned, nothing kept, or it is divided by
    "lr": (1e-30, 1e30),
    "keep_checkpoints": (1e-9, 1),
    "delta_weights": (1e-9, 1e9),
}


def check_flags(flags, world):
    """Raises UsageError for values that argparse lets through.  world: how many processes."""
    for name, (low, high) in RANGES.items():
        given = flags.get(name, [])
        for value in given if type(given) is list else [given]:
            if not low <= value <= high:     # also what is not a number
                raise UsageError(f"{flag(name)} {value}: must be from {low} to {high}")
    if flags.get("train_sizes") == []:
        raise UsageError("--train-sizes: at least one size is wanted")
    if flags.get("freeze") == "location" and not flags.get("init"):
        raise UsageError("--freeze location wants --init, a detector whose boxes are to stay")
    if len(flags.get("neck_widths", [])) > 3:
        raise UsageError(f"--neck-widths {flags['neck_widths']}: at most three steps lead up from "
                         f"stride 32")
    for sizes, longest in (("train_sizes", "train_longest"), ("test_size", "test_longest")):
        given, limit = flags.get(sizes, 0), flags.get(longest, 0)
        largest = max(given) if type(given) is list else given
        if largest and limit and largest > limit:
            raise UsageError(f"{flag(sizes)} {largest}: no shorter side can be longer than the "
                             f"longer one, {flag(longest)} {limit}; give both")
    if flags["batch_size"] % (world * flags["accumulate"]):
        raise UsageError(f"--batch-size {flags['batch_size']}: must be a multiple of {world} "
                         f"process(es) x {flags['accumulate']} micro-batch(es)")

    if flags.get("freeze") == "location" and flags.get("many"):
        raise UsageError("--freeze location trains the classification sub-net alone, --many a "
                         "second branch beside it: give one of them")

    detector = flags["detector"]
    predefined = flags.get("location_cost") == "predefined"
    # of the group norms; the heads of attention divide both
    groups = 8 if detector in DENSE and flags.get("width", 0) < 256 else 32
    if flags.get("width", 0) % groups:
        raise UsageError(f"--width {flags['width']}: must be a multiple of {groups}")
    for name in ("assign", "many_assign"):
        rule = flags.get(name)
        if name == "many_assign" and rule == "one-to-many":
            raise UsageError("--many-assign one-to-many: the original rules are one-to-many-iou "
                             "and one-to-many-points")
        if rule == "one-to-many-points" and detector not in ("fcos", "centernet"):
            raise UsageError(f"{flag(name)} one-to-many-points judges points: it goes with FCOS "
                             f"and CenterNet, not with --detector {detector}")
        if rule == "one-to-many-iou" and predefined and detector != "retinanet":
            raise UsageError(f"{flag(name)} one-to-many-iou with --location-cost predefined "
                             f"compares anchors: it goes with --detector retinanet")


def build_arguments(flags, num_classes):
    """What checkpoints.build needs; it travels in the checkpoint."""
    detector, original = flags["detector"], flags["assign"] == "one-to-many"
    build = {"detector": detector, "num_classes": num_classes, "backbone": flags["backbone"],
             "original": original}
    if flags["backbone"] != "tiny":
        # without pre-trained weights there is nothing to freeze; CenterNet trains all, norms too
        pre_trained = flags["backbone_weights"] != "none" or flags.get("init")
        train_all = not pre_trained or detector == "centernet"
        build.update(norm="batch" if train_all else "frozen", freeze=0 if train_all else 2,
                     resnet=flags["resnet"])
    # --many is not in force beside a rule that is one-to-many already: the constructor's 0 then
    return {**build, **{name: flags[name] for name in options_of(detector, original)
                        if name in flags}}


def headline(flags, num_pictures, num_classes):
    """What this run trains, in the paper's words."""
    if flags["assign"] == "one-to-many":
        rule = "its original one-to-many assignment and losses"
    else:
        kinds = {"hungarian": "one-to-one", "min-cost": "minimum-cost"}
        weight = flags.get("class_cost", 0)
        own = flags.get("cost")
        cost = f"{weight:g} x classification cost + " if weight else "location cost only: "
        location = flags.get("location_cost", "").replace("predefined", "pre-defined")
        cost += f"{location} location cost"
        if own:
            cost = own
        elif "class_cost" not in flags:
            cost = f"IoU with {location} boxes" if location else "area around points"
        rule = (f"{kinds.get(flags['assign'], flags['assign'])} positive sample assignment, "
                f"matching cost = {cost}")
        if flags.get("many"):
            kind = (f"{flags['many']} positives an object" if flags["many_assign"] == "top-k"
                    else f"{flags['many_assign']}, weighing 1/{flags['many']}")
            rule += f", and a second branch with {kind}"
            if flags["many_weight"] != [1, 1]:
                rule += " and a weight of {:g} to {:g}".format(*flags["many_weight"])
            if flags.get("many_detach"):
                rule += ", by which alone the features learn"
    start = ", from scratch" if flags["backbone_weights"] == "none" else ""
    return (f"{NAMES[flags['detector']]} ({flags['backbone']}{start}) with {rule}; "
            f"{flags['data']}, {num_pictures} pictures, {num_classes} classes, "
            f"{flags['steps']} steps")


def run_name(flags):
    """The folder of a run without --out, below runs/."""
    def plain(name):
        return name.replace("/", "_").replace(":", "-")

    rule = plain(flags["assign"])
    if rule != "one-to-many":
        if flags.get("cost"):
            rule += f"-{plain(flags['cost'])}"
        for name, value in (("location_cost", "-{}"), ("class_cost", "-class{:g}")):
            rule += value.format(flags[name]) if name in flags else ""
        if flags.get("many"):
            rule += f"-many{flags['many']}"
            if flags["many_assign"] != "top-k":
                rule += f"-{plain(flags['many_assign'])}"
            if flags["many_weight"] != [1, 1]:
                rule += "-weight{:g}-{:g}".format(*flags["many_weight"])
            rule += "-detach" if flags.get("many_detach") else ""
    return f"{flags['data']}-{flags['detector']}-{rule}"
