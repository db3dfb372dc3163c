"""What ImageNet is to the paper: the small backbone learns to see before anything learns to detect.

The paper's detectors start from a network that can tell a thousand kinds of things apart.  Here
`tiny` becomes a classifier of creatures cut out of scenes, whose kind is all that it is told: it
knows nothing of detection, nor of which prediction is whose.  Its pictures are no row's: the rows
train and validate on scenes of seed 0, this file draws those of seed 1.

    python pretrain.py --out tiny.pt

is how the file was made that ships with the repository, and from which all small recipes start.
"""
import argparse
import hashlib
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import checkpoints
import models
import runs
import scenes

SEED = 1                        # of the pictures; the rows' are of seed 0
CROP = 96                       # pixels, side of a crop


def creatures(split, count):
    """Scenes, and every creature in them, as a classifier sees them.

    Returns pictures (N, 3, H, W), uint8; of each creature the picture it is in (M,), the middle of
    what is drawn of it (M, 2) as x, y in pixels, and its kind (M,).
    """
    pictures, which = [], []
    middles, kinds = [], []
    for index in tqdm(range(count), f"{split} pictures", leave=False, disable=None):
        picture, objects = scenes.draw(SEED, split, index)
        pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
        for creature in objects:
            which.append(index)
            middles.append((creature["box"][:2] + creature["box"][2:]) / 2)
            kinds.append(creature["kind"])
    middles = torch.tensor(np.array(middles), dtype=torch.float32)
    return torch.stack(pictures), torch.tensor(which), middles, torch.tensor(kinds)


def cut(pictures, middles, vary=False):
    """Square crops around the creatures, normalised as the detectors do it: (M, 3, CROP, CROP).

    pictures: (M, 3, H, W), one for each crop.  vary: turned, mirrored, scaled and moved at random,
    so that no creature looks twice the same.  The mean colour fills what lies outside.
    """
    M, size = len(pictures), pictures.shape[-1]
    turn, zoom = torch.zeros(M), torch.ones(M)
    mirror, move = torch.ones(M), torch.zeros(M, 2)
    if vary:
        turn = 2 * torch.pi * torch.rand(M)
        zoom = 2 ** (1.2 * torch.rand(M) - 0.6)
        mirror = torch.randint(2, (M,)) * 2.0 - 1
        move = 16 * torch.rand(M, 2) - 8

    # each crop's two axes and its middle, in the picture's coordinates from -1 to 1
    half = CROP / size / zoom
    across = torch.stack([mirror * turn.cos(), mirror * turn.sin()], 1) * half[:, None]
    down = torch.stack([-turn.sin(), turn.cos()], 1) * half[:, None]
    at = 2 * (middles + move) / size - 1
    axes = torch.stack([across, down, at], 2)                            # (M, 2, 3)
    grid = F.affine_grid(axes, (M, 3, CROP, CROP), align_corners=False)

    mean, std = (torch.tensor(v).view(3, 1, 1) for v in models.PIXELS["rgb"])
    return F.grid_sample((pictures.float() - mean) / std, grid, align_corners=False)


class Classifier(nn.Module):
    """The backbone, and one linear layer on the mean of its coarsest map."""

    def __init__(self):
        super().__init__()
        self.backbone = models.Tiny()
        self.kind = nn.Linear(models.Tiny.channels[-1], len(scenes.KINDS))

    def forward(self, x):                                                # x: (M, 3, H, W)
        x = x.contiguous(memory_format=torch.channels_last)
        return self.kind(self.backbone(x)[-1].mean((2, 3)))              # (M, kinds)


@torch.no_grad()
def accuracy(model, split="val", count=500):
    """Share of creatures of other pictures whose kind the classifier tells, in percent."""
    pictures, which, middles, kinds = creatures(split, count)
    model.eval()
    right = 0
    for part in torch.arange(len(kinds)).split(256):
        told = model(cut(pictures[which[part]], middles[part])).argmax(1)
        right += int((told == kinds[part]).sum())
    return 100 * right / len(kinds)


def train(steps=2500, batch=64, pictures=8000, lr=2e-3, seed=0):
    """A classifier of creatures, trained on random crops of them."""
    torch.manual_seed(seed)
    model = Classifier().to(memory_format=torch.channels_last)
    bfloat16 = runs.native_precision("cpu") == "bf16"
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    pictures, which, middles, kinds = creatures("train", pictures)

    bar = tqdm(range(steps), "crops", unit="step", smoothing=0.05, disable=None)
    for step in bar:
        some = torch.randint(len(kinds), (batch,))
        crops = cut(pictures[which[some]], middles[some], vary=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = model(crops)
        loss = F.cross_entropy(logits.float(), kinds[some])

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
            if bar.disable and step % 1000 == 999:
                print(f"step {step + 1}/{steps}  loss {loss.item():.3f}", flush=True)
    return model


def save(model, file):
    """The backbone alone, in half precision, as `--backbone-weights` reads it."""
    tensors = {f"backbone.{name}": value.half() if value.is_floating_point() else value
               for name, value in model.backbone.state_dict().items()}
    checkpoints.save_whole({"model": tensors}, Path(file))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="FILE",
                        help="where to write the backbone; all small recipes start from tiny.pt")
    parser.add_argument("--steps", type=runs.at_least(1), default=2500, metavar="N",
                        help="optimiser steps (default 2500)")
    parser.add_argument("--batch-size", type=runs.at_least(1), default=64, metavar="N",
                        help="crops a step (default 64)")
    parser.add_argument("--seed", type=runs.at_least(0), default=0,
                        help="of weights, order and crops (default 0)")
    args = parser.parse_args()
    started = time.time()
    with runs.faults_told("pretrain.py", runs.RunError):
        runs.check_writable(args.out, "--out")
        model = train(args.steps, args.batch_size, seed=args.seed)
        save(model, args.out)
        digest = hashlib.sha256(Path(args.out).read_bytes()).hexdigest()
    minutes = (time.time() - started) / 60
    print(f"{accuracy(model):.1f}% of held-out creatures told right, after {minutes:.1f} minutes")
    print(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.1f} MB, SHA-256 {digest}")


if __name__ == "__main__":
    main()
