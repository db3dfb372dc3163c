"""Points for a strategy or a cost of one's own: does it keep the contract, and what does it do?

    python grade.py my.py:my_strategy               the contract, in seconds: 100 points
    python grade.py my.py:my_cost                   the same for a cost: a function of two arguments
    python grade.py my.py:f --seed 7 --json a.json  other matrices and boxes; points for a grader
    python grade.py my.py:f --train                 and its effect: a run of minutes, beside the
                                                    reference rules; 100 points more
    python grade.py my.py:f --train --many 6        the same as the strategy of a second branch
    python grade.py --collect *.json                a table of gradings, a line a hand-in
    python grade.py --reference --seeds 0 1 2       trains the reference rules

A strategy is cost (Q, G) -> prediction (K,), object (K,); a cost is (one, target) -> (Q, G); both
are explained at the top of assign.py.  One that draws lots says `my_strategy.randomised = True` and
is spared the check of the order.  Points say that a detector can be trained with it, not that it is
what an exercise asks for.  Exit code: 0 the contract is kept, 1 it is not, 2 nothing could be
graded.
"""
import argparse
import copy
import inspect
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

import annotations
import assign
import claims
import data
import evaluate
import ideas
import recipes
import runs
from assign import IGNORE, AssignError
from models import Prediction

INF = float("inf")


class Broken(AssertionError):
    """A rule of the contract is broken: a sentence for whoever wrote the function."""

    def __init__(self, rule, sentence):
        super().__init__(sentence)
        self.rule = rule


def demand(rule, kept, sentence):
    if not kept:
        raise Broken(rule, sentence)


# ------------------------------------------------------------------------------------------------
# the contract of a strategy
# ------------------------------------------------------------------------------------------------

# rule: points, in words; in the order in which they are checked
STRATEGY = {
    "answers": (15, "answers every cost (Q, G), also with Q = 0, G = 0 or G > Q"),
    "form": (15, "returns two long vectors of one length"),
    "range": (10, "numbers that exist: predictions 0...Q-1, objects 0...G-1 or IGNORE"),
    "chooses": (5, "gives somebody a positive sample, where every pair is allowed"),
    "forbidden": (15, "never uses a forbidden pair (cost inf)"),
    "once": (15, "gives a prediction to one object at most, or says that it shares"),
    "leaves": (10, "leaves the cost as it was given"),
    "order": (10, "looks at the costs only, not at the order of rows and columns"),
    "speed": (5, "answers a dense head, 5,000 x 20, in half a second"),
}


def kind(answer):
    """Of what type a value is, and its parts, in words."""
    parts = answer if isinstance(answer, (tuple, list)) else ()
    of = ", ".join(type(part).__name__ for part in parts[:4])
    return f"{type(answer).__name__}" + (f" of {len(parts)}: {of}" if parts else "")


def check_contract(strategy, cost):
    """What training relies on, for one cost.  Returns the answer.  Raises Broken."""
    (Q, G), given = cost.shape, cost.clone()
    try:
        answer = ideas.call(strategy, given, progress=0.5)
    except AssignError as error:
        raise Broken("answers", f"a strategy must answer every cost (Q, G), also with Q = 0, G = 0 "
                                f"or G > Q; for {Q} x {G} it raised {error}") from error

    # what it returns ...
    demand("form", isinstance(answer, (tuple, list)) and len(answer) == 2
           and all(torch.is_tensor(part) for part in answer),
           f"a strategy must return two tensors, prediction and object; this is {kind(answer)}")
    prediction, objects = answer
    demand("form", prediction.dtype == objects.dtype == torch.long,
           "both tensors must be long (use .long()), also when empty")
    demand("form", prediction.ndim == 1 and prediction.shape == objects.shape,
           "both tensors must be vectors of one length")

    # ... which numbers stand in it ...
    demand("range", ((prediction >= 0) & (prediction < Q)).all(),
           f"a prediction must be one of 0 ... Q - 1 (here Q = {Q})")
    demand("range", ((objects >= IGNORE) & (objects < G)).all(),
           f"an object must be one of 0 ... G - 1 (here G = {G}), or {IGNORE} for a prediction to "
           f"ignore")
    positive = objects != IGNORE
    demand("chooses", positive.any() or not (cost < INF).all() or not cost.numel(),
           f"a cost of {Q} x {G} in which every pair is allowed got no positive sample: nothing "
           f"would be learned")
    demand("forbidden", (cost[prediction[positive], objects[positive]] < INF).all(),
           "a forbidden pair (cost inf) must never be used")

    # ... how often each may, and what became of the cost
    if getattr(strategy, "shares_predictions", False):
        demand("once", len(set(zip(prediction.tolist(), objects.tolist()))) == len(prediction),
               "a pair must appear at most once")
    else:
        demand("once", len(prediction.unique()) == len(prediction),
               "a prediction must appear at most once, unless the function sets "
               "my_function.shares_predictions = True")
    if getattr(strategy, "one_to_one", False):
        demand("once", positive.all() and len(objects.unique()) == len(objects),
               "a strategy that claims one_to_one must give each object at most one prediction, "
               "and ignore none")
    demand("leaves", torch.equal(given, cost),
           "a strategy must not modify the cost it is given; work on cost.clone()")
    return prediction, objects


