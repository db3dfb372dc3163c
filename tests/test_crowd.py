"""Crowded scenes, from drawing and reading to the figures of Table 3.

The published evaluation (OneNet's script, commit cb860adb; CrowdDet's JI, fa0b55b6) judges on 40
pictures of reference.pt.gz; slow loops and hand-made cases judge the rest.
"""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torchvision.ops import box_convert, box_iou, nms

import annotations
import crowd
import evaluate
import scenes
import train
from test_annotations import GOOD, draw_crowd_pictures, write_lines
from test_parity import reference


@pytest.fixture(scope="module")
def crowd_files(tmp_path_factory):
    """A small crowd data set: 12 pictures to train on, 5 to evaluate."""
    folder = tmp_path_factory.mktemp("crowd")
    return scenes.write_crowd(folder, seed=0, counts={"train": 12, "val": 5})


def score(command, gt, dt, *more):
    """evaluate.py results --protocol crowdhuman: exit code, standard output and error."""
    files = ["--gt", gt, "--dt", dt]
    return command(evaluate, "results", "--protocol", "crowdhuman", *files, *more)


# ------------------------------------------------------------------------------------------------
# the figures
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("missing", [False, True])
def test_the_figures_are_those_of_the_published_evaluation(tmp_path, command, missing):
    """From the command line; once with two pictures that have no line in the result file."""
    record = reference()["crowdhuman_eval/"]
    gt = write_lines(tmp_path / "gt.odgt", record["gt"])
    left_out = record["missing"] if missing else ()
    dt = write_lines(tmp_path / "dt.odgt", [r for r in record["dt"] if r["ID"] not in left_out])
    code, out, err = score(command, gt, dt, "--out", tmp_path / "m.json")
    assert code == 0, err
    ours = json.loads((tmp_path / "m.json").read_text())
    expected = record["expected"]["onenet_script_missing_records" if missing else "onenet_script"]
    for name, theirs in (("AP50", "AP"), ("mMR", "mMR"), ("recall", "recall")):
        # percent: 1e-6 of one
        assert ours[name] == pytest.approx(100 * expected[theirs], abs=1e-4)
    if not missing:
        assert ours["JI"] == pytest.approx(100 * record["JI"], abs=1e-4)


def slow_match(persons, ignored, boxes, threshold=0.5):
    """One detection after the other, as the protocol's text says it: "hit", "miss" or "none"."""
    def area(box):
        return (box[2] - box[0]) * (box[3] - box[1])

    def overlaps(a, b):
        w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        inter = max(w, 0) * max(h, 0)
        return inter / (area(a) + area(b) - inter + 1e-6), inter / area(a)

    taken, answers = set(), []
    for box in boxes:
        best, chosen = threshold, None
        for g, person in enumerate(persons):
            iou, _ = overlaps(box, person)
            if g not in taken and iou > best:
                best, chosen = iou, g
        if chosen is not None:
            taken.add(chosen)
            answers.append("hit")
        elif any(overlaps(box, region)[1] > threshold for region in ignored):
            answers.append("none")
        else:
            answers.append("miss")
    return answers


PLACES = st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 30), st.integers(1, 30))
BOXES = st.lists(PLACES, max_size=12).map(
    lambda rows: np.array([(x, y, x + w, y + h) for x, y, w, h in rows], float).reshape(-1, 4))


@settings(max_examples=100)
@given(BOXES, BOXES, BOXES)
def test_matching_agrees_with_a_slow_loop(persons, ignored, boxes):
    iou, covered = crowd.overlaps(boxes, persons)[0], crowd.overlaps(boxes, ignored)[1]
    hits, counts = crowd.match_crowd(iou, covered)
    ours = ["hit" if hit else "miss" if count else "none" for hit, count in zip(hits, counts)]
    assert ours == slow_match(persons, ignored, boxes)


@settings(max_examples=50)
@given(BOXES, BOXES)
def test_overlaps_are_torchvisions(a, b):
    expected = box_iou(torch.from_numpy(a), torch.from_numpy(b)).numpy().reshape(len(a), len(b))
    assert np.allclose(crowd.overlaps(a, b)[0], expected, atol=1e-5)


