"""Published checkpoints in, ours out; and ours to a file that runs without this code.

In: their names, their class ids, and what their authors' code fixes around them.

    python convert.py model_final.pth --out onenet.pt
    python evaluate.py --weights onenet.pt --data coco --data-dir coco
    python convert.py --export out.pt2 --weights onenet.pt --size 800 1344

Knows, by their keys alone, the files of OneNet, of detectron2's and torchvision's RetinaNet and
FCOS, of AdelaiDet's FCOS, of CenterNet, DETR, Deformable DETR and Sparse R-CNN, and ImageNet
ResNets (torchvision .pth, detectron2 .pkl; for train.py --backbone-weights).  A conversion is exact
or it is an error: keys that are missing, left over, or of another shape are listed.  Two-stage
Deformable DETR is refused.  One thing keys cannot tell: DETR-DC5's are plain DETR's; it is refused
where the file says so itself, as the published ones' flags may.  Files are read without running any
code in them.

Out: torch.export's file.  It takes pictures (B, 3, H, W), float32 RGB from 0 to 255, any number of
one size, and gives boxes (B, Q, 4), xyxy in pixels of these, and scores (B, Q, C).
"""
import argparse
import io
import json
import pickle
import re
import warnings
from pathlib import Path

import torch
from torchvision.models.detection import FCOS_ResNet50_FPN_Weights

import checkpoints
import data
import models
import runs
from checkpoints import CheckpointError
from pictures import DataError, read_text

# COCO's 80 classes: the ids in use (10 of 1 ... 90 are not), and the names of its files
COCO = FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
COCO_IDS = [i for i, name in enumerate(COCO) if name not in ("__background__", "N/A")]
COCO_NAMES = [COCO[i] for i in COCO_IDS]

# by the number of classes: their names and ids, and flags of evaluation; of other numbers they are
# "class 1", "class 2" ..., unless --classes names them
DATA_SETS = {80: (COCO_NAMES, COCO_IDS, {"data": "coco", "max_dets": 100}),
             1: (["person"], [1], {"data": "crowdhuman", "max_dets": 500})}


# ------------------------------------------------------------------------------------------------
# names: (pattern, replacement) applied one after the other to every key
# ------------------------------------------------------------------------------------------------

def shifted(template, by):
    """A replacement that counts from another number: shifted("lateral.{}", -3) makes a 3 a 0."""
    return lambda found: template.format(int(found[1]) + by)


def words(before, **ours):
    """Rules for whole words of a key: words("^head.", feat1="trunk"), their name = ours."""
    return [(rf"{before}{theirs}\b", our) for theirs, our in ours.items()]


DETECTRON_RESNET = [
    (r"\bstem\.conv1\.norm\.", "bn1."),
    (r"\bstem\.", ""),
    (r"\bres(\d)\.", shifted("layer{}.", -1)),
    (r"\bconv(\d)\.norm\.", r"bn\1."),
    (r"\bshortcut\.norm\.", "downsample.1."),
    (r"\bshortcut\.", "downsample.0."),
]


def detectron_fpn(first):
    """detectron2's pyramid above its ResNet.  first: the finest of its levels, P3 or P2."""
    return [
        (r"^backbone\.fpn_lateral(\d)", shifted("neck.lateral.{}", -first)),
        (r"^backbone\.fpn_output(\d)", shifted("neck.output.{}", -first)),
        (r"^backbone\.top_block\.p(\d)", shifted("neck.extra.{}", -6)),
        (r"^backbone\.bottom_up\.", "backbone.body."),
        *DETECTRON_RESNET,
    ]


