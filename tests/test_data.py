"""Reading, transforming and batching (oracles: PIL, torchvision, exact fractions, pixels, counting by hand)."""
import copy
import io
import json
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
from PIL import Image
from torchvision.ops import clip_boxes_to_image
from torchvision.transforms.functional import hflip

import data

ROOT = Path(data.__file__).parent
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with two pictures, a.png (40 wide, 30 high) and b.png (30 wide, 40 high), for `save` to describe."""
    folder = tmp_path_factory.mktemp("set")
    (folder / "pictures").mkdir()
    Image.new("RGB", (40, 30), RED).save(folder / "pictures" / "a.png")
    Image.new("RGB", (30, 40), BLUE).save(folder / "pictures" / "b.png")
    return folder


def valid():
    """A faultless data set: two pictures, three boxes, two classes whose ids have gaps and are not in order."""
    return {"images": [{"id": 7, "file_name": "a.png", "height": 30, "width": 40},
                       {"id": 5, "file_name": "b.png", "height": 40, "width": 30}],
            "annotations": [{"id": 1, "image_id": 5, "category_id": 90, "bbox": [1, 2, 10, 20], "iscrowd": 0},
                            {"id": 2, "image_id": 7, "category_id": 3, "bbox": [0.5, 1.25, 8.5, 4], "iscrowd": 0},
                            {"id": 3, "image_id": 5, "category_id": 3, "bbox": [0, 0, 30, 40], "iscrowd": 1}],
            "categories": [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}]}


def save(folder, content):
    """Write `content` as set.json; returns what the reader wants: the JSON file and the picture folder."""
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "set.json").write_text(text, encoding="utf-8")
    return folder / "set.json", folder / "pictures"


def sizes_only(sizes):
    """Stand-in for Annotations where only the (height, width) of the pictures matters."""
    n = len(sizes)
    return SimpleNamespace(sizes=torch.tensor(sizes).reshape(-1, 2), first=torch.arange(n + 1), crowd=torch.zeros(n, dtype=torch.bool))


# ------------------------------------------------------------------------------------------------
# what the reader makes of a file
# ------------------------------------------------------------------------------------------------

def test_labels_are_ranks_of_category_ids_and_names_are_kept(folder):
    a = data.read_annotations(*save(folder, valid()))
    assert a.category_ids == [3, 90] and a.class_names == ["car", "toothbrush"]
    assert a.labels.tolist() == [0, 1, 0]                             # picture 7 first, as in the file


def test_pictures_keep_the_order_of_the_file_and_boxes_follow_their_picture(folder):
    a = data.read_annotations(*save(folder, valid()))
    assert a.image_ids == [7, 5] and a.file_names == ["a.png", "b.png"] and a.sizes.tolist() == [[30, 40], [40, 30]]
    assert a.first.tolist() == [0, 1, 3]
    assert a.boxes.tolist() == [[0.5, 1.25, 9, 5.25], [1, 2, 11, 22], [0, 0, 30, 40]]
    assert a.crowd.tolist() == [False, False, True]


def test_a_crowd_region_is_no_target_but_is_kept_to_be_ignored(folder):
    pictures = data.Pictures(data.read_annotations(*save(folder, valid())), data.Transform(shortest=(30,)))
    _, target = pictures[0, 1]                                        # the second picture
    assert target["boxes"].tolist() == [[1, 2, 11, 22]] and target["labels"].tolist() == [1]
    assert target["ignore"].tolist() == [[0, 0, 30, 40]] and target["image_id"] == 5


def test_a_picture_without_annotations_is_an_ordinary_picture(folder):
    content = valid()
    content["annotations"] = []
    a = data.read_annotations(*save(folder, content))
    image, target = data.Pictures(a, data.Transform(shortest=(30,)))[0, 0]
    assert len(a) == 2 and image.shape == (3, 30, 40)
    assert target["boxes"].shape == target["ignore"].shape == (0, 4) and target["labels"].shape == (0,)


def test_ids_may_be_text(folder):
    content = valid()
    content["images"][0]["id"] = content["annotations"][1]["image_id"] = "first"
    with pytest.raises(data.DataError, match="mix"):
        data.read_annotations(*save(folder, content))
    content["images"][1]["id"] = content["annotations"][0]["image_id"] = content["annotations"][2]["image_id"] = "5"
    content["categories"] = [{"id": "zebra", "name": "Zebra"}, {"id": "ant", "name": "Ant"}]
    for annotation, category in zip(content["annotations"], ["zebra", "ant", "ant"]):
        annotation["category_id"] = category
    a = data.read_annotations(*save(folder, content))
    assert a.image_ids == ["first", "5"] and a.category_ids == ["ant", "zebra"] and a.class_names == ["Ant", "Zebra"]
    assert a.labels.tolist() == [0, 1, 0]


def test_boxes_are_cut_at_the_picture(folder):
    content = valid()
    content["annotations"][1]["bbox"] = [-5, 10.5, 100, 100]          # of a.png, 40 x 30
    assert data.read_annotations(*save(folder, content)).boxes[0].tolist() == [0, 10.5, 40, 30]


@settings(max_examples=40)
@given(st.lists(st.tuples(*[st.floats(-50, 90, width=32)] * 2, *[st.floats(0.125, 90, width=32)] * 2), max_size=8))
def test_every_box_is_kept_as_torchvision_clips_it_or_reported(folder, boxes):
    content = valid()
    content["annotations"] = [{"id": n, "image_id": 7, "category_id": 3, "bbox": box} for n, box in enumerate(boxes)]
    a, faults = data.parse_coco(*save(folder, content))
    xyxy = torch.tensor([(x, y, x + w, y + h) for x, y, w, h in boxes], dtype=torch.float64).reshape(-1, 4)
    clipped = clip_boxes_to_image(xyxy, (30, 40))
    inside = (clipped[:, 2:] - clipped[:, :2] > 1e-5).all(1)
    assert torch.equal(a.boxes, clipped[inside].float())
    assert len(faults) == (~inside).sum() and all(f.box and f.kind == "box outside the picture" for f in faults)


# ------------------------------------------------------------------------------------------------
# faults: (what is done to a valid data set, what the message must name)
# ------------------------------------------------------------------------------------------------

def changed(key, n, **values):
    """A valid data set with some values of entry n of images, annotations or categories replaced."""
    content = valid()
    content[key][n].update(values)
    return content


def with_more(key, *entries):
    content = valid()
    content[key] += entries
    return content


FAULTS = {
    "broken JSON": ('{"images": [', ["not valid JSON"]),
    "an empty file": ("", ["not valid JSON"]),
    "nested beyond reason": ("[" * 100_000, ["not valid JSON"]),
    "a list": ([], ["not a COCO data set"]),
    "a result file": ([{"image_id": 5, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.5}], ["evaluate.py results"]),
    "a number": (3, ["not a COCO data set"]),
    "no categories": ({"images": [], "annotations": []}, ["categories"]),
    "annotations is an object": ({**valid(), "annotations": {}}, ["annotations"]),
    "an empty data set": ({**valid(), "images": [], "annotations": []}, ["empty"]),
    "a category id that is not listed": (changed("annotations", 1, category_id=4), ["image 7", "annotation 2", "4"]),
    "a category id that is no id": (changed("annotations", 1, category_id=[3]), ["image 7", "annotation 2", "[3]"]),
    "category ids of two types": (with_more("categories", {"id": "x", "name": "x"}), ["category ids"]),
    "a category listed twice": (with_more("categories", {"id": 3, "name": "x"}), ["category id 3", "twice"]),
    "a category without id": (with_more("categories", {"name": "x"}), ["no id"]),
    "a NaN box": (changed("annotations", 1, bbox=[1, float("nan"), 3, 4]), ["image 7", "annotation 2", "nan"]),
    "an infinite box": (changed("annotations", 1, bbox=[1, 2, float("inf"), 4]), ["image 7", "annotation 2", "inf"]),
    "a box of three numbers": (changed("annotations", 1, bbox=[1, 2, 3]), ["image 7", "annotation 2", "[1, 2, 3]"]),
    "a box of text": (changed("annotations", 1, bbox=["1", "2", "3", "4"]), ["image 7", "annotation 2", "'1'"]),
    "a box beyond floats": (changed("annotations", 1, bbox=[0, 0, 10 ** 400, 4]), ["image 7", "annotation 2"]),
    "no box": (changed("annotations", 1, bbox=None), ["image 7", "annotation 2"]),
    "a negative extent": (changed("annotations", 1, bbox=[9, 9, -3, 4]), ["image 7", "annotation 2", "-3"]),
    "no extent": (changed("annotations", 1, bbox=[9, 9, 3, 0]), ["image 7", "annotation 2", "no extent"]),
    "a box outside": (changed("annotations", 1, bbox=[40, 3, 5, 5]), ["image 7", "annotation 2", "40 x 30"]),
    "a duplicate image id": (changed("images", 1, id=7), ["image id 7", "twice"]),
    "a duplicate annotation id": (changed("annotations", 2, id=2), ["image 5", "annotation 2", "twice"]),
    "an unknown image id": (changed("annotations", 1, image_id=8), ["image 8", "annotation 2"]),
    "an image id that is no id": (changed("annotations", 1, image_id=[7]), ["annotation 2"]),
    "an annotation that is no object": (with_more("annotations", 3), ["annotation number 3"]),
    "an image that is no object": (with_more("images", 3), ["no id"]),
    "an image without id": (with_more("images", {"file_name": "a.png", "height": 30, "width": 40}), ["no id", "a.png"]),
    "a way up": (changed("images", 0, file_name="../pictures/a.png"), ["image 7", "../pictures/a.png", "leaves"]),
    "a way up inside": (changed("images", 0, file_name="x/../../set.json"), ["image 7", "leaves"]),
    "a way up with backslashes": (changed("images", 0, file_name="..\\a.png"), ["image 7", "leaves"]),
    "an absolute name": (changed("images", 0, file_name="/etc/passwd"), ["image 7", "/etc/passwd", "leaves"]),
    "an absolute Windows name": (changed("images", 0, file_name="C:\\a.png"), ["image 7", "leaves"]),
    "no file name": (changed("images", 0, file_name=None), ["image 7", "file_name"]),
    "a file name too long for a file": (changed("images", 0, file_name="a" * 5000), ["image 7"]),
    "no height": (changed("images", 0, height=None), ["image 7", "height"]),
    "a height of zero": (changed("images", 0, height=0), ["image 7", "height"]),
    "a height beyond integers": (changed("images", 0, height=1e30), ["image 7", "height"]),
    "a height beyond floats": (changed("images", 0, height=10 ** 400), ["image 7", "height"]),
    "a missing picture": (changed("images", 0, file_name="c.png"), ["image 7", "c.png", "does not exist"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_data_set_is_refused_in_one_sentence_with_file_image_and_annotation(folder, fault):
    content, words = FAULTS[fault]
    with pytest.raises(data.DataError) as error:
        data.read_annotations(*save(folder, content))
    assert all(word in str(error.value) for word in ["set.json", *words])
    assert "\n" not in str(error.value)


def test_without_the_file_or_the_picture_folder_the_message_names_it(folder, tmp_path):
    for file in (tmp_path / "none.json", tmp_path):                   # a folder is no file
        with pytest.raises(data.DataError, match=str(file)):
            data.read_annotations(file, folder / "pictures")
    with pytest.raises(data.DataError, match="nowhere"):
        data.read_annotations(save(folder, valid())[0], tmp_path / "nowhere")


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                    max_leaves=6)


def places(node, path=()):
    """The path of every value inside a JSON document, itself included."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path] + [place for key, value in inner for place in places(value, (*path, key))]


