"""Train a detector with the assignment and the matching cost of your choice: Tables 1 and 2.

    python train.py                                                 the paper's detector, on scenes
    python train.py --class-cost 0 --location-cost predefined       location only: duplicates return
    python train.py --assign one-to-many                            the original FCOS: lives on NMS
    python train.py --assign my.py:my_function                      your own idea
    torchrun --nproc-per-node 8 train.py --data coco --detector retinanet

Every flag has a default that suits the data set and the detector; what is in force is saved in
OUT/args.json.  A run leaves in OUT:

    args.json         every flag in force, versions
    training.png      some pictures as training sees them, with their target boxes
    log.csv           a row per logging step: losses, learning rate, gradient norm, speed, and what
                      positives.py says of the positive samples
    eval.csv          a row per evaluation: AP, AP50 (crowds: AP50, mMR, ...) without and with NMS
    last.pt           the checkpoint: `--resume` goes on from it, `evaluate.py --weights` scores it
    detections.json   of the last evaluation, COCO result format (and detections_nms.json)
    metrics.json      their figures, in percent
    detections.png    some of them, drawn beside the ground truth
"""
import contextlib
import hashlib
import math
import platform
import shutil
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import annotations
import checkpoints
import data
import evaluate
import figures
import losses
import recipes
import runs
from assign import AssignError, match
from positives import Silhouettes, Watch
from runs import Interrupted, TrainingStopped


# ------------------------------------------------------------------------------------------------
# the parts of a run
# ------------------------------------------------------------------------------------------------

def open_data(flags, process):
    """The pictures to train on and those to evaluate.  Raises DataError."""
    with runs.main_first(process):           # it draws the pictures, and reads their sizes
        cache = None
        if flags["data"] == "crowdhuman":
            cache = Path(flags["out"]).parent / "sizes-crowdhuman.json"
        train_set, val_set = data.read_both(flags, cache)
    if not (~train_set.crowd).any():
        raise annotations.DataError(f"{train_set.json_file}: holds no boxes to learn from")

    augment = data.Transform(flags.get("train_sizes", []), flags.get("train_longest", 10 ** 9),
                             flags["flip"], flags["crop"], flags["round_down"],
                             square=flags["square"], colours=flags["colours"],
                             shift=flags["shift"])
    return (data.Pictures(train_set, augment, flags["seed"]),
            data.Pictures(val_set, data.Transform(**test_transform(flags))))


def test_transform(flags):
    """How pictures are resized in evaluation; it travels in the checkpoint."""
    return {"shortest": [flags["test_size"]] if flags["test_size"] else [],
            "longest": flags.get("test_longest", 10 ** 9), "round_down": flags["round_down"]}


def build_model(flags, checkpoint, classes, process):
    """The detector: of the checkpoint, or new, with the pre-trained weights that flags ask for."""
    if checkpoint:
        file = f"{flags['out']}/last.pt"
        if checkpoint["class_names"] != classes.class_names:
            raise checkpoints.CheckpointError(f"{file} knows the classes "
                                              f"{checkpoint['class_names']}, not those of the data")
        if checkpoint.get("boxes") not in (None, digest(classes)):    # older ones have none
            raise checkpoints.CheckpointError(f"{file} was trained on other pictures or boxes "
                                              f"than those of {classes.json_file}; start a new run "
                                              f"with --init {file}")
        with checkpoints.understood(file):
            model = checkpoints.build(**checkpoint["build"])
            model.load_state_dict(checkpoint["model"])
    else:
        model = checkpoints.build(**recipes.build_arguments(flags, len(classes.class_names)))
        if flags["backbone_weights"] != "none":
            checkpoints.load_backbone(model.backbone, flags["backbone_weights"])
        if flags.get("init"):
            spared = model.class_branch if flags.get("freeze") == "location" else ()
            fates = checkpoints.load_weights(model, flags["init"], spared)
            for fate, names in zip(("got no weights", "left over", "of another shape"), fates):
                if names:
                    process.say(f"--init {flags['init']}: {len(names)} {fate}: {', '.join(names)}")
    if flags.get("freeze") == "location":
        model.freeze_location()
    model.many_detach = flags.get("many_detach", False)
    return model