ONENET = [
    *detectron_fpn(3),
    *words(r"^head\.", cls_conv_module="class_tower", reg_conv_module="box_tower",
           cls_score="score", ltrb_pred="ltrb", bbox_pred="delta"),
    (r"^head\.scales\.(\d)\.scale", r"scale.\1"),
]
ONENET_CENTERNET = [
    (r"^backbone\.", "backbone.body."),
    *DETECTRON_RESNET,
    (r"^head\.deconv\.deconv(\d)", shifted("neck.steps.{}", -1)),
    (r"^head\.deconv\.lateral_conv(\d)", shifted("neck.lateral.{}", -1)),
    (r"^head\.deconv\.output_conv", "neck.output"),
    *words(r"\b", dcn_offset="conv.offset", dcn="conv", dcn_bn="conv_norm", bn="conv_norm",
           up_sample="up", up_bn="up_norm"),
    *words(r"^head\.", feat1="trunk", cls_score="score", ltrb_pred="ltrb"),
]
DETECTRON = [
    *detectron_fpn(3),
    *words(r"^head\.", cls_subnet="class_tower", bbox_subnet="box_tower", cls_score="score",
           ctrness="centreness"),
]
ADELAIDET = [
    *detectron_fpn(3),
    (r"^proposal_generator\.fcos_head\.", ""),
    *words("^", cls_tower="class_tower", bbox_tower="box_tower", cls_logits="score",
           bbox_pred="ltrb", ctrness="centreness"),
    (r"^scales\.(\d)\.scale", r"scale.\1"),
]
TORCHVISION = [
    (r"^backbone\.fpn\.inner_blocks\.(\d)(\.0)?\.", r"neck.lateral.\1."),
    (r"^backbone\.fpn\.layer_blocks\.(\d)(\.0)?\.", r"neck.output.\1."),
    (r"^backbone\.fpn\.extra_blocks\.p(\d)", shifted("neck.extra.{}", -6)),
    # since torchvision 0.13 convolution n of RetinaNet's towers is conv.n.0, before it was conv.2n
    (r"(?<=_head\.conv\.)(\d)\.0(?=\.)", lambda found: str(2 * int(found[1]))),
    *words(r"^head\.classification_head\.", conv="class_tower", cls_logits="score"),
    *words(r"^head\.regression_head\.", conv="box_tower", bbox_ctrness="centreness"),
]
CENTERNET = [
    (r"^(conv1|bn1|layer\d)\.", r"backbone.body.\1."),
    *[(rf"^deconv_layers\.{6 * step + part}\.", f"neck.steps.{step}.{name}.")
      for step in range(3)
      for part, name in ((0, "conv"), (1, "conv_norm"), (3, "up"), (4, "up_norm"))],
    (r"\.conv_offset_mask\.", ".offset."),
    *words("^", hm="score", wh="size", reg="offset"),
]
CENTERNET_BETTER = [
    (r"^backbone\.stage0\.0\.", "backbone.body.conv1."),
    (r"^backbone\.stage0\.1\.", "backbone.body.bn1."),
    (r"^backbone\.stage(\d)", r"backbone.body.layer\1"),
    (r"^upsample\.deconv(\d)", shifted("neck.steps.{}", -1)),
    (r"\.dcn\.(offset_mask_conv|conv_offset_mask)\.", ".conv.offset."),
    (r"\.dcn\.(dcnv2\.)?", ".conv."),
    *words(r"\b", dcn_bn="conv_norm", up_sample="up", up_bn="up_norm"),
    (r"^head\.(cls|wh|reg)_head\.feat_conv", r"\1.0"),
    (r"^head\.(cls|wh|reg)_head\.out_conv", r"\1.2"),
    *words("^", cls="score", wh="size", reg="offset"),
]