def replaced(node, path, value):
    if not path:
        return value
    node = copy.copy(node)
    node[path[0]] = replaced(node[path[0]], path[1:], value)
    return node


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(places(valid())), JSON), min_size=1, max_size=3))
@example([(("images", 0, "height"), 1e30)])
@example([(("images", 0, "file_name"), "a\0b")])
@example([(("annotations", 0, "bbox", 2), 10 ** 400)])
def test_whatever_stands_in_a_data_set_the_check_reports_it_and_does_not_fall_over(folder, changes):
    content = valid()
    for path, value in changes:
        try:
            content = replaced(content, path, value)
        except (KeyError, IndexError, TypeError):                     # an earlier change took this place away
            pass
    json_file, images = save(folder, content)
    try:
        reported = data.check(json_file, images, out=io.StringIO())
    except data.DataError:
        reported = 1                                                  # nothing in it can be read
    if not reported:
        a = data.read_annotations(json_file, images)
        assert a.boxes.isfinite().all() and (a.boxes[:, 2:] > a.boxes[:, :2]).all()
        assert a.labels.numel() == 0 or 0 <= a.labels.min() and a.labels.max() < len(a.class_names)


def test_drop_bad_boxes_leaves_out_the_bad_boxes_only_and_says_how_many(folder, capsys):
    bad = [[1, float("nan"), 3, 4], [9, 9, 0, 4], [40, 3, 5, 5]]
    content = valid()
    for n, box in enumerate(bad):
        content["annotations"].insert(n, {"id": 10 + n, "image_id": 7, "category_id": 3, "bbox": box})
    whole = data.read_annotations(*save(folder, valid()))
    a = data.read_annotations(*save(folder, content), drop_bad_boxes=True)
    assert torch.equal(a.boxes, whole.boxes) and torch.equal(a.first, whole.first)
    said = capsys.readouterr()
    assert "dropped 3 bad box" in said.err and "annotation 10" in said.err and not said.out


