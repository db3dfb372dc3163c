"""The AP of parts of a list, held to pycocotools."""
import numpy as np
import pytest

import coco
import evaluate
from test_evaluate import detection, ground_truth, random_case


def judge(truth, found, max_dets=100):
    """pycocotools' AP and AP50."""
    gt = evaluate.coco_object(truth["images"], truth["categories"], truth["annotations"])
    return {name: evaluate.coco_metrics(gt, found, max_dets)[name] for name in ("AP", "AP50")}


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
