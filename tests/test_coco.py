"""The AP of parts of a list, held to pycocotools."""
import numpy as np
import pytest

import coco
import evaluate
from test_evaluate import detection, ground_truth, pycocotools_run, random_case


def judge(truth, found, max_dets=100):
    """pycocotools' AP and AP50."""
    precision = pycocotools_run(truth, found, max_dets).eval["precision"]
    known = precision[0][precision[0] > -1]
    return {"AP": 100 * precision[precision > -1].mean(), "AP50": 100 * known.mean()}


def ours(truth, found, keep, max_dets=100, matched=None):
    by_class = coco.groups(found, truth["annotations"])
    return coco.average_precision(by_class, np.array(keep, bool), max_dets, matched)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("max_dets", [100, 3])
def test_any_part_of_a_list_has_the_ap_of_pycocotools(seed, max_dets):
    truth, found = random_case(seed)
    rng, matched = np.random.default_rng(seed), {}
    for share in (1.0, 0.9, 0.5, 0.1, 0.0):
        keep = rng.random(len(found)) < share
        left = [d for d, k in zip(found, keep) if k]
        assert ours(truth, found, keep, max_dets) == pytest.approx(judge(truth, left, max_dets),
                                                                   abs=2e-4)
        if max_dets == 100:                              # what is remembered changes nothing
            assert ours(truth, found, keep, max_dets, matched) == ours(truth, found, keep)


def test_equal_overlaps_and_equal_scores_are_settled_as_pycocotools_does():
    box = (0, 0, 10, 10)
    truth = ground_truth([(1, 1, box), (1, 1, box), (2, 1, (5, 5, 10, 10))], images=2)
    found = [detection(box, 0.5), detection(box, 0.5), detection(box, 0.5),
             detection((5, 5, 10, 9), 0.5, image=2), detection((5, 5, 10, 8), 0.5, image=2)]
    assert ours(truth, found, [True] * 5) == pytest.approx(judge(truth, found), abs=1e-4)


def test_without_objects_there_is_nothing_to_measure():
    assert ours(ground_truth([]), [detection((0, 0, 1, 1), 0.5)], [True]) == {"AP": -1, "AP50": -1}


def f1_of(found, objects, crowd=()):
    """Of objects far apart, a row each; the detections are on them or on nothing."""
    truth = ground_truth([(1, 1, (60 * n, 0, 50, 50)) for n in range(objects)])
    truth["annotations"] += [{"id": 99 + n, "image_id": 1, "category_id": 1, "iscrowd": 1,
                              "bbox": list(box), "area": 1} for n, box in enumerate(crowd)]
    gt = evaluate.coco_object(truth["images"], truth["categories"], truth["annotations"])
    boxes = [detection((60 * n, 0, 50, 50) if n >= 0 else (0, 300, 9, 9), score)
             for n, score in found]
    own = evaluate.class_figures(evaluate.coco_run(gt, boxes))["class 1"]
    return own["F1"], own["score"]


def test_the_largest_f1_and_its_score_by_hand():
    """F1 = 2 hits / (detections + objects).  A second detection of an object is false."""
    hit, miss = 0, -1
    assert f1_of([(0, 0.9), (1, 0.8), (miss, 0.7), (2, 0.6)], 4) == (75.0, 0.6)      # 2 3 / (4 + 4)
    assert f1_of([(0, 0.9), (1, 0.8), (miss, 0.7), (miss, 0.6)], 2) == (100.0, 0.8)
    assert f1_of([(hit, 0.9), (hit, 0.8)], 1) == (100.0, 0.9)
    # of equal scores all count or none: 2 1 / (2 + 1), not 2 1 / (1 + 1)
    assert f1_of([(0, 0.5), (miss, 0.5)], 1) == (pytest.approx(66.6667), 0.5)
    assert f1_of([(miss, 0.5)], 3)[0] == 0
    assert f1_of([], 3) == (0, None) and f1_of([(miss, 0.5)], 0)[0] == -1
    # what lies in a crowd region does not count
    assert f1_of([(miss, 0.9), (0, 0.8)], 1, crowd=[(0, 290, 50, 50)]) == (100.0, 0.8)