def test_drop_bad_boxes_still_refuses_other_faults(folder):
    content = changed("annotations", 1, category_id=4)
    content["annotations"][0]["bbox"] = [9, 9, 0, 4]
    with pytest.raises(data.DataError, match="category id 4"):
        data.read_annotations(*save(folder, content), drop_bad_boxes=True)


# ------------------------------------------------------------------------------------------------
# pictures of every make
# ------------------------------------------------------------------------------------------------

def two_halves(mode, left, right):
    """A picture 40 wide and 20 high of two colours."""
    picture = Image.new(mode, (40, 20), left)
    picture.paste(right, (20, 0, 40, 20))
    return picture


def assert_halves(path, left, right, tolerance=0):
    picture = data.load_picture(path, 20, 40)
    assert picture.mode == "RGB" and picture.size == (40, 20)
    for x, colour in ((5, left), (35, right)):
        assert np.abs(np.subtract(picture.getpixel((x, 10)), colour)).max() <= tolerance


@pytest.mark.parametrize("mode, left, right, name, rgb", [
    ("RGB", RED, BLUE, "p.bmp", (RED, BLUE)),
    ("L", 50, 200, "p.png", ((50,) * 3, (200,) * 3)),
    ("L", 50, 200, "p.jpg", ((50,) * 3, (200,) * 3)),
    ("1", 0, 1, "p.png", ((0,) * 3, WHITE)),
    ("LA", (50, 0), (200, 255), "p.png", ((50,) * 3, (200,) * 3)),
    ("RGBA", (*RED, 0), (*BLUE, 128), "p.png", (RED, BLUE)),
    ("I", 50 * 257, 200 * 257, "p.tif", ((50,) * 3, (200,) * 3)),
    ("CMYK", (0, 255, 255, 0), (255, 255, 0, 0), "p.tif", (RED, BLUE)),
    ("CMYK", (0, 255, 255, 0), (255, 255, 0, 0), "p.jpg", (RED, BLUE)),
    ("YCbCr", (76, 85, 255), (29, 255, 107), "p.jpg", (RED, BLUE))])
def test_a_picture_of_any_mode_becomes_rgb_of_the_same_colours(tmp_path, mode, left, right, name, rgb):
    two_halves(mode, left, right).save(tmp_path / name)
    assert_halves(tmp_path / name, *rgb, tolerance=4 if name.endswith("jpg") else 0)


@pytest.mark.parametrize("name", ["p.png", "p.tif"])
def test_sixteen_bits_of_grey_become_eight_and_65535_is_white(tmp_path, name):
    for left, right, expected in ((50 * 257, 200 * 257, (50, 200)), (3 * 257, 65535, (3, 255)), (5, 200, (0, 0))):
        grey = np.full((20, 40), left, np.uint16)
        grey[:, 20:] = right
        Image.fromarray(grey).save(tmp_path / name)
        assert_halves(tmp_path / name, *[(v,) * 3 for v in expected])         # the last one stays as dark as it is


@pytest.mark.parametrize("name", ["p.png", "p.gif"])
@pytest.mark.parametrize("transparency", [None, 1])
def test_a_palette_is_looked_up_also_where_it_is_transparent(tmp_path, name, transparency):
    picture = two_halves("P", 1, 2)
    picture.putpalette([*GREEN, *RED, *BLUE])
    picture.save(tmp_path / name, **({} if transparency is None else {"transparency": transparency}))
    assert_halves(tmp_path / name, RED, BLUE)


