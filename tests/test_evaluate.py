"""Figures, and the pass over pictures that makes them.

pycocotools called directly, and precision worked out by hand, are the judges.
"""
import contextlib
import io
import json

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import annotations
import checkpoints
import data
import evaluate
import models


def ground_truth(objects, images=1, category_ids=(1,)):
    """A COCO data set: `objects` are (image_id, category_id, xywh), pictures count from 1."""
    pictures = [{"id": n + 1, "file_name": f"{n}.png", "height": 500, "width": 500}
                for n in range(images)]
    boxes = [{"id": n + 1, "image_id": image, "category_id": category, "bbox": list(box),
              "iscrowd": 0, "area": box[2] * box[3]}
             for n, (image, category, box) in enumerate(objects)]
    return {"images": pictures, "annotations": boxes,
            "categories": [{"id": c, "name": f"class {c}"} for c in category_ids]}


def detection(box, score, image=1, category=1):
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


def figures(folder, truth, found, max_dets=100):
    """Our figures of a ground truth and a result file, both written to disk first."""
    (folder / "gt.json").write_text(json.dumps(truth))
    (folder / "dt.json").write_text(json.dumps(found))
    return evaluate.score_file(folder / "gt.json", folder / "dt.json", max_dets)


def pycocotools_run(truth, found, max_dets=100):
    """A COCOeval of objects of all sizes together, by pycocotools alone."""
    gt, dt = COCO(), COCO()
    boxes = [{**d, "id": n + 1, "iscrowd": 0, "area": d["bbox"][2] * d["bbox"][3]}
             for n, d in enumerate(found)]
    for one, dataset in ((gt, truth), (dt, {**truth, "annotations": boxes})):
        one.dataset = {**dataset, "info": {}}
        with contextlib.redirect_stdout(io.StringIO()):
            one.createIndex()
    judge = COCOeval(gt, dt, "bbox")
    judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ["all"]
    judge.params.maxDets = [max_dets]
    with contextlib.redirect_stdout(io.StringIO()):
        judge.evaluate()
        judge.accumulate()
    return judge


# ------------------------------------------------------------------------------------------------
# figures
# ------------------------------------------------------------------------------------------------

def random_case(seed):
    """Twelve pictures, three classes, objects of all sizes, some crowd regions;
    detections, most of them good.
    """
    rng = np.random.default_rng(seed)
    truth, found = ground_truth([], images=12, category_ids=(3, 7, 20)), []
    for image in range(1, 13):
        for _ in range(rng.integers(0, 12)):
            size = rng.choice([15, 60, 150]) * rng.uniform(0.8, 1.3, 2)
            corner, category = rng.uniform(0, 500 - size), int(rng.choice([3, 7, 20]))
            truth["annotations"].append({
                "id": len(truth["annotations"]) + 1, "image_id": image, "category_id": category,
                "bbox": [*corner, *size], "area": 0.7 * size.prod(),
                "iscrowd": int(rng.random() < 0.1)})
            for _ in range(rng.integers(0, 4)):
                moved = corner + rng.normal(0, 0.08, 2) * size
                box = [*moved, *size * rng.uniform(0.85, 1.2, 2)]
                score, right = rng.random(), rng.random() < 0.9
                found.append(detection(box, score, image, category if right else 7))

        # one picture with more than 100 detections
        found += [detection([*rng.uniform(0, 300, 2), 40, 30], 0.3 * rng.random(), image, 20)
                  for _ in range(150 if image == 5 else 2)]
    return truth, found


@pytest.mark.parametrize("seed", range(4))
def test_figures_are_pycocotools(tmp_path, seed):
    truth, found = random_case(seed)
    ours = figures(tmp_path, truth, found)
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(tmp_path / "gt.json")
        run = COCOeval(gt, gt.loadRes(str(tmp_path / "dt.json")), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    theirs = dict(zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), run.stats), AR=run.stats[8])
    assert ours == pytest.approx({name: 100 * value for name, value in theirs.items()}, abs=1e-3)
    # else the case would show nothing
    assert 5 < ours["AP"] < 95


