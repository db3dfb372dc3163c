"""Figures 4 to 6 and their kin: not the pixels, but the numbers behind them and what is refused."""
import json

import numpy as np
import pytest
import torch
from matplotlib.path import Path as Polygon
from PIL import Image

import checkpoints
import figures
import train
from test_train import flags


@pytest.fixture(scope="module")
def two_runs(tiny_scenes, tmp_path_factory):
    """Location only and end-to-end, a few steps each, with two kept checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    rules = {"location": ["--class-cost", "0", "--location-cost", "predefined"], "end": []}
    for name, rule in rules.items():
        train.main(flags(tiny_scenes, out=folder / name, steps=6) + rule
                   + ["--keep-checkpoints", "0.5", "1"])
    return [folder / name for name in rules]


def own_prediction(run, file, picture, size=64):
    """The network asked without any of figures.py: scores (Q, C), candidates (Q, 2)."""
    model, _ = checkpoints.load(run / file)
    image = Image.open(picture).convert("RGB").resize((size, size), Image.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    with torch.no_grad():
        found = model.eval()(pixels, torch.zeros(1, size, size, dtype=torch.bool))
    return found.logits[0].sigmoid().numpy(), found.candidates[:, :2].numpy()


def test_the_lines_of_figure_4_are_the_scores_of_the_network(two_runs, tiny_scenes, tmp_path):
    truth = json.loads((tiny_scenes / "val.json").read_text())
    box = truth["annotations"][0]
    told = figures.score_histograms(two_runs, tmp_path / "a.png", box["image_id"], count=3)
    assert len(told) == 4                                # two runs at two stages
    name = next(i["file_name"] for i in truth["images"] if i["id"] == box["image_id"])
    scores, _ = own_prediction(two_runs[0], "step-000003.pt", tiny_scenes / "val" / name)
    second, first = np.sort(scores[:, box["category_id"] - 1])[-2:]
    assert f"highest score {first:.3f}, second {second:.3f}, gap {first - second:.3f}" in told[0]
    assert "step 3: " in told[0] and "step 6: " in told[3]
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_the_share_on_the_background_is_that_of_the_polygons(two_runs, tiny_scenes, tmp_path):
    """Location only: the positive is the point nearest to the box's centre, whatever is learned."""
    told = figures.positive_samples(two_runs[:1], tmp_path / "a.png", counted=24)
    truth = json.loads((tiny_scenes / "train.json").read_text())
    polygons = {}
    for o in truth["annotations"]:
        polygons.setdefault(o["image_id"], []).extend(
            Polygon(np.reshape(p, (-1, 2))) for p in o["segmentation"])
    _, points = own_prediction(two_runs[0], "last.pt", tiny_scenes / "train" / "00000.png")
    fine = points[:64] * 128 / 64                        # stride 8 in 64 pixels, of 128 drawn
    on, count = 0, 0
    for o in truth["annotations"]:
        x, y, w, h = o["bbox"]
        nearest = fine[np.abs(fine - [x + w / 2, y + h / 2]).sum(1).argmin()]
        on += any(p.contains_point(nearest) for p in polygons[o["image_id"]])
        count += 1
    share, of = float(told[0].split(": ")[1].split("%")[0]), int(told[0].split("of ")[1].split()[0])
    assert of == count
    assert share == pytest.approx(100 * (1 - on / count), abs=8)      # edges, two objects a point


@pytest.mark.parametrize("name", ["positives", "wander"])
def test_runs_of_other_pictures_are_not_shown_below_each_other(
        two_runs, tiny_scenes, tmp_path, command, name):
    images = json.loads((tiny_scenes / "train.json").read_text())
    images["images"] = images["images"][:9]
    known = {image["id"] for image in images["images"]}
    images["annotations"] = [b for b in images["annotations"] if b["image_id"] in known]
    (tmp_path / "few.json").write_text(json.dumps(images))
    other = tmp_path / "other"
    train.main(flags(tiny_scenes, out=other, steps=2, **{"train-json": tmp_path / "few.json"}))
    code, _, err = command(figures, name, two_runs[0], other, "--out", tmp_path / "a.gif")
    assert code == 2 and "other pictures" in err and err.count("\n") == 1


def test_the_other_pictures_are_drawn(two_runs, tmp_path, command):
    for name in ("match", "hero", "curves", "positives"):
        given = two_runs[1:] if name == "match" else two_runs
        code, _, err = command(figures, name, *given, "--out", tmp_path / f"{name}.png")
        assert code == 0, err
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 1
    code, _, err = command(figures, "wander", *two_runs, "--out", tmp_path / "a.gif")
    assert code == 0, err
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.n_frames == 2
    assert (tmp_path / "a.gif").stat().st_size < 1_500_000


@pytest.mark.parametrize("given, words", [
    (["scores", "nowhere"], "nowhere"),
    (["positives", "RUN", "--image", "999"], "image 999: not among the pictures"),
    (["nms", "RUN"], "nms.json"),
    (["curves", "EMPTY"], "holds no row"),
    (["curves", "RUN", "CROWD"], "judged by other figures"),
    (["curves", "GARBLED"], "column AP of eval.csv or log.csv"),
    (["nms", "EMPTY"], "nms.json: not valid JSON"),
    (["nms", "CROWD"], "nms.json: not what `evaluate.py nms` writes"),
])
def test_what_cannot_be_drawn_is_one_sentence(two_runs, tmp_path, command, given, words):
    places = {"RUN": two_runs[0]}
    for name, table, nms in (("EMPTY", "step,AP,AP_nms\n", '{"nms": {'),
                             ("CROWD", "step,AP50,mMR\n1,2,3\n", '{"AP": 1}'),
                             ("GARBLED", "step,AP,AP_nms,AP50,AP50_nms\n4,5x,1,1,1\n", "")):
        places[name] = tmp_path / name
        places[name].mkdir()
        (places[name] / "eval.csv").write_text(table)
        (places[name] / "nms.json").write_text(nms)
    code, _, err = command(figures, *[places.get(word, word) for word in given],
                           "--out", tmp_path / "a.png")
    assert code == 2 and words in err and err.count("\n") == 1


def test_seeds_of_one_row_are_one_line():
    steps = np.array([1.0, 2])
    values = [(steps, np.array([10.0, 20])), (steps, np.array([30.0, 40]))]
    _, plot = figures.plt.subplots()
    figures.draw_band(plot, values, "C0-", "a")
    (line,) = plot.lines
    assert line.get_ydata().tolist() == [20, 30]
    (band,) = plot.collections
    assert band.get_paths()[0].vertices[:, 1].min() == 10
    assert band.get_paths()[0].vertices[:, 1].max() == 40
