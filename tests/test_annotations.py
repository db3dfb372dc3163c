"""Reading files without trusting them (oracles: PIL, torchvision, pixels, counting by hand)."""
import copy
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.ops import clip_boxes_to_image

import annotations
import data
import detect

ROOT = Path(annotations.__file__).parent
RED, BLUE = (255, 0, 0), (0, 0, 255)


def draw_pictures(folder):
    """The two pictures that `valid` describes:
    a.png (40 wide, 30 high) and b.png (30 wide, 40 high).
    """
    (folder / "pictures").mkdir()
    Image.new("RGB", (40, 30), RED).save(folder / "pictures" / "a.png")
    Image.new("RGB", (30, 40), BLUE).save(folder / "pictures" / "b.png")
    return folder


def valid():
    """A faultless data set: two pictures, three boxes,
    two classes whose ids have gaps and are not in order.
    """
    return {"images": [{"id": 7, "file_name": "a.png", "height": 30, "width": 40},
                       {"id": 5, "file_name": "b.png", "height": 40, "width": 30}],
            "annotations": [{"id": 1, "image_id": 5, "category_id": 90,
                             "bbox": [1, 2, 10, 20], "iscrowd": 0},
                            {"id": 2, "image_id": 7, "category_id": 3,
                             "bbox": [0.5, 1.25, 8.5, 4], "iscrowd": 0},
                            {"id": 3, "image_id": 5, "category_id": 3,
                             "bbox": [0, 0, 30, 40], "iscrowd": 1}],
            "categories": [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}]}


def save(folder, content):
    """Write `content` as set.json; returns what the reader wants:
    the JSON file and the picture folder.
    """
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "set.json").write_text(text, encoding="utf-8")
    return folder / "set.json", folder / "pictures"