def check_order(strategy, cost, generator):
    """The same pairs whatever the order; the costs must be free of ties.  Raises Broken."""
    rows, columns = (torch.randperm(n, generator=generator) for n in cost.shape)
    prediction, objects = check_contract(strategy, cost[rows][:, columns])
    back = torch.where(objects == IGNORE, IGNORE, columns[objects])
    there = set(zip(rows[prediction].tolist(), back.tolist()))
    here = set(zip(*(part.tolist() for part in check_contract(strategy, cost))))
    demand("order", there == here or getattr(strategy, "randomised", False),
           "a strategy must look at the costs only: another order of predictions or objects must "
           "give the same pairs; if it draws lots, set my_function.randomised = True")


def strategy_cases(generator):
    """(check, arguments) of every case; other seeds have other numbers."""
    def cost(Q, G, forbidden):
        values = torch.rand(Q, G, generator=generator) - 1
        return values.masked_fill(torch.rand(Q, G, generator=generator) < forbidden, INF)

    shapes = (0, 0), (0, 3), (7, 0), (1, 1), (1, 4), (3, 5), (5, 5), (60, 6)
    for forbidden in (0.0, 0.5, 1.0):
        for Q, G in shapes:
            yield check_contract, cost(Q, G, forbidden)
    for _ in range(30):                                  # ties
        few = torch.tensor([-1.0, -0.5, 0.0, INF])
        yield check_contract, few[torch.randint(4, (6, 3), generator=generator)]
    wanted = cost(12, 3, 0.2)
    wanted[0] = torch.tensor([-3.0, -3.5, -4.0])         # all three want it
    yield check_contract, wanted
    for Q, G, forbidden in ((30, 5, 0.0), (30, 5, 0.5), (4, 7, 0.0), (4, 7, 0.5)):
        for _ in range(5):
            yield check_order, cost(Q, G, forbidden), generator
    yield check_speed, cost(5000, 20, 0.0)


def check_speed(strategy, cost):
    check_contract(strategy, cost)
    began = time.perf_counter()
    ideas.call(strategy, cost.clone(), progress=0.5)
    took = time.perf_counter() - began
    demand("speed", took < 0.5, f"a cost of {len(cost)} x {cost.shape[1]} took {took:.1f} s: "
                                f"training asks for 16 such answers a step")


# ------------------------------------------------------------------------------------------------
# the contract of a cost
# ------------------------------------------------------------------------------------------------

COST = {
    "answers": (20, "answers every image, also without objects or predictions"),
    "form": (20, "returns floating-point costs (Q, G)"),
    "number": (20, "is a number or inf: no NaN on empty boxes or certain scores"),
    "leaves": (10, "leaves its inputs as they were given"),
    "predictions": (15, "prices a prediction alike wherever it stands among the others"),
    "objects": (15, "prices an object alike wherever it stands among the others"),
}


def check_cost(cost, one, target):
    """Returns the costs of one image.  Raises Broken."""
    given = copy.deepcopy((one, target))
    shape = len(one.logits), len(target["boxes"])
    try:
        C = ideas.call(cost, *given, progress=0.5)
    except AssignError as error:
        raise Broken("answers", f"a cost must answer every image; for {shape[0]} predictions and "
                                f"{shape[1]} objects it raised {error}") from error
    demand("form", torch.is_tensor(C) and C.shape == shape and C.is_floating_point(),
           f"a cost must return a floating-point tensor of shape (Q, G), here {shape}")
    demand("number", not C.isnan().any() and not (C == -INF).any(),
           "a cost must be a number or inf; boxes without extent and scores of 0 and 1 occur")
    same = all(torch.equal(a, b) for a, b in zip(tensors(given), tensors((one, target))))
    demand("leaves", same, "a cost must not modify the prediction or the target it is given")
    return C