@pytest.mark.parametrize("max_dets", [100, 3])
def test_hotcoco_where_installed_has_the_figures_of_pycocotools(monkeypatch, max_dets):
    """Of all classes and of each."""
    hotcoco = pytest.importorskip("hotcoco", reason="pip install hotcoco, to compare")
    for seed in range(6):
        truth, found = random_case(seed)
        both = []
        for judge in (None, hotcoco):
            monkeypatch.setattr(evaluate, "hotcoco", judge)
            gt = evaluate.coco_object(truth["images"], truth["categories"], truth["annotations"])
            run = evaluate.coco_run(gt, found, max_dets)
            both.append((evaluate.coco_figures(run), evaluate.class_figures(run)))
            assert isinstance(run, COCOeval) == (judge is None)
        (slow, slow_classes), (fast, fast_classes) = both
        assert fast == pytest.approx(slow, abs=1e-4)
        assert list(fast_classes) == list(slow_classes)
        for name, of_class in slow_classes.items():
            assert fast_classes[name] == pytest.approx(of_class, abs=1e-4)


def test_ids_that_are_no_whole_numbers_stay_with_pycocotools(monkeypatch):
    hotcoco = pytest.importorskip("hotcoco", reason="pip install hotcoco, to compare")
    monkeypatch.setattr(evaluate, "hotcoco", hotcoco)
    for image in ("a", -1):
        truth = ground_truth([(image, 1, (10, 10, 50, 50))])
        truth["images"] = [{"id": image}]
        gt = evaluate.coco_object(truth["images"], truth["categories"], truth["annotations"])
        assert evaluate.coco_metrics(gt, [detection((10, 10, 50, 50), 0.5, image)])["AP"] == 100


def test_one_perfect_detection_of_one_object_is_100(tmp_path):
    truth = ground_truth([(1, 1, (10, 10, 50, 50))])
    ours = figures(tmp_path, truth, [detection((10, 10, 50, 50), 0.1)])
    assert ours == {"AP": 100, "AP50": 100, "AP75": 100, "APs": -1, "APm": 100, "APl": -1,
                    "AR": 100}


def test_a_better_scored_mistake_halves_ap_and_a_worse_scored_one_costs_nothing(tmp_path):
    """Precision where recall first reaches 1 is 1/2 or 1:
    the end-to-end detector's problem in one picture.
    """
    truth, right = ground_truth([(1, 1, (10, 10, 50, 50))]), detection((10, 10, 50, 50), 0.5)
    elsewhere = (200, 200, 50, 50)
    assert figures(tmp_path, truth, [right, detection(elsewhere, 0.6)])["AP"] == 50
    assert figures(tmp_path, truth, [right, detection(elsewhere, 0.4)])["AP"] == 100


def test_a_duplicate_costs_precision_of_what_is_found_later(tmp_path):
    """Two objects; found, found again, found:
    precision 1 up to recall 0.5 (51 of 101 points), then 2/3.
    """
    truth = ground_truth([(1, 1, (10, 10, 50, 50)), (1, 1, (200, 200, 50, 50))])
    found = [detection((10, 10, 50, 50), 0.9), detection((10, 10, 50, 50), 0.8),
             detection((200, 200, 50, 50), 0.7)]
    expected = 100 * (51 + 50 * 2 / 3) / 101
    assert figures(tmp_path, truth, found)["AP"] == pytest.approx(expected, abs=1e-3)


def test_a_box_counts_up_to_the_threshold_its_iou_passes(tmp_path):
    """IoU 0.81 passes 0.50, 0.55, ... 0.80: seven of the ten thresholds."""
    truth = ground_truth([(1, 1, (0, 0, 100, 100))])
    ours = figures(tmp_path, truth, [detection((0, 0, 81, 100), 0.5)])
    assert ours["AP50"] == ours["AP75"] == 100
    assert ours["AP"] == pytest.approx(70) and ours["AR"] == pytest.approx(70)


def test_max_dets_is_honoured_beyond_100(tmp_path):
    """120 objects, 120 perfect detections, one picture:
    100 of them recall 5/6, which 84 of 101 recall points reach.
    """
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
    found = [detection((10, 10, 50, 50), 0.5)]
    found += [detection((110 + 9 * n, 150, 40, 40), 0.9) for n in range(20)]
    assert figures(tmp_path, truth, found)["AP"] < 5
    truth["annotations"][1]["iscrowd"] = 1
    assert figures(tmp_path, truth, found)["AP"] == 100


@pytest.mark.parametrize("ids", [[0, 1], ["a", "b"], [None, None], [2, None], [2 ** 60, 7]])
def test_annotation_ids_are_only_names(tmp_path, ids):
    """Ids from 0, of text, or none at all: what the reader accepts can be evaluated, and counts."""
    truth = ground_truth([(1, 1, (10, 10, 50, 50)), (1, 1, (200, 200, 50, 50))])
    for annotation, name in zip(truth["annotations"], ids):
        annotation["id"] = name
        if name is None:
            del annotation["id"]
    found = [detection((10, 10, 50, 50), 0.9), detection((200, 200, 50, 50), 0.8)]
    assert figures(tmp_path, truth, found)["AP"] == 100


