"""A second branch in training (--many): K positives an object beside the one, for the features."""
import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch

import assign
import checkpoints
import claims
import convert
import figures
import losses
import models
import recipes
import train

ROOT = Path(__file__).parent.parent

OPTIONS = {"retinanet": {"width": 16, "depth": 1, "extra_levels": 0, "anchor_scales": 1},
           "centernet": {"neck_widths": (16, 16), "deform": False},
           "fcos": {"width": 16, "depth": 1, "extra_levels": 0}}
QUERIES = {"detr": {"width": 32, "stride": 16, "dropout": 0.0},
           "deformable-detr": {"width": 32, "levels": 2, "dropout": 0.0},
           "sparse-rcnn": {"width": 16, "dynamic": 8, "roi_size": 24}}
FLAGS = {"assign": "hungarian", "location_cost": "predicted", "class_cost": 2.0, "lambda_cls": 2.0,
         "lambda_l1": 5.0, "lambda_iou": 2.0, "many_assign": "top-k"}


def detector(name, many):
    torch.manual_seed(0)
    return checkpoints.build(name, 3, "tiny", **OPTIONS[name], many=many).train()


def pictures():
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    targets = [{"boxes": torch.tensor([[4.0, 8, 40, 50], [20, 20, 60, 62]]), "image_id": n,
                "labels": torch.tensor([0, 2]), "size": torch.tensor([64, 64])} for n in range(2)]
    return images, torch.zeros(2, 64, 64, dtype=torch.bool), targets


@pytest.mark.parametrize("name", OPTIONS)
def test_the_branch_is_there_in_training_alone_and_learns_in_layers_of_its_own(name):
    images, mask, _ = pictures()
    plain, model = detector(name, 0), detector(name, 4)
    expected = plain(images, mask)
    assert not expected.aux
    # the same weights but for the twins, which start as their originals
    assert {key for key in model.state_dict() if not key.startswith("twins.")} == set(
        plain.state_dict())
    prediction = model(images, mask)
    (second,) = prediction.aux
    assert torch.equal(prediction.logits, expected.logits)
    assert torch.equal(prediction.boxes, expected.boxes)
    assert second.second and second.weight == 1 / 4 and not prediction.second
    assert torch.equal(second.logits, prediction.logits) and len(second.boxes) == 2
    second.logits.sum().backward()
    assert all(p.grad is None for p in model.score.parameters())
    assert all(p.grad is not None for p in model.twins[0].parameters())
    assert not model.eval()(images, mask).aux


@pytest.mark.parametrize("name", OPTIONS)
def test_each_object_has_its_k_cheapest_there_and_they_weigh_a_kth(name):
    """Cheapest by Eq. 5, sorted whole; a prediction that two objects want goes to the cheaper."""
    K, flags = 3, {**FLAGS, "detector": name, "many": 3}
    images, mask, targets = pictures()
    model = detector(name, K)
    torch.nn.init.normal_(model.twins[0].weight, std=0.1)        # so that the branches differ
    prediction = model(images, mask)
    cost, strategy, loss = losses.row(flags)
    matches = assign.match(prediction, targets, cost, strategy, second=losses.many_row(flags))
    assert [len(m.prediction) for m in matches[0]] == [2, 2]

    second = prediction.aux[0]
    for n, (target, m) in enumerate(zip(targets, matches[1])):
        C = assign.matching_cost(second.image(n), target).double()
        wanted = C.argsort(0)[:K]                                # (K, G)
        expected = {}
        for g in range(2):
            for q in wanted[:, g].tolist():
                if q not in expected or C[q, g] < C[q, expected[q]]:
                    expected[q] = g
        assert dict(zip(m.prediction.tolist(), m.object.tolist())) == expected

    objects = torch.tensor(4.0)
    both = loss(prediction, targets, matches, objects)
    prediction.aux = []
    one = loss(prediction, targets, matches[:1], objects)
    second.weight = 1.0
    other = loss(second, targets, matches[1:], objects)
    for term in both:
        assert torch.allclose(both[term], one[term] + other[term] / K)


@pytest.mark.parametrize("name", OPTIONS)
def test_detached_layers_learn_and_the_features_in_front_of_them_do_not(name):
    images, mask, _ = pictures()
    model = detector(name, 4)
    plain = model(images, mask)
    model.many_detach = True
    detached = model(images, mask)
    assert torch.equal(plain.logits, detached.logits) and torch.equal(plain.boxes, detached.boxes)
    (detached.logits.sum() + detached.boxes.sum()).backward()
    learned = {key for key, p in model.named_parameters() if p.grad is not None}
    # FCOS's factor of each level stands behind the layers
    assert {key.split(".")[0] for key in learned} - {"scale"} == set(model.last)