def digest(classes):
    """What tells the training pictures and boxes from others, wherever they lie (Annotations)."""
    known = hashlib.sha256(repr((classes.image_ids, classes.category_ids)).encode())
    for part in (classes.first, classes.boxes, classes.labels, classes.crowd):
        known.update(part.numpy().tobytes())
    return known.hexdigest()


def make_optimizer(model, flags, device):
    """AdamW or SGD; the backbone's parameters are a group of their own, to learn more slowly."""
    kinds = nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm
    norms = {id(p) for m in model.modules() if isinstance(m, kinds) for p in m.parameters()}
    sgd, groups = flags["optimizer"] == "sgd", {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            of_backbone = name.startswith("backbone.")
            slow = any(part in name for part in model.slow_parameters)
            factor = flags["backbone_lr_factor"] if of_backbone else 0.1 if slow else 1.0
            spared = sgd and flags["spare_norms"] and id(p) in norms
            decay = 0.0 if spared else flags["weight_decay"]
            groups.setdefault((factor, decay, of_backbone), []).append(p)

    groups = [{"params": params, "lr": flags["lr"] * factor, "peak": flags["lr"] * factor,
               "weight_decay": decay} for (factor, decay, _), params in groups.items()]
    if sgd:
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
        start = flags["warmup_factor"]
        factor *= start + (1 - start) * step / flags["warmup_steps"]
    return factor


def to_device(targets, device):
    return [{k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in t.items()}
            for t in targets]


def distributed(model, process):
    """The model, or a wrapper that averages the gradients of all processes."""
    if process.world == 1:
        return model
    gpu = [torch.device(process.device).index] if "cuda" in process.device else None
    with warnings.catch_warnings():
        # PyTorch's successor of broadcast_buffers would copy the buffers of process 0 once
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False, device_ids=gpu)


class Numbers:
    """The losses of a step, left on the device until somebody needs them: reading waits for it."""

    def __init__(self, step, terms, norm, interrupted, micro_batches):
        self.step = step
        self.image_ids = [t["image_id"] for _, _, targets in micro_batches for t in targets]
        self.names = [*terms, "gradient_norm", "interrupted"]
        interrupted = norm.new_tensor(float(interrupted))
        self.own = torch.stack([*terms.values(), norm.detach(), interrupted])
        self.mean = losses.mean_over_processes(self.own)

    def read(self):
        """On the host, by name.  Raises TrainingStopped if they are not finite."""
        values, own = self.mean.tolist(), self.own.tolist()
        if not all(map(math.isfinite, values)):
            where = f"images {', '.join(map(str, self.image_ids))}"
            if all(map(math.isfinite, own)):
                where = "images of another process"
            told = ", ".join(f"{n} {v:g}" for n, v in zip(self.names, values))
            raise TrainingStopped(f"step {self.step}: the losses are not finite ({told}; {where}); "
                                  f"lower --lr, set --clip-grad, or use --precision fp32; last.pt "
                                  f"is the last good checkpoint")
        return dict(zip(self.names, values))


@contextlib.contextmanager
def told_with_step(step, numbers):
    """Matching that fails stops the run, with its step; the last step's losses may tell why."""
    try:
        yield
    except AssignError as error:
        if numbers:
            numbers.read()                   # NaN there explains more
        raise TrainingStopped(f"step {step}: {error}") from error


# ------------------------------------------------------------------------------------------------
# what a run leaves
# ------------------------------------------------------------------------------------------------

