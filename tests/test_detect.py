"""Pictures of one's own: boxes worked out by hand, from the file to the drawing."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import detect
import figures
import models

# what the stand-in finds in a picture, in pixels of the resized one: box, score, label
FOUND = [((10, 5, 50, 25), 0.9, 1), ((0, 0, 20, 20), 0.4, 0), ((0, 0, 5, 5), 0.1, 0)]


def run_folder(folder):
    """A run of an untrained FCOS whose pictures become 50 pixels high; two classes, ids 3 and 7."""
    build = {"detector": "fcos", "num_classes": 2, "backbone": "tiny", "width": 16, "depth": 1,
             "extra_levels": 0}
    folder.mkdir()
    torch.save({"build": build, "model": checkpoints.build(**build).state_dict(),
                "class_names": ["cat", "two\nlines"], "category_ids": [3, 7],
                "args": {"max_dets": 2}, "test_transform": {"shortest": [50], "longest": 500}},
               folder / "last.pt")
    return folder


def photograph(file, size=(200, 100), mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file)
    return file


@pytest.fixture
def known(monkeypatch):
    """FCOS finds FOUND everywhere, and with NMS its first alone."""
    def detections(self, one, k):
        boxes, scores, labels = zip(*FOUND[:k])
        plain = torch.tensor(boxes).float(), torch.tensor(scores), torch.tensor(labels)
        return {"plain": plain, "nms": tuple(part[:1] for part in plain)}
    monkeypatch.setattr(models.FCOS, "detections", detections)


@pytest.fixture
def detections(tmp_path, command):
    """detections(path, ...) runs the command; exit code, both outputs, and detections.json."""
    run = run_folder(tmp_path / "run")

    def of(*words):
        code, out, err = command(figures, "detections", "--weights", run, "--device", "cpu",
                                 "--out", tmp_path / "out", "--images", *words)
        file = tmp_path / "out" / "detections.json"
        return code, out, err, json.loads(file.read_text()) if file.exists() else None
    return of


# ------------------------------------------------------------------------------------------------
# one picture, from Python
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_boxes_come_in_pixels_of_the_picture_that_was_given(tmp_path, known, mode):
    """200 x 100 pixels become 100 x 50: boxes double on their way back."""
    model, _ = checkpoints.load(run_folder(tmp_path / "run"))
    file = photograph(tmp_path / "a.png", mode=mode)
    for given in (file, str(file), Image.open(file)):
        boxes, scores, labels = model.detect(given)
        assert boxes.tolist() == [[20, 10, 100, 50], [0, 0, 40, 40], [0, 0, 10, 10]]
        assert scores.tolist() == pytest.approx([0.9, 0.4, 0.1]) and labels.tolist() == [1, 0, 0]
    assert model.class_names[labels[1]] == "cat"
    assert len(model.detect(file, k=2)[0]) == 2 and len(model.detect(file, nms=True)[0]) == 1


def test_a_file_is_shown_upright_as_in_training(tmp_path, known):
    """EXIF orientation 6: 200 x 100 stored is 100 x 200 seen, and becomes 50 x 100."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (200, 100)).save(tmp_path / "a.jpg", exif=exif)
    model, _ = checkpoints.load(run_folder(tmp_path / "run"))
    assert model.prepare(tmp_path / "a.jpg")[2][0]["original_size"].tolist() == [200, 100]
    assert model.prepare(tmp_path / "a.jpg")[2][0]["size"].tolist() == [100, 50]


def test_the_network_sees_the_resized_picture_with_padding(tmp_path):
    """What a loaded detector is given is what PIL makes of the picture, padded to 32s."""
    model, _ = checkpoints.load(run_folder(tmp_path / "run"))
    file = photograph(tmp_path / "a.png")
    images, mask, _ = model.prepare(file)
    expected = np.asarray(Image.open(file).resize((100, 50), Image.BILINEAR))
    assert images.shape == (1, 3, 64, 128) and not model.training
    assert np.array_equal(images[0, :, :50, :100].permute(1, 2, 0).numpy(), expected)
    assert not mask[0, :50, :100].any() and int((~mask).sum()) == 50 * 100


# ------------------------------------------------------------------------------------------------
# many, from the command line
# ------------------------------------------------------------------------------------------------