def test_image_and_category_ids_may_be_text(tmp_path):
    truth = ground_truth([("x", "car", (10, 10, 50, 50))], images=2, category_ids=("car",))
    truth["images"][0]["id"], truth["images"][1]["id"] = "x", "y"
    assert figures(tmp_path, truth, [detection((10, 10, 50, 50), 0.9, "x", "car")])["AP"] == 100


def test_without_an_area_the_box_gives_it(tmp_path):
    truth = ground_truth([(1, 1, (10, 10, 50, 50))])
    del truth["annotations"][0]["area"], truth["annotations"][0]["iscrowd"]
    assert figures(tmp_path, truth, [detection((10, 10, 50, 50), 0.9)])["APm"] == 100


def test_the_summary_line_holds_the_two_columns_and_their_difference():
    line = evaluate.describe({"AP": 33.6, "AP50": 51.2, "nms": {"AP": 36.84, "AP50": 50.0}})
    assert line == "AP 33.6   AP(+NMS) 36.8 (+3.2)   AP50 51.2   AP50(+NMS) 50.0 (-1.2)"


def test_a_printed_difference_is_that_of_the_printed_figures():
    """Unrounded they are +3.6 and -0.4."""
    line = evaluate.describe({"AP": 60.46, "AP50": 88.14, "nms": {"AP": 60.04, "AP50": 91.76}})
    assert line == "AP 60.5   AP(+NMS) 60.0 (-0.5)   AP50 88.1   AP50(+NMS) 91.8 (+3.7)"
    line = evaluate.describe({"AP": 60.04, "AP50": 88.0, "nms": {"AP": 59.96, "AP50": 88.04}})
    assert "(+0.0)   AP50" in line and line.endswith("(+0.0)")


def test_crowds_and_classes_are_told_with_the_name_of_each_figure():
    crowd = {"AP50": 1.04, "mMR": 2.0, "recall": 3.0, "JI": 4.0, "coco": {"AP": 6.0}}
    assert evaluate.describe({**crowd, "nms": {**crowd, "JI": 5.0}}) == (
        "without NMS: AP50 1.0   mMR 2.0   recall 3.0   JI 4.0   (COCO-style AP 6.0)\n"
        "with NMS:    AP50 1.0   mMR 2.0   recall 3.0   JI 5.0   (COCO-style AP 6.0)")
    ant = {"objects": 7, "AP": 1.0, "AP50": 3.0, "F1": 4.0, "score": 0.5}
    head, line, _ = evaluate.describe_classes(
        {"classes": {"ant": ant}, "nms": {"classes": {"ant": {**ant, "AP": 2.0}}}}).splitlines()
    assert head.split() == "class objects AP AP(+NMS) AP50 best F1 at score".split()
    assert line.split() == "ant 7 1.0 2.0 3.0 4.0 0.500".split()


def test_boxes_without_extent_are_no_objects_of_a_ground_truth(tmp_path):
    truth = ground_truth([(1, 1, (10, 10, 50, 50)), (1, 1, (5, 5, 0, 9))])
    assert figures(tmp_path, truth, [detection((10, 10, 50, 50), 0.9)])["AP"] == 100


# ------------------------------------------------------------------------------------------------
# class by class
# ------------------------------------------------------------------------------------------------

def classes_of(truth, found, max_dets=100):
    gt = evaluate.coco_object(truth["images"], truth["categories"], truth["annotations"])
    return evaluate.class_figures(evaluate.coco_run(gt, found, max_dets))


