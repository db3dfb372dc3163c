"""The embedded pictures: the same for everybody, and truthfully annotated.

Oracles: pycocotools, torchvision, PIL.
"""
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from pycocotools import mask as coco_mask
from torchvision.ops import box_iou

import data
import scenes
from pictures import DataError

# pycocotools under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")


def contents(folder):
    """Every file below a folder: relative path -> bytes."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def read(folder, split="train"):
    """Pairs of image entry and its annotations, in the file's order, which is that of drawing."""
    record = json.loads((folder / f"{split}.json").read_text())
    annotations = {image["id"]: [] for image in record["images"]}
    for a in record["annotations"]:
        annotations[a["image_id"]].append(a)
    return [(image, annotations[image["id"]]) for image in record["images"]]


def pixels(folder, image, split="train"):
    """A picture as numbers, (height, width, 3)."""
    return np.asarray(Image.open(folder / split / image["file_name"]), float)


def behind(masks, n):
    """Where mask n is covered by those drawn after it."""
    return masks[n] & np.any([np.zeros_like(masks[n]), *masks[n + 1:]], axis=0)


def silhouette(annotation, image):
    """pycocotools' boolean mask of all polygons of a creature together."""
    parts = coco_mask.frPyObjects(annotation["segmentation"], image["height"], image["width"])
    return coco_mask.decode(coco_mask.merge(parts)).astype(bool)


# ------------------------------------------------------------------------------------------------
# the same pictures for everybody
# ------------------------------------------------------------------------------------------------

def test_the_pictures_are_those_of_their_version():
    """Boxes as the documents' figures were made with; other pictures want another VERSION."""
    drawn = [scenes.draw(0, "train", 1)[1][n] for n in (0, -1)]
    found = [(scenes.KINDS[o["kind"]], *o["box"].round(1).tolist()) for o in drawn]
    assert scenes.VERSION == 2
    assert found == [("crescent", 42.1, 41.5, 118.0, 94.8), ("disk", 22.6, 6.3, 46.8, 46.6)]
    boxes = scenes.draw_crowd(0, "train", 0)[1]
    assert scenes.CROWD_VERSION == 3 and len(boxes) == 24
    assert [(b["tag"], *b["fbox"]) for b in boxes[:2]] == [
        ("mask", 10.09, 18.36, 27.23, 12.05), ("person", -1.45, -11.62, 63.75, 61.59)]

def test_the_same_seed_gives_the_same_bytes(tmp_path):
    first = contents(scenes.write(tmp_path / "a", seed=3, counts={"train": 5, "val": 3}))
    assert len(first) == 5 + 3 + 3          # pictures, two JSON files and complete.json
    assert contents(scenes.write(tmp_path / "b", seed=3, counts={"train": 5, "val": 3})) == first


def test_another_seed_another_split_and_another_index_give_other_pictures():
    different = (0, "train", 0), (1, "train", 0), (0, "val", 0), (0, "train", 1)
    pictures = {scenes.draw(*which)[0].tobytes() for which in different}
    assert len(pictures) == 4


def test_a_picture_does_not_depend_on_how_many_are_drawn(tmp_path):
    few = scenes.write(tmp_path / "few", seed=0, counts={"train": 3, "val": 2})
    many = scenes.write(tmp_path / "many", seed=0, counts={"val": 4, "train": 8})
    for split, count in (("train", 3), ("val", 2)):
        assert read(few, split) == read(many, split)[:count]
        for image, _ in read(few, split):
            file = f"{split}/{image['file_name']}"
            assert (few / file).read_bytes() == (many / file).read_bytes()


def test_drawing_leaves_the_global_random_state_alone():
    np.random.seed(0)
    expected = np.random.random()
    np.random.seed(0)
    scenes.draw(0, "train", 0)
    assert np.random.random() == expected


# ------------------------------------------------------------------------------------------------
# truthful annotations
# ------------------------------------------------------------------------------------------------

def test_a_box_is_the_extent_of_the_polygons_and_lies_inside_the_picture(tiny_scenes):
    for image, annotations in read(tiny_scenes):
        width, height = image["width"], image["height"]
        assert pixels(tiny_scenes, image).shape == (height, width, 3)
        for a in annotations:
            points = np.concatenate([np.reshape(p, (-1, 2)) for p in a["segmentation"]])
            x, y, w, h = a["bbox"]
            assert np.allclose([x, y, x + w, y + h], [*points.min(0), *points.max(0)], atol=0.02)
            assert x >= 0 and y >= 0 and x + w <= width and y + h <= height


