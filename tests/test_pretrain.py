"""The small backbone's school: crops show their creatures, a short run learns, what ships sees."""
import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import checkpoints
import models
import pretrain
import recipes
import scenes
import train
from test_train import flags

ROOT = Path(__file__).resolve().parent.parent
MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in models.PIXELS["rgb"])
DRAW = functools.cache(scenes.draw)


@pytest.fixture(autouse=True)
def drawn_once(monkeypatch):
    """Most of these tests look at the same pictures."""
    monkeypatch.setattr(scenes, "draw", DRAW)


def cut_by_pil(index, split="val"):
    """The crops and kinds of one scene, by Pillow's own cutting and resizing."""
    picture, objects = scenes.draw(pretrain.SEED, split, index)
    crops, kinds = [], []
    for creature in objects:
        x1, y1, x2, y2 = creature["box"]
        left, top = (x1 + x2) / 2 - pretrain.CROP / 2, (y1 + y2) / 2 - pretrain.CROP / 2
        window = 1, 0, left, 0, 1, top
        crop = picture.transform((pretrain.CROP,) * 2, Image.AFFINE, window, Image.BILINEAR,
                                 fillcolor=(124, 116, 104))
        crops.append((torch.from_numpy(np.array(crop)).permute(2, 0, 1).float() - MEAN) / STD)
        kinds.append(creature["kind"])
    return crops, kinds


def some_crops(indices):
    parts = [cut_by_pil(index) for index in indices]
    crops = [crop for crops, _ in parts for crop in crops]
    return torch.stack(crops), torch.tensor([kind for _, kinds in parts for kind in kinds])


def test_a_crop_is_pillows_but_for_the_rounding_and_the_rim():
    pictures, which, middles, kinds = pretrain.creatures("val", 12)
    expected, expected_kinds = some_crops(range(12))
    got = pretrain.cut(pictures[which], middles)
    assert torch.equal(kinds, expected_kinds)
    difference = (got - expected).abs()                              # in standard deviations
    assert difference.mean() < 0.02
    assert (difference.amax(1) > 0.1).float().mean() < 0.03          # the rim, half a pixel wide


def test_varied_crops_differ_from_one_another_and_all_hold_their_creature():
    """Its colour is the one under its body's outline; a seventh of it must be in each."""
    pictures, which, middles, _ = pretrain.creatures("val", 4)
    first = int(which[0])
    picture, objects = scenes.draw(pretrain.SEED, "val", first)
    body = np.asarray(scenes.silhouette(objects[0]["polygons"][:1])) > 200
    colour = torch.tensor(np.median(np.asarray(picture)[body], 0), dtype=torch.float32)
    many = torch.zeros(64, dtype=torch.long)
    crops = pretrain.cut(pictures[which[many]], middles[many], vary=True)
    assert len(crops.flatten(1).unique(dim=0)) == 64
    near = ((crops * STD + MEAN - colour.view(3, 1, 1)).abs() < 30).all(1).float().mean((1, 2))
    share = objects[0]["area"] / pretrain.CROP ** 2
    assert near.min() > share / 7


def test_crops_are_turned_mirrored_and_scaled():
    """A red dot in the middle, a green one right of it and a blue one below tell how."""
    picture = Image.new("RGB", (scenes.SIZE,) * 2, (124, 116, 104))
    pen, middle, away = ImageDraw.Draw(picture), scenes.SIZE // 2, 20
    for colour, dx, dy in (((255, 0, 0), 0, 0), ((0, 255, 0), away, 0), ((0, 0, 255), 0, away)):
        x, y = middle + dx, middle + dy
        pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    crops = pretrain.cut(pixels.expand(200, -1, -1, -1), torch.full((200, 2), float(middle)),
                         vary=True) * STD + MEAN

    # each dot is brighter than the ground in its own colour alone
    weight = (crops - torch.tensor([124.0, 116, 104]).view(3, 1, 1) - 20).clamp(min=0)
    at = torch.arange(pretrain.CROP).float()
    x, y = ((weight.sum(axis) * at).sum(2) / weight.sum((2, 3)) for axis in (2, 3))
    red, green, blue = torch.stack([x, y], 2).unbind(1)                      # (200, 2) each
    ways = torch.stack([green - red, blue - red], 2) / away                  # (200, 2, 2)
    area = torch.linalg.det(ways)
    assert area.min() < 0 < area.max()                                       # mirrored and not
    zoom = area.abs().sqrt()
    assert 2 ** -0.6 - 0.03 < zoom.min() < 0.75 and 1.3 < zoom.max() < 2 ** 0.6 + 0.03
    assert len({(a > 0, b > 0) for a, b in (green - red).tolist()}) == 4     # every quarter turn