@pytest.mark.parametrize("max_dets", [100, 3])
def test_figures_of_a_class_are_pycocotools_on_that_class_alone(max_dets):
    """The best F1 too: no third score is a better threshold, each counted by pycocotools anew."""
    truth, found = random_case(1)
    classes = classes_of(truth, found, max_dets)
    of_all = evaluate.coco_figures(evaluate.coco_run(evaluate.coco_object(
        truth["images"], truth["categories"], truth["annotations"]), found, max_dets))
    assert of_all["AP"] == pytest.approx(np.mean([of["AP"] for of in classes.values()]), abs=1e-3)

    for category in truth["categories"]:
        alone = {**truth, "categories": [category],
                 "annotations": [a for a in truth["annotations"]
                                 if a["category_id"] == category["id"]]}
        of_class = [d for d in found if d["category_id"] == category["id"]]

        def run(threshold):
            above = [d for d in of_class if d["score"] >= threshold]
            return pycocotools_run(alone, above, max_dets)

        def f1(threshold):
            pictures = [p for p in run(threshold).evalImgs if p]
            objects = sum((~p["gtIgnore"].astype(bool)).sum() for p in pictures)
            counts = [~p["dtIgnore"][0].astype(bool) for p in pictures]
            true = sum((p["dtMatches"][0][c] > 0).sum() for p, c in zip(pictures, counts))
            return 200 * true / (objects + sum(c.sum() for c in counts))

        ours, precision = classes[category["name"]], run(0).eval["precision"]
        assert ours["AP"] == pytest.approx(100 * precision.mean(), abs=1e-3)
        assert ours["AP50"] == pytest.approx(100 * precision[0].mean(), abs=1e-3)
        assert ours["F1"] == pytest.approx(f1(ours["score"]), abs=1e-3)
        some = [d["score"] for d in of_class][::3]
        assert all(f1(score) <= ours["F1"] + 1e-3 for score in some) and 20 < ours["F1"] < 100


def test_classes_without_objects_or_of_one_name():
    truth = ground_truth([(1, 1, (10, 10, 50, 50))], category_ids=(1, 2, 3))
    for category, name in zip(truth["categories"], ("ant", "bee", "bee")):
        category["name"] = name
    found = [detection((10, 10, 50, 50), 0.9), detection((10, 10, 50, 50), 0.9, category=2)]
    ours = classes_of(truth, found)
    assert ours == {
        "ant": {"objects": 1, "AP": 100, "AP50": 100, "F1": 100, "score": 0.9},
        "bee (2)": {"objects": 0, "AP": -1, "AP50": -1, "F1": -1, "score": None},
        "bee (3)": {"objects": 0, "AP": -1, "AP50": -1, "F1": -1, "score": None}}


# ------------------------------------------------------------------------------------------------
# a pass over pictures
# ------------------------------------------------------------------------------------------------

def all_knowing(pictures, batch_size):
    """A method `detections` that answers with the targets, picture after picture;
    its "nms" forgets everything.
    """
    batches = data.evaluation_batches(pictures.annotations, batch_size)
    answers = iter([pictures[key][1] for batch in batches for key in batch])

    def detections(one, k):
        target = next(answers)
        empty = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long)
        scores = torch.ones(len(target["boxes"]))
        return {"plain": (target["boxes"], scores, target["labels"]), "nms": empty}

    return detections


def test_a_detector_that_knows_the_answers_scores_100_through_resizing_and_batching(
        tiny_scenes, tmp_path):
    """Its boxes come in pixels of the resized pictures, its classes as 0 ... C-1."""
    truth_set = annotations.read_annotations(tiny_scenes / "val.json", tiny_scenes / "val")
    pictures = data.Pictures(truth_set, data.Transform(shortest=(96,)))
    model = checkpoints.build("fcos", 6, "tiny", width=16, depth=1, extra_levels=0).train()
    model.detections = all_knowing(pictures, 3)
    results = evaluate.detect(model, pictures, batch_size=3, progress=False)
    truth = json.loads((tiny_scenes / "val.json").read_text())
    assert figures(tmp_path, truth, results["plain"])["AP"] == 100
    assert figures(tmp_path, truth, results["nms"])["AP"] == 0
    assert len(results["plain"]) == len(truth["annotations"]) and model.training
    # in pixels of the original, the file's own ids
    for d in results["plain"]:
        assert any(a["image_id"] == d["image_id"] and a["category_id"] == d["category_id"]
                   and np.allclose(a["bbox"], d["bbox"], atol=0.02) for a in truth["annotations"])


def checkpoint(folder, class_names, args=None):
    """A checkpoint of a small untrained detector with what evaluate.py reads of it; its file."""
    build = {"detector": "fcos", "num_classes": len(class_names), "backbone": "tiny",
             "width": 16, "depth": 1, "extra_levels": 0}
    weights = checkpoints.build(**build).state_dict()
    torch.save({"build": build, "model": weights, "class_names": class_names, "args": args or {},
                "test_transform": {"shortest": [128], "longest": 128}}, folder / "last.pt")
    return folder / "last.pt"


