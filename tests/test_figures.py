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


def pictures(folder, split, *transform):
    split_set = annotations.read_annotations(folder / f"{split}.json", folder / split)
    return data.Pictures(split_set, data.Transform(*transform))


@pytest.fixture(autouse=True)
def few_drawn():
    """Here all are."""


@pytest.fixture
def kept(monkeypatch):
    """The figures that are drawn, which are closed once they are in their file."""
    drawn, close = [], figures.plt.close
    monkeypatch.setattr(figures.plt, "close", drawn.append)
    yield drawn
    for figure in drawn:
        close(figure)


def curves(axes):
    """The values of the lines of a plot."""
    return [list(line.get_ydata()) for line in axes.lines]


def cells_of(file, side, columns, rows):
    """The pictures of a sheet, (rows, columns, side, side, 3), without captions of 14 pixels."""
    with Image.open(file) as sheet:
        assert sheet.size == (columns * (side + 4), rows * (side + 14 + 4))
        pixels = np.asarray(sheet)
    return pixels.reshape(rows, side + 18, columns, side + 4, 3).swapaxes(1, 2)[
        :, :, 14:14 + side, :side]


def framed_below(cell, box, label):
    """Whether a box's lower edge has its class's colour, in the middle, where no name stands."""
    x, y = round((box[0] + box[2]) / 2), round(box[3])
    near = cell[max(0, y - 2):y + 2, x]
    return (near == np.array(detect.COLOURS[label])).all(1).any()


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
    """Four cells of 500 x 500 pixels in a row, 4 pixels apart, each under a caption of 14.

    Mirrored here, with frames around the boxes; the last three cells are empty.
    """
    train = pictures(tiny_scenes, "train", (500,), 900, 1.0)
    figures.training_pictures(train, tmp_path / "a.png", count=5)
    cells = cells_of(tmp_path / "a.png", 500, columns=4, rows=2).reshape(8, 500, 500, 3)
    framed = []
    for i, cell in enumerate(cells[:5]):
        image, target = train[0, i]
        assert (cell == image.permute(1, 2, 0).numpy()).all(2).mean() > 0.8
        for box, label in zip(target["boxes"][:1].tolist(), target["labels"].tolist()):
            framed.append(framed_below(cell, box, label))
    assert all(framed) and len(framed) > 2 and (cells[5:] == 255).all()


def test_a_run_leaves_twelve_training_pictures(tiny_scenes, tmp_path):
    """The first of the 24, at three times their 128 pixels."""
    figures.training_pictures(pictures(tiny_scenes, "train", (128,)), tmp_path / "a.png")
    cells = cells_of(tmp_path / "a.png", 384, columns=4, rows=3)
    assert not (cells == 255).all((2, 3, 4)).any()


def test_ground_truth_and_detections_come_in_pairs(tiny_scenes, tmp_path):
    """Of the first, the middle and the last picture, enlarged three times.

    A detection that scores less than 0.3 is not drawn, so that the picture is as it was.
    """
    val = pictures(tiny_scenes, "val", (128,), 128)
    a = val.annotations
    found = [{"image_id": a.image_ids[i], "category_id": a.category_ids[2],
              "bbox": [20, 30, 60, 50], "score": score} for i, score in ((0, 0.9), (3, 0.2))]
    figures.detections_beside_truth(val, found, tmp_path / "a.png", count=3)
    (cells,) = cells_of(tmp_path / "a.png", 384, columns=6, rows=1)
    for n, i in enumerate((0, 3, 6)):
        truth, ours = cells[2 * n:2 * n + 2]
        bare = np.asarray(val.picture(i).resize((384, 384), Image.BILINEAR))
        first = int(a.first[i])
        assert framed_below(truth, (3 * a.boxes[first]).tolist(), int(a.labels[first]))
        assert framed_below(ours, (60, 90, 240, 240), 2) == (i == 0)
        assert (ours == bare).all() == (i > 0)


def test_a_run_leaves_up_to_twelve_pairs(tiny_scenes, tmp_path):
    """Of all 7 pictures here: three pairs a row."""
    val = pictures(tiny_scenes, "val", (128,), 128)
    figures.detections_beside_truth(val, [], tmp_path / "a.png")
    cells = cells_of(tmp_path / "a.png", 384, columns=6, rows=3).reshape(18, -1)
    assert (cells == 255).all(1).tolist() == 14 * [False] + 4 * [True]


def test_learning_curves_are_drawn_from_eval_csv_and_log_csv(tmp_path, kept):
    """Full lines without NMS, dashed ones with it; below the score gap, and what moved."""
    (tmp_path / "eval.csv").write_text("step,AP,AP_nms,AP50,AP50_nms\n10,1,2,3,4\n20,5,6,7,8\n")
    (tmp_path / "log.csv").write_text("step,loss,gap,moved\n5,9,0.5,\n15,8,0.25,30\n")
    figures.learning_curves([tmp_path], tmp_path / "curves.png")
    plots = kept[0].axes
    assert [curves(plot) for plot in plots] == [
        [[1, 5], [2, 6]], [[3, 7], [4, 8]], [[0.5, 0.25]], [[30]]]
    assert [line.get_linestyle() for line in plots[0].lines] == ["-", "--"]
    assert [plot.lines[0].get_xdata().tolist() for plot in plots] == [
        [10, 20], [10, 20], [5, 15], [15]]


@pytest.mark.parametrize("content", ["{}", "[]", '{"detector": "fc'])
def test_a_damaged_args_json_is_told(tmp_path, command, content):
    (tmp_path / "args.json").write_text(content)
    (tmp_path / "eval.csv").write_text("step,AP,AP_nms,AP50,AP50_nms\n4,1,1,1,1\n")
    code, _, err = command(figures, "curves", tmp_path, "--out", tmp_path / "a.png")
    assert code == 2 and "args.json: not the args.json of a run" in err and err.count("\n") == 1


def test_learning_curves_of_crowds_show_ap50_and_recall(tmp_path, kept):
    rows = ("step,AP50,AP50_nms,mMR,mMR_nms,recall,recall_nms\n"
            "10,1,2,3,4,9,10\n20,5,6,7,8,11,12\n")
    (tmp_path / "eval.csv").write_text(rows)
    figures.learning_curves([tmp_path], tmp_path / "curves.png")
    left, right = kept[0].axes[:2]
    assert left.get_ylabel() == "AP50, percent" and curves(left) == [[1, 5], [2, 6]]
    assert right.get_ylabel() == "recall, percent" and curves(right) == [[9, 11], [10, 12]]