def test_the_weight_of_the_second_branch_runs_on_a_straight_line_and_scales_its_loss():
    flags = {"many_weight": [0.8, 0.1]}
    assert [losses.many_weight(flags, x) for x in (0, 0.5, 1)] == pytest.approx([0.8, 0.45, 0.1])
    assert losses.many_weight({}, 0.5) == 1

    images, mask, targets = pictures()
    model = detector("fcos", 3)
    flags = {**FLAGS, "detector": "fcos", "many": 3}
    cost, strategy, loss = losses.row(flags)
    of_weight = {}
    for weight in (0.0, 1.0, 2.0):
        model.many_weight = weight
        prediction = model(images, mask)
        matches = assign.match(prediction, targets, cost, strategy, second=losses.many_row(flags))
        of_weight[weight] = loss(prediction, targets, matches, torch.tensor(4.0))
    prediction.aux = []
    alone = loss(prediction, targets, matches[:1], torch.tensor(4.0))
    for term, nothing in of_weight[0.0].items():
        assert torch.allclose(nothing, alone[term])
        one, two = of_weight[1.0][term] - nothing, of_weight[2.0][term] - nothing
        assert torch.allclose(two, 2 * one, rtol=1e-4) and one > 0


def assert_second_group_pays(loss, prediction, targets, matches, terms, K):
    """A K-th of what it would pay alone, but DETR's class loss, a mean over all its queries: that.
    """
    layers = [prediction, *prediction.aux]
    alone = [loss(dataclasses.replace(layer, aux=[], weight=1.0), targets, [found],
                  torch.tensor(4.0)) for layer, found in zip(layers, matches)]
    for term, paid in terms.items():
        share = 1 if prediction.softmax and term == "class" else 1 / K
        first, second = (sum(one[term] for one in half) for half in (alone[:2], alone[2:]))
        assert torch.allclose(paid, first + share * second, rtol=1e-4)


@pytest.mark.parametrize("name", QUERIES)
def test_a_second_group_of_queries_learns_beside_the_first_unseen_by_it(name):
    K, Q = 3, 5
    images, mask, targets = pictures()

    def build(many):
        torch.manual_seed(0)
        options = {**QUERIES[name], "layers": 2, "hidden": 32, "heads": 4, "queries": Q}
        return checkpoints.build(name, 3, "tiny", **options, many=many).train()

    plain, model = build(0), build(K)
    expected, prediction = plain(images, mask), model(images, mask)
    assert torch.equal(prediction.logits, expected.logits)       # the first group is as without
    first, *second = prediction.aux
    assert torch.equal(first.logits, expected.aux[0].logits) and not first.second
    assert [(layer.second, layer.weight, layer.boxes.shape[1]) for layer in second] == [
        (True, 1 / K, K * Q)] * 2                                # both decoder layers

    flags = {**FLAGS, "detector": name, "many": K}
    cost, strategy, loss = losses.row(flags)
    matches = assign.match(prediction, targets, cost, strategy, second=losses.many_row(flags))
    assert [len(m.prediction) for layer in matches[:2] for m in layer] == [2] * 4
    assert all(K <= len(m.prediction) <= 2 * K for layer in matches[2:] for m in layer)
    terms = loss(prediction, targets, matches, torch.tensor(4.0))
    assert_second_group_pays(loss, prediction, targets, matches, terms, K)
    sum(terms.values()).backward()
    assert all(twin.weight.grad.any() for twin in model.twins)
    inference = model.eval()(images, mask)
    assert len(inference.aux) == 1                               # of the first group alone
    assert not any(layer.second for layer in inference.aux)
    for twin in model.twins:
        twin.weight.data.fill_(float("nan"))
    assert not model(images, mask).logits.isnan().any()


def test_proposals_of_the_second_group_start_as_the_whole_picture():
    model = checkpoints.build("sparse-rcnn", 3, "tiny", **QUERIES["sparse-rcnn"], many=2)
    whole = torch.tensor([0.5, 0.5, 1.0, 1.0])
    assert all((boxes.weight == whole).all() for boxes in (model.boxes, model.twins[0]))


def test_another_rule_brings_its_own_cost():
    flags = {**FLAGS, "detector": "fcos", "many": 3, "many_assign": "one-to-many-points"}
    assert losses.many_row(flags) == (assign.fcos_area_cost, assign.one_to_many_points)
    # also beside a cost of one's own, which the other branch keeps
    own = {**flags, "cost": f"{Path(__file__).with_name('solutions.py')}:location_only"}
    assert losses.many_row(own) == losses.many_row(flags)
    assert losses.row(own).cost.__name__ == "location_only"
    assert losses.many_row({**FLAGS, "detector": "fcos", "many": 0}) is None