def test_dropped_boxes_are_no_missed_objects_in_evaluation(
        tiny_scenes, tmp_path, monkeypatch, command):
    """With --drop-bad-boxes a detector that finds every good box scores 100,
    whatever the file's other boxes are.
    """
    record = json.loads((tiny_scenes / "val.json").read_text())
    truth_set = annotations.read_annotations(tiny_scenes / "val.json", tiny_scenes / "val")
    pictures = data.Pictures(truth_set, data.Transform(shortest=(128,)))
    bad = [None, [5, 5, float("nan"), 5], [5, 5, 0, 9], [200, 5, 9, 9]]
    record["annotations"] += [
        {"id": 1000 + n, "image_id": 1, "category_id": 1, "bbox": box, "iscrowd": 0}
        for n, box in enumerate(bad)]
    (tmp_path / "val.json").write_text(json.dumps(record))

    knows = all_knowing(pictures, 16)

    def found(self, one, k):
        return dict.fromkeys(("plain", "nms"), knows(one, k)["plain"])

    monkeypatch.setattr(models.FCOS, "detections", found)
    code, _, err = command(
        evaluate, "--weights", checkpoint(tmp_path, truth_set.class_names), "--data", "custom",
        "--val-json", tmp_path / "val.json", "--val-images", tiny_scenes / "val",
        "--drop-bad-boxes", "--device", "cpu", "--out", tmp_path / "out")
    assert code == 0 and "dropped 4 bad box" in err
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["AP"] == 100


def test_classes_go_by_name_and_one_that_the_file_lacks_is_left_out(
        tiny_scenes, tmp_path, monkeypatch, command):
    """The file lists five of the six classes, in another order and with other ids."""
    record = json.loads((tiny_scenes / "val.json").read_text())
    names = [c["name"] for c in sorted(record["categories"], key=lambda c: c["id"])]
    lacking = record["categories"].pop(0)["id"]
    record["annotations"] = [a for a in record["annotations"] if a["category_id"] != lacking]
    for category in record["categories"]:
        category["id"] = 100 - category["id"]
    for one in record["annotations"]:
        one["category_id"] = 100 - one["category_id"]
    (tmp_path / "val.json").write_text(json.dumps(record))

    flags = {"data": "custom", "val_json": str(tmp_path / "val.json"),
             "val_images": str(tiny_scenes / "val")}
    truth_set = data.read(flags, "val", names)
    knows = all_knowing(data.Pictures(truth_set, data.Transform(shortest=(128,))), 16)
    unseen = truth_set.category_ids.index(None)

    def found(self, one, k):
        boxes, scores, labels = knows(one, k)["plain"]
        extra = torch.tensor([[1.0, 1, 9, 9]]), torch.ones(1), torch.tensor([unseen])
        both = [torch.cat(pair) for pair in zip(extra, (boxes, scores, labels))]
        return dict.fromkeys(("plain", "nms"), both)

    monkeypatch.setattr(models.FCOS, "detections", found)
    words = ["--weights", checkpoint(tmp_path, names, flags), "--device", "cpu", "--batch-size", 16]
    code, _, err = command(evaluate, *words, "--out", tmp_path / "out")
    assert code == 0, err
    detections = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert figures(tmp_path, record, detections)["AP"] == 100
    assert len(detections) == len(record["annotations"])
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["AP"] == 100

    # and nothing of it is a duplicate: the verdict on a checkpoint
    knows = all_knowing(data.Pictures(truth_set, data.Transform(shortest=(128,))), 16)
    code, out, err = command(evaluate, "nms", *words, "--out", tmp_path / "nms")
    assert code == 0 and "end-to-end: NMS changes AP by" in out, err
    said = json.loads((tmp_path / "nms" / "nms.json").read_text())
    assert said["AP"] == 100 and said["objects"] == said["found"] == len(record["annotations"])
    assert said["duplicates per object"]["0.05"] == 0


def test_what_is_found_with_nms_and_without_is_written_to_a_file_each(
        tiny_scenes, tmp_path, monkeypatch, command):
    """A detector that finds each object, and each once more; its NMS leaves the first."""
    truth_set = annotations.read_annotations(tiny_scenes / "val.json", tiny_scenes / "val")
    knows = all_knowing(data.Pictures(truth_set, data.Transform(shortest=(128,))), 16)

    def found(self, one, k):
        boxes, scores, labels = knows(one, k)["plain"]
        again = boxes.repeat(2, 1), torch.cat([scores, scores / 2]), labels.repeat(2)
        return {"plain": again, "nms": (boxes, scores, labels)}

    monkeypatch.setattr(models.FCOS, "detections", found)
    flags = {"data": "custom", "val_json": str(tiny_scenes / "val.json"),
             "val_images": str(tiny_scenes / "val")}
    code, _, err = command(
        evaluate, "--weights", checkpoint(tmp_path, truth_set.class_names, flags),
        "--device", "cpu", "--batch-size", 16, "--out", tmp_path / "out")
    assert code == 0, err
    plain, nms = (json.loads((tmp_path / "out" / name).read_text())
                  for name in ("detections.json", "detections_nms.json"))
    assert len(plain) == 2 * len(nms) == 2 * len(truth_set.boxes)
    assert {d["score"] for d in nms} == {1.0} and {d["score"] for d in plain} == {0.5, 1.0}


