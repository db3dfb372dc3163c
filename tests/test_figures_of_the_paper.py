"""Figures 4 to 6 and their kin: not the pixels, but the numbers behind them and what is refused."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.path import Path as Polygon
from PIL import Image
from scipy.optimize import linear_sum_assignment

import annotations
import checkpoints
import data
import figures
import train
from detect import COLOURS
from test_figures import curves, kept                                # noqa: F401 (a fixture)
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


def test_positives_of_one_score_are_both_seen(two_runs, tmp_path, monkeypatch):
    """Two lines at one place, the second drawn over the first: the first is the wider."""
    widths, axvline = [], plt.Axes.axvline

    def noted(axes, x, **look):
        widths.append(look["linewidth"])
        return axvline(axes, x, **look)

    monkeypatch.setattr(plt.Axes, "axvline", noted)
    figures.score_histograms([two_runs[0], two_runs[0]], tmp_path / "a.png", count=1)
    assert len(widths) == 4 and all(a > b for a, b in zip(widths[::2], widths[1::2]))


def test_a_ring_is_seen_on_its_own_colour():
    canvas = Image.new("RGB", (40, 40), "red")
    figures.ring(canvas, (20, 20), "red")
    pixels = np.asarray(canvas)
    assert (pixels[20, 20] == (255, 0, 0)).all() and (pixels == 0).all(-1).any()


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
    """What stands in them is looked at below."""
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
    (["wander", "BARE"], "an animation needs runs that were trained with --keep-checkpoints"),
    (["scores", "RUN", "BARE"], "did not keep the same number of checkpoints"),
])
def test_what_cannot_be_drawn_is_one_sentence(two_runs, tmp_path, command, given, words):
    places = {"RUN": two_runs[0], "BARE": tmp_path / "BARE"}
    shutil.copytree(two_runs[0], places["BARE"], ignore=shutil.ignore_patterns("step-*.pt"))
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


def test_what_each_strategy_chooses_is_what_it_is_said_to_choose(
        two_runs, tmp_path, kept, monkeypatch):
    """By brute force from the costs that the figure shows: each object's cheapest are among them.

    All objects want prediction 7, so that no two strategies agree.  top-k: each object's 9
    cheapest, but a prediction that two want goes where it is cheaper.
    """
    price = figures.assign.price

    def one_for_all(*args):
        cost = price(*args)
        cost[7] -= 100
        return cost

    monkeypatch.setattr(figures.assign, "price", one_for_all)
    figures.cost_and_choice(two_runs[1:], tmp_path / "a.png")
    left, middle = kept[0].axes[:2]
    cost = np.asarray(middle.images[0].get_array())
    cheapest = np.argsort(cost, 0)
    wanted = {(g, q) for g in range(cost.shape[1]) for q in cheapest[:9, g]}
    expected = {
        "hungarian": set(zip(*linear_sum_assignment(cost.T))),
        "min-cost": set(enumerate(cheapest[0])),
        "top-k (9)": {(g, q) for g, q in wanted if all(
            cost[q, g] <= cost[q, other] for other, same in wanted if same == q)}}
    found = {line.get_label(): set(zip(*line.get_data())) for line in middle.lines}
    assert found == expected and found["hungarian"] != found["min-cost"]
    assert {line.get_label(): len(line.get_xdata()) for line in left.lines} == {
        name: len(pairs) for name, pairs in expected.items()}


def test_hero_shows_what_was_found_without_nms(two_runs, tiny_scenes, tmp_path):
    """A row of pictures a run, twice as large: one run has found a box here, the other none."""
    truth = json.loads((tiny_scenes / "val.json").read_text())
    image, folders = truth["images"][1], [tmp_path / name for name in "ab"]
    found = [{"image_id": image["id"], "category_id": truth["categories"][3]["id"],
              "bbox": [20, 30, 60, 50], "score": 0.25}]
    for folder, score in zip(folders, (0.25, 0.15)):
        shutil.copytree(two_runs[0], folder)
        (folder / "detections.json").write_text(json.dumps([{**found[0], "score": score}]))
        (folder / "detections_nms.json").unlink()
    figures.hero(folders, tmp_path / "a.png", image["id"])
    with Image.open(tmp_path / "a.png") as sheet:
        rows = np.asarray(sheet.convert("RGB")).astype(int)
    row = 14 + 256 + 4 + 4                   # a caption, the picture, two gaps
    # of 255 colours each is about what it was
    edges = [rows[n * row + 14 + 159:n * row + 14 + 162, 100] for n in (0, 1)]
    close = [np.abs(edge - np.array(COLOURS[3])).max(1).min() < 40 for edge in edges]
    assert close == [True, False]


def test_positives_are_red_on_an_object_and_yellow_beside_it(tiny_scenes):
    """Drawn at twice the size of the picture."""
    known = annotations.read_annotations(tiny_scenes / "val.json", tiny_scenes / "val")
    detector = SimpleNamespace(pictures=data.Pictures(known, data.Transform()))
    canvas = figures.positives_on_picture(detector, torch.tensor([[64.0, 80], [20, 30]]),
                                          torch.tensor([True, False]), 0)
    assert canvas.getpixel((128, 160)) == (255, 0, 0)
    assert canvas.getpixel((40, 60)) == (255, 255, 0)


def test_ap_by_threshold_of_nms_is_drawn_from_nms_json(tmp_path, command, kept):
    """Left the thresholds, and lines without NMS and with an oracle; right shares of the found."""
    (tmp_path / "nms.json").write_text(json.dumps(
        {"AP": 40, "nms": {"0.3": {"AP": 30}, "0.5": {"AP": 45}}, "oracle": {"AP": 50},
         "score gaps": [1, 3], "found": 4, "pictures": 7, "objects": 5}))
    code, _, err = command(figures, "nms", tmp_path, "--out", tmp_path / "a.png")
    assert code == 0 and (tmp_path / "a.png").exists(), err
    left, right = kept[0].axes
    assert curves(left) == [[30, 45], [40, 40], [50, 50]]
    assert left.lines[0].get_xdata().tolist() == [0.3, 0.5]
    assert [line.get_label() for line in left.lines[:2]] == [tmp_path.name, "    without NMS"]
    (stairs,) = right.patches
    assert stairs.get_data().values.tolist() == [25, 75]
    assert stairs.get_data().edges.tolist() == [0, 0.5, 1]


def test_a_line_of_many_points_is_a_running_mean_of_five():
    """An impulse of 5 becomes five ones; of fewer than 20 points nothing is smoothed."""
    impulse = np.zeros((1, 20))
    impulse[0, 10] = 5
    assert np.flatnonzero(figures.smooth(impulse)[0]).tolist() == [8, 9, 10, 11, 12]
    assert figures.smooth(impulse)[0, 8:13] == pytest.approx(np.ones(5))
    assert np.array_equal(figures.smooth(impulse[:, 1:]), impulse[:, 1:])


def test_early_middle_and_late_are_a_tenth_half_and_all_of_the_schedule():
    kept = [SimpleNamespace(step=step, flags={"steps": 100}) for step in (5, 10, 50, 90, 100)]
    assert [one.step for one in figures.early_middle_late(kept)] == [10, 50, 100]
    assert [one.step for one in figures.early_middle_late(kept[1:2])] == [10]


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