# Which visual corners (T, B: top, bottom; L, R: left, right) the stored corners TL, TR, BL, BR are, from the EXIF
# standard's "the 0th row is at the visual ..., the 0th column at the visual ..."
EXIF = {1: "TL TR BL BR", 2: "TR TL BR BL", 3: "BR BL TR TL", 4: "BL BR TL TR",
        5: "TL BL TR BR", 6: "TR BR TL BL", 7: "BR TR BL TL", 8: "BL TL BR TR"}


@pytest.mark.parametrize("orientation", EXIF)
@pytest.mark.parametrize("name", ["p.jpg", "p.png"])
def test_a_rotated_photograph_comes_out_upright(tmp_path, orientation, name):
    colours = {"TL": RED, "TR": GREEN, "BL": BLUE, "BR": WHITE}
    width, height = (96, 64) if orientation < 5 else (64, 96)         # stored; upright it is 96 wide
    stored = Image.new("RGB", (width, height))
    for corner, where in zip(EXIF[orientation].split(), [(0, 0), (1, 0), (0, 1), (1, 1)]):
        stored.paste(colours[corner], (where[0] * width // 2, where[1] * height // 2, width, height))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / name, exif=exif, **({"quality": 95} if name == "p.jpg" else {}))
    picture = data.load_picture(tmp_path / name, height=64, width=96)
    for corner, place in (("TL", (8, 8)), ("TR", (88, 8)), ("BL", (8, 56)), ("BR", (88, 56))):
        assert np.abs(np.subtract(picture.getpixel(place), colours[corner])).max() < 30


@pytest.mark.parametrize("name", ["p.jpg", "p.png", "p.bmp", "p.tif", "p.gif", "p.webp"])
def test_a_picture_cut_in_the_middle_is_refused_when_it_is_loaded(folder, name):
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    path = folder / "pictures" / name
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    pictures = data.Pictures(data.read_annotations(*save(folder, changed("images", 0, file_name=name))), data.Transform())
    with pytest.raises(data.DataError, match=f"{name} .image 7.: the picture cannot be decoded"):
        pictures[0, 0]


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name in ("text.jpg", "empty.jpg", "missing.jpg"):
        with pytest.raises(data.DataError, match=name):
            data.load_picture(tmp_path / name)


def test_a_picture_of_another_size_than_the_json_says_is_refused_when_it_is_loaded(folder):
    content = changed("images", 1, height=30, width=40)               # b.png is 30 wide and 40 high
    pictures = data.Pictures(data.read_annotations(*save(folder, content)), data.Transform())
    with pytest.raises(data.DataError, match="b.png .image 5.*is 30 x 40.*says 40 x 30"):
        pictures[0, 1]


# ------------------------------------------------------------------------------------------------
# sizes
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, limits, detectron2, detr", [          # worked out by hand
    ((480, 640), (800, 1333), (800, 1067), (800, 1066)),              # 1066.67
    ((640, 480), (800, 1333), (1067, 800), (1066, 800)),
    ((427, 640), (800, 1333), (800, 1199), (800, 1199)),              # 1199.06
    ((333, 500), (800, 1333), (800, 1201), (800, 1201)),              # 1201.20
    ((640, 640), (800, 1333), (800, 800), (800, 800)),
    ((300, 640), (800, 1333), (625, 1333), (625, 1333)),              # too long: 624.84
    ((100, 400), (800, 1333), (333, 1333), (333, 1332)),              # too long: 333.25; DETR's longer side: 333 x 4
    ((400, 100), (800, 1333), (1333, 333), (1332, 333)),
    ((375, 500), (512, 853), (512, 683), (512, 682)),                 # CenterNet's, 682.67
    ((60, 208), (800, 1333), (385, 1333), (385, 1334)),               # too long: 384.52; DETR exceeds its own limit
    ((128, 128), (128, 128), (128, 128), (128, 128))])
def test_resized_sizes_from_a_table(size, limits, detectron2, detr):
    assert data.resized_size(*size, *limits) == detectron2
    assert data.resized_size(*size, *limits, round_down=True) == detr


SIDES = st.integers(60, 1500)
LIMITS = st.sampled_from([(800, 1333), (640, 1500), (512, 853), (896, 1400), (128, 10 ** 9)])


@settings(max_examples=300)
@given(SIDES, SIDES, LIMITS)
def test_sizes_are_detectron2s_one_scale_rounded_half_up(height, width, limits):
    """In exact fractions.  Where a side falls on one half exactly, floating point may go either way."""
    scale = min(Fraction(limits[0], min(height, width)), Fraction(limits[1], max(height, width)))
    for side, got in zip((height, width), data.resized_size(height, width, *limits)):
        exact = scale * side + Fraction(1, 2)
        assert got == exact // 1 or got == exact - 1


@settings(max_examples=300)
@given(SIDES, SIDES, LIMITS)
def test_detrs_shorter_side_is_limited_by_rounding_and_its_longer_side_rounds_down(height, width, limits):
    short, long = min(height, width), max(height, width)
    shorter = limits[0] if Fraction(limits[0] * long, short) <= limits[1] else round(Fraction(limits[1] * short, long))
    longer = shorter * long // short
    expected = (shorter, longer) if height <= width else (longer, shorter)
    assert data.resized_size(height, width, *limits, round_down=True) == expected


@settings(max_examples=100)
@given(st.integers(1, 5000), st.integers(1, 5000), LIMITS, st.booleans())
@example(1, 5000, (800, 1333), True)
def test_no_side_shrinks_to_nothing_and_detectron2s_stay_within_the_longest(height, width, limits, round_down):
    size = data.resized_size(height, width, *limits, round_down)
    assert min(size) >= 1 and (round_down or max(size) <= limits[1])


