"""Figures and decoding (oracles: pycocotools called directly, hand-computed precision, brute-force loops)."""
import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import batched_nms, box_iou

import annotations
import data
import evaluate
import models

ROOT = Path(evaluate.__file__).parent


def ground_truth(annotations, images=1, category_ids=(1,)):
    """A COCO data set: `annotations` are (image_id, category_id, xywh) with pictures numbered from 1."""
    return {"images": [{"id": n + 1, "file_name": f"{n}.png", "height": 500, "width": 500} for n in range(images)],
            "annotations": [{"id": n + 1, "image_id": image, "category_id": category, "bbox": list(box), "iscrowd": 0,
                             "area": box[2] * box[3]} for n, (image, category, box) in enumerate(annotations)],
            "categories": [{"id": c, "name": f"class {c}"} for c in category_ids]}


def detection(box, score, image=1, category=1):
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


def figures(folder, truth, found, max_dets=100):
    """Our figures of a ground truth and a result file, both written to disk first."""
    (folder / "gt.json").write_text(json.dumps(truth))
    (folder / "dt.json").write_text(json.dumps(found))
    return evaluate.score_file(folder / "gt.json", folder / "dt.json", max_dets)


# ------------------------------------------------------------------------------------------------
# figures
# ------------------------------------------------------------------------------------------------

def random_case(seed):
    """Twelve pictures, three classes, objects of all sizes, some crowd regions; detections, most of them good."""
    rng = np.random.default_rng(seed)
    truth, found = ground_truth([], images=12, category_ids=(3, 7, 20)), []
    for image in range(1, 13):
        for _ in range(rng.integers(0, 12)):
            size = rng.choice([15, 60, 150]) * rng.uniform(0.8, 1.3, 2)
            corner, category = rng.uniform(0, 500 - size), int(rng.choice([3, 7, 20]))
            truth["annotations"].append({
                "id": len(truth["annotations"]) + 1, "image_id": image, "category_id": category,
                "bbox": [*corner, *size], "area": 0.7 * size.prod(), "iscrowd": int(rng.random() < 0.1)})
            for _ in range(rng.integers(0, 4)):
                moved = corner + rng.normal(0, 0.08, 2) * size
                box = [*moved, *size * rng.uniform(0.85, 1.2, 2)]
                found.append(detection(box, rng.random(), image, category if rng.random() < 0.9 else 7))
        found += [detection([*rng.uniform(0, 300, 2), 40, 30], 0.3 * rng.random(), image, 20)
                  for _ in range(150 if image == 5 else 2)]           # one picture with more than 100 detections
    return truth, found


@pytest.mark.parametrize("seed", range(4))
def test_figures_are_pycocotools(tmp_path, seed):
    truth, found = random_case(seed)
    ours = figures(tmp_path, truth, found)
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(tmp_path / "gt.json")
        run = COCOeval(gt, gt.loadRes(str(tmp_path / "dt.json")), "bbox")
        run.evaluate(), run.accumulate(), run.summarize()
    theirs = dict(zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), run.stats), AR=run.stats[8])
    assert ours == pytest.approx({name: 100 * value for name, value in theirs.items()}, abs=1e-3)
    assert 5 < ours["AP"] < 95                                        # else the case would show nothing


def test_one_perfect_detection_of_one_object_is_100(tmp_path):
    ours = figures(tmp_path, ground_truth([(1, 1, (10, 10, 50, 50))]), [detection((10, 10, 50, 50), 0.1)])
    assert ours == {"AP": 100, "AP50": 100, "AP75": 100, "APs": -1, "APm": 100, "APl": -1, "AR": 100}


def test_a_better_scored_mistake_halves_ap_and_a_worse_scored_one_costs_nothing(tmp_path):
    """Precision where recall first reaches 1 is 1/2 or 1: the end-to-end detector's problem in one picture."""
    truth, right = ground_truth([(1, 1, (10, 10, 50, 50))]), detection((10, 10, 50, 50), 0.5)
    elsewhere = (200, 200, 50, 50)
    assert figures(tmp_path, truth, [right, detection(elsewhere, 0.6)])["AP"] == 50
    assert figures(tmp_path, truth, [right, detection(elsewhere, 0.4)])["AP"] == 100