TRANSFORMER = [
    (r"^backbone\.0\.body\.", "backbone.body."),
    (r"^transformer\.(encoder|decoder)\.layers\.(\d)\.", r"\1.\2."),
    (r"(?<=\d\.)linear(\d)\.", r"feed_forward.linear\1."),
    *words(r"(?<=^encoder\.\d\.)", self_attn="attention", norm1="norm",
           norm2="feed_forward.norm"),
    *words(r"(?<=^decoder\.\d\.)", self_attn="self_attention", multihead_attn="cross",
           cross_attn="cross", norm3="feed_forward.norm"),
    *words("^", class_embed="score", bbox_embed="box", query_embed="query", input_proj="project"),
    (r"(?<=box)(\.\d)?\.layers\.(\d)", lambda found: f"{found[1] or ''}.{2 * int(found[2])}"),
]
# both attend to themselves first; Deformable DETR numbers its norms the other way round, the one
# behind the image first
DETR = [
    *TRANSFORMER,
    *words(r"(?<=^decoder\.\d\.)", norm1="self_norm", norm2="cross_norm"),
    (r"^transformer\.decoder\.norm", "norm"),
]
DEFORMABLE_DETR = [
    *TRANSFORMER,
    *words(r"(?<=^decoder\.\d\.)", norm1="cross_norm", norm2="self_norm"),
    *words(r"(?<=\.)", sampling_offsets="offset", attention_weights="weight", value_proj="value",
           output_proj="output"),
    *words(r"^transformer\.", level_embed="level_code", reference_points="reference_points"),
]
SPARSE_RCNN = [
    *detectron_fpn(2),
    *words("^", init_proposal_boxes="boxes", init_proposal_features="query"),
    (r"^head\.head_series\.", "stages."),
    (r"(?<=\d)\.linear(\d)\.", r".feed_forward.linear\1."),
    (r"^(stages\.\d)\.norm3\.", r"\1.feed_forward.norm."),
    *words(r"(?<=\.)", self_attn="attention", inst_interact="dynamic", dynamic_layer="write",
           out_layer="out", cls_module="class_tower", reg_module="box_tower",
           class_logits="score", bboxes_delta="delta"),
]

CAFFE_RESNET = [
    (r"^conv1_w$", "conv1.weight"),
    (r"^res_conv1_bn_", "bn1."),
    (r"^res(\d)_(\d+)_", lambda found: f"layer{int(found[1]) - 1}.{found[2]}."),
    (r"branch2([abc])_w$", lambda found: f"conv{'abc'.index(found[1]) + 1}.weight"),
    (r"branch2([abc])_bn_", lambda found: f"bn{'abc'.index(found[1]) + 1}."),
    (r"branch1_w$", "downsample.0.weight"),
    (r"branch1_bn_", "downsample.1."),
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
    (r"^", "backbone.body."),
]

COCO_TEST = {"shortest": [800], "longest": 1333}
CENTERNET_TEST = {"shortest": [512], "longest": 853}
DETR_TEST = {"shortest": [800], "longest": 1333, "round_down": True}
CROWDHUMAN_TEST = {"": {"shortest": [800], "longest": 1400},
                   "sparse-rcnn": {"shortest": [800], "longest": 1500}}
ORIGINAL_SIZE = {"shortest": [], "longest": 10 ** 9}

