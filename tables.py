"""Tables 1, 2, 3 and many: trains their rows, and prints them beside the paper's, with verdicts.

The last, "many", is of what came after the paper: dual assignment.

    python tables.py 1 --seeds 0 1 2                    one-to-many against one-to-one
    python tables.py 2 --seeds 0 1 2 --jobs 2           what the classification cost does
    python tables.py 1 2 --detectors fcos               the rows of both in one table
    python tables.py 3                                  crowds
    python tables.py many                               dual assignment
    python tables.py 2 --collect --readme PAGE.md       only what is there, into a page
    python tables.py 2 -- --steps 400                   what stands after -- goes to every row

A finished run is not trained again, and after Ctrl-C the same command goes on.  A run's folder, in
--out, holds the words of train.py in output.txt and its time in minutes.txt.  Exit code: 0 all
statements hold, 1 one does not or a row is missing, 2 a row failed or the command is wrong.
"""
import argparse
import contextlib
import csv
import re
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import annotations
import checkpoints
import claims
import crowd
import data
import recipes
import runs
from claims import BOXES, DATA, FLAGS, ROWS, Figure
from recipes import NAMES, UsageError
from runs import RunError


class Run(NamedTuple):
    row: tuple                  # detector, rule
    folder: Path
    words: list                 # for train.py
    flags: dict                 # in force
    plain: dict                 # in force without what stands after --


def plan(args, extra):
    """Every Run of the tables, in their order.  Raises UsageError."""
    parser, planned = recipes.make_parser(), []
    ours = ("data", "detector", "assign", "location_cost", "class_cost", "seed", "out", "resume")
    for name, value in vars(parser.parse_args(extra)).items():
        if name in ours and value not in (None, False):
            raise UsageError(f"{recipes.flag(name)} after --: tables.py gives it to each row")
    rows = [(detector, rule) for detector in args.detectors for rule in FLAGS
            if any(detector in ROWS[table].get(rule, ()) for table in args.tables)]
    for detector, rule in rows:
        for seed in args.seeds:
            words = ["--data", args.data, "--detector", detector, *FLAGS[rule].split(), "--seed",
                     str(seed)]
            plain, flags = (recipes.effective_flags(vars(parser.parse_args(given)))[0]
                            for given in (words, words + extra))
            recipes.check_flags(flags, 1)
            folder = Path(args.out) / f"{recipes.run_name(flags)}-seed{seed}"
            planned.append(Run((detector, rule), folder, words + extra, flags, plain))
    return planned


def check_row(run, saved):
    """That a finished run is the one that is planned.  saved: its args.json.  Raises UsageError."""
    known = vars(recipes.make_parser().parse_args([]))
    # a flag that there was not yet had the row's value
    flags = [(recipes.flag(name), saved.get(name, run.plain.get(name)), run.flags.get(name))
             for name in known if name not in recipes.FREE_ON_RESUME]
    weights = "backbone_weights_sha256"
    now = checkpoints.backbone_digest(run.flags["backbone_weights"])
    flags.append((weights, saved.get("versions", {}).get(weights, now), now))
    changed = [f"{name} (was {was}, now {now})" for name, was, now in flags
               if now not in (was, "auto")]
    if changed:
        raise UsageError(f"the folder holds a run of other flags, {', '.join(changed)}; give its "
                         f"flags after --, or choose another --out")


def numbers_of(run):
    """{name: number} of a finished run, and by what it was trained; else None.

    Raises UsageError if it is another row's, and RunError.
    """
    saved, found = runs.finished(run.folder) or (None, None)
    if not saved:
        return None
    check_row(run, saved)
    sittings = runs.sittings(run.folder)
    numbers = {"minutes": sum(minutes for minutes, _ in sittings) or None}
    for name in [name for name in ("AP", "AP50", "mMR", "recall", "JI") if name in found]:
        numbers.update({name: found[name], f"{name}+NMS": found["nms"][name]})
    made_by = [f"PyTorch {saved.get('versions', {}).get('torch')}", str(saved.get("precision"))]
    return claims.with_gains(numbers), ", ".join(made_by + sorted({how for _, how in sittings}))


def train_missing(planned, jobs):
    """Trains what is not finished.  Returns {folder: the last line of its error}."""
    commands, script = {}, Path(__file__).with_name("train.py")
    for run in planned:
        with contextlib.suppress(RunError):                          # `collect` tells it
            if runs.finished(run.folder):
                continue
            resume = ["--resume"] * (run.folder / "last.pt").exists()
            words = [sys.executable, script, *run.words, "--out", str(run.folder), *resume]
            commands[run.folder] = words, run.flags["steps"]
    print(f"{len(planned)} runs, {len(commands)} of them to train, {jobs} at a time", flush=True)
    for split in ("train", "val") if commands else ():   # drawn, or found missing, before the first
        data.locate(planned[0].flags, split)
    return runs.side_by_side(commands, jobs)