def test_a_checkpoint_of_other_classes_is_refused(tiny_scenes, tmp_path, command):
    weights = checkpoint(tmp_path, ["cat", "dog"])
    own = ["--val-json", tiny_scenes / "val.json", "--val-images", tiny_scenes / "val"]
    code, _, err = command(evaluate, "--weights", weights, "--data", "custom", *own)
    assert code == 2 and err.count("\n") == 1 and "['cat', 'dog']" in err and "same classes" in err


@pytest.mark.parametrize("trained_on, given, words", [
    # files alone are custom data, whatever the checkpoint was validated on
    ("scenes", ["--val-json", "a.json", "--val-images", "nowhere"], "a.json"),
    ("coco", ["--val-json", "a.json"], "--data custom needs --val-json and --val-images"),
    ("custom", ["--val-json", "a.json"], "--val-json and --val-images go together"),
    ("custom", ["--val-json", "a.json", "--val-images", "nowhere"], "a.json"),
    # and go with no other data set
    ("scenes", ["--data", "coco", "--val-json", "a.json"],
     "--val-json names a file of your own: it goes with --data custom, not with coco"),
    ("custom", ["--data", "crowd", "--val-images", "a"],
     "--val-images names a file of your own: it goes with --data custom, not with crowd"),
    ("custom", ["--data-dir", "a"], "--data-dir does not concern --data custom"),
])
def test_files_of_ones_own_are_custom_data(
        tmp_path, command, monkeypatch, trained_on, given, words):
    monkeypatch.chdir(tmp_path)
    args = {"data": trained_on}
    if trained_on == "custom":
        args.update(val_json="trained.json", val_images="trained")
    code, _, err = command(evaluate, "--weights", checkpoint(tmp_path, ["cat"], args), *given)
    assert code == 2 and err.startswith(f"evaluate.py: {words}") and err.count("\n") == 1


def test_the_annotations_of_ones_own_files_are_custom_data(tmp_path, command):
    own = ["--val-json", tmp_path / "none.odgt", "--val-images", tmp_path]
    code, _, err = command(evaluate, "annotations", *own)
    assert code == 2 and "none.odgt" in err
    code, _, err = command(evaluate, "annotations", "--data", "crowd", *own)
    assert code == 2 and "--val-json names a file of your own" in err


def test_a_checkpoint_is_scored_on_the_data_it_was_validated_on(tiny_scenes, tmp_path, command):
    truth = json.loads((tiny_scenes / "val.json").read_text())
    classes = [c["name"] for c in sorted(truth["categories"], key=lambda c: c["id"])]
    args = {"data": "custom", "val_json": str(tiny_scenes / "val.json"),
            "val_images": str(tiny_scenes / "val"), "max_dets": 7}
    weights = checkpoint(tmp_path, classes, args)
    code, out, err = command(evaluate, "--weights", weights, "--device", "cpu",
                             "--out", tmp_path / "out")
    assert code == 0 and out.startswith("AP "), err
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert 0 < len(found) <= 7 * 7                      # 7 pictures

    # of the folder of another run nothing is taken
    (tmp_path / "out" / "args.json").write_text("{}")
    before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    for words in ([], ["nms"]):
        code, _, err = command(evaluate, *words, "--weights", weights, "--out", tmp_path / "out")
        assert code == 2 and "holds another run" in err and err.count("\n") == 1
    assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before

    # a folder means its last.pt
    code, out, err = command(evaluate, "--weights", weights.parent, "--device", "cpu",
                             "--per-class")
    assert code == 0, err
    figures_of = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(figures_of["classes"]) == list(figures_of["nms"]["classes"]) == classes
    for line, name in zip(out.splitlines()[2:], classes):
        count = sum(a["category_id"] == truth["categories"][classes.index(name)]["id"]
                    for a in truth["annotations"])
        assert line.split()[:2] == [name, str(count)]