def save(step, model, loss, optimizer, flags, classes, watch, process):
    """The checkpoint, OUT/last.pt.  classes: the Annotations that name them.

    Raises TrainingStopped for weights that are not finite.
    """
    if not all(value.isfinite().all() for value in model.parameters()):
        raise TrainingStopped(f"step {step}: the weights are not finite after it; lower --lr, or "
                              f"set --clip-grad; last.pt is the last good checkpoint")
    buffers = {k: v.cpu() for k, v in model.named_buffers() if k in model.state_dict()}
    if hasattr(loss, "state_dict"):          # RetinaNet's keeps a moving average
        buffers.update(loss.state_dict())
    # batch norm's statistics and the generators differ from process to process
    shares = runs.gather((buffers, runs.random_states(process.device)), process)
    if process.is_main:
        checkpoints.save_whole({
            "model": {k: v.cpu() for k, v in model.state_dict().items()},
            "optimizer": optimizer.state_dict(), "step": step, "args": flags,
            "build": recipes.build_arguments(flags, len(classes.class_names)),
            "buffers": [buffers for buffers, _ in shares], "random": [r for _, r in shares],
            "watch": watch.state, "boxes": digest(classes),
            "class_names": classes.class_names, "category_ids": classes.category_ids,
            "test_transform": test_transform(flags)}, Path(flags["out"]) / "last.pt")
        if step in kept_steps(flags):
            with runs.whole(Path(flags["out"]) / f"step-{step:06d}.pt") as temporary:
                shutil.copy(Path(flags["out"]) / "last.pt", temporary)


def kept_steps(flags):
    """The steps whose checkpoints stay."""
    return {max(1, round(share * flags["steps"])) for share in flags["keep_checkpoints"]}


def is_due(step, flags):
    """Whether a checkpoint is written after a step; before an evaluation, which takes long."""
    return (step % flags["checkpoint_every"] == 0 or step == flags["steps"]
            or step in kept_steps(flags) or is_evaluated(step, flags))


def is_evaluated(step, flags):
    """Whether the detector is evaluated after a step; after the last one it always is."""
    every = flags["eval_every"]
    return every > 0 and step % every == 0 and 0 < step < flags["steps"]


def restore(checkpoint, model, loss, optimizer, watch, flags, process):
    """The state of a run as `save` left it.  Raises CheckpointError."""
    with checkpoints.understood(f"{flags['out']}/last.pt"):
        own = runs.own_share(checkpoint["buffers"], process)
        model.load_state_dict(own, strict=False)
        if hasattr(loss, "load_state_dict"):
            loss.load_state_dict(own, strict=False)
        optimizer.load_state_dict(checkpoint["optimizer"])
        if "watch" in checkpoint:            # older ones have none
            watch.go_on(checkpoint["watch"])
        runs.set_random_states(runs.own_share(checkpoint["random"], process), process.device)


def score(step, model, pictures, truth, flags, process, log):
    """Evaluates, and writes what there is to see.  Returns the figures (process 0) or None."""
    results = evaluate.detect(model, pictures, evaluate.at_once(flags["data"]), flags["max_dets"],
                              process.device, flags["precision"], flags["workers"])
    if not process.is_main:
        return None
    out, found = Path(flags["out"]), evaluate.metrics(truth, results, flags["max_dets"])
    row = {"step": step}
    for name in ("AP", "AP50", "mMR", "recall", "JI"):
        if name in found:
            row.update({name: found[name], f"{name}_nms": found["nms"][name]})
    log.row(row)
    runs.write_json(out / "detections.json", results["plain"])
    runs.write_json(out / "detections_nms.json", results["nms"])
    runs.write_json(out / "metrics.json", found, indent=1)
    figures.detections_beside_truth(pictures, results["plain"], out / "detections.png")
    process.say(f"step {step}: {evaluate.describe(found)}", flush=True)
    return found