def test_a_duplicate_costs_precision_of_what_is_found_later(tmp_path):
    """Two objects; found, found again, found: precision 1 up to recall 0.5 (51 of 101 points), then 2/3."""
    truth = ground_truth([(1, 1, (10, 10, 50, 50)), (1, 1, (200, 200, 50, 50))])
    found = [detection((10, 10, 50, 50), 0.9), detection((10, 10, 50, 50), 0.8), detection((200, 200, 50, 50), 0.7)]
    assert figures(tmp_path, truth, found)["AP"] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101, abs=1e-3)


def test_a_box_counts_up_to_the_threshold_its_iou_passes(tmp_path):
    """IoU 0.81 passes 0.50, 0.55, ... 0.80: seven of the ten thresholds."""
    ours = figures(tmp_path, ground_truth([(1, 1, (0, 0, 100, 100))]), [detection((0, 0, 81, 100), 0.5)])
    assert ours["AP50"] == ours["AP75"] == 100 and ours["AP"] == pytest.approx(70) and ours["AR"] == pytest.approx(70)


def test_max_dets_is_honoured_beyond_100(tmp_path):
    """120 objects, 120 perfect detections, one picture: 100 of them recall 5/6, which 84 of 101 recall points reach."""
    boxes = [(20 * (n % 12), 20 * (n // 12), 12, 12) for n in range(120)]
    truth = ground_truth([(1, 1, box) for box in boxes])
    found = [detection(box, 1 - n / 1000) for n, box in enumerate(boxes)]
    at_100, at_120 = (figures(tmp_path, truth, found, max_dets) for max_dets in (100, 120))
    assert at_100["AR"] == pytest.approx(100 * 5 / 6, abs=1e-3)
    assert at_100["AP"] == pytest.approx(100 * 84 / 101, abs=1e-3)
    assert at_120["AR"] == at_120["AP"] == 100


def test_without_detections_ap_is_0_and_without_objects_it_is_minus_1(tmp_path):
    assert figures(tmp_path, ground_truth([(1, 1, (10, 10, 50, 50))]), []) == {
        "AP": 0, "AP50": 0, "AP75": 0, "APs": -1, "APm": 0, "APl": -1, "AR": 0}
    assert set(figures(tmp_path, ground_truth([]), [detection((1, 1, 5, 5), 0.5)]).values()) == {-1}


def test_crowd_regions_absorb_any_number_of_detections(tmp_path):
    truth = ground_truth([(1, 1, (10, 10, 50, 50)), (1, 1, (100, 100, 300, 300))])
    found = [detection((10, 10, 50, 50), 0.5)] + [detection((110 + 9 * n, 150, 40, 40), 0.9) for n in range(20)]
    assert figures(tmp_path, truth, found)["AP"] < 5
    truth["annotations"][1]["iscrowd"] = 1
    assert figures(tmp_path, truth, found)["AP"] == 100


@pytest.mark.parametrize("ids", [[0, 1], ["a", "b"], [None, None], [2, None], [2 ** 60, 7]])
def test_annotation_ids_are_only_names(tmp_path, ids):
    """Ids from 0, of text, or none at all: what the reader accepts can be evaluated, and counts."""
    truth = ground_truth([(1, 1, (10, 10, 50, 50)), (1, 1, (200, 200, 50, 50))])
    for annotation, name in zip(truth["annotations"], ids):
        annotation.pop("id") if name is None else annotation.update(id=name)
    assert figures(tmp_path, truth, [detection((10, 10, 50, 50), 0.9), detection((200, 200, 50, 50), 0.8)])["AP"] == 100


def test_image_and_category_ids_may_be_text(tmp_path):
    truth = ground_truth([("x", "car", (10, 10, 50, 50))], images=2, category_ids=("car",))
    truth["images"][0]["id"], truth["images"][1]["id"] = "x", "y"
    assert figures(tmp_path, truth, [detection((10, 10, 50, 50), 0.9, "x", "car")])["AP"] == 100


def test_without_an_area_the_box_gives_it(tmp_path):
    truth = ground_truth([(1, 1, (10, 10, 50, 50))])
    del truth["annotations"][0]["area"], truth["annotations"][0]["iscrowd"]
    assert figures(tmp_path, truth, [detection((10, 10, 50, 50), 0.9)])["APm"] == 100


def test_only_the_pictures_asked_for_are_counted():
    truth = ground_truth([(1, 1, (10, 10, 50, 50)), (2, 1, (10, 10, 50, 50))], images=2)
    gt = evaluate.coco_object(truth["images"], truth["categories"], truth["annotations"])
    found = [detection((10, 10, 50, 50), 0.9, image=2)]
    assert evaluate.coco_metrics(gt, found, image_ids=[2])["AP"] == 100
    assert evaluate.coco_metrics(gt, found, image_ids=[1])["AP"] == 0
    assert evaluate.coco_metrics(gt, found)["AP"] == pytest.approx(100 * 51 / 101, abs=1e-3)


def test_the_summary_line_holds_the_two_columns_and_their_difference():
    line = evaluate.describe({"AP": 33.6, "AP50": 51.2, "nms": {"AP": 36.84, "AP50": 50.0}})
    assert line == "AP 33.6   AP(+NMS) 36.8 (+3.2)   AP50 51.2   AP50(+NMS) 50.0 (-1.2)"


# ------------------------------------------------------------------------------------------------
# a pass over pictures
# ------------------------------------------------------------------------------------------------

def test_a_detector_that_knows_the_answers_scores_100_through_resizing_and_batching(tiny_scenes, tmp_path):
    """Its boxes come in pixels of the resized pictures, its classes as 0 ... C-1; "nms" here forgets everything."""
    truth_set = annotations.read_annotations(tiny_scenes / "val.json", tiny_scenes / "val")
    pictures = data.Pictures(truth_set, data.Transform(shortest=(96,)))
    answers = iter([pictures[key][1] for batch in data.evaluation_batches(truth_set, 3) for key in batch])
    model = models.build("fcos", 6, "tiny", width=16, depth=1, extra=0).train()

    def knows(prediction, n, k):
        target = next(answers)
        empty = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long)
        return {"plain": (target["boxes"], torch.ones(len(target["boxes"])), target["labels"]), "nms": empty}

    model.detections = knows
    results = evaluate.detect(model, pictures, batch_size=3, progress=False)
    truth = json.loads((tiny_scenes / "val.json").read_text())
    assert figures(tmp_path, truth, results["plain"])["AP"] == 100
    assert figures(tmp_path, truth, results["nms"])["AP"] == 0
    assert len(results["plain"]) == len(truth["annotations"]) and model.training
    for d in results["plain"]:                                        # in pixels of the original, the file's own ids
        assert any(a["image_id"] == d["image_id"] and a["category_id"] == d["category_id"]
                   and np.allclose(a["bbox"], d["bbox"], atol=0.02) for a in truth["annotations"])


def checkpoint(folder, class_names):
    """A checkpoint of a small untrained detector with what evaluate.py reads of it; its file."""
    build = dict(detector="fcos", num_classes=len(class_names), backbone="tiny", width=16, depth=1, extra=0)
    torch.save({"build": build, "model": models.build(**build).state_dict(), "class_names": class_names, "args": {},
                "test_transform": {"shortest": [128], "longest": 128}}, folder / "last.pt")
    return folder / "last.pt"


def test_dropped_boxes_are_no_missed_objects_in_evaluation(tiny_scenes, tmp_path, monkeypatch, command):
    """With --drop-bad-boxes a detector that finds every good box scores 100, whatever the file's other boxes are."""
    record = json.loads((tiny_scenes / "val.json").read_text())
    truth_set = annotations.read_annotations(tiny_scenes / "val.json", tiny_scenes / "val")
    pictures = data.Pictures(truth_set, data.Transform(shortest=(128,)))
    answers = iter([pictures[key][1] for batch in data.evaluation_batches(truth_set, 16) for key in batch])
    record["annotations"] += [{"id": 1000 + n, "image_id": 1, "category_id": 1, "bbox": box, "iscrowd": 0}
                              for n, box in enumerate([None, [5, 5, float("nan"), 5], [5, 5, 0, 9], [200, 5, 9, 9]])]
    (tmp_path / "val.json").write_text(json.dumps(record))

    def knows(self, prediction, n, k):
        target = next(answers)
        found = target["boxes"], torch.ones(len(target["boxes"])), target["labels"]
        return {"plain": found, "nms": found}

    monkeypatch.setattr(models.FCOS, "detections", knows)
    code, _, err = command(evaluate, "--weights", checkpoint(tmp_path, truth_set.class_names),
                           "--data", "custom", "--val-json", tmp_path / "val.json", "--val-images", tiny_scenes / "val",
                           "--drop-bad-boxes", "--device", "cpu", "--out", tmp_path / "out")
    assert code == 0 and "dropped 4 bad box" in err
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["AP"] == 100


def test_a_checkpoint_of_other_classes_is_refused(tiny_scenes, tmp_path, command):
    weights = checkpoint(tmp_path, ["cat", "dog"])
    code, _, err = command(evaluate, "--weights", weights, "--data", "custom",
                           "--val-json", tiny_scenes / "val.json", "--val-images", tiny_scenes / "val")
    assert code == 2 and err.count("\n") == 1 and "['cat', 'dog']" in err and "same classes" in err


# ------------------------------------------------------------------------------------------------
# result files and the command line
# ------------------------------------------------------------------------------------------------

def test_results_prints_and_writes_the_same_figures(tmp_path):
    truth, found = random_case(0)
    expected = figures(tmp_path, truth, found)
    files = ["--gt", tmp_path / "gt.json", "--dt", tmp_path / "dt.json", "--out", tmp_path / "out.json"]
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", "results", *files], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    assert json.loads((tmp_path / "out.json").read_text()) == expected
    printed = {name: float(value) for name, value in (line.split() for line in done.stdout.splitlines())}
    assert printed == pytest.approx(expected, abs=0.005)


def test_max_dets_of_the_command_line(tmp_path, command):
    boxes = [(20 * n, 0, 12, 12) for n in range(10)]
    found = [detection(box, 1 - n / 20) for n, box in enumerate(boxes)]
    figures(tmp_path, ground_truth([(1, 1, box) for box in boxes]), found)
    files = ["--gt", tmp_path / "gt.json", "--dt", tmp_path / "dt.json"]
    assert "AR     50.00" in command(evaluate, "results", *files, "--max-dets", 5)[1]
    assert "AR    100.00" in command(evaluate, "results", *files)[1]


TRUTH, FOUND = ground_truth([(1, 1, (10, 10, 50, 50))]), [detection((10, 10, 50, 50), 0.9)]
BAD_INPUT = {       # ground truth, result file (None: missing, text: as it is), what the sentence must name
    "no ground truth": (None, FOUND, "gt.json"),
    "no result file": (TRUTH, None, "dt.json"),
    "broken ground truth": ("{", FOUND, "gt.json: not valid JSON"),
    "broken result file": (TRUTH, "[{", "dt.json: not valid JSON"),
    "a result file that is no list": (TRUTH, {"annotations": FOUND}, "dt.json: not a COCO result file"),
    "a data set as result file": (TRUTH, TRUTH, "dt.json: not a COCO result file"),
    "a result file as ground truth": (FOUND, FOUND, "gt.json: not a COCO data set"),
    "a ground truth without annotations": ({k: TRUTH[k] for k in ("images", "categories")}, FOUND, "gt.json"),
    "a ground truth without images": ({**TRUTH, "images": []}, FOUND, "gt.json"),
    "an image that is no object": ({**TRUTH, "images": [3]}, FOUND, "gt.json"),
    "an annotation that is no object": ({**TRUTH, "annotations": [3]}, FOUND, "gt.json"),
    "an annotation without box": ({**TRUTH, "annotations": [{"image_id": 1, "category_id": 1}]}, FOUND, "gt.json"),
    "an unlisted image": (TRUTH, FOUND + [detection((1, 1, 5, 5), 0.5, image=99)], "number 1 is of image 99"),
    "an image id that is no id": (TRUTH, [detection((1, 1, 5, 5), 0.5, image=[1])], "number 0"),
    "a detection that is no object": (TRUTH, [3], "number 0"),
    "a detection without score": (TRUTH, FOUND + [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}], "number 1"),
    "a score that is no number": (TRUTH, [detection((1, 1, 5, 5), "high")], "number 0"),
    "a score that is NaN": (TRUTH, [detection((1, 1, 5, 5), float("nan"))], "number 0"),
    "a score beyond floats": (TRUTH, [detection((1, 1, 5, 5), 10 ** 400)], "number 0"),
    "a box of three numbers": (TRUTH, [detection((1, 1, 5), 0.5)], "number 0"),
    "a box with infinity": (TRUTH, [detection((1, 1, float("inf"), 5), 0.5)], "number 0"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_sentence_and_exit_code_2(tmp_path, command, case):
    *contents, words = BAD_INPUT[case]
    for name, content in zip(("gt.json", "dt.json"), contents):
        if content is not None:
            (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    code, out, err = command(evaluate, "results", "--gt", tmp_path / "gt.json", "--dt", tmp_path / "dt.json")
    assert code == 2 and not out and err.count("\n") == 1 and err.startswith("evaluate.py: ") and words in err


def test_a_place_where_nothing_can_be_written_is_one_sentence_and_exit_code_2(tmp_path, command):
    figures(tmp_path, TRUTH, FOUND)
    code, _, err = command(evaluate, "results", "--gt", tmp_path / "gt.json", "--dt", tmp_path / "dt.json",
                           "--out", tmp_path / "no" / "such" / "folder.json")
    assert code == 2 and err.count("\n") == 1


def test_without_weights_or_command_the_usage_is_shown(command):
    code, _, err = command(evaluate)
    assert code == 2 and "--weights" in err


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    evaluate.write_json(tmp_path / "a.json", {"AP": 1})
    with pytest.raises(TypeError):
        evaluate.write_json(tmp_path / "a.json", {"AP": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"AP": 1}
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]


JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just([]) | st.just({})
FIELDS = [("gt", key, field) for key, fields in (("images", ["id"]), ("categories", ["id", "name"]), ("annotations", [
    "id", "image_id", "category_id", "bbox", "area", "iscrowd"])) for field in fields] + [
    ("dt", None, field) for field in ("image_id", "category_id", "bbox", "score")]


@settings(max_examples=150)
@given(st.sampled_from(FIELDS), JSON)
@example(("gt", "annotations", "bbox"), None)
@example(("dt", None, "image_id"), [])
def test_whatever_stands_in_a_field_there_are_figures_or_a_sentence(tmp_path_factory, place, value):
    truth, found = json.loads(json.dumps(TRUTH)), json.loads(json.dumps(FOUND))
    (truth[place[1]] if place[0] == "gt" else found)[0][place[2]] = value
    try:
        ours = figures(tmp_path_factory.getbasetemp(), truth, found)
    except annotations.DataError:
        return
    assert all(value == -1 or 0 <= value <= 100 for value in ours.values())


# ------------------------------------------------------------------------------------------------
# decoding: from predictions to detections
# ------------------------------------------------------------------------------------------------

def distinct(rng, *shape):
    """Scores between 0 and 1 of which no two are equal, so that every order is one order."""
    n = int(np.prod(shape))
    return torch.from_numpy(rng.permutation(n).reshape(shape) + 0.5).float() / n


def random_boxes(rng, n, size=100):
    corner = torch.from_numpy(rng.uniform(0, size, (n, 2))).float()
    return torch.cat([corner, corner + torch.from_numpy(rng.uniform(5, size / 2, (n, 2))).float()], 1)


def as_list(detections):
    boxes, scores, labels = detections
    return list(zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True))


@settings(max_examples=30)
@given(st.integers(0, 999), st.integers(1, 12), st.integers(1, 5), st.integers(1, 80))
def test_top_k_is_the_head_of_the_sorted_pairs_of_prediction_and_class(seed, q, c, k):
    rng = np.random.default_rng(seed)
    boxes, scores = random_boxes(rng, q), distinct(rng, q, c)
    pairs = [(boxes[i].tolist(), scores[i, j].item(), j) for i in range(q) for j in range(c)]
    assert as_list(models.top_k(boxes, scores, k)) == sorted(pairs, key=lambda pair: -pair[1])[:k]


@settings(max_examples=30)
@given(st.integers(0, 999), st.integers(0, 30), st.integers(1, 40), st.sampled_from([0.3, 0.5, 0.7]))
def test_nms_is_greedy_and_class_by_class(seed, n, k, threshold):
    rng = np.random.default_rng(seed)
    boxes, scores, labels = random_boxes(rng, n), distinct(rng, n), torch.from_numpy(rng.integers(0, 3, n))
    kept = []
    for i in scores.argsort(descending=True).tolist():
        if all(labels[i] != labels[j] or box_iou(boxes[i:i + 1], boxes[j:j + 1]) <= threshold for j in kept):
            kept.append(i)
    ours = as_list(models.with_nms(boxes, scores, labels, threshold, k))
    assert ours == as_list((boxes[kept[:k]], scores[kept[:k]], labels[kept[:k]]))
    theirs = batched_nms(boxes, scores, labels, threshold)[:k]
    assert ours == as_list((boxes[theirs], scores[theirs], labels[theirs]))


def test_a_one_to_one_detectors_nms_works_on_its_k_best():
    """Three boxes; the two best overlap.  With k = 2 the third is not promoted when NMS removes the second."""
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]]).float()
    prediction = models.Prediction(torch.tensor([[[2.0], [1.0], [0.0]]]), boxes[None])
    found = models.DeformableDETR.detections(None, prediction, 0, k=2)
    assert found["plain"][0].tolist() == boxes[:2].tolist() and found["nms"][0].tolist() == boxes[:1].tolist()
    assert found["plain"][1].tolist() == pytest.approx([1 / (1 + np.exp(-2)), 1 / (1 + np.exp(-1))])


