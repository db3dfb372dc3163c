"""The pictures a run leaves are what they say they are."""
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import annotations
import checkpoints
import data
import detect
import figures
import train
from test_train import flags


def drawn(size, box, label, name):
    """One box on a black picture, its longer side 128 pixels: colours (height, width, 3)."""
    picture = detect.draw_boxes(Image.new("RGB", size), [box], [label], [name], side=128)
    return np.asarray(picture).astype(int)


def pictures(folder, split, size, longest):
    split_set = annotations.read_annotations(folder / f"{split}.json", folder / split)
    return data.Pictures(split_set, data.Transform(size, longest))


def test_drawn_boxes_lie_where_the_boxes_are():
    """A red-ish frame of the enlarged box on a black picture, and nothing of it inside."""
    canvas = drawn((64, 32), (10, 8, 50, 28), 0, "cell")
    assert canvas.shape == (64, 128, 3)
    framed = (canvas == np.array(detect.COLOURS[0])).all(2)
    assert framed[56, 20:100].all() and framed[30:56, 100].all() and framed[30:56, 20].all()
    assert not framed[40:50, 30:90].any()


def test_an_ignore_region_is_grey_and_called_so():
    canvas = drawn((128, 128), (20, 40, 100, 120), -1, "person")
    assert (canvas[100, 20] == 170).all()
    assert not (canvas == np.array(detect.COLOURS[0])).all(2).any()


def test_training_pictures_show_what_the_transform_made(tiny_scenes, tmp_path):
    """Four cells of 500 x 500 pixels in a row, 4 pixels apart, each under a caption of 14."""
    train = pictures(tiny_scenes, "train", (500,), 900)
    figures.training_pictures(train, tmp_path / "a.png", count=5)
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.size == (4 * 504, 2 * (500 + 14 + 4))


def test_ground_truth_and_detections_come_in_pairs(tiny_scenes, tmp_path):
    val = pictures(tiny_scenes, "val", (128,), 128)
    found = [{"image_id": 1, "category_id": 2, "bbox": [5, 5, 30, 30], "score": 0.9}]
    figures.detections_beside_truth(val, found, tmp_path / "a.png", count=3)
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.width >= 6 * 384
        assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 100


def test_learning_curves_are_drawn_from_eval_csv(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "eval.csv").write_text("step,AP,AP_nms,AP50,AP50_nms\n10,1,2,3,4\n20,5,6,7,8\n")
    figures.learning_curves([run], tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 1


def test_learning_curves_of_crowds_show_ap50(tmp_path):
    rows = "step,AP50,AP50_nms,mMR,mMR_nms\n10,1,2,3,4\n20,5,6,7,8\n"
    (tmp_path / "eval.csv").write_text(rows)
    figures.learning_curves([tmp_path], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


# ------------------------------------------------------------------------------------------------
# detections on pictures of one's own
# ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run(tiny_scenes, tmp_path_factory):
    """A trained FCOS, as far as two steps go, with its detections on the 7 validation pictures."""
    out = tmp_path_factory.mktemp("detections") / "run"
    train.main(flags(tiny_scenes, steps=2, out=out))
    return out


def test_pictures_of_ones_own_get_what_evaluation_finds(run, tiny_scenes, tmp_path, command):
    """In a folder of a folder, at twice their size, as a JPEG among files that are none."""
    names = {image["id"]: image["file_name"] for image in
             json.loads((tiny_scenes / "val.json").read_text())["images"]}
    known = json.loads((run / "detections.json").read_text())
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    (tmp_path / "mine" / "notes.txt").write_text("no picture")
    for name in names.values():
        shutil.copy(tiny_scenes / "val" / name, tmp_path / "mine" / "deep")
    code, said, _ = command(figures, "detections", "--weights", run, "--images", tmp_path / "mine",
                            "--out", tmp_path / "out", "--score", 0)
    assert code == 0 and "wrote 7 pictures" in said
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    for image, name in names.items():
        ours, theirs = ([d for d in of if d["image_id"] == i]
                        for of, i in ((found, f"deep/{name}"), (known, image)))
        assert len(ours) == len(theirs) > 0
        for a, b in zip(ours, theirs):
            assert a["category_id"] == b["category_id"]
            assert a["score"] == pytest.approx(b["score"], abs=1e-5)
            assert a["bbox"] == pytest.approx(b["bbox"], abs=1e-2)
        with Image.open(tmp_path / "out" / f"deep_{name}.png") as drawn:
            assert max(drawn.size) >= 384


def test_one_picture_in_three_lines(run, tiny_scenes):
    """The boxes are in its own pixels: of a picture three times as large, three times as large."""
    model, _ = checkpoints.load(run)
    picture = Image.open(next((tiny_scenes / "val").iterdir()))
    small, scores, labels = model.detect(picture)
    twice = picture.resize((3 * picture.width, 3 * picture.height), Image.NEAREST)
    large = model.detect(twice)[0]
    assert small.shape == (len(scores), 4) and labels.max() < len(model.class_names) == 6
    assert small[:, 2].max() <= picture.width < large[:, 2].max() <= twice.width


def test_a_picture_that_cannot_be_read_is_told_and_the_others_are_done(
        run, tiny_scenes, tmp_path, command):
    (tmp_path / "a.png").write_bytes(b"no picture")
    good = next((tiny_scenes / "val").iterdir())
    code, said, told = command(figures, "detections", "--weights", run / "last.pt", "--images",
                               tmp_path / "a.png", good, "--out", tmp_path / "out")
    assert code == 2 and "a.png" in told and "cannot be decoded" in told
    assert "wrote 1 pictures" in said and (tmp_path / "out" / f"{good.name}.png").exists()
    code, _, told = command(figures, "detections", "--weights", run, "--images", tmp_path / "none",
                            "--out", tmp_path / "out")
    assert code == 2 and "none" in told and "Traceback" not in told


@pytest.mark.parametrize("side, height", [(100, 6), (4000, 25)])
def test_names_can_be_read_at_any_size(side, height):
    """The rows that the name's plate covers, of its class's colour, inside the frame."""
    box = 10, 10, side - 10, side - 10
    large = max(384, side)
    drawn = np.asarray(figures.draw_boxes(Image.new("RGB", (side, side)), [box], [0], ["cat"],
                                          side=large))
    at = 10 * large // side + max(4, large // 200)
    inside = drawn[at:large // 2, at:at + large // 50]
    assert (inside == figures.COLOURS[0]).all(-1).any(1).sum() >= height