def tensors(case):
    one, target = case
    return [part for part in [*vars(one).values(), *target.values()] if torch.is_tensor(part)]


def check_places(cost, one, target, generator):
    """The costs travel with predictions and objects.  Raises Broken."""
    C = check_cost(cost, one, target)
    rows = torch.randperm(len(one.logits), generator=generator)
    moved = Prediction(one.logits[rows], one.boxes[rows], one.candidates[rows], one.strides[rows])
    demand("predictions", torch.allclose(check_cost(cost, moved, target), C[rows], atol=1e-4),
           "another order of the predictions must give the same costs in that order")
    columns = torch.randperm(len(target["boxes"]), generator=generator)
    other = {**target, "boxes": target["boxes"][columns], "labels": target["labels"][columns],
             "objects": target["objects"][columns]}
    demand("objects", torch.allclose(check_cost(cost, one, other), C[:, columns], atol=1e-4),
           "another order of the objects must give the same costs in that order")


def image(generator, Q, G, classes=4, empty=False, scale=1.0):
    """A Prediction and a target of a picture of 96 x 64 pixels.  empty: predicted boxes are points.

    The boxes of objects never are: such annotations are left out.
    """
    def boxes(n):
        a, b = torch.rand(2, n, 2, generator=generator) * torch.tensor([96.0, 64.0])
        return torch.cat([torch.minimum(a, b), torch.maximum(a, b) + 1], 1)

    points = boxes(Q)[:, :2].repeat(1, 2)
    predicted = points if empty else boxes(Q)
    one = Prediction(scale * torch.randn(Q, classes, generator=generator), predicted, points,
                     8.0 * 2 ** torch.randint(3, (Q,), generator=generator))
    size = torch.tensor([64, 96])
    return one, {"boxes": boxes(G), "labels": torch.randint(classes, (G,), generator=generator),
                 "size": size, "original_size": size, "image_id": 0, "objects": torch.arange(G),
                 "frame": torch.tensor([0.0, 0, 96, 64]), "ignore": torch.zeros(0, 4)}


def cost_cases(generator):
    for Q, G in ((0, 0), (0, 3), (7, 0), (1, 1), (3, 5), (60, 6)):
        yield check_cost, *image(generator, Q, G)
    for empty in (False, True):
        for scale in (1.0, 1e4):
            yield check_cost, *image(generator, 20, 4, empty=empty, scale=scale)
    for _ in range(5):
        yield check_places, *image(generator, 30, 5), generator


# ------------------------------------------------------------------------------------------------
# points
# ------------------------------------------------------------------------------------------------

def is_cost(function):
    """A cost takes two arguments, one and target; a strategy takes one, the cost."""
    parameters = inspect.signature(function).parameters.values()
    return sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "progress"
               for p in parameters) == 2


def is_choice(case):
    """Whether there is something to choose or to price: nothing is nobody's merit."""
    if torch.is_tensor(case[0]):
        return bool((case[0] < INF).any())               # a cost
    return len(case[0].logits) > 0 and len(case[1]["boxes"]) > 0


