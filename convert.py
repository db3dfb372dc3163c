"""Published checkpoints in, ours out.

That is their names, their class ids, and what their authors' code fixes around them.

    python convert.py model_final.pth --out onenet.pt
    python evaluate.py --weights onenet.pt --data coco --data-dir coco

Knows, by their keys alone, the files of OneNet, of detectron2's and torchvision's RetinaNet and
FCOS, of AdelaiDet's FCOS, of CenterNet, DETR, Deformable DETR and Sparse R-CNN, and ImageNet
ResNets (torchvision .pth, detectron2 .pkl; for train.py --backbone-weights).  A conversion is exact
or it is an error: keys that are missing, left over, or of another shape are listed.  One thing keys
cannot tell: DETR-DC5's are plain DETR's; it is refused where the file says so itself, as the
published ones' flags may.  Files are read without running any code in them.
"""
import argparse
import pickle
import re
import sys
from pathlib import Path

import torch

import models
from models import CheckpointError

# COCO's 80 classes: the ids in use (10 of 1 ... 90 are not), and the names of its files
COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
COCO_NAMES = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball,
kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup,
fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut,
cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush""".replace("\n", " ").split(", ")


# ------------------------------------------------------------------------------------------------
# names: (pattern, replacement) applied one after the other to every key
# ------------------------------------------------------------------------------------------------

def shifted(template, by):
    """A replacement that counts from another number: shifted("lateral.{}", -3) makes a 3 a 0."""
    return lambda found: template.format(int(found[1]) + by)


DETECTRON_RESNET = [
    (r"\bstem\.conv1\.norm\.", "bn1."),
    (r"\bstem\.", ""),
    (r"\bres(\d)\.", shifted("layer{}.", -1)),
    (r"\bconv(\d)\.norm\.", r"bn\1."),
    (r"\bshortcut\.norm\.", "downsample.1."),
    (r"\bshortcut\.", "downsample.0."),
]
DETECTRON_FPN = [
    (r"^backbone\.fpn_lateral(\d)", shifted("neck.lateral.{}", -3)),
    (r"^backbone\.fpn_output(\d)", shifted("neck.output.{}", -3)),
    (r"^backbone\.top_block\.p(\d)", shifted("neck.extra.{}", -6)),
    (r"^backbone\.bottom_up\.", "backbone.body."),
    *DETECTRON_RESNET,
]
ONENET = [
    *DETECTRON_FPN,
    (r"^head\.cls_conv_module", "class_tower"),
    (r"^head\.reg_conv_module", "box_tower"),
    (r"^head\.cls_score", "score"),
    (r"^head\.ltrb_pred", "ltrb"),
    (r"^head\.bbox_pred", "delta"),
    (r"^head\.scales\.(\d)\.scale", r"scale.\1"),
]
ONENET_CENTERNET = [
    (r"^backbone\.", "backbone.body."),
    *DETECTRON_RESNET,
    (r"^head\.deconv\.deconv(\d)", shifted("neck.steps.{}", -1)),
    (r"\.dcn_offset\.", ".conv.offset."),
    (r"\.dcn\.", ".conv."),
    (r"\.(dcn_bn|bn)\.", ".conv_norm."),
    (r"\.up_sample\.", ".up."),
    (r"\.up_bn\.", ".up_norm."),
    (r"^head\.deconv\.lateral_conv(\d)", shifted("neck.lateral.{}", -1)),
    (r"^head\.deconv\.output_conv", "neck.output"),
    (r"^head\.feat1", "trunk"),
    (r"^head\.cls_score", "score"),
    (r"^head\.ltrb_pred", "ltrb"),
]
DETECTRON = [
    *DETECTRON_FPN,
    (r"^head\.cls_subnet", "class_tower"),
    (r"^head\.bbox_subnet", "box_tower"),
    (r"^head\.cls_score", "score"),
]
ADELAIDET = [
    *DETECTRON_FPN,
    (r"^proposal_generator\.fcos_head\.", ""),
    (r"^cls_tower", "class_tower"),
    (r"^bbox_tower", "box_tower"),
    (r"^cls_logits", "score"),
    (r"^bbox_pred", "ltrb"),
    (r"^ctrness", "centreness"),
    (r"^scales\.(\d)\.scale", r"scale.\1"),
]
TORCHVISION = [
    (r"^backbone\.fpn\.inner_blocks\.(\d)(\.0)?\.", r"neck.lateral.\1."),
    (r"^backbone\.fpn\.layer_blocks\.(\d)(\.0)?\.", r"neck.output.\1."),
    (r"^backbone\.fpn\.extra_blocks\.p(\d)", shifted("neck.extra.{}", -6)),
    # since torchvision 0.13 convolution n of RetinaNet's towers is conv.n.0, before it was conv.2n
    (r"(?<=_head\.conv\.)(\d)\.0(?=\.)", lambda found: str(2 * int(found[1]))),
    (r"^head\.classification_head\.conv", "class_tower"),
    (r"^head\.regression_head\.conv", "box_tower"),
    (r"^head\.classification_head\.cls_logits", "score"),
    (r"^head\.regression_head\.bbox_ctrness", "centreness"),
]
CENTERNET_HEADS = [
    (r"^hm\.", "score."),
    (r"^wh\.", "size."),
    (r"^reg\.", "offset."),
]
CENTERNET = [
    (r"^(conv1|bn1|layer\d)\.", r"backbone.body.\1."),
    *[(rf"^deconv_layers\.{6 * step + part}\.", f"neck.steps.{step}.{name}.")
      for step in range(3)
      for part, name in ((0, "conv"), (1, "conv_norm"), (3, "up"), (4, "up_norm"))],
    (r"\.conv_offset_mask\.", ".offset."),
    *CENTERNET_HEADS,
]
CENTERNET_BETTER = [
    (r"^backbone\.stage0\.0\.", "backbone.body.conv1."),
    (r"^backbone\.stage0\.1\.", "backbone.body.bn1."),
    (r"^backbone\.stage(\d)", r"backbone.body.layer\1"),
    (r"^upsample\.deconv(\d)", shifted("neck.steps.{}", -1)),
    (r"\.dcn\.(offset_mask_conv|conv_offset_mask)\.", ".conv.offset."),
    (r"\.dcn\.(dcnv2\.)?", ".conv."),
    (r"\.dcn_bn\.", ".conv_norm."),
    (r"\.up_sample\.", ".up."),
    (r"\.up_bn\.", ".up_norm."),
    (r"^head\.(cls|wh|reg)_head\.feat_conv", r"\1.0"),
    (r"^head\.(cls|wh|reg)_head\.out_conv", r"\1.2"),
    (r"^cls\.", "hm."),
    *CENTERNET_HEADS,
]

TRANSFORMER = [
    (r"^backbone\.0\.body\.", "backbone.body."),
    (r"^transformer\.(encoder|decoder)\.layers\.(\d)\.", r"\1.\2."),
    (r"(?<=\d\.)linear(\d)\.", r"feed_forward.linear\1."),
    (r"^(encoder\.\d\.)self_attn\.", r"\1attention."),
    (r"^(encoder\.\d\.)norm1\.", r"\1norm."),
    (r"^(encoder\.\d\.)norm2\.", r"\1feed_forward.norm."),
    (r"^(decoder\.\d\.)self_attn\.", r"\1self_attention."),
    (r"^(decoder\.\d\.)(multihead|cross)_attn\.", r"\1cross."),
    (r"^(decoder\.\d\.)norm3\.", r"\1feed_forward.norm."),
    (r"^class_embed", "score"),
    (r"^bbox_embed", "box"),
    (r"(?<=box)(\.\d)?\.layers\.(\d)", lambda found: f"{found[1] or ''}.{2 * int(found[2])}"),
    (r"^query_embed", "query"),
    (r"^input_proj", "project"),
]
# both attend to themselves first; Deformable DETR numbers its norms the other way round, the one
# behind the image first
DETR = [
    *TRANSFORMER,
    (r"^(decoder\.\d\.)norm1\.", r"\1self_norm."),
    (r"^(decoder\.\d\.)norm2\.", r"\1cross_norm."),
    (r"^transformer\.decoder\.norm", "norm"),
]
DEFORMABLE_DETR = [
    *TRANSFORMER,
    (r"^(decoder\.\d\.)norm1\.", r"\1cross_norm."),
    (r"^(decoder\.\d\.)norm2\.", r"\1self_norm."),
    (r"\.sampling_offsets\.", ".offset."),
    (r"\.attention_weights\.", ".weight."),
    (r"\.(value|output)_proj\.", r".\1."),
    (r"^transformer\.level_embed", "level_code"),
    (r"^transformer\.reference_points", "reference_points"),
    (r"^transformer\.enc_output", "proposal"),
    (r"^transformer\.pos_trans", "query_of_box"),
]
SPARSE_RCNN = [
    (r"^backbone\.fpn_lateral(\d)", shifted("neck.lateral.{}", -2)),
    (r"^backbone\.fpn_output(\d)", shifted("neck.output.{}", -2)),
    (r"^backbone\.bottom_up\.", "backbone.body."),
    *DETECTRON_RESNET,
    (r"^init_proposal_boxes", "boxes"),
    (r"^init_proposal_features", "query"),
    (r"^head\.head_series\.", "stages."),
    (r"\.self_attn\.", ".attention."),
    (r"\.inst_interact\.dynamic_layer\.", ".dynamic.write."),
    (r"\.inst_interact\.out_layer\.", ".dynamic.out."),
    (r"\.inst_interact\.", ".dynamic."),
    (r"(?<=\d)\.linear(\d)\.", r".feed_forward.linear\1."),
    (r"^(stages\.\d)\.norm3\.", r"\1.feed_forward.norm."),
    (r"\.cls_module\.", ".class_tower."),
    (r"\.reg_module\.", ".box_tower."),
    (r"\.class_logits\.", ".score."),
    (r"\.bboxes_delta\.", ".delta."),
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
    ("OneNet RetinaNet", "head.cls_conv_module.0.weight", ONENET,
     {"detector": "retinanet"}, COCO_TEST),

    ("AdelaiDet FCOS", "proposal_generator.fcos_head.cls_logits.weight", ADELAIDET,
     {"detector": "fcos", "original": True, "resnet": "msra"}, COCO_TEST),
    ("detectron2 FCOS", "head.ctrness.weight",
     [*DETECTRON, (r"^head\.bbox_pred", "ltrb"), (r"^head\.ctrness", "centreness")],
     {"detector": "fcos", "original": True, "resnet": "msra", "score_threshold": 0.2}, COCO_TEST),
    ("detectron2 RetinaNet", "head.cls_subnet.0.weight",
     [*DETECTRON, (r"^head\.bbox_pred", "delta")],
     {"detector": "retinanet", "original": True, "resnet": "msra"}, COCO_TEST),
    ("torchvision FCOS", "head.regression_head.bbox_ctrness.weight",
     [*TORCHVISION, (r"^head\.regression_head\.bbox_reg", "ltrb")],
     {"detector": "fcos", "original": True, "torchvision_grid": True, "score_threshold": 0.2},
     COCO_TEST),
    ("torchvision RetinaNet", "head.regression_head.bbox_reg.weight",
     [*TORCHVISION, (r"^head\.regression_head\.bbox_reg", "delta")],
     {"detector": "retinanet", "original": True, "torchvision_grid": True, "extra_from": "p5"},
     COCO_TEST),
    ("CenterNet", "hm.2.weight", CENTERNET,
     {"detector": "centernet", "original": True, "norm": "batch", "freeze": 0,
      "pixels": "bgr-unit"}, ORIGINAL_SIZE),
    ("CenterNet-better", "head.cls_head.out_conv.weight", CENTERNET_BETTER,
     {"detector": "centernet", "original": True, "norm": "batch", "freeze": 0}, ORIGINAL_SIZE),

    ("Sparse R-CNN", "init_proposal_boxes.weight", SPARSE_RCNN,
     {"detector": "sparse-rcnn"}, COCO_TEST),
    ("Deformable DETR", "transformer.level_embed", DEFORMABLE_DETR,
     {"detector": "deformable-detr"}, DETR_TEST),
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


def read(file):
    """The named tensors of a published file.

    That is a PyTorch checkpoint, or detectron2's pickle of numpy arrays.
    """
    if Path(file).suffix == ".pkl":
        try:
            with open(file, "rb") as stream:
                checkpoint = ArrayUnpickler(stream, encoding="latin1").load()
        except OSError as error:
            raise CheckpointError(
                f"{file}: cannot be read ({error.strerror}); check the path") from None
        except Exception as error:                  # a broken pickle may raise anything
            raise CheckpointError(
                f"{file}: refused: not a plain pickle of numpy arrays ({error})") from None
    else:
        # DETR's files hold the flags they were trained with
        checkpoint = models.read_checkpoint(file, harmless=[argparse.Namespace])
    if isinstance(checkpoint, dict) and getattr(checkpoint.get("args"), "dilation", False):
        raise CheckpointError(f"{file}: a DETR with a dilated last stage (DC5), which our backbone "
                              f"does not have; its keys are plain DETR's")

    for container in ("model", "state_dict", "blobs"):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(container), dict):
            checkpoint = checkpoint[container]
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{file}: not a checkpoint: it holds a {type(checkpoint).__name__}")
    return {k.removeprefix("module."): torch.as_tensor(v) for k, v in checkpoint.items()
            if isinstance(k, str) and (torch.is_tensor(v) or hasattr(v, "__array__"))}


# ------------------------------------------------------------------------------------------------
# converting
# ------------------------------------------------------------------------------------------------

def rename(weights, rules):
    """Weights under our names.

    FCOS's scalars scale.0, scale.1, ... become the one vector our model has.
    """
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
    """Some CenterNet files have a bias in the deformable convolution.

    Batch norm follows: its mean takes it in.
    """
    for key in [k for k in weights if re.fullmatch(r"neck\.steps\.\d\.conv\.bias", k)
                and k.replace("bias", "offset.weight") in weights]:
        mean = key.replace("conv.bias", "conv_norm.running_mean")
        weights[mean] = weights[mean] - weights.pop(key)


def choose_classes(weights, classifiers, anchors):
    """Outputs for COCO's 91 ids become outputs for its 80 classes.

    torchvision's RetinaNet has ids within anchors, DETR a last output for "no object".
    """
    for key in classifiers:
        w = weights[key].unflatten(0, (anchors, -1))                # (A, 91 or 92, ...)
        weights[key] = w[:, COCO_IDS + [91] * (w.shape[1] == 92)].flatten(0, 1)


def query_options(weights, detector):
    """What to build for a query detector's weights.

    Deformable DETR's files repeat tensors that modules share.
    """
    copies = sorted(k for k in weights if re.match(r"transformer\.decoder\.(class|bbox)_embed", k))
    two_stage = "proposal.weight" in weights
    for key in copies:
        del weights[key]
    options = {"queries": len(weights["query.weight"])} if "query.weight" in weights else {}
    if detector == "deformable-detr":
        options.update(refine=bool(copies), two_stage=two_stage)
        if not copies:                          # the base form: one head in six copies
            for key in [k for k in weights if re.match(r"(score|box)\.[1-9]", k)]:
                if not torch.equal(weights.pop(key), weights[re.sub(r"\.\d", ".0", key, count=1)]):
                    raise CheckpointError(f"Deformable DETR without refinement, but {key} is not "
                                          f"the copy of its first layer's")
    return options


def sizes_outer(weights):
    """torchvision lists a point's nine anchors with the ratio outside, ours with the size outside.

    So each is the other's 3 x 3, transposed.
    """
    for key in ("score.weight", "score.bias", "delta.weight", "delta.bias"):
        weights[key] = weights[key].unflatten(0, (3, 3, -1)).transpose(0, 1).flatten(0, 2)


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


def convert(weights, resnet=None):
    """A checkpoint of ours from the named tensors of a published one.

    resnet: "torchvision" or "msra", if not the one the layout's authors used.
    Returns (layout's name, checkpoint).  Raises CheckpointError.
    """
    for layout, mark, rules, build, test_transform in LAYOUTS:
        if mark in weights:
            break
    else:
        raise CheckpointError(f"none of the published layouts "
                              f"({', '.join(name for name, *_ in LAYOUTS)}); its keys begin with "
                              f"{', '.join(sorted(weights)[:3]) or 'nothing'}")

    build = {"resnet": "torchvision", **build, **({"resnet": resnet} if resnet else {})}
    weights = rename({k: v for k, v in weights.items() if not NOT_WEIGHTS.search(k)}, rules)
    backbone = resnet_name(weights)
    if "detector" not in build:
        own = models.ResNet(backbone).state_dict(prefix="backbone.")
        class_names = category_ids = None
    else:
        detector, anchors = build["detector"], 9 if build["detector"] == "retinanet" else 1
        if detector not in models.DENSE:
            build.update(query_options(weights, detector))
        classifier = {"deformable-detr": r"score\.\d\.", "sparse-rcnn": r"stages\.\d\.score\."}.get(
            detector,
            r"score\.2\." if "score.2.weight" in weights else r"score\.(?=weight|bias)")
        classifiers = [k for k in weights if re.match(classifier, k)]
        if not classifiers:
            raise CheckpointError(f"{layout}: its classifier is missing")
        num_classes = len(weights[classifiers[0]]) // anchors - (detector == "detr")
        if num_classes == 91:
            # the encoder's head of the two-stage form knows objects of any class by output 0,
            # whatever COCO's ids are
            proposer = [k for k in classifiers if build.get("two_stage")
                        and k.split(".")[1] == max(c.split(".")[1] for c in classifiers)]
            any_object = {k: weights[k][:1].clone() for k in proposer}
            choose_classes(weights, classifiers, anchors)
            for k in proposer:
                weights[k][:1] = any_object[k]
            num_classes = 80
        if build.get("torchvision_grid") and detector == "retinanet":
            sizes_outer(weights)
        if num_classes not in (1, 80):
            raise CheckpointError(f"{layout} with {num_classes} classes: only COCO's 80 (or 91 "
                                  f"ids) and CrowdHuman's 1 can be converted")

        class_names, category_ids = ((COCO_NAMES, COCO_IDS) if num_classes == 80
                                     else (["person"], [1]))
        if num_classes == 1 and test_transform is COCO_TEST:
            test_transform = CROWDHUMAN_TEST.get(detector, CROWDHUMAN_TEST[""])
        if detector == "centernet":
            build["deform"] = "neck.steps.0.conv.offset.weight" in weights
            fold_bias(weights)
        if layout in ("detectron2 FCOS", "torchvision FCOS"):
            weights.setdefault("scale", torch.ones(5))      # they have none
        if detector == "retinanet" and build.get("original"):
            # where training starts; no file keeps it
            weights.setdefault("positives_average", torch.tensor(100.0))
        build = {**build, "num_classes": num_classes, "backbone": backbone}
        own = models.build(**build).state_dict()

    # exact, or an error that lists all that is wrong
    own = {k: v for k, v in own.items() if not k.endswith("num_batches_tracked")}
    wrong = ([f"missing {k}" for k in own if k not in weights]
             + [f"left over {k}" for k in weights if k not in own])
    wrong += [f"{k} is {tuple(weights[k].shape)}, not {tuple(own[k].shape)}"
              for k in own if k in weights and own[k].shape != weights[k].shape]
    if wrong:
        raise CheckpointError(f"looks like {layout}, but {len(wrong)} entries do not fit: "
                              f"{'; '.join(wrong)}")

    counters = {k.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for k in own
                if k.endswith("running_mean") and build.get("norm") == "batch"}
    checkpoint = {"model": {**{k: weights[k].float() for k in own}, **counters}}
    if class_names is None:
        return layout, {**checkpoint, "resnet": build["resnet"]}
    data_set = "coco" if len(class_names) == 80 else "crowdhuman"
    return layout, {**checkpoint, "build": build,
                    "class_names": class_names, "category_ids": category_ids,
                    "test_transform": test_transform,
                    "args": {"data": data_set, "max_dets": 100 if data_set == "coco" else 500,
                             "precision": "fp32", "drop_bad_boxes": True}}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="IN", help="a published checkpoint (.pth, .pkl)")
    parser.add_argument("--out", required=True, metavar="OUT",
                        help="the file to write; must not exist")
    parser.add_argument("--resnet", choices=("torchvision", "msra"),
                        help="whose ImageNet weights the model was trained from, if not those its "
                             "authors used: torchvision (RGB, stride in the 3x3) or msra (BGR, "
                             "stride in the first 1x1; detectron2's model zoo)")
    args = parser.parse_args()
    try:
        if Path(args.out).exists():
            raise CheckpointError(f"{args.out}: exists already; choose another name")
        try:
            layout, checkpoint = convert(read(args.file), args.resnet)
        except CheckpointError as error:
            raise (error if str(error).startswith(args.file)
                   else CheckpointError(f"{args.file}: {error}")) from None
        models.save_whole(checkpoint, Path(args.out))
    except (CheckpointError, OSError) as error:
        print(f"convert.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.file}: {layout}, "
          f"{sum(v.numel() for v in checkpoint['model'].values()):,} numbers -> {args.out}")


if __name__ == "__main__":
    main()