def picture(persons, ignored=()):
    boxes = (np.array(part, float).reshape(-1, 4) for part in (persons, ignored))
    return {"a": (*boxes, 200, 200)}


def found(*boxes):
    return {"a": np.array([(*box, score) for box, score in boxes], float).reshape(-1, 5)}


def test_hand_made_figures():
    """Two persons; best detection right, second wrong, third right:
    precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1.

    AP50 counts trapezoids from the second detection on: (1/2 + 2/3) / 2 * 1/2.  FPPI 0, 1, 1: all
    nine references are first reached by the second detection, where half is missed.
    """
    one, other, nowhere = (0, 0, 50, 100), (100, 0, 150, 100), (0, 150, 40, 190)
    detections = found((one, 0.9), (nowhere, 0.8), (other, 0.7))
    ours = crowd.crowd_metrics(picture([one, other]), detections)
    assert ours["AP50"] == pytest.approx(100 * (1 / 2 + 2 / 3) / 2 / 2, abs=1e-3)
    assert ours["mMR"] == pytest.approx(50, abs=1e-3) and ours["recall"] == 100
    # 2 pairs among 2 persons and 3 detections
    assert ours["JI"] == pytest.approx(100 * 2 / 3, abs=1e-3)


def test_a_second_detection_of_a_person_is_false_and_one_in_an_ignore_region_does_not_count():
    one, region = (0, 0, 50, 100), (100, 100, 200, 200)
    truth, twice = picture([one], [region]), [(one, 0.9), (one, 0.9)]
    ours = crowd.crowd_metrics(truth, found(*twice, ((110, 110, 150, 150), 0.95)))
    assert ours == crowd.crowd_metrics(truth, found(*twice))
    # no score threshold parts the two
    assert ours["recall"] == 100 and ours["JI"] == pytest.approx(50, abs=1e-3)


@pytest.mark.parametrize("persons, detections, expected", [
    # nobody there
    ([], [], {"AP50": -1, "mMR": -1, "recall": -1, "JI": -1}),
    ([], [((0, 0, 9, 9), 0.9)], {"AP50": -1, "mMR": -1, "recall": -1, "JI": 0}),
    ([(0, 0, 50, 100)], [], {"AP50": 0, "mMR": 100, "recall": 0, "JI": 0}),
    # no trapezoid in one point; no miss: no log
    ([(0, 0, 50, 100)], [((0, 0, 50, 100), 0.9)], {"AP50": 0, "mMR": 0, "recall": 100, "JI": 100}),
])
def test_pictures_without_people_or_detections_and_a_miss_rate_of_zero(
        persons, detections, expected):
    ours = crowd.crowd_metrics(picture(persons), found(*detections))
    assert {k: round(v, 3) for k, v in ours.items()} == expected
    assert all(math.isfinite(v) for v in ours.values())


def test_a_picture_of_ignore_regions_only_changes_the_fppi_and_nothing_else():
    """False positives per picture 1 and 2 of one picture, 1/2 and 1 of two:
    the log-average looks at other points of the curve.
    """
    one, other, nowhere = (0, 0, 50, 100), (100, 0, 150, 100), (0, 150, 40, 190)
    detections = found((nowhere, 0.95), (one, 0.9), ((50, 150, 90, 190), 0.8), (other, 0.7))
    alone = crowd.crowd_metrics(picture([one, other]), detections)
    region = np.array([[0, 0, 200, 200.0]])
    pictures = {**picture([one, other]), "b": (np.zeros((0, 4)), region, 200, 200)}
    both = crowd.crowd_metrics(pictures, {**detections, "b": np.array([[10, 10, 50, 50, 0.99]])})
    for name in both.keys() - {"mMR", "JI"}:
        assert both[name] == alone[name]
    assert both.keys() == alone.keys()

    # misses before and behind the detections: 1 1/2 1/2 0.  One picture: every reference is
    # reached by the first detection; two reach FPPI 0.5623 with the second false positive only
    assert alone["mMR"] == pytest.approx(100, abs=1e-3)
    expected = math.exp((7 * math.log(1) + 2 * math.log(0.5)) / 9)
    assert both["mMR"] == pytest.approx(100 * expected, abs=1e-3)


