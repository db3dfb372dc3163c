"""Duplicates and score gaps: lists that a person can count, and a slow version of its own."""
import json
import random

import numpy as np
import pytest
import torch

import duplicates
import evaluate
from test_evaluate import detection, ground_truth, random_case

# two objects far apart; the first found three times, the second once, and one false detection
OBJECTS = [(1, 1, (0, 0, 100, 100)), (1, 1, (200, 200, 100, 100))]
FOUND = [detection((0, 0, 100, 100), 0.9), detection((0, 10, 100, 100), 0.8),    # IoU 0.82
         detection((0, 25, 100, 100), 0.2),                                      # IoU 0.6
         detection((200, 200, 100, 100), 0.5), detection((400, 0, 50, 50), 0.7)]


def diagnosis(folder, truth, found):
    """What `evaluate.py nms` writes."""
    (folder / "gt.json").write_text(json.dumps(truth))
    (folder / "dt.json").write_text(json.dumps(found))
    return evaluate.diagnose(*evaluate.read_case(folder / "gt.json", folder / "dt.json"), 100)


def test_two_objects_counted_by_hand(tmp_path):
    found = diagnosis(tmp_path, ground_truth(OBJECTS), FOUND)
    assert (found["objects"], found["found"], found["detections"]) == (2, 2, 5)
    assert found["duplicates per object"] == {"0.05": 1.0, "0.1": 1.0, "0.3": 0.5, "0.5": 0.5}
    # gaps 0.9 - 0.8 and 0.5 - 0, whose quartiles lie between them
    assert found["score gap"] == pytest.approx([0.2, 0.3, 0.4])
    assert found["first score"] == pytest.approx([0.6, 0.7, 0.8])
    assert found["second score"] == pytest.approx([0.2, 0.4, 0.6])
    # at IoU 0.5 in the order of scores: hit, duplicate, false, hit: precision 1 and 2/4
    assert found["AP50"] == pytest.approx(100 * (51 * 1 + 50 * 0.5) / 101, abs=1e-3)
    # NMS at 0.5 takes both duplicates away: hit, false, hit
    assert found["nms"]["0.5"]["AP50"] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101, abs=1e-3)
    assert found["oracle"]["AP50"] == pytest.approx(found["nms"]["0.5"]["AP50"])
    # NMS at 0.9 none, at 0.8 the nearer one
    assert found["nms"]["0.9"]["AP50"] == pytest.approx(found["AP50"])
    assert found["nms"]["0.8"]["AP50"] == pytest.approx(found["nms"]["0.5"]["AP50"])
    assert found["lost to NMS at 0.5"] == 0


def test_another_class_and_crowd_regions_are_of_no_object(tmp_path):
    truth = ground_truth([OBJECTS[0]], category_ids=(1, 2))
    truth["annotations"].append({"id": 9, "image_id": 1, "category_id": 1, "iscrowd": 1,
                                 "bbox": [300, 300, 50, 50], "area": 2500})
    found = diagnosis(tmp_path, truth, [detection((0, 0, 100, 100), 0.9),
                                        detection((0, 0, 100, 100), 0.8, category=2),
                                        detection((300, 300, 50, 50), 0.7)])
    assert (found["objects"], found["found"]) == (1, 1)
    assert found["duplicates per object"]["0.05"] == 0
    assert found["score gap"] == pytest.approx([0.9] * 3)


def test_neighbours_that_nms_loses(tmp_path):
    """Two objects with IoU 0.6, each found exactly once: NMS at 0.5 keeps one, at 0.7 both."""
    objects = [(1, 1, (0, 0, 100, 100)), (1, 1, (0, 25, 100, 100))]
    found = diagnosis(tmp_path, ground_truth(objects), [detection(objects[0][2], 0.9),
                                                        detection(objects[1][2], 0.8)])
    assert found["lost to NMS at 0.5"] == 1
    assert found["AP"] == found["oracle"]["AP"] == found["nms"]["0.7"]["AP"] == 100
    assert found["nms"]["0.5"]["AP"] == pytest.approx(100 * 51 / 101, abs=1e-3)
    assert found["duplicates per object"]["0.05"] == 0
    assert "end-to-end" in duplicates.verdict(found)
    assert "NMS at IoU 0.5 costs 49.5 AP" in duplicates.verdict(found)