# name, a key only it has, rules, and what to build (None: a backbone); the first that fits.
# "resnet" is whose ImageNet weights the authors started from; --resnet tells of other ones
LAYOUTS = [
    ("OneNet CenterNet", "head.feat1.weight", ONENET_CENTERNET,
     {"detector": "centernet", "norm": "batch", "freeze": 0}, CENTERNET_TEST),
    ("OneNet FCOS", "head.ltrb_pred.weight", ONENET, {"detector": "fcos"}, COCO_TEST),
    ("OneNet RetinaNet", "head.cls_conv_module.0.weight", ONENET, {"detector": "retinanet"},
     COCO_TEST),

    ("AdelaiDet FCOS", "proposal_generator.fcos_head.cls_logits.weight", ADELAIDET,
     {"detector": "fcos", "original": True, "resnet": "msra"}, COCO_TEST),
    ("detectron2 FCOS", "head.ctrness.weight", [*DETECTRON, (r"^head\.bbox_pred", "ltrb")],
     {"detector": "fcos", "original": True, "variant": "detectron2", "resnet": "msra"}, COCO_TEST),
    ("detectron2 RetinaNet", "head.cls_subnet.0.weight",
     [*DETECTRON, (r"^head\.bbox_pred", "delta")],
     {"detector": "retinanet", "original": True, "resnet": "msra"}, COCO_TEST),
    ("torchvision FCOS", "head.regression_head.bbox_ctrness.weight",
     [*TORCHVISION, (r"^head\.regression_head\.bbox_reg", "ltrb")],
     {"detector": "fcos", "original": True, "variant": "torchvision"}, COCO_TEST),
    ("torchvision RetinaNet", "head.regression_head.bbox_reg.weight",
     [*TORCHVISION, (r"^head\.regression_head\.bbox_reg", "delta")],
     {"detector": "retinanet", "original": True, "variant": "torchvision"}, COCO_TEST),
    ("CenterNet", "hm.2.weight", CENTERNET,
     {"detector": "centernet", "original": True, "norm": "batch", "freeze": 0,
      "pixels": "bgr-unit"}, ORIGINAL_SIZE),
    ("CenterNet-better", "head.cls_head.out_conv.weight", CENTERNET_BETTER,
     {"detector": "centernet", "original": True, "norm": "batch", "freeze": 0}, ORIGINAL_SIZE),

    ("Sparse R-CNN", "init_proposal_boxes.weight", SPARSE_RCNN, {"detector": "sparse-rcnn"},
     COCO_TEST),
    ("Deformable DETR", "transformer.level_embed", DEFORMABLE_DETR, {"detector": "deformable-detr"},
     DETR_TEST),
    ("DETR", "query_embed.weight", DETR, {"detector": "detr"}, DETR_TEST),

    ("MSRA's ResNet (detectron2's R-50.pkl, R-101.pkl)", "res2_0_branch2a_w", CAFFE_RESNET,
     {"resnet": "msra"}, None),
    ("torchvision ResNet under detectron2's names", "stem.conv1.weight",
     [*DETECTRON_RESNET, (r"^", "backbone.body.")], {}, None),
    ("torchvision ResNet", "layer1.0.conv1.weight", [(r"^", "backbone.body.")], {}, None),
]
# constants and counters of the published code that our modules make themselves, and ImageNet's
# classifier
NOT_WEIGHTS = re.compile(r"(num_batches_tracked|pixel_mean|pixel_std|cell_anchors\.\d+"
                         r"|^(stem\.)?fc\.(weight|bias)|^fc1000_[wb]|^conv1_b|_momentum)$")


# ------------------------------------------------------------------------------------------------
# reading
# ------------------------------------------------------------------------------------------------

class ArrayUnpickler(pickle.Unpickler):
    """Reads a pickle of numpy arrays in plain containers, and nothing that could run code."""

    ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
               *((f"numpy.{core}.multiarray", name)
                 for core in ("core", "_core") for name in ("_reconstruct", "scalar"))}

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no array")
        return super().find_class(module, name)


# names under which training codes keep weights, also a moving average: model_ema, ema_state_dict
CONTAINER = re.compile(r"(ema|model|module|net|weights|blobs|state_dict)"
                       r"(_(ema|model|module|net|weights|state_dict|state))*")
# what torch.compile, several GPUs, and a trainer around the model put before its names
WRAPPERS = re.compile(r"^((_orig_mod|module|model)\.)+|(?<=\.)_orig_mod\.")


def innermost(checkpoint, depth=4):
    """The named tensors and arrays of a dict, or of one in it: {} where there are none.

    A moving average's only where there are no others.  depth: a file may hold itself.
    """
    inside = [name for name, value in checkpoint.items() if isinstance(value, dict)
              and isinstance(name, str) and CONTAINER.fullmatch(name)]
    for name in sorted(inside, key=lambda name: "ema" in name) if depth else ():
        found = innermost(checkpoint[name], depth - 1)
        if found:
            return found
    return {name: value for name, value in checkpoint.items()
            if isinstance(name, str) and (torch.is_tensor(value) or hasattr(value, "__array__"))}