def test_only_the_best_500_detections_of_a_picture_count():
    one = (0, 0, 50, 100)
    boxes = [((150, 150, 160, 160), 0.9 - n / 1000) for n in range(500)] + [(one, 0.1)]
    assert crowd.crowd_metrics(picture([one]), found(*boxes))["recall"] == 0
    assert crowd.crowd_metrics(picture([one]), found(*boxes), max_dets=501)["recall"] == 100


# ------------------------------------------------------------------------------------------------
# result files
# ------------------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    return draw_crowd_pictures(tmp_path)


@pytest.mark.parametrize("line, words", [
    ("{", "line 1"),
    ({"ID": "a"}, "dtboxes"),
    ({"ID": "x", "dtboxes": []}, "'x'"),
    ({"ID": "../a", "dtboxes": []}, "ID"),
    ({"ID": "a", "dtboxes": [{"box": [1, 2, 3], "score": 1}]}, "detection 0"),
])
def test_a_bad_result_file_is_one_sentence(folder, command, line, words):
    sized = [{**record, "height": 60, "width": 80} for record in GOOD]
    gt = write_lines(folder / "gt.odgt", sized)
    code, _, err = score(command, gt, write_lines(folder / "dt.odgt", [line]))
    assert code == 2 and err.count("\n") == 1 and words in err


def test_sizes_may_come_from_the_ground_truth_the_results_or_the_pictures(folder, command):
    """A person's full box sticks out to the left:
    without clipping the detection would overlap it by too little.
    """
    detection, size = {"box": [0, 5, 30, 55], "score": 0.9}, {"height": 60, "width": 80}
    bare = write_lines(folder / "bare.odgt", GOOD)
    sized = write_lines(folder / "sized.odgt", [{**record, **size} for record in GOOD])
    results = [{"ID": "a", "dtboxes": [detection]}, {"ID": "b", "dtboxes": []}]
    plain = write_lines(folder / "plain.odgt", results[:1])
    with_sizes = write_lines(folder / "with.odgt", [{**result, **size} for result in results])

    said = []
    for gt, dt, more in [(sized, plain, ()), (bare, with_sizes, ()),
                         (bare, plain, ("--images", folder / "Images"))]:
        code, out, err = score(command, gt, dt, *more)
        assert code == 0, err
        said.append(out)
    assert said[0] == said[1] == said[2] and "recall 100.00" in said[0]
    code, _, err = score(command, bare, plain)
    assert code == 2 and "--images" in err


# ------------------------------------------------------------------------------------------------
# the embedded crowds
# ------------------------------------------------------------------------------------------------

def test_the_same_seed_gives_the_same_crowd(crowd_files, tmp_path):
    again = scenes.write_crowd(tmp_path / "again", seed=0, counts={"train": 2, "val": 1})
    for name in ("train-00000.png", "train-00001.png", "val-00000.png"):
        picture = Path("Images") / name
        assert (crowd_files / picture).read_bytes() == (again / picture).read_bytes()
    one, other = ((folder / "annotation_train.odgt").read_text().splitlines()
                  for folder in (crowd_files, again))
    assert one[:2] == other