@pytest.mark.parametrize("words, told", [
    ([], "sub-commands results, nms, annotations"),
    (["--weights", "nowhere"], "nowhere: cannot be read"),
    (["--weights", "."], "last.pt: cannot be read"), (["nms"], "nms wants --weights"),
    (["nms", "--weights", "nowhere"], "nowhere: cannot be read"),
    (["annotations"], "--data crowd"),
    (["--weights", "w", "annotations", "--data", "crowd"], "annotations takes no --weights"),
    (["--per-class", "nms", "--weights", "w"], "--per-class is not of nms"),
    (["nms", "--weights", "w", "--gt", "g"], "nms wants --weights last.pt, or --gt and --dt"),
    (["--weights", "untrained.pt"], "untrained.pt: of another version of train.py, or damaged"),
])
def test_nothing_is_drawn_that_nobody_asked_for(tmp_path, monkeypatch, command, words, told):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"a": torch.zeros(1)}}, "untrained.pt")
    code, _, err = command(evaluate, *words)
    assert code == 2 and told in err
    assert [p.name for p in tmp_path.iterdir()] == ["untrained.pt"]


@pytest.mark.parametrize("data_set, given, at_once", [
    ("coco", [], 1), ("crowdhuman", [], 1), ("custom", [], 1), ("scenes", [], 16),
    ("crowd", [], 16), ("coco", ["--batch-size", "3"], 3)])
def test_pictures_of_many_sizes_are_evaluated_one_at_a_time(
        tiny_scenes, tmp_path, command, monkeypatch, data_set, given, at_once):
    """As the published figures were made; the embedded ones are all of one size."""
    truth = annotations.read_annotations(tiny_scenes / "val.json", tiny_scenes / "val")
    monkeypatch.setattr(data, "locate", lambda flags, split: (str(tiny_scenes / "val.json"),
                                                              str(tiny_scenes / "val")))
    sizes = []

    def watched(self, images, mask):
        sizes.append(len(images))
        return forward(self, images, mask)

    forward = models.FCOS.forward
    monkeypatch.setattr(models.FCOS, "forward", watched)
    weights = checkpoint(tmp_path, truth.class_names, {"data": data_set})
    code, _, err = command(evaluate, "--weights", weights, "--device", "cpu", *given)
    assert code == 0, err
    assert max(sizes) == min(at_once, 7) and sum(sizes) == 7


# ------------------------------------------------------------------------------------------------
# result files and the command line
# ------------------------------------------------------------------------------------------------

def test_results_prints_and_writes_the_same_figures(tmp_path, command):
    truth, found = random_case(0)
    expected = figures(tmp_path, truth, found)
    gt, dt, out = (tmp_path / name for name in ("gt.json", "dt.json", "out.json"))
    code, said, err = command(evaluate, "results", "--gt", gt, "--dt", dt, "--out", out)
    assert code == 0 and not err
    assert json.loads((tmp_path / "out.json").read_text()) == expected
    lines = [line.split() for line in said.splitlines()]
    printed = {name: float(value) for name, value in lines}
    assert printed == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("form, words", [
    (lambda x, y, w, h: (x, y, w, h), ""),
    (lambda x, y, w, h: (x, y, x + w, y + h), "the boxes look like x1, y1, x2, y2"),
    (lambda x, y, w, h: (x / 500, y / 500, w / 500, h / 500), "shares of the picture"),
])
def test_boxes_of_another_form_are_scored_and_told(tmp_path, capsys, command, form, words):
    boxes = [(30 * n, 20 * n, 25, 12) for n in range(10)]
    figures(tmp_path, ground_truth([(1, 1, box) for box in boxes]),
            [detection(form(*box), 0.5) for box in boxes])
    capsys.readouterr()
    files = ["--gt", tmp_path / "gt.json", "--dt", tmp_path / "dt.json"]
    for code, out, err in (command(evaluate, "results", *files),
                           command(evaluate, "nms", *files, "--out", tmp_path)):
        assert code == 0 and out and words in err and err.count("\n") == bool(words)


def test_max_dets_of_the_command_line(tmp_path, command):
    boxes = [(20 * n, 0, 12, 12) for n in range(10)]
    found = [detection(box, 1 - n / 20) for n, box in enumerate(boxes)]
    figures(tmp_path, ground_truth([(1, 1, box) for box in boxes]), found)
    files = ["--gt", tmp_path / "gt.json", "--dt", tmp_path / "dt.json"]
    assert "AR     50.00" in command(evaluate, "results", *files, "--max-dets", 5)[1]
    assert "AR    100.00" in command(evaluate, "results", *files)[1]