def collect(planned, failed):
    """{(detector, rule): {name: Figure}} of what is there, the folders of what is not, and of the
    former how many were trained by what, {words: runs}."""
    found, missing, makers = {run.row: [] for run in planned}, [], Counter()
    for run in planned:
        known = None
        try:
            known = numbers_of(run)
        except (UsageError, RunError) as error:                      # of other flags, damaged
            failed.setdefault(run.folder, error)
        if known:
            numbers, made_by = known
            found[run.row].append(numbers)
            makers[made_by] += 1
        else:
            missing.append(run.folder)

    table = {}
    for row, there in found.items():
        columns = {name: [numbers[name] for numbers in there] for name in (there or [{}])[0]}
        table[row] = {name: claims.over_seeds(c) for name, c in columns.items() if None not in c}
    return table, missing, makers


def boxes_recall(args, flags):
    """What NMS leaves of the annotation boxes, in percent; --collect reads what stands there."""
    file = Path(args.out) / f"{args.data}-annotation-boxes.txt"
    if not args.collect:
        boxes = data.read(flags, "val")
        file.write_text(f"{crowd.annotation_recall(crowd.crowd_truth(boxes))[0.5]}\n")
    return {"recall": Figure(float(file.read_text()))} if file.exists() else {}


# ------------------------------------------------------------------------------------------------
# the page
# ------------------------------------------------------------------------------------------------

def lines(args, extra, ours, paper):
    """The table, cell by cell."""
    names = [name + end for name in ("AP", "AP50") for end in ("", "+NMS", " gain")]
    if args.tables == ["3"]:
        names = [name + end for name in ("AP50", "mMR", "recall", "JI") for end in ("", "+NMS")]
    papers = [name for name in names if any(name in row for row in paper.values())]
    table = [["`python train.py` with", "detector", "positive samples", *names, "minutes",
              *[f"paper's {name}" for name in papers]]]
    for (detector, rule), row in ours.items():
        if rule == BOXES:
            continue
        flags = [f"--data {args.data}"] * (args.data != "scenes")
        flags += [f"--detector {detector}"] * (detector != "fcos") + [FLAGS[rule], *extra]
        flags = " ".join(flag for flag in flags if flag)
        cells = [(row, name) for name in [*names, "minutes"]]
        cells += [(paper.get((detector, rule), {}), name) for name in papers]
        seeds = max((figure.seeds for figure in row.values()), default=0)
        fewer = f" ({seeds} of {len(args.seeds)} seeds)" if 0 < seeds < len(args.seeds) else ""
        table.append([f"`{flags}`" if flags else "no flag", NAMES[detector], rule + fewer]
                     + [claims.text(row, name) for row, name in cells])
    return table


def markdown(table):
    widths = [max(map(len, column)) for column in zip(*table)]
    padded = [" | ".join(map(str.ljust, line, widths)) for line in table]
    padded.insert(1, " | ".join("-" * width for width in widths))
    return "".join(f"| {line} |\n" for line in padded)


def split_page(file, key):
    """The text of a page before its table, the table, the text after it.  Raises UsageError."""
    text = Path(file).read_text()
    start, end = f"<!-- table {key} -->\n", f"<!-- end of table {key} -->"
    head, _, rest = text.partition(start)
    table, mark, tail = rest.partition(end)
    if not mark:
        raise UsageError(f"{file} does not hold the lines {start.strip()} and {end}")
    return head + start, table, mark + tail


def held(table):
    """The rows (their flags) and the seeds of a table in a page."""
    rows = re.findall(r"^\| (`-.*?`|no flag) ", table, re.MULTILINE)
    seeds = re.search(r"^\* Trained on \w+, seeds ([\d, ]*\d)", table, re.MULTILINE)
    return {*rows, *(f"seed {seed}" for seed in (seeds[1].split(", ") if seeds else ()))}


def gone(before, after):
    """What a table to replace another lacks of it, in words; "" if it lacks nothing."""
    return ", ".join(sorted(held(before) - held(after)))


def rewrite(file, key, text, empty):
    """Puts the table into its page, unless something that was measured would go; tells which.

    The page is read anew: training took hours.  empty: the rows that have no run
    """
    head, before, tail = split_page(file, key)
    lacks = gone(before, text)
    why = [f"no run of {'; '.join(empty)}"] * bool(empty)
    why += [f"nothing of {lacks}, which stands there"] * bool(lacks)
    if why:
        print(f"tables.py: {file} is left as it is: there is {' and '.join(why)}", file=sys.stderr)
    else:
        runs.write_whole(file, (head + text + tail).encode())
        print(f"rewrote table {key} in {file}")