def test_candidates_are_cut_per_level_then_put_in_order():
    """Two levels of two predictions, one pair a level: the better of each, best first, whatever the other level has."""
    boxes = torch.tensor([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]]).float()
    scores = torch.tensor([[0.3, 0.1], [0.2, 0.0], [0.6, 0.9], [0.8, 0.7]])
    prediction = models.Prediction(scores[None], boxes[None], levels=torch.tensor([0, 0, 1, 1]))
    found = models.candidate_detections(prediction, scores, 0, k=10, nms=0.5, accept=scores > 0.05, per_level=1)
    assert as_list(found["plain"]) == as_list((boxes[[2, 0]], torch.tensor([0.9, 0.3]), torch.tensor([1, 0])))


def test_candidates_that_are_not_accepted_are_never_reported():
    scores = torch.tensor([[0.04, 0.9], [0.05, 0.06]])
    boxes = torch.tensor([[0, 0, 9, 9], [50, 0, 59, 9]]).float()
    prediction = models.Prediction(scores[None], boxes[None], levels=torch.zeros(2))
    found = models.candidate_detections(prediction, scores, 0, k=10, nms=0.5, accept=scores > 0.05)
    for variant in ("plain", "nms"):
        assert found[variant][1].tolist() == pytest.approx([0.9, 0.06]) and found[variant][2].tolist() == [1, 1]