def test_a_folder_becomes_drawings_and_cocos_result_format(tmp_path, known, detections):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("b.JPG", "a.png"):
        photograph(folder / name)
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_text("no picture")
    code, out, err, found = detections(folder)
    assert code == 0 and not err
    assert "2 pictures, 4 detections that score 0.3 or more, without NMS; 1 other files" in out
    assert found[0].pop("score") == pytest.approx(0.9)
    assert found[0] == {"image_id": "a.png", "category_id": 7, "bbox": [20, 10, 80, 40]}
    assert [d["image_id"] for d in found] == ["a.png", "a.png", "b.JPG", "b.JPG"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.png", "b.JPG", "detections.json"}
    with Image.open(tmp_path / "out" / "a.png") as drawn:
        scale = drawn.width / 200
        assert scale >= 3                                # small pictures are enlarged
        edge = drawn.getpixel((int(100 * scale), int(40 * scale)))
        assert edge == detect.COLOURS[1]

    for words, count in ((["--score", 0.5], 2), (["--nms", "--score", 0], 2), (["--score", 0], 4)):
        assert len(detections(folder, *words)[3]) == count       # max_dets is 2


def test_a_picture_that_cannot_be_decoded_is_named_and_the_others_are_done(
        tmp_path, known, detections):
    half = photograph(tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(half[:len(half) // 2])
    files = [photograph(tmp_path / "a.png"), tmp_path / "b.png", photograph(tmp_path / "c.png")]
    code, _, err, found = detections(*files)
    assert code == 2 and "b.png: the picture cannot be decoded" in err.splitlines()[0]
    assert "2 pictures, 4 detections" in err and "1 pictures could not be read" in err
    assert err.count("\n") == 2 and {d["image_id"] for d in found} == {"a.png", "c.png"}
    assert (tmp_path / "out" / "c.png").exists() and not (tmp_path / "out" / "b.png").exists()


def test_what_was_found_before_an_interruption_is_written(
        tmp_path, known, detections, monkeypatch):
    def stop(self, picture, k, nms):
        monkeypatch.setattr(models.FCOS, "detect", interrupt)
        return real(self, picture, k, nms)

    def interrupt(*words):
        raise KeyboardInterrupt

    real = models.FCOS.detect
    monkeypatch.setattr(models.FCOS, "detect", stop)
    code, _, err, found = detections(*(photograph(tmp_path / f"{n}.png") for n in range(3)))
    assert code == 130 and "interrupted" in err and found is None
    partial = json.loads((tmp_path / "out" / "detections.partial.json").read_text())
    assert {d["image_id"] for d in partial} == {"0.png"}

    # the file of a whole call is not lost to one that was interrupted
    monkeypatch.setattr(models.FCOS, "detect", real)
    files = [tmp_path / f"{n}.png" for n in range(3)]
    _, _, _, whole = detections(*files)
    assert len({d["image_id"] for d in whole}) == 3
    assert not (tmp_path / "out" / "detections.partial.json").exists()
    monkeypatch.setattr(models.FCOS, "detect", interrupt)
    assert detections(*files)[3] == whole


@pytest.mark.parametrize("words, told", [
    (["nowhere"], "nowhere: no such file or folder"),
    (["run"], "run: holds no pictures"),
    (["one/a.png", "two/a.png"], "have the same name"),
    (["one", "--out", "one"], "would be overwritten"),
    (["linked", "--out", "one"], "would be overwritten"),
    (["one", "--out", "run"], "run is a run's folder"),
    (["one", "--weights", "two"], "last.pt: cannot be read"),
])
def test_what_cannot_be_done_is_one_sentence(
        tmp_path, monkeypatch, detections, words, told):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        photograph(tmp_path / name / "a.png")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "b.png").symlink_to(tmp_path / "one" / "a.png")
    before = (tmp_path / "one" / "a.png").read_bytes()
    code, _, err, found = detections(*words)
    assert code == 2 and err.count("\n") == 1 and told in err and found is None
    assert (tmp_path / "one" / "a.png").read_bytes() == before


# ------------------------------------------------------------------------------------------------
# drawing
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(8, 8), (200, 100), (4000, 3000), (3000, 20), (20, 3000)])
def test_a_name_is_readable_at_any_size_of_picture(size):
    """Its ground is at least 11 pixels high and a fiftieth of the longer side, in the picture."""
    canvas = detect.draw_boxes(Image.new("RGB", size), [(0, 0, *size)], [0], ["cat"], [0.5],
                               side=max(384, *size))
    ground = (np.asarray(canvas)[:, 5] == detect.COLOURS[0]).all(1)
    high = int(ground.sum())
    assert max(canvas.size) >= 384
    assert high >= min(canvas.height - 2, max(11, max(canvas.size) / 50))


def test_a_name_of_two_lines_is_written_in_one():
    picture = Image.new("RGB", (300, 300))
    one, two = (detect.draw_boxes(picture, [(0, 0, 200, 200)], [0], [name])
                for name in ("a cat", "a\ncat"))
    assert np.array_equal(np.asarray(one), np.asarray(two))


def test_the_best_box_lies_on_top():
    """Two boxes of one place and two classes: what shows is the first."""
    canvas = detect.draw_boxes(Image.new("RGB", (400, 400)), [(20, 20, 300, 300)] * 2, [3, 0],
                               ["a", "b", "c", "d"])
    assert canvas.getpixel((300, 200)) == detect.COLOURS[3]