def read_names(file):
    """Names of classes, one a line.  Raises CheckpointError."""
    try:
        lines = read_text(file).splitlines()
    except DataError as error:
        raise CheckpointError(str(error)) from None
    names = [line.strip() for line in lines if line.strip()]
    twice = [name for n, name in enumerate(names) if name in names[:n]]
    if twice:
        raise CheckpointError(f"{file}: names {twice[0]} twice; each class needs a name of its own")
    return names


def read(file):
    """The named tensors of a PyTorch checkpoint, or of detectron2's pickle of numpy arrays."""
    if Path(file).suffix == ".pkl":
        try:
            with open(file, "rb") as stream:
                checkpoint = ArrayUnpickler(stream, encoding="latin1").load()
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror}); check the "
                                  f"path") from None
        except Exception as error:                  # a broken pickle may raise anything
            raise CheckpointError(f"{file}: refused: not a plain pickle of numpy arrays "
                                  f"({error})") from None
    else:
        # DETR's files hold the flags they were trained with
        checkpoint = checkpoints.read(file, harmless=[argparse.Namespace])
    if isinstance(checkpoint, dict) and getattr(checkpoint.get("args"), "dilation", False):
        raise CheckpointError(f"{file}: a DETR with a dilated last stage (DC5), which our backbone "
                              f"does not have; its keys are plain DETR's")

    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{file}: not a checkpoint: it holds a {type(checkpoint).__name__}")

    weights = {}
    for key, value in innermost(checkpoint).items():
        name = WRAPPERS.sub("", key)
        if name in weights:
            raise CheckpointError(f"{file}: holds {name} twice, once as {key}; keep one of the two "
                                  f"models")
        try:
            weights[name] = torch.as_tensor(value)
        except (TypeError, ValueError):
            raise CheckpointError(f"{file}: its entry {key} is no tensor but a numpy array of "
                                  f"{value.dtype}; save it without") from None
    return weights


# ------------------------------------------------------------------------------------------------
# converting
# ------------------------------------------------------------------------------------------------

def rename(weights, rules):
    """Weights under our names; FCOS's scalars scale.0, scale.1, ... become our one vector."""
    renamed = {}
    for key, value in weights.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    scales = sorted(key for key in renamed if re.fullmatch(r"scale\.\d", key))
    if scales:
        renamed["scale"] = torch.cat([renamed.pop(key).reshape(1) for key in scales])
    return renamed


def fold_bias(weights):
    """A deformable convolution's bias, which some CenterNet files have, into the norm behind it."""
    for key in [k for k in weights if re.fullmatch(r"neck\.steps\.\d\.conv\.bias", k)
                and k.replace("bias", "offset.weight") in weights]:
        mean = key.replace("conv.bias", "conv_norm.running_mean")
        weights[mean] = weights[mean] - weights.pop(key)


def sizes_outer(weights):
    """torchvision's nine anchors of a point have the ratio outside, ours the size: a transpose."""
    for key in ("score.weight", "score.bias", "delta.weight", "delta.bias"):
        weights[key] = weights[key].unflatten(0, (3, 3, -1)).transpose(0, 1).flatten(0, 2)


def query_options(weights, detector):
    """What to build for a query detector's weights.

    Deformable DETR's files repeat tensors that modules share.
    """
    copies = sorted(k for k in weights if re.match(r"transformer\.decoder\.(class|bbox)_embed", k))
    for key in copies:
        del weights[key]
    options = {"queries": len(weights["query.weight"])} if "query.weight" in weights else {}
    if detector != "deformable-detr":
        return options

    if not copies:                              # the base form: one head in six copies
        for key in [k for k in weights if re.match(r"(score|box)\.[1-9]", k)]:
            if not torch.equal(weights.pop(key), weights[re.sub(r"\.\d", ".0", key, count=1)]):
                raise CheckpointError(f"Deformable DETR without refinement, but {key} is not the "
                                      f"copy of its first layer's")
    return {**options, "refine": bool(copies)}