def test_crowds_are_crowds(crowd_files):
    """10 to 31 persons, heads and visible parts inside their boxes, up to two ignore regions;
    and the reader finds no fault.
    """
    counts, regions, hidden = [], [], []
    for line in (crowd_files / "annotation_train.odgt").read_text().splitlines():
        boxes = json.loads(line)["gtboxes"]
        people = [b for b in boxes if b["tag"] == "person"]
        counts.append(len(people))
        regions.append(len(boxes) - len(people))
        for n, b in enumerate(people):
            hidden.append(b["extra"]["occ"])
            # only a nearer figure's box can hide
            nearer = torch.tensor([p["fbox"] for p in people[n + 1:]]).reshape(-1, 4)
            near, own = box_convert(nearer, "xywh", "xyxy"), torch.tensor(b["fbox"])
            own = box_convert(own, "xywh", "xyxy")
            shared = torch.minimum(near[:, 2:], own[2:]) - torch.maximum(near[:, :2], own[:2])
            assert not hidden[-1] or (shared > -1).all(1).any()

            x1, y1, x2, y2 = own.tolist()
            for x, y, w, h in (b["vbox"], b["hbox"]):
                assert x1 - 1 <= x and y1 - 1 <= y and x + w <= x2 + 1 and y + h <= y2 + 1
    assert 0.4 < np.mean(hidden) < 0.99
    assert 10 <= min(counts) and max(counts) <= 31 and np.mean(counts) > 15
    assert max(regions) == 2
    assert annotations.check(crowd_files / "annotation_train.odgt", crowd_files / "Images") == 0


def test_nms_keeps_95_percent_of_the_annotation_boxes():
    """At IoU 0.5, over 40 crowds, scores random: the ceiling the paper reports for CrowdHuman."""
    kept = total = 0
    for index in range(40):
        boxes = [b["fbox"] for b in scenes.draw_crowd(0, "val", index)[1] if b["tag"] == "person"]
        boxes = box_convert(torch.tensor(boxes, dtype=torch.float64), "xywh", "xyxy")
        boxes = boxes.clamp(0, scenes.CROWD_SIZE)
        kept += len(nms(boxes, torch.rand(len(boxes), dtype=torch.float64), 0.5))
        total += len(boxes)
    assert 0.94 < kept / total < 0.96


def test_the_recall_of_annotation_boxes_is_that_of_their_overlaps():
    """Of three persons two have an IoU of 2/3: NMS from 0.7 on leaves both.

    Boxes are cut to the picture first: two that share all that is in it, but a quarter in all.
    """
    def recall(*boxes):
        persons = np.array(boxes, float)
        return crowd.annotation_recall({"a": (persons, persons[:0], 200, 300)})

    one_goes = recall((0, 0, 100, 100), (0, 20, 100, 120), (0, 150, 40, 190))
    assert one_goes == {at: 66.67 for at in (0.4, 0.45, 0.5, 0.55, 0.6, 0.65)} | {0.7: 100}
    assert set(recall((-100, 0, 20, 100), (-10, 0, 20, 100)).values()) == {50}


def test_a_crowd_trains_and_leaves_its_figures(crowd_files, tmp_path, command):
    train_json, val_json = (crowd_files / f"annotation_{split}.odgt" for split in ("train", "val"))
    flags = {"data": "custom", "train-json": train_json, "train-images": crowd_files / "Images",
             "val-json": val_json, "val-images": crowd_files / "Images",
             "train-sizes": 96, "train-longest": 96, "test-size": 96, "test-longest": 96,
             "steps": 2, "batch-size": 4, "width": 16, "depth": 1, "device": "cpu",
             "precision": "fp32", "max-dets": 500, "out": tmp_path / "run"}
    train.main([part for name, value in flags.items() for part in (f"--{name}", str(value))])
    figures = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for part in (figures, figures["nms"]):
        assert {"AP50", "mMR", "recall", "JI", "coco"} <= part.keys()
    code, out, err = command(evaluate, "--weights", tmp_path / "run" / "last.pt", "--device", "cpu",
                             "--out", tmp_path / "again")
    assert code == 0 and "mMR" in out, err
    assert json.loads((tmp_path / "again" / "metrics.json").read_text()) == figures
    code, out, err = command(evaluate, "nms", "--weights", tmp_path / "run", "--device", "cpu")
    assert code == 0 and "AP50" in out, err
    said = json.loads((tmp_path / "run" / "nms.json").read_text())
    assert [said[name] for name in ("AP50", "recall")] == [figures["AP50"], figures["recall"]]
    code, out, _ = command(evaluate, "annotations", "--data", "custom", "--val-json", val_json,
                           "--val-images", crowd_files / "Images")
    assert code == 0 and out.count("NMS at IoU") == 7