# ------------------------------------------------------------------------------------------------
# transforms: boxes move with their pixels
# ------------------------------------------------------------------------------------------------

def rectangle(box, width=640, height=480):
    """A dark picture with one bright rectangle, and its box as (1, 4)."""
    picture = Image.new("RGB", (width, height), (0, 0, 40))
    picture.paste((250, 200, 0), tuple(box))
    return picture, torch.tensor([box], dtype=torch.float32)


def seen(picture):
    """The box of the bright pixels, None if there are none."""
    rows, columns = np.nonzero(np.asarray(picture)[:, :, 0] > 125)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else None


RECTANGLES = st.tuples(st.integers(0, 560), st.integers(0, 400), st.integers(12, 400), st.integers(12, 300)).map(
    lambda b: [b[0], b[1], min(b[0] + b[2], 640), min(b[1] + b[3], 480)])


@settings(max_examples=60)
@given(RECTANGLES, st.integers(0, 999), st.booleans())
def test_the_box_is_where_the_pixels_are_after_flip_crop_and_resize(box, seed, round_down):
    transform = data.Transform((320, 352, 384, 416, 448, 480), longest=640, flip=0.5, crop=1.0, round_down=round_down)
    picture, boxes, kept = transform(*rectangle(box), np.random.default_rng(seed))
    found = seen(picture)
    if kept[0] and min(boxes[0, 2:] - boxes[0, :2]) > 3:              # less is too thin a sliver to be seen
        assert np.allclose(found, boxes[0], atol=1.5)
    elif not kept[0]:
        assert found is None


@settings(max_examples=20)
@given(RECTANGLES, st.integers(0, 999))
def test_flipping_is_torchvisions_mirror_to_the_pixel(box, seed):
    picture, boxes = rectangle(box)
    flipped, moved, kept = data.Transform(shortest=(480,), flip=1.0)(picture, boxes, np.random.default_rng(seed))
    assert flipped.tobytes() == hflip(picture).tobytes() and kept.all()
    assert seen(flipped) == moved[0].tolist()


def test_a_flip_and_a_crop_happen_as_often_as_they_are_asked_for():
    transform = data.Transform(shortest=(48,), longest=640, flip=0.5, crop=0.5)
    box = [40, 40, 120, 120]                                          # left of the middle, so right of it when flipped
    flips = crops = 0
    for seed in range(200):
        picture, boxes, kept = transform(*rectangle(box, 640, 640), np.random.default_rng(seed))
        whole = picture.size == (48, 48) and kept[0] and np.allclose(boxes[0, 2:] - boxes[0, :2], 6, atol=0.01)
        crops += not whole
        flips += bool(whole and boxes[0, 0] > 24)
    assert 70 <= crops <= 130                                         # 100 expected, standard deviation 7
    assert 0.33 <= flips / (200 - crops) <= 0.67