def resnet_name(weights):
    """Which ResNet: the number of blocks in its third stage, and whether they are bottlenecks."""
    depth = len({k.split(".")[3] for k in weights if k.startswith("backbone.body.layer3.")})
    bottleneck = "backbone.body.layer1.0.conv3.weight" in weights
    known = {(2, False): "resnet18", (6, False): "resnet34",
             (6, True): "resnet50", (23, True): "resnet101"}
    if (depth, bottleneck) not in known:
        raise CheckpointError(f"its backbone is no ResNet of 18, 34, 50 or 101 layers "
                              f"(third stage: {depth} blocks)")
    return known[depth, bottleneck]


def find_layout(weights):
    """The row of LAYOUTS that a file's keys fit.  Raises CheckpointError."""
    if "transformer.enc_output.weight" in weights or "transformer.pos_trans.weight" in weights:
        raise CheckpointError("two-stage Deformable DETR is not supported (no row of the paper "
                              "uses it); convert its one-stage form")
    for row in LAYOUTS:
        if row[1] in weights:
            return row
    raise CheckpointError(f"none of the published layouts "
                          f"({', '.join(name for name, *_ in LAYOUTS)}); its keys begin with "
                          f"{', '.join(sorted(weights)[:3]) or 'nothing'}")


def settle_classes(weights, layout, detector, names=None):
    """How many classes the classifier knows, and how many outputs are no class.

    names: of the classes, if others than COCO's or CrowdHuman's

    Outputs for COCO's 91 ids become outputs for its 80 classes: within each anchor, and with DETR's
    last one, "no object".  DETR and Deformable DETR keep those of the other 11 ids behind the
    classes, for they take part in the softmax and in the ranking.  Raises CheckpointError.
    """
    own = r"score\.2\." if "score.2.weight" in weights else r"score\.(?=weight|bias)"
    pattern = {"deformable-detr": r"score\.\d\.", "sparse-rcnn": r"stages\.\d\.score\."}
    classifiers = [k for k in weights if re.match(pattern.get(detector, own), k)]
    if not classifiers:
        raise CheckpointError(f"{layout}: its classifier is missing")

    anchors, no_object = 9 if detector == "retinanet" else 1, detector == "detr"
    num_classes, unused = len(weights[classifiers[0]]) // anchors - no_object, []
    if num_classes < 1:
        raise CheckpointError(f"{layout}: its classifier has no outputs for classes")
    if names is not None and len(names) != num_classes:
        raise CheckpointError(f"{layout} with {num_classes} classes, but --classes names "
                              f"{len(names)}; give one name a line")
    if num_classes == 91 and names is None:
        if detector in ("detr", "deformable-detr"):
            unused = [i for i in range(91) if i not in COCO_IDS]
        for key in classifiers:
            w = weights[key].unflatten(0, (anchors, -1))            # (A, 91 or 92, ...)
            weights[key] = w[:, COCO_IDS + unused + [91] * no_object].flatten(0, 1)
        num_classes = 80
    return num_classes, len(unused)


def fitted(weights, own, layout):
    """The weights of a state dict like `own`, exactly, or an error that lists all that is wrong."""
    counters = {k: torch.tensor(0) for k in own if k.endswith("num_batches_tracked")}
    own = {k: v for k, v in own.items() if k not in counters}
    wrong = ([f"missing {k}" for k in own if k not in weights]
             + [f"left over {k}" for k in weights if k not in own])
    wrong += [f"{k} is {tuple(weights[k].shape)}, not {tuple(own[k].shape)}"
              for k in own if k in weights and own[k].shape != weights[k].shape]
    if wrong:
        raise CheckpointError(f"looks like {layout}, but {len(wrong)} entries do not fit: "
                              f"{'; '.join(wrong)}")
    return {**{k: weights[k].float() for k in own}, **counters}


