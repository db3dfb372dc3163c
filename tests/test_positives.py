"""What log.csv says of the positive samples, on cases that a person can count."""
import dataclasses
import json

import pytest
import torch

import positives
from assign import Match
from models import Prediction


def logit(p):
    return torch.as_tensor(p, dtype=torch.float32).logit()


def target(boxes, labels, frame=(0, 0, 100, 100), image=1, size=(100, 100)):
    return {"boxes": torch.tensor(boxes).float().view(-1, 4), "labels": torch.tensor(labels),
            "image_id": image, "frame": torch.tensor(frame).float(),
            "original_size": torch.tensor(size), "objects": torch.arange(len(labels))}


def match(prediction, of):
    return Match(torch.tensor(prediction, dtype=torch.long), torch.tensor(of, dtype=torch.long),
                 torch.zeros(0, dtype=torch.long))


def points(xy, stride=10.0):
    """A batch of one image with a candidate at each point."""
    xy = torch.tensor(xy).float()
    return Prediction(torch.zeros(1, len(xy), 1), torch.zeros(1, len(xy), 4),
                      torch.cat([xy, xy], 1), torch.full((len(xy),), stride))


def one_image():
    """Three predictions near object 0 (IoU 1, 0.9, 0.5), one on object 1; two classes."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 5], [50, 50, 60, 60]])
    scores = [[0.9, 0.1], [0.6, 0.1], [0.8, 0.1], [0.2, 0.7]]
    return Prediction(logit(scores), boxes)


def test_the_gap_is_between_the_two_best_that_overlap_the_object_by_more_than_half():
    """Object 0: 0.9 - 0.6, for IoU 0.5 is not more than 0.5.  Object 1: 0.7 alone.  Object 2: no
    prediction."""
    objects = [[0, 0, 10, 10], [50, 50, 60, 60], [80, 80, 90, 90]]
    gaps = positives.score_gaps(one_image(), target(objects, [0, 1, 0]))
    assert gaps[:2].tolist() == pytest.approx([0.3, 0.7]) and gaps[2].isnan()


def test_the_rank_counts_the_predictions_that_score_higher_for_the_class_of_the_object():
    objects = target([[0, 0, 10, 10], [50, 50, 60, 60]], [0, 1])
    found = positives.ranks(one_image(), objects, match([1, 3, 0, 2], [0, 1, 0, 1]))
    assert found.tolist() == [3, 1, 1, 2]


def test_the_one_agrees_with_the_many_where_it_is_their_best_by_score():
    """Object 0's many score 0.9, 0.6, 0.8; object 1's 0.7 for its class, though 0.2 for the other.
    Object 2 has none in the second branch."""
    objects = target([[0, 0, 10, 10], [50, 50, 60, 60], [80, 80, 90, 90]], [0, 1, 0])
    many = match([0, 1, 2, 3], [0, 0, 0, 1])
    best, other = match([0, 3, 1], [0, 1, 2]), match([2, 0], [0, 1])
    assert positives.agreed(one_image(), objects, best, many).tolist() == [True, True, False]
    assert positives.agreed(one_image(), objects, other, many).tolist() == [False, False]
    assert positives.agreed(one_image(), objects, best, match([], [])).tolist() == [False] * 3


def test_agreement_is_a_column_in_percent_of_runs_with_a_second_branch():
    objects, prediction = target([[0, 0, 10, 10], [50, 50, 60, 60]], [0, 1]), one_image()
    prediction.logits, prediction.boxes = prediction.logits[None], prediction.boxes[None]
    matches = [match([1, 3], [0, 1])], [match([0, 1, 3], [0, 0, 1])]
    assert positives.Watch().row(prediction, [objects], matches)["agreed"] is None
    prediction.aux = [dataclasses.replace(prediction, second=True)]
    # two groups of queries have no candidates in common
    assert positives.Watch().row(prediction, [objects], matches)["agreed"] is None
    prediction.candidates, prediction.strides = torch.zeros(4, 4), torch.ones(4)
    assert positives.Watch().row(prediction, [objects], matches)["agreed"] == 50


def test_softmax_scores_are_without_no_object():
    one = Prediction(torch.tensor([[1.0, 2.0, 3.0]]), torch.zeros(1, 4), softmax=True)
    expected = torch.tensor([1.0, 2.0]).exp() / torch.tensor([1.0, 2.0, 3.0]).exp().sum()
    torch.testing.assert_close(positives.class_scores(one), expected[None])


@pytest.mark.parametrize("frame,expected", [
    ((0, 0, 100, 200), [30, 40, 10]),                    # as it is
    ((100, 0, 0, 200), [70, 40, 10]),                    # mirrored
    ((0, 0, 200, 400), [15, 20, 5]),                     # twice as large
    ((12, -8, 112, 192), [18, 48, 10])])                 # moved
def test_places_are_in_the_original_picture(frame, expected):
    at = positives.places(points([[30, 40]]), target([[0, 0, 9, 9]], [0], frame, size=(200, 100)),
                          match([0], [0]))
    assert at.tolist() == [pytest.approx(expected)]


def test_a_query_is_its_own_place():
    prediction = Prediction(torch.zeros(1, 5, 1), torch.zeros(1, 5, 4))
    at = positives.places(prediction, target([[0, 0, 9, 9]], [0]), match([3], [0]))
    assert at.tolist() == [[3, 0, 0]]


def test_a_point_is_on_an_object_or_on_the_background(tmp_path):
    square = [20, 20, 60, 20, 60, 60, 20, 60]
    (tmp_path / "a.json").write_text(json.dumps({"annotations": [
        {"image_id": 7, "segmentation": [square]}, {"image_id": 8, "segmentation": {"counts": []}},
        {"image_id": 9}]}))
    known = positives.Silhouettes(tmp_path / "a.json")
    at = torch.tensor([[40.0, 40], [10, 40], [40, 70], [-5, 40], [40, 500]])
    assert known.on_object(7, (100, 80), at).tolist() == [True, False, False, False, False]
    assert not known.on_object(8, (100, 80), at).any()


def test_a_row_of_two_pictures_counted_by_hand(tmp_path):
    """Gaps 0.3, 0.7, 0.05: the median 0.3.  The positives are the 3rd, the 1st, the 2nd and the 1st
    of their classes: 1.5 makes PyTorch the lower one, 1.  Four positives of three objects.  Three
    of the four points lie on the squares."""
    square = [0, 0, 12, 0, 12, 12, 0, 12]
    (tmp_path / "a.json").write_text(json.dumps({"annotations": [
        {"image_id": 1, "segmentation": [square]}, {"image_id": 2, "segmentation": [square]}]}))
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 5], [50, 50, 60, 60]])
    scores = torch.tensor([[[0.9, 0.1], [0.6, 0.1], [0.8, 0.1], [0.2, 0.7]],
                           [[0.30, 0.1], [0.35, 0.1], [0.2, 0.1], [0.1, 0.1]]])
    at = torch.tensor([[5.0, 5], [6, 6], [8, 8], [55, 55]])
    prediction = Prediction(logit(scores), boxes.expand(2, 4, 4), torch.cat([at, at], 1),
                            torch.full((4,), 8.0))
    targets = [target([[0, 0, 10, 10], [50, 50, 60, 60]], [0, 1], image=1),
               target([[0, 0, 10, 10]], [0], image=2)]
    matches = [[match([1, 3], [0, 1]), match([0, 1], [0, 0])]]
    row = positives.Watch(positives.Silhouettes(tmp_path / "a.json")).row(prediction, targets,
                                                                          matches)
    assert row == {"gap": pytest.approx(0.3), "rank": 1, "positives": pytest.approx(4 / 3),
                   "shared": 0, "moved": None, "background": pytest.approx(25), "agreed": None}


def test_of_three_predictions_the_second_score_counts():
    boxes = torch.tensor([[0.0, 0, 10, 10]] * 3)
    one = Prediction(logit([[0.9], [0.2], [0.7]]), boxes)
    assert positives.score_gaps(one, target([[0, 0, 10, 10]], [0])).tolist() == [
        pytest.approx(0.2)]


def test_between_two_levels_the_coarser_grid_says_what_a_step_is():
    """15 pixels are less than a step of 16, in whichever order the two were met."""
    objects = target([[0, 0, 50, 50]], [0])
    for order in ([0, 1], [1, 0]):
        watch, prediction = positives.Watch(), points([[10, 10], [25, 10]])
        prediction.strides = torch.tensor([8.0, 16.0])
        for q in order:
            watch.note(prediction, [objects], [match([q], [0])])
        assert watch.state["compared"] == 1 and watch.state["moved"] == 0


def test_a_positive_moved_if_it_lies_more_than_a_stride_away():
    watch, objects = positives.Watch(), target([[0, 0, 50, 50], [50, 50, 99, 99]], [0, 0])
    prediction = points([[10, 10], [20, 10], [31, 10], [60, 60]])
    watch.note(prediction, [objects], [match([0, 3], [0, 1])])
    assert watch.row(prediction, [objects], [[match([0, 3], [0, 1])]])["moved"] is None
    watch.note(prediction, [objects], [match([1, 3], [0, 1])])           # 10 away: one stride
    assert watch.row(prediction, [objects], [[match([1, 3], [0, 1])]])["moved"] == 0
    watch.note(prediction, [objects], [match([2, 3], [0, 1])])           # 11 away
    assert watch.row(prediction, [objects], [[match([2, 3], [0, 1])]])["moved"] == 50
    # all since the last row: of four, one is 21 away, one a stride
    watch.note(prediction, [objects], [match([0, 3], [0, 1])])
    watch.note(prediction, [objects], [match([1, 3], [0, 1])])
    assert watch.row(prediction, [objects], [[match([1, 3], [0, 1])]])["moved"] == 25


def test_the_same_grid_point_in_a_mirrored_picture_did_not_move_and_objects_keep_their_names():
    watch, prediction = positives.Watch(), points([[15, 15], [85, 15]])
    plain = target([[10, 10, 20, 20]], [0])
    watch.note(prediction, [plain], [match([0], [0])])
    # object 0 was cut away by the picture's edge: object 1 is the first of this view
    mirrored = {**target([[0, 0, 9, 9], [80, 10, 90, 20]], [0, 0], (100, 0, 0, 100)),
                "objects": torch.tensor([4, 0])}
    watch.note(prediction, [mirrored], [match([1], [1])])
    assert watch.state["compared"] == 1 and watch.state["moved"] == 0


def test_only_some_pictures_are_remembered(monkeypatch):
    monkeypatch.setattr(positives, "PICTURES", 2)
    watch, prediction = positives.Watch(), points([[15, 15]])
    for image in (1, 2, 3, 3, 2):
        watch.note(prediction, [target([[0, 0, 30, 30]], [0], image=image)], [match([0], [0])])
    assert set(watch.state["seen"]) == {1, 2} and watch.state["compared"] == 1


def test_what_is_remembered_goes_on():
    objects, prediction = target([[0, 0, 50, 50]], [0]), points([[10, 10], [31, 10]])
    first = positives.Watch()
    first.note(prediction, [objects], [match([0], [0])])
    second = positives.Watch()
    second.go_on(first.state)
    second.note(prediction, [objects], [match([1], [0])])
    assert second.state["moved"] == second.state["compared"] == 1


def test_pictures_without_objects_leave_the_columns_empty():
    watch, empty = positives.Watch(), target([], [])
    row = watch.row(points([[10, 10]]), [empty], [[match([], [])]])
    assert row == dict.fromkeys(positives.COLUMNS)


def test_what_breaks_the_contract_is_said_once():
    said = []
    watch = positives.Watch(strategies=[lambda cost: None], say=said.append)
    objects, prediction = target([[0, 0, 50, 50], [50, 50, 99, 99]], [0, 0]), points([[10, 10]])
    for _ in range(2):
        assert watch.row(prediction, [objects], [[match([], [])]])["positives"] == 0
        assert watch.row(prediction, [objects], [[match([0, 0], [0, 1])]])["shared"] == 1
    assert len(said) == 2
    assert "no positive sample to any of the 2 objects" in said[0]
    assert "more than one object" in said[1] and "shares_predictions" in said[1]


def test_what_breaks_the_contract_in_the_second_branch_is_said_too():
    def second(cost):
        raise AssertionError

    said = []
    watch = positives.Watch(strategies=[lambda cost: None, second], say=said.append)
    objects = target([[0, 0, 50, 50], [50, 50, 99, 99]], [0, 0])
    prediction = Prediction(torch.zeros(1, 2, 1), torch.zeros(1, 2, 4))          # of queries
    prediction.aux = [dataclasses.replace(prediction), dataclasses.replace(prediction, second=True)]
    good = [match([0, 1], [0, 1])]
    for broken in (match([], []), match([0, 0], [0, 1]), match([0, 0], [0, 1])):
        watch.row(prediction, [objects], [good, [match([], [])], [broken]])
    assert len(said) == 2 and all(words.startswith("warning: second gives") for words in said)
    assert "no positive sample" in said[0] and "shares_predictions" in said[1]