@pytest.mark.parametrize("words, sentence", [
    ("--detector detr --many 3 --many-detach", "whose two groups of queries share all layers"),
    ("--detector detr --many 3 --many-assign one-to-many-points",
     "--many-assign one-to-many-points judges points"),
    ("--detector retinanet --assign one-to-many --many 3",
     "--many does not concern --assign one-to-many, which is one-to-many already"),
    ("--many 101", "--many 101: must be from 0 to 100"),
    ("--many-assign top-k", "--many-assign does not concern a run without --many"),
    ("--many-weight 1 0", "--many-weight does not concern a run without --many"),
    ("--many-detach", "--many-detach does not concern a run without --many"),
    ("--many 3 --many-weight 1 -1", "--many-weight -1.0: must be from 0"),
    ("--assign one-to-many-points --many 3", "--many does not concern --assign one-to-many-points"),
    ("--detector retinanet --many 3 --many-assign one-to-many-points",
     "--many-assign one-to-many-points judges points"),
    ("--many 3 --many-assign one-to-many-iou --location-cost predefined",
     "--many-assign one-to-many-iou with --location-cost predefined"),
    ("--many 3 --many-assign one-to-many", "--many-assign one-to-many: the original rules are"),
    ("--many 3 --freeze location --init last.pt", "give one of them"),
    ("--assign top-k --many 3", "--many does not concern --assign top-k, which is one-to-many"),
    ("--assign one-to-many-points --cost my.py:f", "--cost does not concern --assign one-to-many"),
    ("--assign one-to-many-iou --cost my.py:f", "--cost does not concern --assign one-to-many-iou"),
])
def test_it_is_refused_where_it_has_nothing_to_say(words, sentence):
    with pytest.raises(recipes.UsageError, match=sentence):
        given = vars(recipes.make_parser().parse_args(words.split()))
        recipes.check_flags(recipes.effective_flags(given)[0], 1)


RULES = "hungarian", "min-cost", "one-to-many-iou", "one-to-many-points", "top-k"


@pytest.mark.parametrize("rule", ["hungarian", "min-cost"])
@pytest.mark.parametrize("many_assign", RULES)
def test_every_pair_of_rules_makes_a_row(rule, many_assign):
    words = f"--assign {rule} --many 3 --many-assign {many_assign}"
    flags, _ = recipes.effective_flags(vars(recipes.make_parser().parse_args(words.split())))
    cost, strategy = losses.many_row(flags)
    own = {"one-to-many-iou": assign.predicted_iou_cost,
           "one-to-many-points": assign.fcos_area_cost}
    assert getattr(cost, "func", cost) is own.get(many_assign, assign.matching_cost)
    images, mask, targets = pictures()
    prediction = detector("fcos", 3)(images, mask)
    first = losses.row(flags)
    matches = assign.match(prediction, targets, first.cost, first.strategy,
                           second=(cost, strategy))
    assert len(matches) == 2
    alone = assign.match(dataclasses.replace(prediction.aux[0], second=False), targets, cost,
                         strategy)
    for n, m in enumerate(matches[1]):
        assert m.prediction.tolist() == alone[0][n].prediction.tolist()


@pytest.mark.parametrize("location, cost", [("predefined", assign.anchor_iou_cost),
                                            ("predicted", assign.predicted_iou_cost)])
def test_retinanets_rule_judges_anchors_or_predicted_boxes(location, cost):
    flags = {**FLAGS, "detector": "retinanet", "assign": "one-to-many-iou"}
    assert losses.row({**flags, "location_cost": location}).cost is cost


def test_twins_start_as_copies_of_what_init_loads(tmp_path):
    base, model = detector("fcos", 0), detector("fcos", 3)
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter)
    torch.save({"model": base.state_dict()}, tmp_path / "base.pt")
    checkpoints.load_weights(model, tmp_path / "base.pt")
    assert torch.equal(model.twins[0].weight, base.score.weight)
    assert torch.equal(model.twins[1].bias, base.ltrb.bias)


def test_twins_that_init_brings_are_kept_where_they_fit(tmp_path):
    base = detector("fcos", 3)
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter)
    torch.save({"model": base.state_dict()}, tmp_path / "base.pt")
    model = checkpoints.build("fcos", 5, "tiny", **OPTIONS["fcos"], many=3)      # of 5 classes
    checkpoints.load_weights(model, tmp_path / "base.pt")
    assert torch.equal(model.twins[1].weight, base.twins[1].weight)              # boxes
    assert torch.equal(model.twins[0].weight, model.score.weight)