def convert(weights, resnet=None, names=None):
    """A checkpoint of ours from the named tensors of a published one.

    resnet: "torchvision" or "msra", if not the one the layout's authors used
    names: of its classes, if others than COCO's or CrowdHuman's

    Returns (layout's name, checkpoint).  Raises CheckpointError.
    """
    layout, _, rules, build, test_transform = find_layout(weights)
    weights = rename({k: v for k, v in weights.items() if not NOT_WEIGHTS.search(k)}, rules)
    resnet, backbone = resnet or build.get("resnet", "torchvision"), resnet_name(weights)
    if "detector" not in build:
        own = models.ResNet(backbone).state_dict(prefix="backbone.")
        return layout, {"model": fitted(weights, own, layout), "resnet": resnet}

    # what the keys tell of the detector, and what its authors keep in another way than we
    detector, options = build["detector"], {"backbone": backbone, "resnet": resnet}
    if detector not in models.DENSE:
        options.update(query_options(weights, detector))
    if detector == "centernet":
        options["deform"] = "neck.steps.0.conv.offset.weight" in weights
        fold_bias(weights)
    if detector == "fcos" and "variant" in build:
        weights.setdefault("scale", torch.ones(5))          # they have none
    num_classes, unused_ids = settle_classes(weights, layout, detector, names)
    if unused_ids:
        options["unused_ids"] = unused_ids

    build = {**build, **options, "num_classes": num_classes}
    model = fitted(weights, checkpoints.build(**build).state_dict(), layout)
    if layout == "torchvision RetinaNet":
        sizes_outer(model)

    # the classes, and how its authors test
    if names is None and num_classes in DATA_SETS:
        names, ids, args = DATA_SETS[num_classes]
    else:
        names = names or [f"class {n}" for n in range(1, num_classes + 1)]
        ids, args = list(range(1, num_classes + 1)), {"data": "custom", "max_dets": 100}
    if args["data"] == "crowdhuman" and test_transform is COCO_TEST:
        test_transform = CROWDHUMAN_TEST.get(detector, CROWDHUMAN_TEST[""])
    args = {**args, "precision": "fp32", "drop_bad_boxes": True}
    return layout, {"model": model, "build": build, "class_names": names, "category_ids": ids,
                    "test_transform": test_transform, "args": args}


# ------------------------------------------------------------------------------------------------
# exporting
# ------------------------------------------------------------------------------------------------

class Deployed(torch.nn.Module):
    """A detector as a deployer wants it: nothing but tensors in and out, all float32.

    pictures: (B, 3, H, W) RGB, 0 to 255, without padding, of one size for all
    returns boxes (B, Q, 4) xyxy in pixels of these, not clipped, and scores (B, Q, C)
    """

    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, pictures):
        no_padding = torch.zeros_like(pictures[:, 0], dtype=torch.bool)       # (B, H, W)
        prediction = self.detector(pictures, no_padding)
        return prediction.boxes, self.detector.scores(prediction)


def export_size(transform, size, divisor):
    """Height and width to export for: `size`, or the only one a data.Transform makes.

    divisor: of a Detector.  Raises CheckpointError.
    """
    if size is None:
        size = [*transform.shortest, transform.longest]
        if len(size) != 2 or size[0] != size[1]:
            raise CheckpointError("give --size HEIGHT WIDTH: this detector was tested with "
                                  "pictures of many sizes, and an exported one takes one")
    if not all(0 < side <= 10_000 and side % divisor == 0 for side in size):
        raise CheckpointError(f"--size {size[0]} {size[1]}: this detector's pictures have sides "
                              f"that are multiples of {divisor}, up to 10,000")
    return size