def contract(function, seed=0):
    """[(rule, words, points, of, wrong)] of each rule, broken ones first; wrong: a sentence, or "".

    A rule has its points if a case with something to choose has shown that it is kept.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)                              # for those that draw lots
    rules, cases = (COST, cost_cases) if is_cost(function) else (STRATEGY, strategy_cases)
    of_check = {check_order: ["order"], check_speed: ["speed"],
                check_places: ["predictions", "objects"]}
    of_all = [rule for rule in rules if rule not in sum(of_check.values(), [])]
    broken, kept = {}, set()
    for check, *case in cases(generator):
        reached = of_all + of_check.get(check, [])
        try:
            check(function, *case)
        except Broken as fault:
            broken.setdefault(fault.rule, str(fault))
            reached = reached[:reached.index(fault.rule)]
        if is_choice(case):
            kept.update(reached)
        if "no answer after" in broken.get("answers", ""):
            break                                        # it would take its time in every case
    if "chooses" in broken:                              # of no pairs nothing more is known
        kept &= set(of_all[:of_all.index("chooses")])

    rows = []
    for rule, (points, words) in rules.items():
        wrong = broken.get(rule, "" if rule in kept else "could not be checked: another rule was "
                                                         "broken first")
        rows.append((rule, words, 0 if wrong else points, points, wrong))
    return sorted(rows, key=lambda row: row[0] not in broken)


# ------------------------------------------------------------------------------------------------
# the effect
# ------------------------------------------------------------------------------------------------

REFERENCE = Path(__file__).with_name("docs") / "reference.json"
STEPS = 800                                  # of the short run
RULES = {"end-to-end": [], "location only": ["--class-cost", "0", "--location-cost", "predefined"],
         "one-to-many (top-k)": ["--assign", "top-k"]}


def effect(out, words):
    """Trains a short run and says what it does: AP, AP+NMS, duplicates an object, score gap.

    out: a new folder; a run that is there goes on, and one that is finished is only read.
    """
    script = Path(__file__).with_name("train.py")
    command = [sys.executable, script, "--steps", str(STEPS), "--out", str(out), *words]
    if not (Path(out) / "metrics.json").exists():
        if subprocess.run([*command, "--resume", "auto"]).returncode:
            raise AssignError(f"the run in {out} failed; its last line says why")
    flags = json.loads((Path(out) / "args.json").read_text())
    asked = vars(recipes.make_parser().parse_args(words))
    pictures = flags.get("data_dir")                     # None: not given
    if (pictures, flags["seed"]) != (asked["data_dir"], asked["seed"] or 0):
        raise AssignError(f"{out} holds a run of --seed {flags['seed']} on the pictures of "
                          f"{pictures or 'data/scenes'}; remove it to train anew")
    truth = data.read(flags, "val")
    detections = evaluate.read_results(Path(out) / "detections.json")
    found = evaluate.diagnose(truth, detections, flags["max_dets"])
    metrics = json.loads((Path(out) / "metrics.json").read_text())
    return {"AP": metrics["AP"], "AP+NMS": metrics["nms"]["AP"],
            "duplicates": found["duplicates per object"]["0.1"],
            "gap": found["score gap"][1] if found["found"] else 0.0}


def linear(value, low, high):
    """0 at low, 1 at high, a straight line between, whichever is the larger."""
    return min(1.0, max(0.0, (value - low) / (high - low)))


def reference():
    """{rule: [what `effect` says, of each seed]}.  Raises AssignError if it is not there."""
    if not REFERENCE.exists():
        raise AssignError(f"there is no {REFERENCE}, which --reference makes")
    return json.loads(REFERENCE.read_text())


def effect_points(figures, rules):
    """[(rule, words, points, of, "")] of figures, by what the reference rules did; 50 points each.

    All from the worst of the end-to-end rule's seeds on.  None at half of its AP without NMS, or if
    NMS adds twice what it adds to location only.  On a straight line between.
    """
    def gains(rule):
        return [run["AP+NMS"] - run["AP"] for run in rules[rule]]

    ap, gain = min(run["AP"] for run in rules["end-to-end"]), max(gains("end-to-end"))
    location = sum(gains("location only")) / len(rules["location only"])
    rows = (("AP", "AP without NMS", figures["AP"], ap / 2, ap),
            ("gain", "what NMS adds to AP", figures["AP+NMS"] - figures["AP"], 2 * location, gain))
    return [(rule, f"{words}: {value:.1f} (0 points at {low:.1f}, 50 at {high:.1f})",
             round(50 * linear(value, low, high)), 50, "")
            for rule, words, value, low, high in rows]


# of --json; gradings that differ in nothing but the seed are a line of the table
SAME = "function", "sha256", "many", "data_dir", "of"
GRADED = *SAME, "seed", "points", "effect"


def graded(file):
    """What --json wrote.  Raises AssignError."""
    try:
        content = json.loads(Path(file).read_text())
        return {key: content[key] for key in GRADED}
    except (ValueError, KeyError, TypeError):
        raise AssignError(f"{file} is not a file of grade.py --json") from None


def table(files):
    """Lines of Markdown: the reference rules, then functions, each with its mean over the seeds."""
    lines = {rule: [{"effect": found} for found in seeds] for rule, seeds in reference().items()}
    names = {}
    for file in files:
        grading = graded(file)
        key = tuple(grading[part] for part in SAME)
        lines.setdefault(key, []).append(grading)
        # who handed in the same code stands in one line
        names.setdefault(key, {})[re.sub(r"-\d+$", "", Path(file).stem)] = None

    def cell(numbers, digits):
        """Mean, and half the range if there are several."""
        known = [number for number in numbers if number is not None]
        if not known:
            return ""
        figure = claims.over_seeds(known)
        spread = f" ± {figure.spread:.{digits}f}" if figure.seeds > 1 else ""
        return f"{figure.mean:.{digits}f}{spread}"

    columns = {"AP": 1, "AP+NMS": 1, "duplicates": 2, "gap": 2}
    yield f"| | function | seeds | points | {' | '.join(columns)} |"
    yield "|---" * (4 + len(columns)) + "|"
    for key, gradings in lines.items():
        who, function, points = "reference", key, ""
        if key in names:
            who, function = ", ".join(names[key]), f"`{gradings[0]['function']}`"
            points = f"{cell([one['points'] for one in gradings], 0)} of {gradings[0]['of']}"
            if gradings[0]["many"]:
                function += f", `--many {gradings[0]['many']}`"
        effects = [cell([one["effect"].get(column) for one in gradings], digits)
                   for column, digits in columns.items()]
        yield f"| {who} | {function} | {len(gradings)} | {points} | {' | '.join(effects)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("function", nargs="?", metavar="my.py:f", help="the strategy or cost")
    add("--seed", type=runs.at_least(0), default=0, metavar="N",
        help="of the matrices, the boxes and the run")
    add("--json", metavar="FILE", help="write the points to this file as well")
    add("--train", action="store_true", help="grade the effect too, by a run of minutes")
    add("--data-dir", metavar="DIR",
        help="other pictures to train on (scenes.py --seed N --out DIR)")
    add("--many", type=runs.at_least(1), metavar="K", help="the run has a second branch, whose "
        "--many-assign the strategy is; its --assign is hungarian")
    add("--collect", nargs="+", metavar="FILE", help="files of --json, to a table")
    add("--reference", action="store_true", help="train the reference rules for --train")
    add("--seeds", type=runs.at_least(0), nargs="+", default=[0, 1, 2], metavar="N",
        help="of --reference")
    args = parser.parse_args()
    own = ["--data-dir", args.data_dir] if args.data_dir else []
    with runs.faults_told("grade.py", AssignError, annotations.DataError, runs.RunError):
        if args.json:
            runs.check_writable(args.json, "--json")
            if args.json.endswith(".py"):
                parser.error(f"--json {args.json} would be written over: name a .json")
        if args.reference:
            trained = {rule: [effect(f"runs/reference/{rule.split()[0]}-{seed}",
                                     [*words, "--seed", str(seed), *own]) for seed in args.seeds]
                       for rule, words in RULES.items()}
            runs.write_json(REFERENCE, trained, indent=1)
            print(f"wrote {REFERENCE}")
            return
        if args.collect:
            print("\n".join(table(args.collect)))
            return
        if not args.function:
            parser.error("name a strategy or a cost: my.py:f")
        function = assign.load_strategy(args.function, "the function")
        if args.many and (is_cost(function) or not args.train):
            parser.error("--many takes a strategy, not a cost, and goes with --train")
        print("a cost, of two arguments: one and target" if is_cost(function)
              else "a strategy, of one argument: the cost")
        rows = contract(function, args.seed)
        kept = all(points == of for _, _, points, of, _ in rows)
        figures = {}
        if args.train and kept:
            rules = reference()
            flag = "--cost" if is_cost(function) else "--assign"
            if args.many:
                own += ["--many", str(args.many)]
                flag = "--many-assign"
            name = f"grade-{Path(args.function.replace(':', '-')).name}-{args.seed}"
            out = runs.free_name(Path("runs") / name)    # the function may have changed since
            figures = effect(out, [flag, args.function, "--seed", str(args.seed), *own])
            for rule, seeds in rules.items():
                bands = ", ".join(f"{name} {min(s[name] for s in seeds):.2f} to "
                                  f"{max(s[name] for s in seeds):.2f}" for name in seeds[0])
                print(f"{rule}, {len(seeds)} seeds: {bands}")
            print(f"{args.function}: " + ", ".join(f"{n} {v:.2f}" for n, v in figures.items()))
            rows += effect_points(figures, rules)

    for _, words, points, of, wrong in rows:
        print(f"{points:3}/{of:<3} {words}" + (f"\n        {wrong}" if wrong else ""))
    points, of = (sum(row[n] for row in rows) for n in (2, 3))
    print(f"{points}/{of} points for {args.function}")
    if args.train and not figures:
        print("the effect is graded once the contract is kept")
    if args.json:
        own_file = args.function.rpartition(":")[0]
        runs.write_json(args.json, {
            "function": args.function, "sha256": ideas.digest(args.function) if own_file else None,
            "many": args.many, "data_dir": args.data_dir, "seed": args.seed, "points": points,
            "of": of, "effect": figures, "rows": rows}, indent=1)
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