def open_folder(flags, checkpoint, given, train_pictures, process):
    """The run's folder, and what is said and written before the first step.  Returns its logs."""
    out, classes = Path(flags["out"]), train_pictures.annotations
    process.say(recipes.headline(flags, len(classes), len(classes.class_names)))
    words = [" ".join([recipes.flag(name), *map(str, value if type(value) is list else [value])])
             for name, value in given.items()]
    if not checkpoint:
        process.say(f"  given: {'  '.join(words) or 'no flags, all as the recipe has it (--help)'}")
        process.say(f"  writing to {out}")
    else:
        process.say(f"  given now: {'  '.join(words) or 'no flags'}; the others from {out}/last.pt")
        left = flags["steps"] - checkpoint["step"]
        process.say(f"  writing to {out}, going on from step {checkpoint['step']}"
                    + ("" if left else ", the last: it is evaluated again"))
    if checkpoint and len(checkpoint["buffers"]) != process.world:
        before = len(checkpoint["buffers"])
        process.say(f"  with {process.world} process(es), before with {before}: each step sees the "
                    f"same pictures, batch norm and dropout differ")
    if not process.is_main:
        return None, None
    out.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "torchvision": torchvision.__version__}
    if of_backbone := checkpoints.backbone_digest(flags["backbone_weights"]):
        versions["backbone_weights_sha256"] = of_backbone
    runs.write_json(out / "args.json",
                    {**flags, "device": str(process.device), "versions": versions,
                     "processes": process.world}, indent=1)
    if not checkpoint:
        figures.training_pictures(train_pictures, out / "training.png")
    first_step = checkpoint["step"] if checkpoint else 0
    # the evaluation that was due at the checkpoint is made up for
    return runs.Log(out / "log.csv", first_step), runs.Log(out / "eval.csv", first_step - 1)


# ------------------------------------------------------------------------------------------------
# the run
# ------------------------------------------------------------------------------------------------