def test_a_crop_is_384_to_600_pixels_of_a_picture_whose_shorter_side_is_400_500_or_600():
    """Seen in a picture whose red and green say where a pixel comes from; resizing changes nothing else."""
    ramp = np.zeros((480, 640, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 255, 640)[None], np.linspace(0, 255, 480)[:, None]
    transform = data.Transform(shortest=(400,), longest=10 ** 9, crop=1.0)
    widths, heights = [], []                                          # of the window, as shares of the picture
    for seed in range(60):
        picture, _, _ = transform(Image.fromarray(ramp), torch.zeros(0, 4), np.random.default_rng(seed))
        red, green, _ = np.asarray(picture, float).transpose(2, 0, 1)
        widths.append(np.ptp(red) / 255), heights.append(np.ptp(green) / 255)
    assert 384 / 800 - 0.03 < min(widths) < 0.6 and 0.9 < max(widths)
    assert 384 / 600 - 0.03 < min(heights) < 0.7 and 0.95 < max(heights)


@settings(max_examples=60)
@given(RECTANGLES, st.integers(0, 999))
def test_the_box_is_where_the_pixels_are_in_centernets_square(box, seed):
    picture, boxes, kept = data.Transform(square=512, flip=0.5)(*rectangle(box), np.random.default_rng(seed))
    assert picture.size == (512, 512)
    found = seen(picture)
    if kept[0] and min(boxes[0, 2:] - boxes[0, :2]) > 3:
        assert np.allclose(found, boxes[0], atol=1.5)
    elif not kept[0]:
        assert found is None


def test_centernets_square_is_0p6_to_1p3_of_the_longer_side_around_a_point_128_pixels_inside():
    """A box of 64 pixels in a picture of 640 x 480 becomes 64 * 512 / (640 * s); s takes each of its eight values."""
    scales, centres = [], []
    for seed in range(300):
        _, boxes, kept = data.Transform(square=512)(*rectangle([288, 208, 352, 272]), np.random.default_rng(seed))
        if (boxes[0] > 0).all() and (boxes[0] < 512).all():
            scale = 64 / float(boxes[0, 2] - boxes[0, 0]) * 512 / 640
            scales.append(round(scale, 3))
            centres.append(((256 - (boxes[0, :2] + boxes[0, 2:]) / 2) * scale * 640 / 512 + torch.tensor([320, 240])).tolist())
    assert set(scales) == {0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3}
    x, y = np.transpose(centres)
    assert 127 < x.min() < 160 and 480 < x.max() < 513 and 127 < y.min() < 160 and 320 < y.max() < 353


def test_colours_vary_as_much_as_asked_and_only_the_colours():
    grey = Image.new("RGB", (40, 30), (100, 100, 100))
    mean = [np.asarray(data.vary_colours(grey, 0.4, 0.1, np.random.default_rng(seed)), float).mean((0, 1)) for seed in range(200)]
    lightness = np.mean(mean, 1)
    assert 45 < lightness.min() < 75 and 125 < lightness.max() < 155 and 90 < lightness.mean() < 110
    assert np.ptp(mean, 1).max() >= 1                                 # the noise along the colour axes tints greys
    picture, boxes, _ = data.Transform(shortest=(), colours=0.4)(*rectangle([100, 100, 300, 200]), np.random.default_rng(0))
    assert picture.size == (640, 480) and boxes[0].tolist() == [100, 100, 300, 200]


def test_boxes_are_clipped_and_emptied_boxes_marked():
    boxes = [[-10, 5, 20, 60], [90, 10, 130, 20], [100, 0, 120, 20], [5, 5, 9, 9], [30, -9, 40, 0]]
    transform, picture = data.Transform(shortest=(100,)), Image.new("RGB", (100, 50))
    picture, moved, kept = transform(picture, torch.tensor(boxes).float(), np.random.default_rng(0))
    assert picture.size == (200, 100)
    assert kept.tolist() == [True, True, False, True, False]
    assert moved[kept].tolist() == [[0, 10, 40, 100], [180, 20, 200, 40], [10, 10, 18, 18]]


def test_the_target_says_the_resized_and_the_original_size(folder):
    pictures = data.Pictures(data.read_annotations(*save(folder, valid())), data.Transform(shortest=(60,), longest=70))
    image, target = pictures[0, 0]                                    # 30 x 40 to 52.5 x 70
    assert image.dtype == torch.uint8 and image.shape == (3, 53, 70)
    assert target["size"].tolist() == [53, 70] and target["original_size"].tolist() == [30, 40]
    assert torch.allclose(target["boxes"], torch.tensor([[0.5, 1.25, 9, 5.25]]) * torch.tensor([1.75, 53 / 30] * 2))


# ------------------------------------------------------------------------------------------------
# order, augmentation, batches
# ------------------------------------------------------------------------------------------------

def scene_pictures(folder, seed=0):
    annotations = data.read_annotations(folder / "train.json", folder / "train")
    return data.Pictures(annotations, data.Transform(shortest=(96, 128, 160), longest=160, flip=0.5, crop=0.5), seed)


def same(one, other):
    """Two batches agree to the byte."""
    images, mask, targets = one
    return torch.equal(images, other[0]) and torch.equal(mask, other[1]) and all(
        a["image_id"] == b["image_id"] and all(torch.equal(a[k], b[k]) for k in a if k != "image_id")
        for a, b in zip(targets, other[2], strict=True))


def test_batches_do_not_depend_on_the_number_of_worker_processes(tiny_scenes):
    pictures = scene_pictures(tiny_scenes)
    keys = list(islice(data.training_batches(pictures.annotations, 8, seed=0), 5))
    alone = list(data.loader(pictures, keys, workers=0))
    assert len(alone) == 5
    assert all(same(a, b) for a, b in zip(alone, data.loader(pictures, keys, workers=2), strict=True))


def test_an_item_depends_on_seed_epoch_and_index_and_on_nothing_else(tiny_scenes):
    first, again, other = scene_pictures(tiny_scenes), scene_pictures(tiny_scenes), scene_pictures(tiny_scenes, seed=1)
    expected = data.collate([first[4, i] for i in range(8)])
    torch.manual_seed(99), np.random.seed(99), [again[5, i] for i in (7, 3)]          # none of which matters
    assert same(expected, data.collate([again[4, i] for i in range(8)]))
    assert not same(expected, data.collate([first[5, i] for i in range(8)]))
    assert not same(expected, data.collate([other[4, i] for i in range(8)]))


def test_loading_leaves_the_global_random_state_alone(tiny_scenes):
    pictures = scene_pictures(tiny_scenes)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(data.loader(pictures, [[(0, 0), (0, 1)]]))
    assert torch.equal(torch.rand(1), expected)


MANY_SIZES = st.lists(st.sampled_from([(30, 40), (40, 30), (30, 30), (90, 20)]), min_size=1, max_size=30)
few = settings(max_examples=40)


@few
@given(MANY_SIZES, st.integers(1, 8), st.integers(0, 99), st.integers(0, 25))
def test_resuming_at_a_step_continues_the_same_order(sizes, batch_size, seed, start):
    a = sizes_only(sizes)
    whole = list(islice(data.batch_stream(a, batch_size, seed), start + 5))
    assert list(islice(data.training_batches(a, batch_size, seed, start=start), 5)) == whole[start:]


@few
@given(MANY_SIZES, st.integers(0, 99), st.integers(0, 9), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_the_processes_micro_batches_together_are_the_batch(sizes, seed, start, world, accumulate, each):
    a, batch_size = sizes_only(sizes), world * accumulate * each
    stream = list(islice(data.batch_stream(a, batch_size, seed), start + 4))[start:]
    shares = [list(islice(data.training_batches(a, batch_size, seed, start, rank, world, accumulate), 4 * accumulate))
              for rank in range(world)]
    for step, expected in enumerate(stream):
        parts = [part for share in shares for part in share[step * accumulate:(step + 1) * accumulate]]
        assert [len(part) for part in parts] == [each] * (world * accumulate)
        assert sorted(key for part in parts for key in part) == sorted(expected)


@few
@given(MANY_SIZES, st.integers(1, 8), st.integers(0, 99))
def test_every_picture_comes_once_per_epoch_in_batches_of_one_orientation(sizes, batch_size, seed):
    """The first epoch's left-overs are out, at the latest, when a picture alone in its bucket has filled a batch."""
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
    assert sorted(next(data.batch_stream(a, 3, seed=0, skip_empty=True))) == [(0, 0), (0, 2), (0, 4)]
    assert sorted(i for _, i in next(data.batch_stream(a, 5, seed=0))) == [0, 1, 2, 3, 4]


def test_every_epoch_and_every_seed_has_its_own_order():
    a = sizes_only([(30, 40)] * 50)
    epochs = list(islice(data.batch_stream(a, 50, seed=0), 3)) + list(islice(data.batch_stream(a, 50, seed=1), 3))
    orders = [[i for _, i in batch] for batch in epochs]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6 and list(range(50)) not in orders


@few
@given(st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=4), st.sampled_from([1, 32]))
def test_collate_pads_right_and_bottom_and_masks_exactly_the_padding(sizes, divisor):
    samples = [(torch.full((3, h, w), n + 1, dtype=torch.uint8), {"image_id": n}) for n, (h, w) in enumerate(sizes)]
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
    batches = [batch for rank in range(world) for batch in data.evaluation_batches(a, batch_size, rank, world)]
    assert sorted(key for batch in batches for key in batch) == [(0, i) for i in range(len(sizes))]
    assert all(1 <= len(batch) <= batch_size for batch in batches)


# ------------------------------------------------------------------------------------------------
# Pascal VOC
# ------------------------------------------------------------------------------------------------

def voc_object(name, box, extra=""):
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
    return f"<object><name>{name}</name>{extra}<bndbox>{corners}</bndbox></object>"


def voc_xml(name, inside):
    size = "<size><width>40</width><height>30</height></size>"
    return f"<annotation><filename>{name}.jpg</filename>{size}{inside}</annotation>"


@pytest.fixture
def voc(tmp_path):
    """Two pictures: a has a dog and a difficult cat, b nothing; a is in train, both are in trainval."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / "VOC" / name).mkdir(parents=True)
    objects = voc_object("dog", (5, 6, 25, 16)) + voc_object("cat", ("1.5", 2, 9, 8), "<difficult>1</difficult>")
    for name, inside in (("a", objects), ("b", "")):
        Image.new("RGB", (40, 30)).save(tmp_path / "VOC" / "JPEGImages" / f"{name}.jpg")
        (tmp_path / "VOC" / "Annotations" / f"{name}.xml").write_text(voc_xml(name, inside))
    (tmp_path / "VOC" / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    (tmp_path / "VOC" / "ImageSets" / "Main" / "trainval.txt").write_text("b\na\n")
    return tmp_path / "VOC"


def test_voc_becomes_coco_that_the_reader_reads(voc, tmp_path):
    written = data.voc2coco(voc, tmp_path / "out")
    assert [Path(file).name for file in written] == ["train.json", "trainval.json"]
    train, both = (data.read_annotations(file, voc / "JPEGImages") for file in written)
    assert train.file_names == ["a.jpg"] and both.file_names == ["b.jpg", "a.jpg"] and both.first.tolist() == [0, 0, 2]
    assert train.class_names == both.class_names == ["cat", "dog"]
    assert both.boxes.tolist() == [[5, 6, 25, 16], [1.5, 2, 9, 8]]    # edges, so the dog is 20 pixels wide
    assert both.labels.tolist() == [1, 0] and both.crowd.tolist() == [False, True]
    assert json.loads(Path(written[0]).read_text())["annotations"][0]["area"] == 200


def test_vocs_own_lists_of_one_class_are_read_too(voc, tmp_path):
    """Pascal VOC's ImageSets/Main also holds dog_train.txt and the like: a name and 1, -1 or 0 a line."""
    (voc / "ImageSets" / "Main" / "dog_trainval.txt").write_text("a  1\nb -1\n")
    data.voc2coco(voc, tmp_path / "out")
    assert data.read_annotations(tmp_path / "out" / "train.json", voc / "JPEGImages").file_names == ["a.jpg"]


@pytest.mark.parametrize("xml", [
    None, "", "<annotation>", "<annotation></annotation>", voc_xml("a", "<object><name>dog</name></object>"),
    voc_xml("a", voc_object("dog", ("five", 6, 25, 16))), voc_xml("a", voc_object("dog", (5, 6, 25)))])
def test_a_broken_voc_annotation_is_named(voc, tmp_path, xml):
    (voc / "Annotations" / "a.xml").unlink()
    if xml is not None:
        (voc / "Annotations" / "a.xml").write_text(xml)
    with pytest.raises(data.DataError, match="a.xml"):
        data.voc2coco(voc, tmp_path / "out")


def test_a_voc_object_without_a_name_is_named(voc, tmp_path):
    file = voc / "Annotations" / "a.xml"
    file.write_text(file.read_text().replace("<name>dog</name>", ""))
    with pytest.raises(data.DataError, match="a.xml"):
        data.voc2coco(voc, tmp_path / "out")


def test_a_voc_box_without_extent_is_carried_over_for_the_check_to_find(voc, tmp_path):
    file = voc / "Annotations" / "a.xml"
    file.write_text(file.read_text().replace("<xmax>25</xmax>", "<xmax>5</xmax>"))
    written = data.voc2coco(voc, tmp_path / "out")
    with pytest.raises(data.DataError, match="no extent"):
        data.read_annotations(written[0], voc / "JPEGImages")


# ------------------------------------------------------------------------------------------------
# the check and the command line
# ------------------------------------------------------------------------------------------------

def one_of_each_fault(folder):
    """A data set with every kind of fault.  Returns its files, and a list of (kind, what its line must name)."""
    pictures = folder / "pictures"
    Image.new("RGB", (40, 30)).save(pictures / "small.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(pictures / "cut.jpg")
    (pictures / "cut.jpg").write_bytes((pictures / "cut.jpg").read_bytes()[:900])
    size = {"height": 30, "width": 40}
    box = {"image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4]}
    content = valid()
    content["categories"] += [{"name": "nameless"}, {"id": 3, "name": "again"}]
    content["images"] += [
        {"file_name": "nothing.png", **size}, {"id": 5, "file_name": "twice.png", **size},
        {"id": 11, "file_name": "../up.png", **size}, {"id": 12, "file_name": "/top.png", **size},
        {"id": 13, "file_name": "a.png", "height": 0, "width": 40}, {"id": 14, "file_name": "missing.png", **size},
        {"id": 15, "file_name": "small.png", "height": 300, "width": 400}, {"id": 16, "file_name": "cut.jpg", **size}]
    content["annotations"] += [
        "no object", {**box, "id": 1}, {**box, "id": 21, "image_id": 99}, {**box, "id": 22, "category_id": 77},
        {**box, "id": 23, "bbox": [1, 2, float("nan"), 4]}, {**box, "id": 24, "bbox": [9, 9, -3, 4]},
        {**box, "id": 25, "bbox": [50, 9, 3, 4]}, {**box, "id": 26, "bbox": [50, 9, 3, 4]}]
    return save(folder, content), [
        ("category without id", ["nameless"]), ("duplicate category id", ["category id 3"]),
        ("image without id", ["nothing.png"]), ("duplicate image id", ["image id 5"]),
        ("bad file name", ["image 11", "../up.png"]), ("bad file name", ["image 12", "/top.png"]),
        ("bad image size", ["image 13"]), ("missing picture", ["image 14", "missing.png"]),
        ("picture size differs", ["image 15", "small.png", "40 x 30", "400 x 300"]),
        ("unreadable picture", ["image 16", "cut.jpg"]), ("broken annotation", ["annotation number 3"]),
        ("duplicate annotation id", ["image 7", "annotation 1"]), ("unknown image", ["image 99", "annotation 21"]),
        ("unknown category", ["image 7", "annotation 22", "77"]),
        ("box is not four finite numbers", ["image 7", "annotation 23"]),
        ("box without extent", ["image 7", "annotation 24"]),
        ("box outside the picture", ["image 7", "annotation 25"]),
        ("box outside the picture", ["image 7", "annotation 26"])]


def test_the_check_reports_every_fault_in_one_pass_with_counts(folder):
    files, expected = one_of_each_fault(folder)
    out = io.StringIO()
    assert data.check(*files, out=out) == len(expected)
    lines = out.getvalue().splitlines()
    for _, words in expected:
        assert sum(all(word in line for word in words) for line in lines[:len(expected)]) == 1, words
    assert all("set.json" in line or "pictures" in line for line in lines[:len(expected)])
    kinds = [kind for kind, _ in expected]
    counts = lines[lines.index(f"{len(expected)} fault(s)") + 1:]
    assert sorted(counts) == sorted({f"  {kind}: {kinds.count(kind)}" for kind in kinds})


def test_the_check_counts_pictures_boxes_and_classes(folder):
    out = io.StringIO()
    assert data.check(*save(folder, changed("annotations", 1, image_id=5)), out=out) == 0
    assert "2 pictures (1 without boxes), 3 usable boxes, 1 of them crowd" in out.getvalue()
    assert "  car: 1\n  toothbrush: 1\n0 fault(s)\n" in out.getvalue()


def test_check_exits_with_0_without_faults(folder, command):
    json_file, images = save(folder, valid())
    code, _, err = command(data, "check", "--json", json_file, "--images", images)
    assert (code, err) == (0, "")


def test_check_exits_with_1_with_faults(folder):
    (json_file, images), expected = one_of_each_fault(folder)
    done = subprocess.run([sys.executable, ROOT / "data.py", "check", "--json", json_file, "--images", images],
                          capture_output=True, text=True)
    assert done.returncode == 1 and f"{len(expected)} fault(s)" in done.stdout and not done.stderr


@pytest.mark.parametrize("content", ["{", "[]", '{"images": [], "annotations": [], "categories": []}', "\udcff", None])
def test_check_exits_with_2_and_one_line_when_nothing_can_be_read(tmp_path, command, content):
    if content is not None:
        (tmp_path / "set.json").write_bytes(content.encode(errors="surrogateescape"))
    code, _, said = command(data, "check", "--json", tmp_path / "set.json", "--images", tmp_path)
    assert code == 2 and said.count("\n") == 1 and said.startswith(f"data.py: {tmp_path / 'set.json'}: ")


def test_voc2coco_exits_with_2_and_one_line_when_there_is_no_voc_folder(tmp_path, command):
    code, _, said = command(data, "voc2coco", tmp_path, "--out", tmp_path / "out")
    assert code == 2 and said.count("\n") == 1 and str(tmp_path) in said


# ------------------------------------------------------------------------------------------------
# where the data lies
# ------------------------------------------------------------------------------------------------

def test_coco_is_looked_for_where_its_archives_unpack(tmp_path):
    with pytest.raises(data.DataError, match="annotations_trainval2017.zip"):
        data.locate({"data": "coco", "data_dir": str(tmp_path)}, "val")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text("{}")
    with pytest.raises(data.DataError, match="val2017.zip"):
        data.locate({"data": "coco", "data_dir": str(tmp_path)}, "val")
    (tmp_path / "val2017").mkdir()
    expected = str(tmp_path / "annotations" / "instances_val2017.json"), str(tmp_path / "val2017")
    assert data.locate({"data": "coco", "data_dir": str(tmp_path)}, "val") == expected


def test_custom_data_needs_both_flags():
    flags = {"data": "custom", "val_json": "v.json", "val_images": "v", "train_json": "t.json"}
    assert data.locate(flags, "val") == ("v.json", "v")
    with pytest.raises(data.DataError, match="--train-json and --train-images"):
        data.locate(flags, "train")