def test_nothing_found_and_nothing_to_find(tmp_path):
    found = diagnosis(tmp_path, ground_truth(OBJECTS), [])
    assert found["found"] == 0 and found["score gap"] is None and found["AP"] == 0
    assert duplicates.verdict(found) == "cannot be told: nothing is found."
    found = diagnosis(tmp_path, ground_truth([]), FOUND)
    assert found["objects"] == 0 and found["AP"] == -1
    assert duplicates.verdict(found) == "cannot be told: no objects."
    evaluate.describe_diagnosis(found)


def slow_counts(truth, found):
    """Gaps of the objects found, duplicates above 0.3 an object, with loops only."""
    def iou(a, b):
        w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
        h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
        inter = max(w, 0) * max(h, 0)
        return inter / (a[2] * a[3] + b[2] * b[3] - inter)

    objects = [o for o in truth["annotations"] if not o["iscrowd"]]
    own = {o["id"]: [] for o in objects}
    for d in found:
        near = [(iou(d["bbox"], o["bbox"]), o["id"]) for o in objects
                if (o["image_id"], o["category_id"]) == (d["image_id"], d["category_id"])]
        if near and max(near)[0] >= 0.5:
            own[max(near)[1]].append(d["score"])
    tops = [sorted(scores, reverse=True) + [0] for scores in own.values() if scores]
    above = sum(max(0, sum(s >= 0.3 for s in scores) - 1) for scores in own.values())
    return [top[0] - top[1] for top in tops], above / len(objects)


@pytest.mark.parametrize("seed", range(6))
def test_random_cases_against_a_slow_version(tmp_path, seed):
    truth, found = random_case(seed)
    ours = diagnosis(tmp_path, truth, found)
    gaps, per_object = slow_counts(truth, found)
    assert ours["found"] == len(gaps) > 5
    assert ours["score gap"] == pytest.approx(np.quantile(gaps, [0.25, 0.5, 0.75]), abs=1e-4)
    assert ours["score gaps below 0.1"] == pytest.approx(100 * np.mean(np.array(gaps) < 0.1),
                                                         abs=0.01)
    assert ours["duplicates per object"]["0.3"] == pytest.approx(per_object, abs=1e-4)
    assert ours["score gaps"] == np.histogram(gaps, 20, (0, 1))[0].tolist()


def test_nms_does_not_let_one_class_suppress_another_left_of_the_picture(tmp_path):
    found = diagnosis(tmp_path, ground_truth([(1, 1, (0, 0, 10, 10))], category_ids=(1, 2)),
                      [detection((-11, -11, 10, 10), 0.9, category=2),
                       detection((0, 0, 10, 10), 0.5)])
    assert found["lost to NMS at 0.5"] == 0


def test_duplicates_that_cost_nothing_may_still_hit(tmp_path):
    """The first box has IoU 0.6, the second 1: without the first as a mistake AP is 100."""
    truth = ground_truth([(1, 1, (0, 0, 100, 100))])
    found = diagnosis(tmp_path, truth, [detection((0, 25, 100, 100), 0.9),
                                        detection((0, 0, 100, 100), 0.8),
                                        detection((0, 1, 100, 100), 0.7)])
    # at IoU 0.65 and more the first is a mistake before the hit: precision 1/2
    assert found["AP"] == pytest.approx((3 * 100 + 7 * 50) / 10)
    assert found["oracle"]["AP"] == pytest.approx((3 * 100 + 7 * 50) / 10)
    only = diagnosis(tmp_path, truth, [detection((0, 0, 100, 100), 0.9),
                                       detection((0, 25, 100, 100), 0.8)])
    assert only["oracle"]["AP"] == 100


def test_the_order_of_the_list_does_not_matter(tmp_path):
    truth, found = random_case(1)
    shuffled = random.Random(0).sample(found, len(found))
    assert diagnosis(tmp_path, truth, shuffled) == diagnosis(tmp_path, truth, found)


def test_ranks_of_ties_follow_the_list():
    of = torch.tensor([0, 0, -1, 1, 0])
    scores = torch.tensor([0.5, 0.5, 0.9, 0.1, 0.7])
    assert duplicates.ranks(scores, of).tolist() == [1, 2, -1, 0, 0]


@pytest.mark.parametrize("gain,word", [(1.0, "needs NMS"), (0.8, "nearly end-to-end"),
                                       (0.5, "end-to-end"), (-2.0, "end-to-end")])
