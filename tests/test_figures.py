"""The pictures a run leaves are what they say they are."""
import numpy as np
import pytest
from PIL import Image

import annotations
import data
import detect
import figures


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


@pytest.mark.parametrize("content", ["{}", "[]", '{"detector": "fc'])
def test_a_damaged_args_json_is_told(tmp_path, command, content):
    (tmp_path / "args.json").write_text(content)
    (tmp_path / "eval.csv").write_text("step,AP,AP_nms,AP50,AP50_nms\n4,1,1,1,1\n")
    code, _, err = command(figures, "curves", tmp_path, "--out", tmp_path / "a.png")
    assert code == 2 and "args.json: not the args.json of a run" in err and err.count("\n") == 1


def test_learning_curves_of_crowds_show_ap50(tmp_path):
    rows = "step,AP50,AP50_nms,mMR,mMR_nms\n10,1,2,3,4\n20,5,6,7,8\n"
    (tmp_path / "eval.csv").write_text(rows)
    figures.learning_curves([tmp_path], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