def test_an_original_detectors_nms_comes_before_its_k_best():
    """Box 2 repeats box 1: without NMS it takes the second of two places, with NMS box 3 has it."""
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]]).float()
    scores = torch.tensor([[0.9], [0.8], [0.7]])
    prediction = models.Prediction(scores[None], boxes[None], levels=torch.zeros(3))
    found = models.candidate_detections(prediction, scores, 0, k=2, nms=0.6, accept=scores > 0.05)
    assert found["plain"][0].tolist() == boxes[[0, 1]].tolist() and found["nms"][0].tolist() == boxes[[0, 2]].tolist()


@pytest.mark.parametrize("seed", range(3))
def test_centernets_nms_keeps_the_local_maxima_of_each_class(seed):
    rng = np.random.default_rng(seed)
    h, w, c = 5, 7, 2
    heat, boxes = distinct(rng, h, w, c), random_boxes(rng, h * w)
    prediction = models.Prediction(torch.logit(heat).reshape(1, h * w, c), boxes[None], raw={"grid": (h, w)})
    model = models.build("centernet", c, "tiny", original=True, deform=False)
    peaks = [(boxes[y * w + x].tolist(), heat[y, x, k].item(), k) for y in range(h) for x in range(w) for k in range(c)
             if heat[y, x, k] == heat[max(y - 1, 0):y + 2, max(x - 1, 0):x + 2, k].max()]
    found = [d for d in as_list(model.detections(prediction, 0, k=h * w * c)["nms"]) if d[1] > 0]
    assert 1 < len(peaks) < h * w
    for ours, peak in zip(found, sorted(peaks, key=lambda peak: -peak[1]), strict=True):
        assert ours[0] == peak[0] and ours[1] == pytest.approx(peak[1], abs=1e-5) and ours[2] == peak[2]


def test_detections_go_back_to_the_original_picture_clipped_and_without_empty_boxes():
    """From 200 high and 400 wide to 100 x 100: x a quarter, y a half."""
    boxes = torch.tensor([[40, 20, 80, 60], [-40, -20, 440, 220], [410, 0, 450, 50], [8, 8, 8, 20], [0, 150, 100, 200]])
    target = {"size": torch.tensor([200, 400]), "original_size": torch.tensor([100, 100])}
    found = models.to_original((boxes.float(), torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), torch.arange(5)), target)
    assert found[0].tolist() == [[10, 10, 20, 30], [0, 0, 100, 100], [0, 75, 25, 100]]
    assert found[1].tolist() == pytest.approx([0.9, 0.8, 0.5]) and found[2].tolist() == [0, 1, 4]


def test_boxes_that_are_not_a_number_are_dropped():
    boxes = torch.tensor([[float("nan"), 0, 10, 10], [0, 0, 10, 10]])
    target = {"size": torch.tensor([20, 20]), "original_size": torch.tensor([20, 20])}
    assert models.to_original((boxes, torch.ones(2), torch.arange(2)), target)[2].tolist() == [1]