def test_the_area_is_the_area_of_the_silhouette(tiny_scenes):
    """Within 15 % each and 7 % on average.

    Our edges are smooth and, drawn by PIL, a fraction of a pixel wider.
    """
    ratios = []
    for image, annotations in read(tiny_scenes):
        ratios += [a["area"] / silhouette(a, image).sum() for a in annotations]
    assert max(ratios) < 1.15 and min(ratios) > 0.93 and 0.98 < np.mean(ratios) < 1.07


def test_a_creature_has_one_colour_wherever_it_is_visible(tiny_scenes):
    """40 is five standard deviations of the noise, or more; edges blend: a pixel is peeled off."""
    for image, annotations in read(tiny_scenes):
        picture = pixels(tiny_scenes, image)
        masks = [silhouette(a, image) for a in annotations]
        for n, mask in enumerate(masks):
            visible = Image.fromarray(255 * (mask & ~behind(masks, n)).astype(np.uint8))
            inside = np.asarray(visible.filter(ImageFilter.MinFilter(3))) > 0
            colour = np.median(picture[inside], axis=0)
            assert (np.abs(picture[inside] - colour).max(1) < 40).mean() > 0.97


def test_three_quarters_of_every_creature_are_visible(tiny_scenes):
    """Up to what pycocotools' edges and ours differ by."""
    for image, annotations in read(tiny_scenes):
        masks = [silhouette(a, image) for a in annotations]
        for n, mask in enumerate(masks):
            assert behind(masks, n).sum() < 0.3 * mask.sum()


