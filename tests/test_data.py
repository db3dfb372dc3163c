"""From disk to batch (oracles: PIL, torchvision, exact fractions, pixels, counting by hand)."""
import json
import shutil
import subprocess
import sys
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor
from torchvision.transforms.functional import hflip

import annotations
import data
import train
from test_annotations import draw_pictures, save, valid
from test_train import flags

ROOT = Path(data.__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw_pictures(tmp_path_factory.mktemp("set"))


def sizes_only(sizes):
    """Stand-in for Annotations where only the (height, width) of the pictures matters."""
    n = len(sizes)
    return SimpleNamespace(sizes=torch.tensor(sizes).reshape(-1, 2), first=torch.arange(n + 1),
                           crowd=torch.zeros(n, dtype=torch.bool))


# ------------------------------------------------------------------------------------------------
# where the data lies
# ------------------------------------------------------------------------------------------------

def test_coco_is_looked_for_where_its_archives_unpack(tmp_path):
    with pytest.raises(annotations.DataError, match="annotations_trainval2017.zip"):
        data.locate({"data": "coco", "data_dir": str(tmp_path)}, "val")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text("{}")
    with pytest.raises(annotations.DataError, match="val2017.zip"):
        data.locate({"data": "coco", "data_dir": str(tmp_path)}, "val")
    (tmp_path / "val2017").mkdir()
    expected = str(tmp_path / "annotations" / "instances_val2017.json"), str(tmp_path / "val2017")
    assert data.locate({"data": "coco", "data_dir": str(tmp_path)}, "val") == expected


def test_crowdhuman_is_looked_for_where_its_archives_unpack(tmp_path):
    flags = {"data": "crowdhuman", "data_dir": str(tmp_path)}
    with pytest.raises(annotations.DataError, match="annotation_val.odgt does not exist; download"):
        data.locate(flags, "val")
    (tmp_path / "annotation_val.odgt").write_text("")
    with pytest.raises(annotations.DataError, match="Images does not exist; .*CrowdHuman_val.zip"):
        data.locate(flags, "val")
    (tmp_path / "Images").mkdir()
    expected = str(tmp_path / "annotation_val.odgt"), str(tmp_path / "Images")
    assert data.locate(flags, "val") == expected


def test_custom_data_needs_both_flags():
    flags = {"data": "custom", "val_json": "v.json", "val_images": "v", "train_json": "t.json"}
    assert data.locate(flags, "val") == ("v.json", "v")
    with pytest.raises(annotations.DataError, match="--train-json and --train-images"):
        data.locate(flags, "train")


@pytest.mark.parametrize("given, chosen", [
    ({}, "scenes"),
    ({"data": "coco", "data_dir": "a"}, "coco"),
    ({"data": None, "val_json": None}, "scenes"),
    ({"data_dir": "a"}, "scenes"),
    ({"val_json": "v.json"}, "custom"),
    ({"train_images": "t"}, "custom"),
    ({"data": "custom", "val_json": "v.json", "val_images": "v"}, "custom"),
])
def test_files_alone_are_custom_data(given, chosen):
    assert data.data_set(given, "scenes") == chosen


@pytest.mark.parametrize("given, words", [
    ({"data": "coco", "val_json": "v.json"},
     "--val-json names a file of your own: it goes with --data custom, not with coco"),
    ({"data": "scenes", "train_images": "t"},
     "--train-images names a file of your own: it goes with --data custom, not with scenes"),
    ({"data": "custom", "data_dir": "a"},
     "--data-dir does not concern --data custom, whose files are named one by one"),
    ({"val_json": "v.json", "data_dir": "a"},
     "--data-dir does not concern --data custom, whose files are named one by one"),
    ({"data": "coco", "val_share": 0.2},
     "--val-share goes with --data custom, not with coco, which has a val split"),
    ({"train_json": "t.json", "val_json": "v.json", "val_share": 0.2},
     "--val-share cuts the val split off the training pictures: give it, or --val-json and "
     "--val-images"),
    ({"train_json": "t.json", "val_share": 1.0},
     "--val-share 1.0: must be above 0 and below 1"),
])
def test_a_flag_of_another_data_set_is_refused_by_name(given, words):
    with pytest.raises(annotations.DataError) as refused:
        data.data_set(given, "scenes")
    assert str(refused.value) == words


def test_a_share_of_the_pictures_is_for_evaluation_alone(tiny_scenes, tmp_path):
    """Whatever the order of the file; each box stays with its picture."""
    flags = {"data": "custom", "train_json": str(tiny_scenes / "train.json"),
             "train_images": str(tiny_scenes / "train"), "val_share": 0.25}
    whole = annotations.read_annotations(flags["train_json"], flags["train_images"])
    parts = [data.read(flags, split) for split in ("train", "val")]
    assert [len(part) for part in parts] == [18, 6]
    assert sorted(parts[0].image_ids + parts[1].image_ids) == sorted(whole.image_ids)
    for part in parts:
        for n, i in enumerate(part.image_ids):
            k = whole.image_ids.index(i)
            assert part.path(n) == whole.path(k)
            assert torch.equal(part.sizes[n], whole.sizes[k])
            for name in ("boxes", "labels", "crowd", "xywh", "area"):
                assert torch.equal(getattr(part, name)[part.first[n]:part.first[n + 1]],
                                   getattr(whole, name)[whole.first[k]:whole.first[k + 1]])
    record = json.loads((tiny_scenes / "train.json").read_text())
    record["images"].reverse()
    (tmp_path / "turned.json").write_text(json.dumps(record))
    turned = data.read({**flags, "train_json": str(tmp_path / "turned.json")}, "val")
    assert set(turned.image_ids) == set(parts[1].image_ids)
    # a val split that is named goes before
    flags.update(val_json=str(tiny_scenes / "val.json"), val_images=str(tiny_scenes / "val"))
    assert len(data.read(flags, "val")) == 7 and len(data.read(flags, "train")) == 24


def test_both_splits_are_read_with_the_training_files_classes_and_ids(tiny_scenes, tmp_path):
    """A val file may list the same classes in another order, under other ids."""
    record = json.loads((tiny_scenes / "val.json").read_text())
    named = {category["id"]: category["name"] for category in record["categories"]}
    record["categories"] = [{**c, "id": 100 - c["id"]} for c in record["categories"][::-1]]
    for annotation in record["annotations"]:
        annotation["category_id"] = 100 - annotation["category_id"]
    (tmp_path / "val.json").write_text(json.dumps(record))
    flags = {"data": "custom", "train_json": str(tiny_scenes / "train.json"),
             "train_images": str(tiny_scenes / "train"), "val_json": str(tmp_path / "val.json"),
             "val_images": str(tiny_scenes / "val")}
    learned, val = data.read_both(flags)
    assert val.class_names == learned.class_names and len(val) == 7
    of_image = {i: [named[100 - a["category_id"]] for a in record["annotations"]
                    if a["image_id"] == i] for i in val.image_ids}
    for n, i in enumerate(val.image_ids):
        found = val.labels[val.first[n]:val.first[n + 1]].tolist()
        assert sorted(val.class_names[label] for label in found) == sorted(of_image[i])


def test_pictures_that_cannot_be_read_are_left_out_where_that_is_asked(tiny_scenes, tmp_path):
    shutil.copytree(tiny_scenes / "train", tmp_path / "train")
    broken = min((tmp_path / "train").iterdir())
    broken.write_bytes(broken.read_bytes()[:200])
    flags = {"data": "custom", "train_json": str(tiny_scenes / "train.json"),
             "train_images": str(tmp_path / "train")}
    assert len(data.read({**flags, "drop_bad": True}, "train")) == 23
    assert len(data.read(flags, "train")) == 24


# ------------------------------------------------------------------------------------------------
# sizes
# ------------------------------------------------------------------------------------------------

# worked out by hand
@pytest.mark.parametrize("size, limits, detectron2, detr", [
    ((480, 640), (800, 1333), (800, 1067), (800, 1066)),              # 1066.67
    ((640, 480), (800, 1333), (1067, 800), (1066, 800)),
    ((427, 640), (800, 1333), (800, 1199), (800, 1199)),              # 1199.06
    ((333, 500), (800, 1333), (800, 1201), (800, 1201)),              # 1201.20
    ((640, 640), (800, 1333), (800, 800), (800, 800)),
    ((300, 640), (800, 1333), (625, 1333), (625, 1333)),              # too long: 624.84
    # too long: 333.25; DETR's longer side: 333 x 4
    ((100, 400), (800, 1333), (333, 1333), (333, 1332)),
    ((400, 100), (800, 1333), (1333, 333), (1332, 333)),
    # CenterNet's, 682.67
    ((375, 500), (512, 853), (512, 683), (512, 682)),
    # too long: 384.52; DETR exceeds its own limit
    ((60, 208), (800, 1333), (385, 1333), (385, 1334)),
    ((128, 128), (128, 128), (128, 128), (128, 128)),
])
def test_resized_sizes_from_a_table(size, limits, detectron2, detr):
    assert data.resized_size(*size, *limits) == detectron2
    assert data.resized_size(*size, *limits, round_down=True) == detr


SIDES = st.integers(60, 1500)
LIMITS = st.sampled_from([(800, 1333), (640, 1500), (512, 853), (896, 1400), (128, 10 ** 9)])


@settings(max_examples=300)
@given(SIDES, SIDES, LIMITS)
def test_sizes_are_detectron2s_one_scale_rounded_half_up(height, width, limits):
    """In exact fractions.
    Where a side falls on one half exactly, floating point may go either way.
    """
    scale = min(Fraction(limits[0], min(height, width)), Fraction(limits[1], max(height, width)))
    for side, got in zip((height, width), data.resized_size(height, width, *limits)):
        exact = scale * side + Fraction(1, 2)
        assert got == exact // 1 or got == exact - 1


@settings(max_examples=300)
@given(SIDES, SIDES, LIMITS)
def test_detrs_shorter_side_is_limited_by_rounding_and_its_longer_side_rounds_down(
        height, width, limits):
    short, long = min(height, width), max(height, width)
    shorter = limits[0]
    if Fraction(limits[0] * long, short) > limits[1]:
        shorter = round(Fraction(limits[1] * short, long))
    longer = shorter * long // short
    expected = (shorter, longer) if height <= width else (longer, shorter)
    assert data.resized_size(height, width, *limits, round_down=True) == expected


@settings(max_examples=100)
@given(st.integers(1, 5000), st.integers(1, 5000), LIMITS, st.booleans())
@example(1, 5000, (800, 1333), True)
def test_no_side_shrinks_to_nothing_and_detectron2s_stay_within_the_longest(
        height, width, limits, round_down):
    size = data.resized_size(height, width, *limits, round_down)
    assert min(size) >= 1 and (round_down or max(size) <= limits[1])


# ------------------------------------------------------------------------------------------------
# transforms: boxes move with their pixels
# ------------------------------------------------------------------------------------------------

def rectangle(box, width=640, height=480):
    """A dark picture, (3, H, W) uint8, with one bright rectangle, and its box as (1, 4)."""
    picture = Image.new("RGB", (width, height), (0, 0, 40))
    picture.paste((250, 200, 0), tuple(box))
    return pixels(picture), np.float32([box])


def pixels(picture):
    """Of PIL, an array or a colour's name, as Transform takes them."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


NO_BOXES = np.zeros((0, 4), np.float32)


def seen(image):
    """The box of the bright pixels, None if there are none."""
    rows, columns = np.nonzero(image[0].numpy() > 125)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else None


CORNERS = st.tuples(st.integers(0, 560), st.integers(0, 400))
EXTENTS = st.tuples(st.integers(12, 400), st.integers(12, 300))
RECTANGLES = st.tuples(CORNERS, EXTENTS).map(
    lambda b: [*b[0], min(b[0][0] + b[1][0], 640), min(b[0][1] + b[1][1], 480)])


@settings(max_examples=60)
@given(RECTANGLES, st.integers(0, 999), st.booleans())
def test_the_box_is_where_the_pixels_are_after_flip_crop_and_resize(box, seed, round_down):
    transform = data.Transform((320, 352, 384, 416, 448, 480), longest=640, flip=0.5, crop=1.0,
                               round_down=round_down)
    image, boxes, kept = transform(*rectangle(box), np.random.default_rng(seed))[:3]
    found = seen(image)
    # less is too thin a sliver to be seen
    if kept[0] and min(boxes[0, 2:] - boxes[0, :2]) > 3:
        assert np.allclose(found, boxes[0], atol=1.5)
    elif not kept[0]:
        assert found is None


@settings(max_examples=20)
@given(RECTANGLES, st.integers(0, 999))
def test_flipping_is_torchvisions_mirror_to_the_pixel(box, seed):
    image, boxes = rectangle(box)
    transform = data.Transform(shortest=(480,), flip=1.0)
    flipped, moved, kept = transform(image, boxes, np.random.default_rng(seed))[:3]
    assert torch.equal(flipped, hflip(image)) and kept.all()
    assert seen(flipped) == moved[0].tolist()


def test_a_flip_and_a_crop_happen_as_often_as_they_are_asked_for():
    transform = data.Transform(shortest=(48,), longest=640, flip=0.5, crop=0.5)
    # left of the middle, so right of it when flipped
    box = [40, 40, 120, 120]
    flips = crops = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        image, boxes, kept = transform(*rectangle(box, 640, 640), rng)[:3]
        sides = boxes[0, 2:] - boxes[0, :2]
        whole = image.shape[1:] == (48, 48) and kept[0] and np.allclose(sides, 6, atol=0.01)
        crops += not whole
        flips += bool(whole and boxes[0, 0] > 24)
    # 100 expected, standard deviation 7
    assert 70 <= crops <= 130
    assert 0.33 <= flips / (200 - crops) <= 0.67


def test_a_crop_is_384_to_600_pixels_of_a_picture_whose_shorter_side_is_400_500_or_600():
    """The window keeps its own pixels here; the frame says how large the whole picture was."""
    transform = data.Transform(shortest=(), crop=1.0)
    picture, seen = torch.zeros(3, 480, 640, dtype=torch.uint8), []
    for seed in range(200):
        view = transform(picture, NO_BOXES, np.random.default_rng(seed))
        left, top, right, bottom = view.frame.tolist()
        whole = round(bottom - top), round(right - left)             # H, W
        assert whole[0] in (400, 500, 600) and whole[1] == round(whole[0] * 4 / 3)
        for side, window in zip(whole, view.image.shape[1:]):
            assert 384 <= window <= min(side, 600)
        seen.append((*whole, *view.image.shape[1:]))
    assert len({H for H, *_ in seen}) == 3
    assert min(w for *_, w in seen) < 390 and max(w for *_, w in seen) > 594


@settings(max_examples=60)
@given(RECTANGLES, st.integers(0, 999))
def test_the_box_is_where_the_pixels_are_in_centernets_square(box, seed):
    transform = data.Transform(square=512, flip=0.5)
    image, boxes, kept = transform(*rectangle(box), np.random.default_rng(seed))[:3]
    assert image.shape == (3, 512, 512)
    found = seen(image)
    if kept[0] and min(boxes[0, 2:] - boxes[0, :2]) > 3:
        assert np.allclose(found, boxes[0], atol=1.5)
    elif not kept[0]:
        assert found is None


def test_centernets_square_is_0p6_to_1p3_of_the_longer_side_around_a_point_128_pixels_inside():
    """A box of 64 pixels in a picture of 640 x 480 becomes 64 * 512 / (640 * s);
    s takes each of its eight values.
    """
    scales, centres = [], []
    for seed in range(300):
        image, box = rectangle([288, 208, 352, 272])
        view = data.Transform(square=512)(image, box, np.random.default_rng(seed))
        boxes, kept = view.boxes, view.kept
        if (boxes[0] > 0).all() and (boxes[0] < 512).all():
            scale = 64 / float(boxes[0, 2] - boxes[0, 0]) * 512 / 640
            scales.append(round(scale, 3))
            off = 256 - (boxes[0, :2] + boxes[0, 2:]) / 2
            centre = off * scale * 640 / 512 + np.array([320, 240])
            centres.append(centre.tolist())
    assert set(scales) == {0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3}
    x, y = np.transpose(centres)
    assert 127 < x.min() < 160 and 480 < x.max() < 513
    assert 127 < y.min() < 160 and 320 < y.max() < 353


def test_colours_vary_as_much_as_asked_and_only_the_colours():
    grey = torch.full((3, 30, 40), 100, dtype=torch.uint8)
    varied = [data.vary_colours(grey, 0.4, 0.1, np.random.default_rng(n)) for n in range(200)]
    mean = [image.double().mean((1, 2)).numpy() for image in varied]
    lightness = np.mean(mean, 1)
    assert 45 < lightness.min() < 75 and 125 < lightness.max() < 155
    assert 90 < lightness.mean() < 110
    # the noise along the colour axes tints greys: a normal factor of each axis's length
    noise = [data.vary_colours(grey, 0, 0.1, np.random.default_rng(n)) for n in range(500)]
    spread = np.std([image.double().mean((1, 2)).numpy() for image in noise], 0)
    assert np.allclose(spread, 25.5 * np.sqrt(data.COLOUR_AXES ** 2 @ data.COLOUR_VARIANCES ** 2),
                       atol=0.6)

    # contrast and saturation are factors too: of two greys' distance, of a patch's red less blue
    patched = np.full((40, 40, 3), 60, np.uint8)
    patched[:, 20:] = 140
    patched[:5, :5] = 130, 100, 70
    factors = []
    for n in range(200):
        image = data.vary_colours(pixels(patched), 0.4, 0, np.random.default_rng(n)).double()
        dark, light = (image[:, 30, x].mean().item() for x in (10, 30))
        brightness, distance = (dark + light) / 200, (light - dark) / 80
        tint = (image[0, 2, 2] - image[2, 2, 2]).item() / 60
        factors.append((distance / brightness, tint / distance))
    assert np.min(factors) > 0.5 and np.max(factors) < 1.5
    assert (np.min(factors, 0) < 0.68).all() and (np.max(factors, 0) > 1.32).all()
    transform, rng = data.Transform(shortest=(), colours=0.4), np.random.default_rng(0)
    image, boxes = transform(*rectangle([100, 100, 300, 200]), rng)[:2]
    assert image.shape == (3, 480, 640) and boxes[0].tolist() == [100, 100, 300, 200]


@settings(max_examples=60)
@given(RECTANGLES, st.integers(0, 999))
def test_the_box_is_where_the_pixels_are_after_a_shift_to_the_pixel(box, seed):
    """Whole pixels move, so that box and pixels agree exactly where the rectangle stays inside."""
    before, was = rectangle(box)
    transform = data.Transform(shortest=(480,), shift=150)
    image, boxes, kept = transform(before, was, np.random.default_rng(seed))[:3]
    assert image.shape == before.shape
    assert seen(image) == (boxes[0].tolist() if kept[0] else None)
    untouched = (boxes[0] > 0).all() and (boxes[0, 2:] < [640, 480]).all()
    if untouched:
        assert (boxes[0, 2:] - boxes[0, :2] == was[0, 2:] - was[0, :2]).all()


def test_a_shift_is_as_far_as_asked_to_all_sides_and_one_colour_fills_its_gap():
    image, boxes = rectangle([300, 200, 340, 240])
    transform, moves = data.Transform(shortest=(480,), shift=3), []
    for seed in range(200):
        moved, there = transform(image, boxes, np.random.default_rng(seed))[:2]
        moves.append((there - boxes)[0, :2].astype(int).tolist())
        dx, dy = moves[-1]
        inside = np.zeros((480, 640), bool)
        inside[max(dy, 0):480 + min(dy, 0), max(dx, 0):640 + min(dx, 0)] = True
        assert (moved.permute(1, 2, 0).numpy()[~inside] == data.MEAN_COLOUR).all()
    assert {x for x, _ in moves} == {y for _, y in moves} == {-3, -2, -1, 0, 1, 2, 3}


@pytest.mark.parametrize("height, width", [(5, 30), (30, 5), (1, 1)])
def test_a_shift_may_be_longer_than_the_picture(height, width):
    image = torch.full((3, height, width), 200, dtype=torch.uint8)
    box = np.float32([[0, 0, width, height]])
    transform, gone = data.Transform(shortest=(), shift=12), 0
    for seed in range(100):
        moved, boxes, kept = transform(image, box, np.random.default_rng(seed))[:3]
        white = (moved == 200).all(0)
        assert moved.shape == image.shape and bool(kept[0]) == bool(white.any())
        if kept[0]:
            extent = boxes[0, 2:] - boxes[0, :2]
            assert int(white.sum()) == extent.prod()
        gone += not kept[0]
    assert gone


@pytest.mark.parametrize("options", [{}, {"flip": 1.0}, {"crop": 1.0}, {"square": 64},
                                     {"colours": 0.4}, {"shift": 9}, {"crop": 1.0, "flip": 1.0}])
def test_colours_stay_side_by_side_in_memory(options):
    """Whatever a Transform does: so batches are put together row by row."""
    image, boxes = rectangle([100, 100, 300, 200])
    for seed in range(5):
        view = data.Transform(shortest=(240,), **options)(image, boxes, np.random.default_rng(seed))
        assert view.image.stride(0) == 1


def test_a_shift_changes_no_other_random_choice():
    """It is drawn last, so that undoing it gives the picture that is there without it."""
    image, boxes = rectangle([200, 150, 420, 300])
    choices = {"shortest": (96, 128, 160), "flip": 0.5, "crop": 0.5, "colours": 0.4}
    for seed in range(20):
        plain, same_plain, moved = (
            data.Transform(**choices, **more)(image, boxes, np.random.default_rng(seed))[0].numpy()
            for more in ({}, {"shift": 0}, {"shift": 5}))
        assert (plain == same_plain).all() and plain.shape == moved.shape
        here = plain[:, 8:-8, 8:-8]
        _, H, W = here.shape
        assert any((moved[:, 8 + dy:, 8 + dx:][:, :H, :W] == here).all()
                   for dx in range(-5, 6) for dy in range(-5, 6))


@pytest.mark.parametrize("square", [0, 512])
def test_the_frame_says_where_every_point_of_the_original_went(square):
    """Four pixels of one colour each, found again in the picture where the frame puts them."""
    picture = Image.new("RGB", (640, 480), "black")
    corners = [(150, 100), (450, 100), (150, 350), (450, 350)]
    colours = ["red", "lime", "blue", "white"]
    for at, colour in zip(corners, colours):
        picture.paste(colour, (*at, at[0] + 40, at[1] + 40))
    transform = data.Transform((480,), flip=0.5, crop=0.5, square=square, shift=30)
    met = 0
    for seed in range(20):
        view = transform(pixels(picture), NO_BOXES, np.random.default_rng(seed))
        x1, y1, x2, y2 = view.frame.tolist()
        for (x, y), colour in zip(corners, colours):
            at = round(x1 + (x + 20) / 640 * (x2 - x1)), round(y1 + (y + 20) / 480 * (y2 - y1))
            if 0 <= at[0] < view.image.shape[2] and 0 <= at[1] < view.image.shape[1]:
                assert tuple(view.image[:, at[1], at[0]].tolist()) == ImageColor.getrgb(colour)
                met += 1
    assert met > 40


def test_boxes_are_clipped_and_emptied_boxes_marked():
    boxes = [[-10, 5, 20, 60], [90, 10, 130, 20], [100, 0, 120, 20], [5, 5, 9, 9], [30, -9, 40, 0]]
    transform, rng = data.Transform(shortest=(100,)), np.random.default_rng(0)
    image = torch.zeros(3, 50, 100, dtype=torch.uint8)
    image, moved, kept = transform(image, np.float32(boxes), rng)[:3]
    assert image.shape == (3, 100, 200)
    assert kept.tolist() == [True, True, False, True, False]
    assert moved[kept].tolist() == [[0, 10, 40, 100], [180, 20, 200, 40], [10, 10, 18, 18]]


@settings(max_examples=30)
@given(st.integers(20, 300), st.integers(20, 300), st.integers(16, 400), st.integers(0, 99))
def test_resized_pixels_are_pillows_within_two_of_255(height, width, shortest, seed):
    """Smaller and larger; Pillow is the oracle."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3))
    picture = Image.fromarray(noise.astype(np.uint8)).resize((width, height), Image.BICUBIC)
    image, _ = data.resize(pixels(picture), NO_BOXES, shortest, 10 ** 9)
    expected = pixels(picture.resize((image.shape[2], image.shape[1]), Image.BILINEAR))
    assert (image.int() - expected.int()).abs().max() <= 2


# ------------------------------------------------------------------------------------------------
# what a picture becomes
# ------------------------------------------------------------------------------------------------

def test_a_crowd_region_is_no_target_but_is_kept_to_be_ignored(folder):
    a = annotations.read_annotations(*save(folder, valid()))
    # the second picture
    _, target = data.Pictures(a, data.Transform(shortest=(30,)))[0, 1]
    assert target["boxes"].tolist() == [[1, 2, 11, 22]] and target["labels"].tolist() == [1]
    assert target["ignore"].tolist() == [[0, 0, 30, 40]] and target["image_id"] == 5
    # an object keeps its number among all boxes of its picture, also behind a crowd region
    content = valid()
    content["annotations"].reverse()
    a = annotations.read_annotations(*save(folder, content))
    _, target = data.Pictures(a, data.Transform(shortest=(30,)))[0, 1]
    assert target["objects"].tolist() == [1] and target["labels"].tolist() == [1]


def test_a_picture_without_annotations_is_an_ordinary_picture(folder):
    content = valid()
    content["annotations"] = []
    a = annotations.read_annotations(*save(folder, content))
    image, target = data.Pictures(a, data.Transform(shortest=(30,)))[0, 0]
    assert len(a) == 2 and image.shape == (3, 30, 40)
    assert target["boxes"].shape == target["ignore"].shape == (0, 4)
    assert target["labels"].shape == (0,)


def test_the_target_says_the_resized_and_the_original_size(folder):
    a = annotations.read_annotations(*save(folder, valid()))
    pictures = data.Pictures(a, data.Transform(shortest=(60,), longest=70))
    # 30 x 40 to 52.5 x 70
    image, target = pictures[0, 0]
    assert image.dtype == torch.uint8 and image.shape == (3, 53, 70)
    assert target["size"].tolist() == [53, 70] and target["original_size"].tolist() == [30, 40]
    expected = torch.tensor([[0.5, 1.25, 9, 5.25]]) * torch.tensor([1.75, 53 / 30] * 2)
    assert torch.allclose(target["boxes"], expected)


def test_small_data_sets_stay_decoded_in_memory_as_they_are_on_disk(tiny_scenes, monkeypatch):
    """Each file is read once, or once an epoch where all would be too much; copies are changed."""
    read, real = [], data.load_picture

    def counted(path, *details):
        read.append(path)
        return real(path, *details)

    monkeypatch.setattr(data, "load_picture", counted)
    a = annotations.read_annotations(tiny_scenes / "train.json", tiny_scenes / "train")
    changes = data.Transform(shortest=(128,), flip=1.0, crop=1.0, colours=0.4, shift=12)
    for limit, times in ((data.Pictures.CACHE, 1), (0, 3)):
        monkeypatch.setattr(data.Pictures, "CACHE", limit)
        pictures = data.Pictures(a, changes)
        read.clear()
        before = pictures.pixels(0).clone()
        for epoch in (0, 1):
            pictures[epoch, 0]
        assert len(read) == times
        assert torch.equal(pictures.pixels(0), before)


# ------------------------------------------------------------------------------------------------
# order, augmentation, batches
# ------------------------------------------------------------------------------------------------

def scene_pictures(folder, seed=0):
    a = annotations.read_annotations(folder / "train.json", folder / "train")
    transform = data.Transform(shortest=(96, 128, 160), longest=160, flip=0.5, crop=0.5)
    return data.Pictures(a, transform, seed)


def same(one, other):
    """Two batches agree to the byte."""
    images, mask, targets = one
    if not torch.equal(images, other[0]) or not torch.equal(mask, other[1]):
        return False
    pairs = list(zip(targets, other[2], strict=True))
    tensors = [(a[k], b[k]) for a, b in pairs for k in a if k != "image_id"]
    return (all(a["image_id"] == b["image_id"] for a, b in pairs)
            and all(torch.equal(a, b) for a, b in tensors))


def test_batches_do_not_depend_on_the_number_of_worker_processes(tiny_scenes):
    pictures = scene_pictures(tiny_scenes)
    keys = list(islice(data.training_batches(pictures.annotations, 8, seed=0), 5))
    alone = list(data.loader(pictures, keys, 32, workers=0))
    assert len(alone) == 5
    together = data.loader(pictures, keys, 32, workers=2)
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


@pytest.fixture(params=["train", "val"])
def half_broken(request, tiny_scenes, tmp_path):
    """Pictures of which those of one split are cut in the middle."""
    shutil.copytree(tiny_scenes, tmp_path / "scenes")
    for picture in (tmp_path / "scenes" / request.param).iterdir():
        picture.write_bytes(picture.read_bytes()[:200])
    return tmp_path / "scenes"


def test_a_picture_that_cannot_be_read_ends_the_run_with_one_sentence(
        half_broken, tmp_path, command):
    """In training and in evaluation."""
    code, _, said = command(train, *flags(half_broken, out=tmp_path / "run", steps=1))
    assert code == 2
    line = said.strip().splitlines()[-1]
    assert line.startswith("train.py: ") and "cannot be decoded" in line
    assert "Traceback" not in said


def test_a_picture_that_a_worker_cannot_read_ends_the_run_and_nothing_hangs(half_broken, tmp_path):
    command = [sys.executable, ROOT / "train.py",
               *flags(half_broken, out=tmp_path / "run", steps=1, workers=2)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2, run.stderr
    (line,) = run.stderr.strip().splitlines()
    assert line.startswith("train.py: ") and "cannot be decoded" in line


@pytest.mark.parametrize("pause", [0, 1], ids=["seen by the loader", "seen in the strategy"])
def test_a_killed_worker_ends_the_run_with_one_sentence(pause, tiny_scenes, tmp_path):
    """As the system does where memory runs out: a strategy kills its siblings, by the way."""
    (tmp_path / "my.py").write_text(
        "import multiprocessing, time, assign\ndef f(cost):\n"
        "    [child.kill() for child in multiprocessing.active_children()]\n"
        f"    time.sleep({pause})\n"
        "    return assign.hungarian(cost)\n")
    command = [sys.executable, ROOT / "train.py",
               *flags(tiny_scenes, out=tmp_path / "run", steps=500, workers=2,
                      assign=f"{tmp_path}/my.py:f")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2, run.stderr
    assert "a process that reads pictures was killed" in run.stderr.strip().splitlines()[-1]
    assert "Traceback" not in run.stderr


def test_an_item_depends_on_seed_epoch_and_index_and_on_nothing_else(tiny_scenes):
    first, again = scene_pictures(tiny_scenes), scene_pictures(tiny_scenes)
    other = scene_pictures(tiny_scenes, seed=1)
    expected = data.collate([first[4, i] for i in range(8)], 32)
    # none of which matters
    torch.manual_seed(99)
    np.random.seed(99)
    for i in (7, 3):
        again[5, i]
    assert same(expected, data.collate([again[4, i] for i in range(8)], 32))
    assert not same(expected, data.collate([first[5, i] for i in range(8)], 32))
    assert not same(expected, data.collate([other[4, i] for i in range(8)], 32))


def test_loading_leaves_the_global_random_state_alone(tiny_scenes):
    pictures = scene_pictures(tiny_scenes)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(data.loader(pictures, [[(0, 0), (0, 1)]], 32))
    assert torch.equal(torch.rand(1), expected)


SIZES = st.sampled_from([(30, 40), (40, 30), (30, 30), (90, 20)])
MANY_SIZES = st.lists(SIZES, min_size=1, max_size=30)
few = settings(max_examples=40)


@few
@given(MANY_SIZES, st.integers(1, 8), st.integers(0, 99), st.integers(0, 25))
def test_resuming_at_a_step_continues_the_same_order(sizes, batch_size, seed, start):
    a = sizes_only(sizes)
    whole = list(islice(data.batch_stream(a, batch_size, seed), start + 5))
    assert list(islice(data.training_batches(a, batch_size, seed, start=start), 5)) == whole[start:]


@few
@given(MANY_SIZES, st.integers(0, 99), st.integers(0, 9), st.integers(1, 3), st.integers(1, 3),
       st.integers(1, 3))
def test_the_processes_micro_batches_together_are_the_batch(
        sizes, seed, start, world, accumulate, each):
    a, batch_size = sizes_only(sizes), world * accumulate * each
    stream = list(islice(data.batch_stream(a, batch_size, seed), start + 4))[start:]
    shares = []
    for rank in range(world):
        mine = data.training_batches(a, batch_size, seed, start, rank, world, accumulate)
        shares.append(list(islice(mine, 4 * accumulate)))
    for step, expected in enumerate(stream):
        of_step = slice(step * accumulate, (step + 1) * accumulate)
        parts = [part for share in shares for part in share[of_step]]
        assert [len(part) for part in parts] == [each] * (world * accumulate)
        assert sorted(key for part in parts for key in part) == sorted(expected)


@few
@given(MANY_SIZES, st.integers(1, 8), st.integers(0, 99))
def test_every_picture_comes_once_per_epoch_in_batches_of_one_orientation(sizes, batch_size, seed):
    """The first epoch's left-overs are out, at the latest,
    when a picture alone in its bucket has filled a batch.
    """
    enough = 3 + len(sizes) * (batch_size + 1) // batch_size
    batches = list(islice(data.batch_stream(sizes_only(sizes), batch_size, seed), enough))
    keys = [key for batch in batches for key in batch]
    assert len(set(keys)) == len(keys) and all(len(batch) == batch_size for batch in batches)
    assert sorted(i for epoch, i in keys if epoch == 0) == list(range(len(sizes)))
    for batch in batches:
        assert len({sizes[i][0] > sizes[i][1] for _, i in batch}) == 1


def test_pictures_without_objects_can_be_left_out():
    """Picture 1 has no box, picture 3 only a crowd region: one epoch of the others, 0, 2 and 4."""
    a = SimpleNamespace(sizes=torch.full((5, 2), 40), first=torch.tensor([0, 2, 2, 3, 4, 6]),
                        crowd=torch.tensor([False, True, False, True, False, False]))
    used = next(data.batch_stream(a, 3, seed=0, skip_empty=True))
    assert sorted(used) == [(0, 0), (0, 2), (0, 4)]
    assert sorted(i for _, i in next(data.batch_stream(a, 5, seed=0))) == [0, 1, 2, 3, 4]
    assert next(data.training_batches(a, 3, 0, skip_empty=True)) == used


def test_every_epoch_and_every_seed_has_its_own_order():
    a = sizes_only([(30, 40)] * 50)
    epochs = [batch for seed in (0, 1) for batch in islice(data.batch_stream(a, 50, seed), 3)]
    orders = [[i for _, i in batch] for batch in epochs]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6 and list(range(50)) not in orders


@few
@given(st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=4),
       st.sampled_from([1, 32]))
def test_collate_pads_right_and_bottom_and_masks_exactly_the_padding(sizes, divisor):
    samples = [(torch.full((3, h, w), n + 1, dtype=torch.uint8), {"image_id": n})
               for n, (h, w) in enumerate(sizes)]
    images, mask, targets = data.collate(samples, divisor)
    for size, largest in zip(images.shape[2:], np.max(sizes, axis=0)):
        assert size % divisor == 0 and largest <= size < largest + divisor
    assert images.shape == (len(sizes), 3, *mask.shape[1:])
    assert [t["image_id"] for t in targets] == list(range(len(sizes)))
    for n, (h, w) in enumerate(sizes):
        assert (images[n, :, :h, :w] == n + 1).all() and not mask[n, :h, :w].any()
        assert mask[n].sum() == mask[n].numel() - h * w
        assert not images[n].masked_select(mask[n]).any()


@few
@given(MANY_SIZES, st.integers(1, 8), st.integers(1, 3))
def test_evaluation_sees_every_picture_once_over_all_processes(sizes, batch_size, world):
    a = sizes_only(sizes)
    batches = [batch for rank in range(world)
               for batch in data.evaluation_batches(a, batch_size, rank, world)]
    assert sorted(key for batch in batches for key in batch) == [(0, i) for i in range(len(sizes))]
    assert all(1 <= len(batch) <= batch_size for batch in batches)