def test_a_changed_file_of_its_strategy_is_refused_on_resume(tiny_scenes, tmp_path, command):
    my = tmp_path / "my.py"
    my.write_text("import assign\ndef f(cost):\n    return assign.top_k(cost)\n")
    words = (f"--data-dir {tiny_scenes} --out {tmp_path / 'run'} --steps 2 --batch-size 4 --many 3 "
             f"--many-assign {my}:f --width 16 --depth 1").split()
    code, said, error = command(train, *words)
    assert code == 0 and "my.py:f, weighing 1/3" in said, error
    my.write_text(my.read_text() + "# another\n")
    code, _, error = command(train, *words, "--resume")
    assert code == 2 and "the file of --many-assign" in error


@pytest.mark.parametrize("own, said", [
    ("--width 16 --depth 1 --many-weight 0.8 0.1 --many-detach",
     "a second branch with 3 positives an object and a weight of 0.8 to 0.1, by which alone the "
     "features learn"),
    ("--detector sparse-rcnn --width 32 --layers 2 --hidden 32 --queries 6",
     "a second branch with 3 positives an object")])
def test_it_trains_and_its_checkpoint_detects_without_it(tiny_scenes, tmp_path, command, own, said):
    out = tmp_path / "run"
    words = f"--data-dir {tiny_scenes} --out {out} --steps 2 --batch-size 4 --many 3 {own}".split()
    code, text, _ = command(train, *words)
    assert code == 0 and said in text
    model, _ = checkpoints.load(out)
    picture = next((tiny_scenes / "val").iterdir())
    before = model.detect(picture)
    for parameter in model.twins.parameters():
        parameter.data.fill_(float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(before, model.detect(picture)))


def logged(command, folder, words):
    """The rows of log.csv of a short run."""
    code, _, error = command(train, *words.split(), "--out", str(folder), "--log-every", "1")
    assert code == 0, error
    return list(csv.DictReader(open(folder / "log.csv")))


def test_the_weight_acts_in_training(tiny_scenes, tmp_path, command):
    """Of two runs that differ in it alone the first step's loss differs by the second branch's."""
    common = f"--data-dir {tiny_scenes} --steps 2 --batch-size 4 --width 16 --depth 1"
    none, one, two, falls = (
        [float(row["loss"]) for row in logged(command, tmp_path / name, f"{common} {words}")]
        for name, words in (("none", ""), ("one", "--many 3"),
                            ("two", "--many 3 --many-weight 2 2"),
                            ("falls", "--many 3 --many-weight 2 0")))
    assert none[0] < one[0]
    assert two[0] - none[0] == pytest.approx(2 * (one[0] - none[0]), rel=1e-3)
    assert falls[0] == two[0] and falls[1] < two[1]              # 2, then 1


def test_the_strategy_of_the_second_branch_is_told_the_progress(tiny_scenes, tmp_path, command):
    my = tmp_path / "my.py"
    my.write_text("import assign\ndef f(cost, progress):\n"
                  f"    open({str(tmp_path / 'told')!r}, 'a').write(f'{{progress}} ')\n"
                  "    return assign.top_k(cost, 2)\n")
    logged(command, tmp_path / "run", f"--data-dir {tiny_scenes} --steps 2 --batch-size 4 --many 3 "
           f"--width 16 --depth 1 --many-assign {my}:f")
    assert {float(word) for word in (tmp_path / "told").read_text().split()} >= {0.0, 0.5}


def test_detaching_acts_in_training(tiny_scenes, tmp_path, command):
    """Where the second branch weighs nothing, features in front of detached layers stay."""
    start = models.Tiny()
    checkpoints.load_backbone(start, str(ROOT / "tiny.pt"))
    for words, stays in (("--many-detach", True), ("", False)):
        logged(command, tmp_path / f"run{words}", f"--data-dir {tiny_scenes} --steps 1 --width 16 "
               f"--batch-size 4 --depth 1 --many 3 --many-weight 0 0 --weight-decay 0 {words}")
        model, _ = checkpoints.load(tmp_path / f"run{words}")
        same = [torch.equal(*pair) for pair in zip(start.parameters(), model.backbone.parameters())]
        assert all(same) if stays else not any(same)


def test_every_row_of_its_table_has_a_folder_and_a_name_of_its_own(tmp_path):
    names, titles = set(), set()
    rows = [words for words in claims.FLAGS.values() if "--many " in words]
    for words in rows:
        flags, _ = recipes.effective_flags(vars(recipes.make_parser().parse_args(words.split())))
        names.add(recipes.run_name(flags))
        (tmp_path / "args.json").write_text(json.dumps(flags))
        titles.add(figures.row_name(tmp_path))
    assert len(rows) == len(names) == len(titles) == 6


def test_an_exported_program_does_not_carry_the_branch():
    program = convert.export(detector("fcos", 3).eval(), 64, 64)
    names = list(program.state_dict)
    assert names and not any("twins" in name for name in names)
