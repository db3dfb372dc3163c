"""What ImageNet is to the paper: the small backbone learns to see before anything learns to detect.

The paper's detectors start from a network that can tell a thousand kinds of things apart.  Here
`tiny` becomes a classifier of creatures cut out of scenes, whose kind is all that it is told: it
knows nothing of detection, nor of which prediction is whose.  Its pictures are no row's: the rows
train and validate on scenes of seed 0, this file draws those of seed 1.

    python pretrain.py --out tiny.pt          the file that ships with the repository
    python train.py --backbone-weights tiny.pt
"""
import argparse
import hashlib
import sys
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
CROP = 64                       # pixels, side of a crop


def creatures(split, count):
    """Scenes, and every creature in them, as a classifier sees them.

    Returns pictures (N, 3, H, W), uint8; of each creature the picture it is in (M,), its place
    (M, 3): middle x, middle y and longer side of what is drawn, in pixels; and its kind (M,).
    """
    pictures, which = [], []
    places, kinds = [], []
    for index in tqdm(range(count), f"{split} pictures", leave=False, disable=None):
        picture, objects = scenes.draw(SEED, split, index)
        pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
        for creature in objects:
            box = creature["box"]
            which.append(index)
            places.append([*((box[:2] + box[2:]) / 2), (box[2:] - box[:2]).max()])
            kinds.append(creature["kind"])
    places = torch.tensor(np.array(places), dtype=torch.float32)
    return torch.stack(pictures), torch.tensor(which), places, torch.tensor(kinds)


def cut(pictures, places, vary=False):
    """Square crops around the creatures, normalised as the detectors do it: (M, 3, CROP, CROP).

    pictures: (M, 3, H, W), one for each crop.  A crop shows 1.5 times the creature's longer side;
    vary: 1.1 to 2.2 times, turned, mirrored and moved at random, so that no creature looks twice
    the same.  The mean colour fills what lies outside of the picture.
    """
    M, size = len(pictures), pictures.shape[-1]
    side, turn = 1.5 * places[:, 2], torch.zeros(M)
    mirror, move = torch.ones(M), torch.zeros(M, 2)
    if vary:
        turn = 2 * torch.pi * torch.rand(M)
        side = 1.1 * places[:, 2] * 2 ** torch.rand(M)
        mirror = torch.randint(2, (M,)) * 2.0 - 1
        move = (0.3 * torch.rand(M, 2) - 0.15) * side[:, None]

    # each crop's two axes and its middle, in the picture's coordinates from -1 to 1
    half = side / size
    across = torch.stack([mirror * turn.cos(), mirror * turn.sin()], 1) * half[:, None]
    down = torch.stack([-turn.sin(), turn.cos()], 1) * half[:, None]
    at = 2 * (places[:, :2] + move) / size - 1
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
    pictures, which, places, kinds = creatures(split, count)
    model.eval()
    right = 0
    for part in torch.arange(len(kinds)).split(256):
        told = model(cut(pictures[which[part]], places[part])).argmax(1)
        right += int((told == kinds[part]).sum())
    return 100 * right / len(kinds)


def train(steps=6000, batch=64, pictures=8000, lr=2e-3, seed=0):
    """A classifier of creatures, trained on random crops of them."""
    torch.manual_seed(seed)
    model = Classifier().to(memory_format=torch.channels_last)
    bfloat16 = runs.native_precision("cpu") == "bf16"
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    pictures, which, places, kinds = creatures("train", pictures)

    bar = tqdm(range(steps), "crops", unit="step", smoothing=0.05, disable=None)
    for step in bar:
        some = torch.randint(len(kinds), (batch,))
        crops = cut(pictures[which[some]], places[some], vary=True)
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
    parser.add_argument("--out", default="tiny.pt", metavar="FILE",
                        help="where to write the backbone (default: tiny.pt)")
    parser.add_argument("--steps", type=int, default=6000, metavar="N",
                        help="optimiser steps (default 6000)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N",
                        help="crops a step (default 64)")
    parser.add_argument("--seed", type=int, default=0,
                        help="of weights, order and crops (default 0)")
    args = parser.parse_args()
    started = time.time()
    try:
        model = train(args.steps, args.batch_size, seed=args.seed)
        save(model, args.out)
        digest = hashlib.sha256(Path(args.out).read_bytes()).hexdigest()
    except (OSError, ValueError) as error:
        print(f"pretrain.py: {error}", file=sys.stderr)
        sys.exit(2)
    minutes = (time.time() - started) / 60
    print(f"{accuracy(model):.1f}% of held-out creatures told right, after {minutes:.1f} minutes")
    print(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.1f} MB, SHA-256 {digest}")


if __name__ == "__main__":
    main()