def train(flags, checkpoint, given, process):
    """Everything from flags to figures.  Returns metrics (process 0) or None.

    flags: every flag in force   checkpoint: to go on from, or None   given: flags to repeat
    """
    device, steps, accumulate = process.device, flags["steps"], flags["accumulate"]

    # Data:
    train_pictures, val_pictures = open_data(flags, process)
    classes = train_pictures.annotations
    truth = evaluate.ground_truth(val_pictures.annotations) if process.is_main else None

    # Model, and the row of Table 1: its cost, its strategy, its loss:
    runs.seed_everything(flags["seed"])
    model = build_model(flags, checkpoint, classes, process)
    torch.manual_seed(flags["seed"] + process.rank)      # dropout differs from process to process
    model.to(device).train()
    cost, strategy, loss, many = *losses.row(flags), losses.many_row(flags)
    optimizer = make_optimizer(model, flags, device)
    network = distributed(model, process)

    # Folder, what is watched (Section 3.4), and batches:
    log, eval_log = open_folder(flags, checkpoint, given, train_pictures, process)
    silhouettes = Silhouettes(classes.json_file) if flags["data"] == "scenes" else None
    watch = Watch(silhouettes, [strategy, many[1]] if many else [strategy], process.say)
    first_step = checkpoint["step"] if checkpoint else 0
    batches = iter(data.loader(train_pictures, data.training_batches(
        classes, flags["batch_size"], flags["seed"], first_step, process.rank, process.world,
        accumulate, flags["skip_empty"]), model.divisor, flags["workers"], "cuda" in device))
    if checkpoint:                                       # last, so that nothing above disturbs it
        restore(checkpoint, model, loss, optimizer, watch, flags, process)
    if is_evaluated(first_step, flags):
        score(first_step, model, val_pictures, truth, flags, process, eval_log)

    # The loop:
    numbers, stop = None, False
    with runs.signals_noted() as noted, runs.Progress(
            log, first_step, steps, flags["batch_size"], flags["log_every"], process) as progress:
        for step in range(first_step, steps):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * lr_factor(step, flags)
            model.many_weight = losses.many_weight(flags, step / steps)

            # the step's micro-batches, and their objects, averaged over the processes
            micro_batches = progress.fetch(batches, accumulate)
            count = float(sum(len(t["boxes"]) for _, _, targets in micro_batches for t in targets))
            num_objects = losses.mean_over_processes(torch.tensor(count, device=device)).clamp(1)

            optimizer.zero_grad(set_to_none=True)
            totals = {}
            for n, (images, mask, targets) in enumerate(micro_batches):
                images, mask = images.to(device), mask.to(device)
                targets = to_device(targets, device)
                # the processes' gradients are averaged once a step
                network.require_backward_grad_sync = n == accumulate - 1
                with torch.autocast(torch.device(device).type, torch.bfloat16,
                                    enabled=flags["precision"] == "bf16"):
                    prediction = network(images, mask)

                with told_with_step(step, numbers):
                    # the paper, Eq. 2 to 5
                    matches = match(prediction, targets, cost, strategy, step / steps, many)
                watch.note(prediction, targets, matches[0])
                if n == 0 and numbers:                   # matching has just waited for the device
                    stop = numbers.read()["interrupted"] > 0
                terms = loss(prediction, targets, matches, num_objects, accumulate)  # Eq. 1
                sum(terms.values()).backward()
                for name, value in terms.items():
                    totals[name] = totals.get(name, 0) + value.detach()

            norm = nn.utils.clip_grad_norm_(model.parameters(), flags["clip_grad"] or float("inf"))
            numbers = Numbers(step, totals, norm, len(noted), micro_batches)
            optimizer.step()

            # now and then: a row, a checkpoint, an evaluation
            done = step + 1
            progress.bar.update()
            if done % flags["log_every"] == 0 or done == steps:
                values = numbers.read()
                values.pop("interrupted")
                progress.row(done, values, flags["lr"] * lr_factor(step, flags),
                             watch.row(prediction, targets, matches))
            if is_due(done, flags) or stop:
                numbers.read()                           # what is not finite is not saved
                save(done, model, loss, optimizer, flags, classes, watch, process)
            if stop:
                raise Interrupted(runs.how_to_go_on(flags["out"], done))
            if is_evaluated(done, flags):
                with progress.pause():
                    score(done, model, val_pictures, truth, flags, process, eval_log)

    # All is saved: from here on Ctrl-C simply stops.
    if noted:
        raise Interrupted
    return score(steps, model, val_pictures, truth, flags, process, eval_log)


def main(argv=None):
    given = vars(recipes.make_parser(__doc__).parse_args(argv))
    started, process = time.time(), None
    faults = (recipes.UsageError, runs.RunError, TrainingStopped, annotations.DataError,
              AssignError, checkpoints.CheckpointError)
    try:
        with runs.faults_told("train.py", *faults):
            flags, checkpoint = recipes.effective_flags(given)
            process = runs.join_processes(flags.get("device"))
            if flags["precision"] == "auto":
                flags["precision"] = runs.native_precision(process.device)
            recipes.check_flags(flags, process.world)
            losses.row(flags)                # a wrong name is told before anything is written
            losses.many_row(flags)
            if not checkpoint:
                name = recipes.run_name(flags)
                flags["out"] = runs.claim_folder(flags.get("out"), name, process)
            repeat = {name: value for name, value in given.items()
                      if value is not None and name not in ("resume", "out")}
            try:
                with runs.held(flags["out"], process):
                    result = train(flags, checkpoint, repeat, process)
            except KeyboardInterrupt as said:            # one process says it
                if process.is_main:
                    raise Interrupted(str(said) or runs.how_to_go_on(flags["out"])) from None
                sys.exit(130)
    finally:
        data.end_workers()
        if dist.is_initialized():
            dist.destroy_process_group()
    process.say(f"{(time.time() - started) / 60:.1f} minutes; everything is in {flags['out']}: "
                f"look at detections.png")
    if process.is_main:
        print(evaluate.describe(result))


if __name__ == "__main__":
    main()