def read_command(words):
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    add = parser.add_argument
    add("tables", nargs="+", choices=tuple(ROWS), metavar="TABLE", help="1, 2, 1 2, 3 or many")
    add("--data", help="scenes (default) or coco; table 3: crowd (default) or crowdhuman")
    add("--seeds", type=runs.at_least(0), nargs="+", default=[0], metavar="N", help="default: 0")
    add("--detectors", nargs="+", choices=tuple(NAMES), metavar="D", help="default: all")
    add("--jobs", type=runs.at_least(1), default=1, metavar="N",
        help="runs side by side (default: 1)")
    add("--collect", action="store_true", help="train nothing, take what is there")
    add("--readme", metavar="FILE",
        help="a page: what stands in it between <!-- table 1 --> and <!-- end of table 1 --> (or "
             "2, 1 2, 3, many) is rewritten")
    add("--out", default="runs/tables", metavar="DIR", help="default: runs/tables")
    args = parser.parse_args(words)
    args.tables = sorted(set(args.tables))
    choices, rows = DATA[args.tables[0]], sum((list(ROWS[n].values()) for n in args.tables), [])
    fits = [name for name in NAMES if any(name in detectors for detectors in rows)]
    args.data = args.data or choices[0]
    # a table of some detectors does not take the place of one of all
    args.name = "-".join(["table", *args.tables, args.data, *(args.detectors or ())])
    args.detectors = args.detectors or fits
    if len(args.tables) > 1 and args.tables != ["1", "2"]:
        raise UsageError(f"table {args.tables[-1]} stands alone: its rows or figures are others")
    if args.data not in choices or not set(args.detectors) <= set(fits):
        raise UsageError(f"table {args.tables[0]} has rows of {', '.join(fits)} on "
                         f"{' and '.join(choices)}, nothing else")
    if len(set(args.seeds)) < len(args.seeds):
        raise UsageError("--seeds must be different ones")
    return args


def run(args, extra):
    """Trains, collects, tells.  Returns the exit code."""
    key, planned = " ".join(args.tables), plan(args, extra)
    if args.readme:
        split_page(args.readme, key)         # what is wrong is told before anything is trained
    Path(args.out).mkdir(parents=True, exist_ok=True)
    failed = {} if args.collect else train_missing(planned, args.jobs)
    ours, missing, makers = collect(planned, failed)

    # beside the table: how it was made, what the paper says of it
    spread = ": means, ± half the range; verdicts are about means" if args.seeds[1:] else ""
    told = [f"Trained on {args.data}, seeds {', '.join(map(str, args.seeds))}{spread}.  Gain: "
            f"what the row's own NMS adds.  Minutes: of a run."
            + "".join(f"  {count} by {made_by}." for made_by, count in sorted(makers.items()))]
    if key == "3":
        boxes = boxes_recall(args, planned[0].flags)
        ours.update({(detector, BOXES): boxes for detector in args.detectors if boxes})
        left = f"{boxes['recall'].mean:.2f}%" if boxes else "not known how much"
        told.append(f"NMS at IoU 0.5 leaves of the annotation boxes {left}, in the paper "
                    f"{claims.BOXES_RECALL}%: `python evaluate.py annotations --data {args.data}`.")
    judged = claims.verdicts(args.tables, args.detectors, ours)
    told += [line for _, line in judged]
    told += [f"Missing: {', '.join(map(str, missing))}."] if missing else []

    table = lines(args, extra, ours, claims.paper_table(args.tables))
    text = markdown(table) + "".join(f"\n* {line}" for line in told) + "\n"
    name, before = str(Path(args.out) / args.name), ""
    with contextlib.suppress(FileNotFoundError):
        before = Path(f"{name}.md").read_text()
    if lacks := gone(before, text):
        print(f"{text}\nleft {name}.md and .csv as they are, with {lacks}; remove them for a "
              f"smaller table")
    else:
        Path(f"{name}.md").write_text(text)
        with open(f"{name}.csv", "w", newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerows(table)
        print(f"{text}\nwrote {name}.md and .csv")
    for folder, error in failed.items():
        print(f"tables.py: {folder}: {error}", file=sys.stderr)
    empty = [f"{NAMES[detector]}, {rule}" for (detector, rule), row in ours.items() if not row]
    if args.readme and not failed:
        rewrite(args.readme, key, text, empty)
    return 2 if failed else 0 if all(holds for holds, _ in judged) and not missing else 1


def main():
    words, extra = sys.argv[1:], []
    if "--" in words:
        words, extra = words[:words.index("--")], words[words.index("--") + 1:]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with runs.faults_told("tables.py", UsageError, RunError, annotations.DataError):
        try:
            sys.exit(run(read_command(words), extra))
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted; the same command goes on") from None


if __name__ == "__main__":
    main()