def test_a_short_run_learns_what_chance_cannot_tell(monkeypatch):
    """Six kinds, counted here: the most frequent of them is right for about a fifth.

    Smaller crops, for time.  Of some 450, ten percent are five standard deviations of chance.
    """
    monkeypatch.setattr(pretrain, "CROP", 64)
    crops, kinds = some_crops(range(100))
    chance = 100 * kinds.bincount().max() / len(kinds)
    model = pretrain.train(steps=150, pictures=300, lr=3e-3).eval()
    with torch.no_grad():
        right = 100 * (model(crops).argmax(1) == kinds).float().mean()
    assert chance < 30 and right > chance + 10
    assert abs(pretrain.accuracy(model, count=100) - right) < 5


def test_what_is_saved_comes_back_in_half_precision(tmp_path):
    model = pretrain.Classifier()
    pretrain.save(model, tmp_path / "some.pt")
    backbone = models.Tiny()
    checkpoints.load_backbone(backbone, tmp_path / "some.pt")
    for name, value in backbone.state_dict().items():
        given = model.backbone.state_dict()[name]
        assert value.dtype == given.dtype, name
        assert torch.allclose(value, given, rtol=1e-3, atol=1e-6), name


def test_the_file_that_ships_is_small_and_tells_creatures_apart():
    """By the kind whose mean feature is nearest, without training; an untrained backbone cannot."""
    assert (ROOT / "tiny.pt").stat().st_size <= 4_000_000
    crops, kinds = some_crops(range(160))
    right = {}
    for name in ("trained", "untrained"):
        backbone = models.Tiny()
        if name == "trained":
            checkpoints.load_backbone(backbone, ROOT / "tiny.pt")
        with torch.no_grad():
            features = backbone.eval()(crops)[-1].mean((2, 3))
        half = len(kinds) // 2
        means = [features[:half][kinds[:half] == k].mean(0) for k in range(len(scenes.KINDS))]
        told = torch.cdist(features[half:], torch.stack(means)).argmin(1)
        right[name] = (told == kinds[half:]).float().mean()
    assert right["trained"] > 0.8 and right["trained"] > right["untrained"] + 0.3


def test_no_row_trains_or_validates_on_its_pictures():
    assert pretrain.SEED != 0 and scenes.write.__defaults__[0] == 0
    mine, theirs = (scenes.draw(seed, "train", 0)[0] for seed in (pretrain.SEED, 0))
    assert mine.tobytes() != theirs.tobytes()


@pytest.mark.parametrize("detector", ["fcos", "detr"])
def test_the_small_recipes_start_from_it_wherever_one_works(
        tmp_path, tiny_scenes, monkeypatch, detector):
    """The backbone of a run of no more than a step of length 0 is the file's; its hash is saved."""
    monkeypatch.chdir(tmp_path)
    train.main(flags(tiny_scenes, out=tmp_path / "a", steps=1, lr=1e-30, detector=detector))
    given = torch.load(ROOT / "tiny.pt", weights_only=True)["model"]
    learned = torch.load(tmp_path / "a" / "last.pt", weights_only=True)["model"]
    for name, value in given.items():
        if "running" not in name and value.is_floating_point() and name in learned:
            assert torch.equal(learned[name], value.float()), name
    versions = json.loads((tmp_path / "a" / "args.json").read_text())["versions"]
    digest = hashlib.sha256((ROOT / "tiny.pt").read_bytes()).hexdigest()
    assert versions["backbone_weights_sha256"] == digest


@pytest.mark.parametrize("words, weights, shift", [
    ("", "tiny.pt", 12), ("--data crowd", "tiny.pt", 12), ("--detector detr", "tiny.pt", 12),
    ("--assign one-to-many", "tiny.pt", 12), ("--backbone-weights none", "none", 12),
    ("--backbone resnet18", "none", 12), ("--data coco --data-dir x", "imagenet", 0),
    ("--data coco --data-dir x --backbone resnet18", "imagenet", 0)])
def test_who_starts_from_what(words, weights, shift):
    found, _ = recipes.effective_flags(vars(recipes.make_parser().parse_args(words.split())))
    assert (found["backbone_weights"], found["shift"]) == (weights, shift)


def test_the_command_says_how_good_it_is_and_the_hash_of_its_file(tmp_path, command, monkeypatch):
    asked = []

    def learned(*numbers, **options):
        asked.append((numbers, options))
        return pretrain.Classifier()

    monkeypatch.setattr(pretrain, "train", learned)
    monkeypatch.setattr(pretrain, "accuracy", lambda model: 81.25)
    code, out, err = command(pretrain, "--out", tmp_path / "some.pt", "--steps", 7,
                             "--batch-size", 3, "--seed", 5)
    assert code == 0 and asked == [((7, 3), {"seed": 5})], err
    digest = hashlib.sha256((tmp_path / "some.pt").read_bytes()).hexdigest()
    assert digest in out and out.startswith("81.2%")


def test_a_folder_that_is_not_there_is_told_before_anything_is_learned(
        tmp_path, command, monkeypatch):
    monkeypatch.setattr(pretrain, "train", None)
    code, _, err = command(pretrain, "--out", tmp_path / "nowhere" / "tiny.pt")
    assert code == 2 and "nowhere is not there" in err and err.count("\n") == 1