def test_boxes_overlap_less_than_nms_would_suppress(tiny_scenes):
    for _, annotations in read(tiny_scenes):
        boxes = torch.tensor([a["bbox"] for a in annotations]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        overlaps = box_iou(boxes, boxes).fill_diagonal_(0)
        assert (overlaps < scenes.MAX_IOU + 0.005).all()      # coordinates are rounded


def test_every_kind_and_every_number_of_creatures_occurs(tiny_scenes):
    train = read(tiny_scenes)
    kinds = {a["category_id"] for _, annotations in train for a in annotations}
    assert kinds == set(range(1, len(scenes.KINDS) + 1))
    counts = {len(annotations) for _, annotations in train}
    assert 0 in counts and max(counts) >= 4 and max(counts) <= scenes.MAX_OBJECTS


# ------------------------------------------------------------------------------------------------
# interrupted and repeated writes
# ------------------------------------------------------------------------------------------------

def stop_at(monkeypatch, picture):
    """From now on drawing is killed when it reaches picture number `picture`."""
    draw = scenes.draw

    def killed(seed, split, index):
        if index == picture:
            raise KeyboardInterrupt
        return draw(seed, split, index)

    monkeypatch.setattr(scenes, "draw", killed)


def test_a_finished_data_set_is_not_drawn_again(tmp_path, monkeypatch):
    scenes.write(tmp_path, seed=0, counts={"train": 2, "val": 1})
    before = contents(tmp_path)
    stop_at(monkeypatch, 0)
    scenes.write(tmp_path, seed=0, counts={"train": 2, "val": 1})
    assert contents(tmp_path) == before


def test_a_killed_write_is_repeated(tmp_path, monkeypatch):
    expected = contents(scenes.write(tmp_path / "whole", seed=0, counts={"train": 3, "val": 1}))
    with monkeypatch.context() as m:
        stop_at(m, 2)
        with pytest.raises(KeyboardInterrupt):
            scenes.write(tmp_path / "killed", seed=0, counts={"train": 3, "val": 1})
    assert not (tmp_path / "killed" / "complete.json").exists()
    again = scenes.write(tmp_path / "killed", seed=0, counts={"train": 3, "val": 1})
    assert contents(again) == expected


def test_a_killed_write_over_a_finished_data_set_is_repeated(tmp_path, monkeypatch):
    """Of an older version, whose complete.json must not vouch for what the killed write left."""
    expected = contents(scenes.write(tmp_path / "new", seed=0, counts={"train": 3, "val": 1}))
    with monkeypatch.context() as m:
        m.setattr(scenes, "VERSION", scenes.VERSION - 1)
        scenes.write(tmp_path / "old", seed=1, counts={"train": 3, "val": 1})
    with monkeypatch.context() as m:
        stop_at(m, 2)
        with pytest.raises(KeyboardInterrupt):
            scenes.write(tmp_path / "old", seed=0, counts={"train": 3, "val": 1})
    again = scenes.write(tmp_path / "old", seed=0, counts={"train": 3, "val": 1})
    assert contents(again) == expected


def test_other_pictures_are_not_drawn_over_those_that_are_there(tmp_path, monkeypatch):
    """A forgotten --out; and an interrupted drawing of another seed, which may be gone on with."""
    before = contents(scenes.write(tmp_path / "a", seed=0, counts={"train": 2, "val": 1}))
    with pytest.raises(DataError, match="holds the pictures of --seed 0 --counts 2 [+] 1"):
        scenes.write(tmp_path / "a", seed=17, counts={"train": 2, "val": 1})
    assert contents(tmp_path / "a") == before

    with monkeypatch.context() as m:
        stop_at(m, 1)
        with pytest.raises(KeyboardInterrupt):
            scenes.write(tmp_path / "b", seed=17, counts={"train": 2, "val": 1})
    with pytest.raises(DataError, match="--seed 17"):
        scenes.write(tmp_path / "b", seed=0, counts={"train": 2, "val": 1})
    assert (scenes.write(tmp_path / "b", seed=17, counts={"train": 2, "val": 1})
            / "complete.json").exists()


@pytest.mark.parametrize("data_set", ["scenes", "crowd"])
def test_nothing_is_drawn_into_a_folder_that_was_mistyped(tmp_path, data_set):
    flags = {"data": data_set, "data_dir": str(tmp_path / "sceens")}
    with pytest.raises(DataError, match=f"sceens: holds no .* --set {data_set} --out .*sceens"):
        data.locate(flags, "val")
    assert not (tmp_path / "sceens").exists()


def test_a_write_killed_while_it_wrote_complete_json_is_repeated(tmp_path):
    expected = contents(scenes.write(tmp_path, seed=0, counts={"train": 2, "val": 1}))
    (tmp_path / "complete.json").write_text("")
    assert contents(scenes.write(tmp_path, seed=0, counts={"train": 2, "val": 1})) == expected


def test_nothing_is_drawn_over_files_of_another(tmp_path):
    """`train.py --data-dir mine`, --data custom forgotten: my train.json must stay."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.json").write_text("mine")
    for draw in (scenes.write, scenes.write_crowd):
        with pytest.raises(DataError, match="mine holds other files"):
            draw(tmp_path / "mine", counts={"train": 1, "val": 1})
    assert contents(tmp_path / "mine") == {"train.json": b"mine"}
    scenes.write(tmp_path / "scenes", counts={"train": 1, "val": 1})
    with pytest.raises(DataError, match="scenes holds scenes"):
        scenes.write_crowd(tmp_path / "scenes", counts={"train": 1, "val": 1})


# ------------------------------------------------------------------------------------------------
# command line
# ------------------------------------------------------------------------------------------------

def test_show_writes_a_sheet_that_opens(tmp_path, command):
    assert command(scenes, "--show", tmp_path / "sheet.png")[0] == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG" and min(sheet.size) > 5 * scenes.SIZE
        assert len(sheet.convert("RGB").getcolors(2 ** 24)) > 1000    # not a blank page


@pytest.mark.parametrize("flag, where", [
    ("--show", "no/such/folder/sheet.png"),
    ("--show", "sheet"),                        # no ending that names a kind of picture
    ("--out", "file"),
])
def test_what_cannot_be_written_is_one_sentence_and_exit_code_2(
        tmp_path, command, monkeypatch, flag, where):
    monkeypatch.setattr(scenes, "specimen", lambda *of: Image.new("RGB", (4, 4)))
    (tmp_path / "file").write_text("a file where the folder should be")
    code, _, err = command(scenes, flag, tmp_path / where)
    assert code == 2 and err.startswith("scenes.py: ") and err.count("\n") == 1