@pytest.mark.parametrize("words", [
    ["results", "--gt", "g", "--dt", "d", "--max-dets", "-1"],
    ["--weights", "w", "--max-dets", "0"],
    ["nms", "--weights", "w", "--max-dets", "-5"], ["--weights", "w", "--batch-size", "0"],
    ["--weights", "w", "--workers", "-1"]])
def test_a_number_that_is_none_is_refused(command, words):
    code, _, err = command(evaluate, *words)
    assert code == 2 and "no whole number" in err and words[-1] in err


def test_an_area_below_0_is_that_of_the_box(tmp_path):
    """pycocotools would count the object nowhere, and a perfect detection scores -1."""
    truth = ground_truth([(1, 1, (10, 10, 50, 50))])
    truth["annotations"][0]["area"] = -1
    assert figures(tmp_path, truth, [detection((10, 10, 50, 50), 0.9)])["AP"] == 100


TRUTH, FOUND = ground_truth([(1, 1, (10, 10, 50, 50))]), [detection((10, 10, 50, 50), 0.9)]
# ground truth, result file (None: missing, text: as it is), what the sentence must name
BAD_INPUT = {
    "no ground truth": (None, FOUND, "gt.json"),
    "no result file": (TRUTH, None, "dt.json"),
    "broken ground truth": ("{", FOUND, "gt.json: not valid JSON"),
    "broken result file": (TRUTH, "[{", "dt.json: not valid JSON"),
    "a result file that is no list": (TRUTH, {"annotations": FOUND},
                                      "dt.json: not a COCO result file"),
    "a data set as result file": (TRUTH, TRUTH, "dt.json: not a COCO result file"),
    "a result file as ground truth": (FOUND, FOUND, "gt.json: not a COCO data set"),
    "a ground truth without annotations": ({k: TRUTH[k] for k in ("images", "categories")}, FOUND,
                                           "gt.json"),
    "a ground truth without images": ({**TRUTH, "images": []}, FOUND, "gt.json"),
    "an image that is no object": ({**TRUTH, "images": [3]}, FOUND, "gt.json"),
    "an annotation that is no object": ({**TRUTH, "annotations": [3]}, FOUND, "gt.json"),
    "an annotation without box": (
        {**TRUTH, "annotations": [{"image_id": 1, "category_id": 1}]}, FOUND, "gt.json"),
    "an unlisted image": (TRUTH, FOUND + [detection((1, 1, 5, 5), 0.5, image=99)],
                          "number 1 is of image 99"),
    "an image id that is no id": (TRUTH, [detection((1, 1, 5, 5), 0.5, image=[1])], "number 0"),
    "a detection that is no object": (TRUTH, [3], "number 0"),
    "a detection without score": (
        TRUTH, FOUND + [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}], "number 1"),
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
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / name).write_text(text)
    files = ["--gt", tmp_path / "gt.json", "--dt", tmp_path / "dt.json"]
    code, out, err = command(evaluate, "results", *files)
    assert code == 2 and not out and err.count("\n") == 1
    assert err.startswith("evaluate.py: ") and words in err


def test_a_place_where_nothing_can_be_written_is_one_sentence_and_exit_code_2(tmp_path, command):
    figures(tmp_path, TRUTH, FOUND)
    files = ["--gt", tmp_path / "gt.json", "--dt", tmp_path / "dt.json"]
    code, _, err = command(evaluate, "results", *files,
                           "--out", tmp_path / "no" / "such" / "folder.json")
    assert code == 2 and err.count("\n") == 1


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = PLAIN | st.just([]) | st.just({})
FIELDS = [("gt", "images", "id"), ("gt", "categories", "id"), ("gt", "categories", "name")]
FIELDS += [("gt", "annotations", field)
           for field in ("id", "image_id", "category_id", "bbox", "area", "iscrowd")]
FIELDS += [("dt", None, field) for field in ("image_id", "category_id", "bbox", "score")]


@settings(max_examples=150)
@given(st.sampled_from(FIELDS), JSON)
@example(("gt", "annotations", "bbox"), None)
@example(("dt", None, "image_id"), [])
def test_whatever_stands_in_a_field_there_are_figures_or_a_sentence(tmp_path_factory, place, value):
    truth, found = json.loads(json.dumps(TRUTH)), json.loads(json.dumps(FOUND))
    file, part, field = place
    entries = truth[part] if file == "gt" else found
    entries[0][field] = value
    try:
        ours = figures(tmp_path_factory.getbasetemp(), truth, found)
    except annotations.DataError:
        return
    assert all(value == -1 or 0 <= value <= 100 for value in ours.values())