def test_the_verdict_and_its_thresholds(gain, word):
    found = {"AP": 40.0, "nms": {"0.5": {"AP": 40 + gain}, "0.9": {"AP": 40.0}}, "found": 3,
             "objects": 3, "score gap": [0.1, 0.2, 0.3]}
    said = duplicates.verdict(found)
    assert said.startswith(word) and "0.20" in said
    assert ("costs 2.0" in said) == (gain == -2.0)
    assert "1 AP or more" in said and "0.5 or less" in said


def test_a_detector_that_finds_almost_nothing_is_not_called_end_to_end():
    found = {"AP": 1.3, "nms": {"0.5": {"AP": 1.2}, "0.9": {"AP": 1.9}}, "found": 3,
             "objects": 300, "score gap": [0.1, 0.2, 0.3]}
    assert duplicates.verdict(found) == "cannot be told: with NMS and without AP is below 10."
    found["nms"]["0.9"]["AP"] = 2.4
    assert duplicates.verdict(found).startswith("needs NMS")


def test_the_command_prints_writes_and_draws(tmp_path, command):
    (tmp_path / "gt.json").write_text(json.dumps(ground_truth(OBJECTS)))
    (tmp_path / "dt.json").write_text(json.dumps(FOUND))
    files = ["--gt", tmp_path / "gt.json", "--dt", tmp_path / "dt.json"]
    code, out, err = command(evaluate, "nms", *files)
    assert code == 0 and "duplicates an object: 1.00 above 0.05" in out, err
    # the results of another detector in this folder have another name
    written = json.loads((tmp_path / "nms-dt.json").read_text())
    assert written["verdict"] in out and "needs NMS" in written["verdict"]
    assert (tmp_path / "nms-dt.png").stat().st_size > 10_000
    (tmp_path / "dt.json").rename(tmp_path / "detections.json")
    command(evaluate, "nms", *files[:3], tmp_path / "detections.json")
    assert json.loads((tmp_path / "nms.json").read_text()) == written
    weights = ["--weights", tmp_path / "last.pt"]
    for given in (files[:2], [*files, *weights], [*files[:2], *weights]):
        code, _, err = command(evaluate, "nms", *given)
        assert code == 2 and "--weights last.pt, or --gt and --dt" in err


def test_crowds_are_judged_on_their_own_terms(tmp_path, command):
    """Two persons with IoU 0.6, found once each: NMS at 0.5 loses one of them."""
    line = {"ID": "a", "height": 200, "width": 200, "gtboxes": [
        {"tag": "person", "fbox": [0, y, 100, 100], "vbox": [0, y, 100, 100],
         "hbox": [0, y, 10, 10]} for y in (0, 25)]}
    found = {"ID": "a", "dtboxes": [{"box": [0, 0, 100, 100], "score": 0.9},
                                    {"box": [0, 25, 100, 100], "score": 0.8}]}
    (tmp_path / "gt.odgt").write_text(json.dumps(line) + "\n")
    (tmp_path / "dt.odgt").write_text(json.dumps(found) + "\n")
    code, out, err = command(evaluate, "nms", "--protocol", "crowdhuman", "--gt",
                             tmp_path / "gt.odgt", "--dt", tmp_path / "dt.odgt")
    assert code == 0, err
    written = json.loads((tmp_path / "nms-dt.json").read_text())
    assert written["lost to NMS at 0.5"] == 1 and written["duplicates per object"]["0.05"] == 0
    assert written["recall"] == 100 and written["nms"]["0.5"]["recall"] == 50

    # two apart, of which the first is found twice: hit, false, hit.  AP50 is the area from the
    # second detection on, 0 + 0.5 (1/2 + 2/3) / 2; without the duplicate 0.5 (1 + 1) / 2
    for box, x in zip(line["gtboxes"], (0, 100)):
        box["fbox"] = box["vbox"] = [x, 0, 50, 100]
    found["dtboxes"] = [{"box": [0, 0, 50, 100], "score": 0.9},
                        {"box": [0, 0, 50, 100], "score": 0.85},
                        {"box": [100, 0, 50, 100], "score": 0.8}]
    (tmp_path / "gt.odgt").write_text(json.dumps(line) + "\n")
    (tmp_path / "dt.odgt").write_text(json.dumps(found) + "\n")
    assert command(evaluate, "nms", "--protocol", "crowdhuman", "--gt", tmp_path / "gt.odgt",
                   "--dt", tmp_path / "dt.odgt")[0] == 0
    written = json.loads((tmp_path / "nms-dt.json").read_text())
    assert written["AP50"] == pytest.approx(29.1667, abs=1e-3)
    assert written["oracle"]["AP50"] == written["nms"]["0.5"]["AP50"] == 50