def export(detector, height, width):
    """torch.export's program of Deployed(detector), for any number of pictures of one size."""
    if detector.many:
        detector.second_branch(0, *detector.last)    # it is of training alone
    deployed = Deployed(detector).eval().requires_grad_(False)
    pictures = torch.zeros(2, 3, height, width)     # two: of one it would think that B is always 1
    any_number = {"pictures": {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        return torch.export.export(deployed, (pictures,), dynamic_shapes=any_number, strict=False)


def export_file(weights, out, size=None):
    """The detector of a checkpoint as a file of torch.export.  Returns a sentence about it.

    Its extra file classes.json is the list of class names.  Raises CheckpointError and OSError.
    """
    detector, checkpoint = checkpoints.load(weights)
    transform = data.Transform(**checkpoint["test_transform"])
    height, width = export_size(transform, size, detector.divisor)
    program = export(detector, height, width)

    # in memory first: torch.export.save itself has no word for a full disk
    buffer = io.BytesIO()
    with warnings.catch_warnings():                 # PyTorch's own, about its own code
        warnings.simplefilter("ignore")
        torch.export.save(program, buffer,
                          extra_files={"classes.json": json.dumps(checkpoint["class_names"])})
    runs.write_whole(out, buffer.getbuffer())
    return f"{type(detector).__name__}, pictures of {height} x {width} pixels"


# ------------------------------------------------------------------------------------------------
# the command line
# ------------------------------------------------------------------------------------------------

def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = parser.add_argument_group("a published checkpoint in")
    g.add_argument("file", metavar="IN", nargs="?", help="a published checkpoint (.pth, .pkl)")
    g.add_argument("--out", metavar="OUT", help="the file to write; must not exist")
    g.add_argument("--resnet", choices=("torchvision", "msra"),
                   help="whose ImageNet weights the model was trained from, if not those its "
                        "authors used: torchvision (RGB, stride in the 3x3) or msra (BGR, "
                        "stride in the first 1x1; detectron2's model zoo)")
    g.add_argument("--classes", metavar="NAMES.txt",
                   help="the classes' names, one a line in the order of the scores (default: "
                        "COCO's of 80 or 91, person of 1, else class 1, class 2, ...)")
    g = parser.add_argument_group("a detector out")
    g.add_argument("--export", metavar="OUT.pt2",
                   help="the file of torch.export to write; must not exist")
    g.add_argument("--weights", metavar="F", help="a checkpoint of train.py or of this program")
    g.add_argument("--size", nargs=2, type=runs.at_least(1), metavar=("HEIGHT", "WIDTH"),
                   help="of the pictures, in pixels (default: those it was tested with, where all "
                        "are squares of one size)")
    return parser


def convert_file(file, out, resnet=None, classes=None):
    """A published file to one of ours.  Returns a sentence about it.

    Raises CheckpointError and OSError.
    """
    names = classes and read_names(classes)
    weights = read(file)
    try:
        layout, checkpoint = convert(weights, resnet, names)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    except Exception as error:                      # tensors of a damaged file have any shape
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{file}: damaged: {type(error).__name__}: {reason}") from None
    checkpoints.save_whole(checkpoint, Path(out))
    return f"{layout}, {sum(v.numel() for v in checkpoint['model'].values()):,} numbers"


def main():
    parser = make_parser()
    args = parser.parse_args()
    given = {name for name, value in vars(args).items() if value is not None}
    converting = {"file", "out"} <= given <= {"file", "out", "resnet", "classes"}
    exporting = {"export", "weights"} <= given <= {"export", "weights", "size"}
    if not converting and not exporting:
        parser.error("give IN --out OUT (and --resnet, --classes), or --export OUT.pt2 --weights "
                     "F (and --size)")

    source, out = (args.file, args.out) if converting else (args.weights, args.export)
    with runs.faults_told("convert.py", CheckpointError):
        if Path(out).exists():
            raise CheckpointError(f"{out}: exists already; choose another name")
        if converting:
            said = convert_file(source, out, args.resnet, args.classes)
        else:
            said = export_file(source, out, args.size)
    print(f"{source}: {said} -> {out}")


if __name__ == "__main__":
    main()