def write_lines(file, records):
    """Write an .odgt file: one record, or one line of text as it is, a line."""
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    file.write_text("".join(line + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw_pictures(tmp_path_factory.mktemp("set"))


# ------------------------------------------------------------------------------------------------
# what the reader makes of a COCO file
# ------------------------------------------------------------------------------------------------

def test_labels_are_ranks_of_category_ids_and_names_are_kept(folder):
    a = annotations.read_annotations(*save(folder, valid()))
    assert a.category_ids == [3, 90] and a.class_names == ["car", "toothbrush"]
    # picture 7 first, as in the file
    assert a.labels.tolist() == [0, 1, 0]


def test_pictures_keep_the_order_of_the_file_and_boxes_follow_their_picture(folder):
    a = annotations.read_annotations(*save(folder, valid()))
    assert a.image_ids == [7, 5] and a.file_names == ["a.png", "b.png"]
    assert a.sizes.tolist() == [[30, 40], [40, 30]]
    assert a.first.tolist() == [0, 1, 3]
    assert a.boxes.tolist() == [[0.5, 1.25, 9, 5.25], [1, 2, 11, 22], [0, 0, 30, 40]]
    assert a.crowd.tolist() == [False, False, True]


def test_ids_may_be_text(folder):
    content = valid()
    content["images"][0]["id"] = content["annotations"][1]["image_id"] = "first"
    with pytest.raises(annotations.DataError, match="mix"):
        annotations.read_annotations(*save(folder, content))
    content["images"][1]["id"] = "5"
    for n in (0, 2):
        content["annotations"][n]["image_id"] = "5"
    content["categories"] = [{"id": "zebra", "name": "Zebra"}, {"id": "ant", "name": "Ant"}]
    for annotation, category in zip(content["annotations"], ["zebra", "ant", "ant"]):
        annotation["category_id"] = category
    a = annotations.read_annotations(*save(folder, content))
    assert a.image_ids == ["first", "5"]
    assert a.category_ids == ["ant", "zebra"] and a.class_names == ["Ant", "Zebra"]
    assert a.labels.tolist() == [0, 1, 0]


def test_boxes_are_cut_at_the_picture(folder):
    content = valid()
    # of a.png, 40 x 30
    content["annotations"][1]["bbox"] = [-5, 10.5, 100, 100]
    a = annotations.read_annotations(*save(folder, content))
    assert a.boxes[0].tolist() == [0, 10.5, 40, 30]


CORNERS = [st.floats(-50, 90, width=32)] * 2
EXTENTS = [st.floats(0.125, 90, width=32)] * 2


@settings(max_examples=40)
@given(st.lists(st.tuples(*CORNERS, *EXTENTS), max_size=8))
def test_every_box_is_kept_as_torchvision_clips_it_or_reported(folder, boxes):
    content = valid()
    content["annotations"] = [{"id": n, "image_id": 7, "category_id": 3, "bbox": box}
                              for n, box in enumerate(boxes)]
    a, faults = annotations.parse_coco(*save(folder, content))
    xyxy = torch.tensor([(x, y, x + w, y + h) for x, y, w, h in boxes], dtype=torch.float64)
    xyxy = xyxy.reshape(-1, 4)
    clipped = clip_boxes_to_image(xyxy, (30, 40))
    inside = (clipped[:, 2:] - clipped[:, :2] > 1e-5).all(1)
    assert torch.equal(a.boxes, clipped[inside].float())
    assert len(faults) == (~inside).sum()
    assert all(f.box and f.kind == "box outside the picture" for f in faults)


# ------------------------------------------------------------------------------------------------
# faults: (what is done to a valid data set, what the message must name)
# ------------------------------------------------------------------------------------------------

def changed(key, n, **values):
    """A valid data set with other values in entry n of images, annotations or categories."""
    content = valid()
    content[key][n].update(values)
    return content


def with_more(key, *entries):
    content = valid()
    content[key] += entries
    return content


def picture(**values):
    """With other values in a.png's entry, image 7."""
    return changed("images", 0, **values)


def annotation(**values):
    """With other values in the annotation of image 7, annotation 2."""
    return changed("annotations", 1, **values)


IN_2 = ["image 7", "annotation 2"]
FAULTS = {
    "broken JSON": ('{"images": [', ["not valid JSON"]),
    "an empty file": ("", ["not valid JSON"]),
    "nested beyond reason": ("[" * 100_000, ["not valid JSON"]),
    "a number of 5,000 digits": ('{"images": ' + "1" * 5000 + "}", ["not valid JSON"]),
    "a list": ([], ["not a COCO data set"]),
    "a result file": ([{"image_id": 5, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.5}],
                      ["evaluate.py results"]),
    "a number": (3, ["not a COCO data set"]),
    "no categories": ({"images": [], "annotations": []}, ["categories"]),
    "annotations is an object": ({**valid(), "annotations": {}}, ["annotations"]),
    "an empty data set": ({**valid(), "images": [], "annotations": []}, ["empty"]),

    "no size of a missing picture": (picture(file_name="c.png", height=None),
                                     ["image 7", "c.png", "does not exist"]),
    "iscrowd of another kind": (annotation(iscrowd="maybe"), [*IN_2, "iscrowd 'maybe'", "0 or 1"]),
    "a text for a number": (annotation(image_id="7"), ["image '7'", "annotation 2"]),

    "a category id that is not listed": (annotation(category_id=4), [*IN_2, "4"]),
    "a category id that is no id": (annotation(category_id=[3]), [*IN_2, "[3]"]),
    "category ids of two types": (with_more("categories", {"id": "x", "name": "x"}),
                                  ["category ids"]),
    "a category listed twice": (with_more("categories", {"id": 3, "name": "x"}),
                                ["category id 3", "twice"]),
    "a category without id": (with_more("categories", {"name": "x"}), ["no id"]),

    "a NaN box": (annotation(bbox=[1, float("nan"), 3, 4]), [*IN_2, "nan"]),
    "an infinite box": (annotation(bbox=[1, 2, float("inf"), 4]), [*IN_2, "inf"]),
    "a box of three numbers": (annotation(bbox=[1, 2, 3]), [*IN_2, "[1, 2, 3]"]),
    "a box of text": (annotation(bbox=["1", "2", "3", "4"]), [*IN_2, "'1'"]),
    "a box beyond floats": (annotation(bbox=[0, 0, 10 ** 400, 4]), IN_2),
    "no box": (annotation(bbox=None), IN_2),
    "a negative extent": (annotation(bbox=[9, 9, -3, 4]), [*IN_2, "-3"]),
    "no extent": (annotation(bbox=[9, 9, 3, 0]), [*IN_2, "no extent"]),
    "a box outside": (annotation(bbox=[40, 3, 5, 5]), [*IN_2, "40 x 30"]),

    "a duplicate image id": (changed("images", 1, id=7), ["image id 7", "twice"]),
    "a duplicate annotation id": (changed("annotations", 2, id=2),
                                  ["image 5", "annotation 2", "twice"]),
    "an unknown image id": (annotation(image_id=8), ["image 8", "annotation 2"]),
    "an image id that is no id": (annotation(image_id=[7]), ["annotation 2"]),
    "an annotation that is no object": (with_more("annotations", 3), ["annotation number 3"]),
    "an image that is no object": (with_more("images", 3), ["no id"]),
    "an image without id": (with_more("images", {"file_name": "a.png", "height": 30, "width": 40}),
                            ["no id", "a.png"]),

    "a way up": (picture(file_name="../pictures/a.png"),
                 ["image 7", "../pictures/a.png", "leaves"]),
    "a way up inside": (picture(file_name="x/../../set.json"), ["image 7", "leaves"]),
    "a way up with backslashes": (picture(file_name="..\\a.png"), ["image 7", "leaves"]),
    "an absolute name": (picture(file_name="/etc/passwd"), ["image 7", "/etc/passwd", "leaves"]),
    "an absolute Windows name": (picture(file_name="C:\\a.png"), ["image 7", "leaves"]),
    "no file name": (picture(file_name=None), ["image 7", "file_name"]),
    "a file name too long for a file": (picture(file_name="a" * 5000), ["image 7"]),
    "a negative height": (picture(height=-30), ["image 7", "height"]),
    "a height of text": (picture(height="30"), ["image 7", "height"]),
    "a height beyond integers": (picture(height=1e30), ["image 7", "height"]),
    "a height beyond floats": (picture(height=10 ** 400), ["image 7", "height"]),
    "a missing picture": (picture(file_name="c.png"), ["image 7", "c.png", "does not exist"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_data_set_is_refused_in_one_sentence_with_file_image_and_annotation(folder, fault):
    content, words = FAULTS[fault]
    with pytest.raises(annotations.DataError) as error:
        annotations.read_annotations(*save(folder, content))
    assert all(word in str(error.value) for word in ["set.json", *words])
    assert "\n" not in str(error.value)


def test_without_the_file_or_the_picture_folder_the_message_names_it(folder, tmp_path):
    # a folder is no file
    for file in (tmp_path / "none.json", tmp_path):
        with pytest.raises(annotations.DataError, match=str(file)):
            annotations.read_annotations(file, folder / "pictures")
    with pytest.raises(annotations.DataError, match="nowhere"):
        annotations.read_annotations(save(folder, valid())[0], tmp_path / "nowhere")


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
                    lambda inner: (st.lists(inner, max_size=4)
                                   | st.dictionaries(st.text(max_size=5), inner, max_size=3)),
                    max_leaves=6)


def places(node, path=()):
    """The path of every value inside a JSON document, itself included."""
    inner = ()
    if isinstance(node, dict):
        inner = node.items()
    elif isinstance(node, list):
        inner = enumerate(node)
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
        except (KeyError, IndexError, TypeError):
            # an earlier change took this place away
            pass
    json_file, images = save(folder, content)
    try:
        reported = annotations.check(json_file, images, out=io.StringIO())
    except annotations.DataError:
        # nothing in it can be read
        reported = 1
    if not reported:
        a = annotations.read_annotations(json_file, images)
        assert a.boxes.isfinite().all() and (a.boxes[:, 2:] > a.boxes[:, :2]).all()
        assert a.labels.numel() == 0 or 0 <= a.labels.min() and a.labels.max() < len(a.class_names)


def test_drop_bad_boxes_leaves_out_the_bad_boxes_only_and_says_how_many(folder, capsys):
    bad = [[1, float("nan"), 3, 4], [9, 9, 0, 4], [40, 3, 5, 5]]
    content = valid()
    for n, box in enumerate(bad):
        broken = {"id": 10 + n, "image_id": 7, "category_id": 3, "bbox": box}
        content["annotations"].insert(n, broken)
    whole = annotations.read_annotations(*save(folder, valid()))
    a = annotations.read_annotations(*save(folder, content), drop_bad_boxes=True)
    assert torch.equal(a.boxes, whole.boxes) and torch.equal(a.first, whole.first)
    said = capsys.readouterr()
    assert "dropped 3 bad box" in said.err and "annotation 10" in said.err and not said.out


def test_drop_bad_boxes_still_refuses_other_faults(folder):
    content = changed("annotations", 1, category_id=4)
    content["annotations"][0]["bbox"] = [9, 9, 0, 4]
    with pytest.raises(annotations.DataError, match="category id 4"):
        annotations.read_annotations(*save(folder, content), drop_bad_boxes=True)


# ------------------------------------------------------------------------------------------------
# CrowdHuman's files
# ------------------------------------------------------------------------------------------------

def person(x, y, w, h, **extra):
    return {"tag": "person", "fbox": [x, y, w, h], "vbox": [x, y, w, h], "hbox": [x, y, 5, 5],
            "head_attr": {}, "extra": extra}


def draw_crowd_pictures(folder):
    """The pictures of `GOOD`, 80 wide and 60 high: Images/a.jpg and Images/b.png."""
    (folder / "Images").mkdir()
    for name in ("a.jpg", "b.png"):
        Image.new("RGB", (80, 60)).save(folder / "Images" / name)
    return folder


@pytest.fixture
def crowd_folder(tmp_path):
    return draw_crowd_pictures(tmp_path)


GOOD = [{"ID": "a", "gtboxes": [person(-10, 5, 40, 80), person(30, 5, 20, 40, ignore=1),
                                {**person(0, 0, 30, 20), "tag": "mask", "extra": {"ignore": 1}}]},
        {"ID": "b", "gtboxes": []}]


def test_full_boxes_are_clipped_and_ignored_ones_never_targets(crowd_folder):
    file = write_lines(crowd_folder / "f.odgt", GOOD)
    a = annotations.read_annotations(file, crowd_folder / "Images")
    assert a.image_ids == ["a", "b"] and a.file_names == ["a.jpg", "b.png"]
    assert a.sizes.tolist() == [[60, 80]] * 2
    assert a.boxes.tolist() == [[0, 5, 30, 60], [30, 5, 50, 45], [0, 0, 30, 20]]
    assert a.crowd.tolist() == [False, True, True] and a.first.tolist() == [0, 3, 3]
    _, target = data.Pictures(a, data.Transform((60,), 80))[0, 0]
    assert target["boxes"].tolist() == [[0, 5, 30, 60]] and len(target["ignore"]) == 2


def test_a_line_in_the_published_shape_is_read_as_six_persons_and_a_mask(tmp_path):
    """The fields, the ID with a comma and the mask of CrowdHuman's own lines, with other boxes."""
    persons = [person(100 * n, 10, 90, 300, box_id=n, occ=1) for n in range(6)]
    mask = {"tag": "mask", "hbox": [5, 5, 9, 9], "head_attr": {}, "fbox": [5, 5, 90, 90],
            "vbox": [5, 5, 9, 9], "extra": {"ignore": 1}}
    line = {"ID": "283554,35288000868e92d4", "gtboxes": [*persons, mask]}
    (tmp_path / "Images").mkdir()
    Image.new("RGB", (700, 400)).save(tmp_path / "Images" / "283554,35288000868e92d4.jpg")
    a = annotations.read_annotations(write_lines(tmp_path / "f.odgt", [line]), tmp_path / "Images")
    assert a.crowd.tolist() == [False] * 6 + [True]


def test_sizes_are_read_once_and_kept_outside_the_data_folder(
        crowd_folder, tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("out") / "sizes.json"
    file = write_lines(crowd_folder / "f.odgt", GOOD)
    before = sorted(crowd_folder.rglob("*"))
    first = annotations.read_annotations(file, crowd_folder / "Images", cache=cache)
    assert json.loads(cache.read_text())["sizes"] == {"a": [60, 80], "b": [60, 80]}
    monkeypatch.setattr(annotations, "picture_size", lambda path: pytest.fail("opened again"))
    again = annotations.read_annotations(file, crowd_folder / "Images", cache=cache)
    assert torch.equal(first.sizes, again.sizes) and sorted(crowd_folder.rglob("*")) == before
    monkeypatch.undo()
    images = str((crowd_folder / "Images").resolve())
    half = json.dumps({"images": images, "sizes": {"a": 5}})
    for broken in ("{ broken", "[1]", '{"a": 5}', half):
        cache.write_text(broken)
        a = annotations.read_annotations(file, crowd_folder / "Images", cache=cache)
        assert a.sizes.tolist() == [[60, 80]] * 2
    # the same IDs in another folder
    (crowd_folder / "smaller").mkdir()
    for name in ("a.jpg", "b.png"):
        Image.new("RGB", (40, 30)).save(crowd_folder / "smaller" / name)
    a = annotations.read_annotations(file, crowd_folder / "smaller", cache=cache)
    assert a.sizes.tolist() == [[30, 40]] * 2


LINE_FAULTS = {
    "broken line": "{",
    "missing field": {"gtboxes": []},
    "duplicate ID": GOOD[0],
    "missing picture": {"ID": "c", "gtboxes": []},
    "unknown tag": {"ID": "b", "gtboxes": [{**person(1, 1, 9, 9), "tag": "dog"}]},
    "box is not four finite numbers": {"ID": "b", "gtboxes": [person(1, float("nan"), 9, 9)]},
    "box without extent in the picture": {"ID": "b", "gtboxes": [person(200, 1, 9, 9)]},
    "ignore is neither 0 nor 1": {"ID": "b", "gtboxes": [person(1, 1, 9, 9, ignore="maybe")]},
}


@pytest.mark.parametrize("kind", LINE_FAULTS)
def test_every_fault_is_told_by_line_and_counted_by_the_check(crowd_folder, command, kind):
    file = write_lines(crowd_folder / "f.odgt", [GOOD[0], LINE_FAULTS[kind]])
    with pytest.raises(annotations.DataError, match="line 2"):
        annotations.read_annotations(file, crowd_folder / "Images")
    code, out, _ = command(annotations, "check", "--json", file,
                           "--images", crowd_folder / "Images")
    assert code == 1 and f"  {kind}: 1" in out and "line 2" in out


def test_a_size_that_no_picture_has_is_as_good_as_none(crowd_folder):
    """The picture itself tells."""
    line = {**GOOD[0], "height": 1e29, "width": 40}
    file = write_lines(crowd_folder / "f.odgt", [line])
    own = annotations.read_annotations(write_lines(crowd_folder / "g.odgt", GOOD[:1]),
                                       crowd_folder / "Images")
    found = annotations.read_annotations(file, crowd_folder / "Images")
    assert found.sizes.tolist() == own.sizes.tolist()


def test_an_ignored_box_outside_the_picture_is_no_fault(crowd_folder):
    """The published masks often stick out."""
    line = {"ID": "a", "gtboxes": [person(200, 1, 9, 9, ignore=1), person(1, 1, 9, 9)]}
    file = write_lines(crowd_folder / "f.odgt", [line])
    assert annotations.read_annotations(file, crowd_folder / "Images").crowd.tolist() == [False]


# ------------------------------------------------------------------------------------------------
# COCO files as people have them
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_file_with_a_mark_of_its_encoding_is_read(folder, encoding):
    content = changed("categories", 1, name="Käfer")
    json_file, images = save(folder, content)
    json_file.write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    assert annotations.read_annotations(json_file, images).class_names == ["Käfer", "toothbrush"]


def test_another_encoding_is_named_with_its_byte(folder):
    json_file, images = save(folder, valid())
    json_file.write_bytes(json.dumps(valid()).replace("car", "K\xe4fer").encode("latin-1"))
    with pytest.raises(annotations.DataError, match="set.json: not in UTF-8: byte 0xe4"):
        annotations.read_annotations(json_file, images)


def test_whole_floats_are_the_numbers_they_are(folder):
    text = json.dumps(valid())
    for field in ("id", "image_id", "category_id"):
        text = re.sub(rf'"{field}": (\d+)', rf'"{field}": \1.0', text)
    assert '"image_id": 5.0' in text
    a = annotations.read_annotations(*save(folder, text))
    whole = annotations.read_annotations(*save(folder, valid()))
    assert repr((a.image_ids, a.category_ids)) == "([7, 5], [3, 90])"
    assert torch.equal(a.boxes, whole.boxes) and torch.equal(a.labels, whole.labels)
    mixed = annotations.read_annotations(*save(folder, changed("images", 0, id=7.0)))
    assert torch.equal(mixed.boxes, whole.boxes)
    with pytest.raises(annotations.DataError, match="no id"):
        annotations.read_annotations(*save(folder, changed("images", 0, id=7.5)))


@pytest.mark.parametrize("value, crowd", [
    ("0", False), ("1", True), (0.0, False), (1.0, True), (True, True), (False, False),
    (None, False), ("", False), ("false", False), ("True", True)])
def test_iscrowd_is_read_as_people_write_it(folder, value, crowd):
    a = annotations.read_annotations(*save(folder, annotation(iscrowd=value)))
    assert a.crowd.tolist()[0] == crowd


@pytest.mark.parametrize("name", ["sub\\c.png", "sub/c.png", ".\\sub\\c.png", "ABSOLUTE/sub/c.png",
                                  "ABSOLUTE\\sub\\c.png"])
def test_names_with_backslashes_and_absolute_ones_lead_to_the_picture(folder, name):
    (folder / "pictures" / "sub").mkdir(exist_ok=True)
    Image.new("RGB", (40, 30), RED).save(folder / "pictures" / "sub" / "c.png")
    name = name.replace("ABSOLUTE", str(folder / "pictures"))
    a = annotations.read_annotations(*save(folder, picture(file_name=name)))
    assert Path(a.path(0)).samefile(folder / "pictures" / "sub" / "c.png")


def test_an_absolute_name_through_a_link_lies_in_the_folder_too(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder / "pictures")
    for name, images in ((folder / "pictures" / "a.png", tmp_path / "link"),
                         (tmp_path / "link" / "a.png", tmp_path / "link")):
        json_file, _ = save(folder, picture(file_name=str(name)))
        assert annotations.read_annotations(json_file, images).file_names[0] == "a.png"
    for outside in (folder / "pictures2" / "a.png", folder / "pictures" / ".." / "a.png"):
        with pytest.raises(annotations.DataError, match="leaves"):
            annotations.read_annotations(*save(folder, picture(file_name=str(outside))))


@pytest.mark.parametrize("sides", [{}, {"height": None, "width": None}, {"height": 0, "width": 0},
                                   {"width": 40}])
def test_a_size_that_the_file_does_not_say_is_the_pictures(folder, sides):
    content = valid()
    del content["images"][0]["height"], content["images"][0]["width"]
    content["images"][0].update(sides)
    assert annotations.read_annotations(*save(folder, content)).sizes.tolist()[0] == [30, 40]
    (folder / "pictures" / "text.png").write_text("no picture")
    content["images"][0]["file_name"] = "text.png"
    with pytest.raises(annotations.DataError, match="image 7: .*text.png.*cannot be read"):
        annotations.read_annotations(*save(folder, content))


@pytest.mark.parametrize("name, read", [
    ("  traffic light ", "traffic light"), ("a\nb", "a b"), ("\ud800", "\\ud800"), (5, "5"),
    (None, "3"), ("\n", "3")])
def test_a_class_name_is_one_line_that_can_be_printed_and_drawn(folder, name, read):
    a = annotations.read_annotations(*save(folder, changed("categories", 1, name=name)))
    assert a.class_names[0] == read
    detect.draw_boxes(Image.new("RGB", (40, 30)), a.boxes.tolist(), a.labels.tolist(),
                      a.class_names)


def test_what_cannot_be_printed_is_escaped(folder):
    """As a process of its own: its output is a pipe of ASCII."""
    json_file, images = save(folder, picture(file_name="\ud800.png"))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, ROOT / "annotations.py", "check", "--json", json_file,
                           "--images", images], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and not done.stderr
    assert "\\ud800.png does not exist" in done.stdout


def test_drop_bad_leaves_out_every_record_at_fault_and_names_it(folder, capsys):
    files, expected = one_of_each_fault(folder)
    a = annotations.read_annotations(*files, drop_bad=True)
    # what is left is `valid`, to which the faults were added
    assert a.image_ids == [7, 5] and a.category_ids == [3, 90]
    assert a.boxes.tolist() == [[0.5, 1.25, 9, 5.25], [1, 2, 11, 22], [0, 0, 30, 40]]
    assert a.first.tolist() == [0, 1, 3]
    said = capsys.readouterr().err.splitlines()
    assert f"left out {len(expected)} record(s)" in said[0]
    for kind, words in expected:
        assert f"1 x {kind}" in said[0] or f"2 x {kind}" in said[0]
        assert len([line for line in said[1:] if all(word in line for word in words)]) == 1, words


def test_drop_bad_of_a_file_whose_pictures_are_all_bad_says_so(folder):
    content = valid()
    for image in content["images"]:
        image["file_name"] = "nowhere.png"
    with pytest.raises(annotations.DataError, match="leaves no picture.*nowhere.png"):
        annotations.read_annotations(*save(folder, content), drop_bad=True)


def test_drop_bad_of_a_crowd_leaves_its_full_boxes_with_their_picture(crowd_folder):
    (crowd_folder / "Images" / "c.jpg").write_bytes(b"no picture")
    bad = {"ID": "c", "gtboxes": [person(1, 1, 5, 5)], "height": 60, "width": 80}
    file = write_lines(crowd_folder / "f.odgt", [bad, *GOOD])
    a = annotations.read_annotations(file, crowd_folder / "Images", drop_bad=True)
    b = annotations.read_annotations(write_lines(crowd_folder / "g.odgt", GOOD),
                                     crowd_folder / "Images")
    for name in ("image_ids", "first", "boxes", "full_boxes", "full_first", "full_ignore", "area"):
        assert repr(getattr(a, name)) == repr(getattr(b, name))


@pytest.mark.parametrize("value, ignored", [("0", False), ("1", True), (True, True)])
def test_ignore_is_read_as_people_write_it(crowd_folder, value, ignored):
    line = {"ID": "a", "gtboxes": [person(1, 1, 9, 9, ignore=value)]}
    file = write_lines(crowd_folder / "f.odgt", [line])
    a = annotations.read_annotations(file, crowd_folder / "Images")
    assert a.crowd.tolist() == a.full_ignore.tolist() == [ignored]


# ------------------------------------------------------------------------------------------------
# classes by name
# ------------------------------------------------------------------------------------------------

def test_classes_go_by_name_whatever_their_order_and_their_ids(folder):
    a = annotations.read_annotations(*save(folder, valid()))            # car 3, toothbrush 90
    b = annotations.with_classes(a, ["zebra", "toothbrush", "car"])
    assert b.category_ids == [None, 90, 3] and b.class_names == ["zebra", "toothbrush", "car"]
    assert a.labels.tolist() == [0, 1, 0] and b.labels.tolist() == [2, 1, 2]
    assert annotations.with_classes(a, ["car", "toothbrush"]) is a
    with pytest.raises(annotations.DataError, match="not know its class.* 'toothbrush', only"):
        annotations.with_classes(a, ["car", "zebra"])


def test_a_file_without_classes_and_boxes_lacks_them_all(folder):
    a = annotations.read_annotations(*save(folder, {**valid(), "annotations": [],
                                                    "categories": []}))
    b = annotations.with_classes(a, ["car"])
    assert b.category_ids == [None] and b.labels.dtype == torch.long


# ------------------------------------------------------------------------------------------------
# the check and the command line
# ------------------------------------------------------------------------------------------------

def one_of_each_fault(folder):
    """A data set with every kind of fault: its files, and pairs (kind, what its line must name)."""
    pictures = folder / "pictures"
    Image.new("RGB", (40, 30)).save(pictures / "small.png")
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(pictures / "cut.jpg")
    (pictures / "cut.jpg").write_bytes((pictures / "cut.jpg").read_bytes()[:900])
    size = {"height": 30, "width": 40}
    box = {"image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4]}
    content = valid()
    content["categories"] += [{"name": "nameless"}, {"id": 3, "name": "again"}]
    content["images"] += [
        {"file_name": "nothing.png", **size},
        {"id": 5, "file_name": "twice.png", **size},
        {"id": 11, "file_name": "../up.png", **size},
        {"id": 12, "file_name": "/top.png", **size},
        {"id": 13, "file_name": "a.png", "height": -1, "width": 40},
        {"id": 14, "file_name": "missing.png", **size},
        {"id": 15, "file_name": "small.png", "height": 300, "width": 400},
        {"id": 16, "file_name": "cut.jpg", **size},
    ]
    content["annotations"] += [
        "no object",
        {**box, "id": 1},
        {**box, "id": 21, "image_id": 99},
        {**box, "id": 22, "category_id": 77},
        {**box, "id": 23, "bbox": [1, 2, float("nan"), 4]},
        {**box, "id": 24, "bbox": [9, 9, -3, 4]},
        {**box, "id": 25, "bbox": [50, 9, 3, 4]},
        {**box, "id": 26, "bbox": [50, 9, 3, 4]},
    ]
    return save(folder, content), [
        ("category without id", ["nameless"]),
        ("duplicate category id", ["category id 3"]),
        ("image without id", ["nothing.png"]),
        ("duplicate image id", ["image id 5"]),
        ("bad file name", ["image 11", "../up.png"]),
        ("bad file name", ["image 12", "/top.png"]),
        ("bad image size", ["image 13"]),
        ("missing picture", ["image 14", "missing.png"]),
        ("picture size differs", ["image 15", "small.png", "40 x 30", "400 x 300"]),
        ("unreadable picture", ["image 16", "cut.jpg"]),
        ("broken annotation", ["annotation number 3"]),
        ("duplicate annotation id", ["image 7", "annotation 1"]),
        ("unknown image", ["image 99", "annotation 21"]),
        ("unknown category", ["image 7", "annotation 22", "77"]),
        ("box is not four finite numbers", ["image 7", "annotation 23"]),
        ("box without extent", ["image 7", "annotation 24"]),
        ("box outside the picture", ["image 7", "annotation 25"]),
        ("box outside the picture", ["image 7", "annotation 26"]),
    ]


def test_the_check_reports_every_fault_in_one_pass_with_counts(folder):
    files, expected = one_of_each_fault(folder)
    out = io.StringIO()
    assert annotations.check(*files, out=out) == len(expected)
    lines = out.getvalue().splitlines()
    for _, words in expected:
        of_fault = [line for line in lines[:len(expected)] if all(word in line for word in words)]
        assert len(of_fault) == 1, words
    assert all("set.json" in line or "pictures" in line for line in lines[:len(expected)])
    kinds = [kind for kind, _ in expected]
    counts = lines[lines.index(f"{len(expected)} fault(s)") + 1:]
    assert sorted(counts) == sorted({f"  {kind}: {kinds.count(kind)}" for kind in kinds})


def test_the_check_counts_pictures_boxes_and_classes(folder):
    out = io.StringIO()
    assert annotations.check(*save(folder, changed("annotations", 1, image_id=5)), out=out) == 0
    assert "2 pictures (1 without boxes), 3 usable boxes, 1 of them crowd" in out.getvalue()
    assert "  car: 1\n  toothbrush: 1\n0 fault(s)\n" in out.getvalue()


def test_check_exits_with_0_without_faults(folder, command):
    json_file, images = save(folder, valid())
    code, _, err = command(annotations, "check", "--json", json_file, "--images", images)
    assert (code, err) == (0, "")


def test_check_exits_with_1_with_faults(folder, command):
    (json_file, images), expected = one_of_each_fault(folder)
    code, out, err = command(annotations, "check", "--json", json_file, "--images", images)
    assert code == 1 and f"{len(expected)} fault(s)" in out and not err


@pytest.mark.parametrize("content", [
    "{", "[]", '{"images": [], "annotations": [], "categories": []}', "\udcff", None])
def test_check_exits_with_2_and_one_line_when_nothing_can_be_read(tmp_path, command, content):
    if content is not None:
        (tmp_path / "set.json").write_bytes(content.encode(errors="surrogateescape"))
    file = tmp_path / "set.json"
    code, _, said = command(annotations, "check", "--json", file, "--images", tmp_path)
    assert code == 2 and said.count("\n") == 1
    assert said.startswith(f"annotations.py: {file}: ")


def many_boxes(make):
    """A data set with 40 boxes in pictures of 40 x 30 and 30 x 40, as `make` writes them."""
    rng, content = np.random.default_rng(0), valid()
    content["annotations"] = []
    for n in range(40):
        image = content["images"][n % 2]
        width, height = image["width"], image["height"]
        x1, x2 = np.sort(rng.choice(width, 2, replace=False))
        y1, y2 = np.sort(rng.choice(height, 2, replace=False))
        content["annotations"].append({
            "id": n + 1, "image_id": image["id"], "category_id": 3,
            "bbox": [float(v) for v in make(x1, y1, x2, y2, width, height)]})
    return content


@pytest.mark.parametrize("make, kind", [
    (lambda x1, y1, x2, y2, w, h: (x1, y1, x2, y2), "boxes look like corners"),
    (lambda x1, y1, x2, y2, w, h: (x1 / w, y1 / h, (x2 - x1) / w, (y2 - y1) / h),
     "boxes below one pixel"),
    (lambda x1, y1, x2, y2, w, h: ((x1 + x2) / 2 / w, (y1 + y2) / 2 / h, (x2 - x1) / w,
                                   (y2 - y1) / h), "boxes below one pixel"),
    (lambda x1, y1, x2, y2, w, h: (x1, y1, x2 - x1, y2 - y1), None),
    # a pixel too long is rounding
    (lambda x1, y1, x2, y2, w, h: (x1, y1, w - x1 + 1, h - y1 + 1), None),
])
def test_the_check_finds_boxes_in_another_form(folder, make, kind):
    out = io.StringIO()
    faults = annotations.check(*save(folder, many_boxes(make)), out=out)
    assert faults == (kind is not None)
    assert kind is None or f"  {kind}: 1" in out.getvalue()


def test_the_check_finds_a_class_that_is_listed_twice_and_training_lives_with_it(folder):
    content = with_more("categories", {"id": 4, "name": "car "})
    out = io.StringIO()
    assert annotations.check(*save(folder, content), out=out) == 1
    assert "'car' is listed 2 times" in out.getvalue()
    a = annotations.read_annotations(*save(folder, content))
    assert a.class_names == ["car", "car", "toothbrush"]
