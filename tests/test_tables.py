"""Tables: means, spreads and verdicts that a person can count, and rows that really train."""
import argparse
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import claims
import evaluate
import recipes
import runs
import scenes
import tables
import train
from claims import CLS, DUAL, E2E, LOC, O2M, QLOC

ROOT = Path(__file__).resolve().parent.parent


def made_up(out, detector, rule, seed, found, minutes=(), data="scenes", **changed):
    """A finished run that nobody trained.  found: {name: (without NMS, with it)}"""
    words = f"--data {data} --detector {detector} {claims.FLAGS[rule]} --seed {seed}".split()
    flags, _ = recipes.effective_flags(vars(recipes.make_parser().parse_args(words)))
    folder = out / f"{recipes.run_name(flags)}-seed{seed}"
    folder.mkdir(parents=True)
    flags = {**flags, "precision": "fp32", "out": str(folder), "versions": {}, **changed}
    plain, nms = ({name: pair[n] for name, pair in found.items()} for n in (0, 1))
    (folder / "args.json").write_text(json.dumps(flags))
    (folder / "metrics.json").write_text(json.dumps({**plain, "nms": nms}))
    (folder / "eval.csv").write_text(f"step,AP50\n{flags['steps']},{plain['AP50']:.6g}\n")
    for part in minutes:
        with open(folder / "minutes.txt", "a") as stream:
            stream.write(f"{part} OMP_NUM_THREADS=1\n")
    return folder


def fcos(out, seeds=(0, 1, 2), **rows):
    """The four rows of FCOS over three seeds, those of the arguments instead of these."""
    pairs = {"many": (20, 60, 30, 90), "loc": (50, 53, 70, 80), "cls": (51, 51.5, 75, 79),
             "e2e": (55, 55, 85, 89), **rows}
    for name, rule in (("many", O2M), ("loc", LOC), ("cls", CLS), ("e2e", E2E)):
        if pairs[name]:
            ap, ap_nms, ap50, ap50_nms = pairs[name]
            # the seeds lie at -0.2, 0 and +0.2 of it: a spread of 0.2
            for seed in seeds:
                d = 0.2 * (seed - 1)
                made_up(out, "fcos", rule, seed, {"AP": (ap + d, ap_nms + d),
                                                  "AP50": (ap50, ap50_nms)}, minutes=(1.5, 0.5))


@pytest.fixture
def collected(command, tmp_path):
    """collected(tables, ...) gives exit code, verdict lines by the statement's name, CSV rows."""
    def run(*arguments, numbers=("2",), seeds=(0, 1, 2)):
        code, said, error = command(tables, *numbers, "--collect", "--out", tmp_path,
                                    "--seeds", *seeds, *arguments)
        verdicts = [line[2:] for line in said.splitlines() if line.startswith("* ")]
        file = next(tmp_path.glob(f"table-{'-'.join(numbers)}-*.csv"))
        with open(file, newline="") as stream:
            return code, verdicts, list(csv.DictReader(stream)), error
    return run


def said_of(name, verdicts):
    return [line for line in verdicts if re.match(rf"{re.escape(name)}\b", line)]


def test_means_spreads_and_minutes_over_three_seeds(collected, tmp_path):
    fcos(tmp_path)
    code, verdicts, rows, _ = collected("--detectors", "fcos")
    row = rows[-1]
    assert row["positive samples"] == E2E and row["`python train.py` with"] == "no flag"
    assert (row["AP"], row["AP+NMS"]) == ("55.0 ± 0.2", "55.0 ± 0.2")
    assert row["AP gain"] == "+0.0 ± 0.0"
    assert (row["AP50 gain"], row["minutes"]) == ("+4.0 ± 0.0", "2.0 ± 0.0")
    assert (row["paper's AP"], row["paper's AP gain"]) == ("38.9", "+0.0")
    assert "scenes, seeds 0, 1, 2" in verdicts[0] and "OMP_NUM_THREADS=1" in verdicts[0]
    assert code == 0 and all(" holds: " in line for line in verdicts[1:])
    assert [line.split()[0] for line in verdicts[1:]] == ["Conclusion", "S2", "S3", "S3", "S4"]


def test_one_seed_has_no_spread(collected, tmp_path):
    fcos(tmp_path, seeds=[1])
    _, _, rows, _ = collected("--detectors", "fcos", seeds=[1])
    assert rows[0]["AP"] == "50.0" and rows[0]["AP gain"] == "+3.0"


@pytest.mark.parametrize("change, table, name, word", [
    ({"many": (50.4, 60, 30, 90)}, "1", "S1", "DOES NOT HOLD"),
    ({"many": (50, 60, 30, 90)}, "1", "S1", "holds"),
    ({"loc": (50, 51.9, 70, 80)}, "1", "Conclusion 3.1", "DOES NOT HOLD"),
    ({"loc": (10, 53, 70, 80)}, "1", "Conclusion 3.1", "DOES NOT HOLD"),     # more than one-to-many
    ({"cls": (51, 52.1, 75, 79)}, "2", "Conclusion 3.2", "DOES NOT HOLD"),
    ({"cls": (51, 49.8, 75, 79)}, "2", "Conclusion 3.2", "DOES NOT HOLD"),
    ({"loc": (50, 53, 70, 75.9)}, "2", "S2", "DOES NOT HOLD"),
    ({"e2e": (55, 54.4, 85, 89)}, "2", "S3 in AP", "DOES NOT HOLD"),
    ({"e2e": (55, 55.5, 85, 89)}, "2", "S3 in AP", "holds"),
    ({"e2e": (55, 55, 85, 91.1)}, "2", "S3 in AP50", "DOES NOT HOLD"),       # 6.1 of 10
    ({"e2e": (51.1, 51.1, 85, 89)}, "2", "S4", "DOES NOT HOLD"),             # by 0.1, spread 0.2
    ({"e2e": (51.3, 51.3, 85, 89)}, "2", "S4", "holds"),
    ({"cls": None}, "2", "S4", "OPEN"),
])
def test_a_statement_holds_up_to_its_threshold(collected, tmp_path, change, table, name, word):
    fcos(tmp_path, **change)
    code, verdicts, _, _ = collected("--detectors", "fcos", numbers=[table])
    lines = said_of(name, verdicts)
    if word == "holds":
        assert lines and all(line.startswith(f"{name} holds: ") for line in lines)
    else:
        assert code == 1 and any(line.startswith(f"{name} {word}") for line in lines)
        assert any("FCOS" in line for line in lines)


def test_centernet_may_change_by_0_7_in_s3(collected, tmp_path):
    for rule, pair in ((LOC, (30, 40)), (CLS, (40, 40)), (E2E, (50, 50.6))):
        made_up(tmp_path, "centernet", rule, 0, {"AP": pair, "AP50": pair})
    code, verdicts, _, _ = collected("--detectors", "centernet", seeds=[0])
    held = [said_of(f"{name} holds", verdicts) for name in ("S3 in AP", "S3 in AP50")]
    assert code == 0 and list(map(len, held)) == [1, 1]


@pytest.mark.parametrize("own, location, code", [(40.7, 48, 0), (40.8, 48, 1), (40, 47.9, 1)])
def test_query_detectors_need_the_classification_cost(collected, tmp_path, own, location, code):
    made_up(tmp_path, "detr", E2E, 0, {"AP": (40, own), "AP50": (60, 60)})
    made_up(tmp_path, "detr", QLOC, 0, {"AP": (40, location), "AP50": (60, 60)})
    assert collected("--detectors", "detr", seeds=[0])[0] == code


def test_a_missing_row_is_an_empty_cell_and_named(collected, tmp_path):
    fcos(tmp_path, many=None)
    code, verdicts, rows, _ = collected("--detectors", "fcos", numbers=["1", "2"])
    assert code == 1 and [row["AP"] != "" for row in rows] == [False, True, True, True]
    assert "scenes-fcos-one-to-many-seed2" in said_of("Missing", verdicts)[0]
    assert said_of("S1 OPEN", verdicts) and said_of("S4 holds", verdicts)


def test_a_row_of_fewer_seeds_says_so(collected, tmp_path):
    fcos(tmp_path)
    shutil.rmtree(tmp_path / "scenes-fcos-one-to-many-seed2")
    _, _, rows, _ = collected("--detectors", "fcos", numbers=["1"])
    told = [row["positive samples"].endswith(" (2 of 3 seeds)") for row in rows]
    assert told == [True, False, False]


def test_an_evaluation_on_the_way_is_no_finished_run(collected, tmp_path):
    """It leaves metrics.json too; and one killed before the last metrics.json leaves a row."""
    folder = made_up(tmp_path, "fcos", E2E, 0, {"AP": (40, 40), "AP50": (60, 60)})
    row = (folder / "eval.csv").read_text()
    steps = json.loads((folder / "args.json").read_text())["steps"]
    assert f"\n{steps}," in row
    for other in (row.replace(f"\n{steps}", "\n900"), row + f"{steps},61\n"):
        (folder / "eval.csv").write_text(other)
        assert runs.finished(folder) is None
    (folder / "eval.csv").write_text("step,AP50\n900,20\n" + row.splitlines()[1] + "\n")
    assert runs.finished(folder) is not None


def crowd_rows(out, recall_many=94):
    many = {"AP50": (60, 90), "mMR": (90, 20), "recall": (99, recall_many), "JI": (30, 80)}
    own = {"AP50": (95, 91), "mMR": (10, 15), "recall": (99, 96), "JI": (90, 85)}
    for detector in ("retinanet", "fcos"):
        made_up(out, detector, O2M, 0, many, data="crowd")
        made_up(out, detector, E2E, 0, own, data="crowd")
    (out / "crowd-annotation-boxes.txt").write_text("94.87\n")


def test_table_3_judges_section_5(collected, tmp_path):
    crowd_rows(tmp_path)
    code, verdicts, rows, _ = collected(numbers=["3"], seeds=[0])
    assert code == 0 and len(said_of("Section 5.2 holds", verdicts)) == 4
    assert any("94.87%" in line for line in verdicts)
    last = rows[-1]
    assert (last["detector"], last["mMR"], last["mMR+NMS"]) == ("RetinaNet", "10.0", "15.0")
    assert (last["paper's recall"], last["paper's recall+NMS"]) == ("98.1", "93.2")
    assert last["`python train.py` with"] == "`--data crowd --detector retinanet`"


def test_one_to_many_beyond_the_ceiling_is_told(collected, tmp_path):
    crowd_rows(tmp_path, recall_many=98)
    code, verdicts, _, _ = collected(numbers=["3"], seeds=[0])
    assert code == 1 and len(said_of("Section 5.2 DOES NOT HOLD", verdicts)) == 1


@pytest.mark.parametrize("own, held", [
    ((68, 68.4, 90, 92), 3), ((66.9, 66.9, 90, 92), 2), ((68, 68, 90, 92.1), 2),
    ((68, 67.4, 90, 90), 2), ((54, 54, 90, 90), 1)])
def test_dual_assignment_is_judged_without_figures_of_the_paper(collected, tmp_path, own, held):
    """It leads end-to-end; NMS adds at most 0.5 AP and 2 AP50; at most 3 behind one-to-many."""
    for rule, row in ((O2M, (20, 70, 30, 95)), (E2E, (55, 55, 85, 89)), (DUAL, own)):
        made_up(tmp_path, "centernet", rule, 0, {"AP": row[:2], "AP50": row[2:]})
    code, verdicts, rows, _ = collected("--detectors", "centernet", numbers=["many"], seeds=[0])
    holding = [line for line in verdicts if re.match("D[123] holds", line)]
    assert len(holding) == held and code == (held < 3)
    assert not any("paper" in text for text in [*rows[0], *verdicts])
    assert rows[-1]["`python train.py` with"] == "`--detector centernet --many 6`"


def test_the_annotation_boxes_are_put_through_nms_and_remembered(tmp_path, command):
    """As `evaluate.py annotations` does; --collect reads what stands there."""
    scenes.write_crowd(tmp_path / "crowd", counts={"train": 2, "val": 6})
    flags = {"data": "crowd", "data_dir": str(tmp_path / "crowd"), "drop_bad_boxes": False}
    args = argparse.Namespace(out=tmp_path, data="crowd", collect=False)
    recall = tables.boxes_recall(args, flags)["recall"].mean
    _, said, _ = command(evaluate, "annotations", "--data", "crowd",
                         "--data-dir", flags["data_dir"])
    assert f"IoU 0.50 keeps {recall:6.2f}%" in said and 80 < recall < 100
    args.collect = True
    assert tables.boxes_recall(args, {})["recall"].mean == recall


# ------------------------------------------------------------------------------------------------
# pages
# ------------------------------------------------------------------------------------------------

def test_only_what_stands_between_the_marks_is_rewritten(collected, tmp_path):
    fcos(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("# Before\n<!-- table 1 -->\none\n<!-- end of table 1 -->\n"
                    "<!-- table 2 -->\nold\n<!-- end of table 2 -->\nafter\n")
    for _ in range(2):                                               # again, the same
        collected("--detectors", "fcos", "--readme", page)
        text = page.read_text()
        table = (tmp_path / "table-2-scenes-fcos.md").read_text()
        assert text == ("# Before\n<!-- table 1 -->\none\n<!-- end of table 1 -->\n"
                        f"<!-- table 2 -->\n{table}<!-- end of table 2 -->\nafter\n")


def test_a_page_is_not_emptied_of_a_row_that_has_no_run(tmp_path, command):
    page = tmp_path / "page.md"
    page.write_text("<!-- table 1 -->\nmeasured\n<!-- end of table 1 -->\n")
    before = page.read_text()
    made_up(tmp_path, "fcos", O2M, 0, {"AP": (20, 70), "AP50": (30, 95)})
    code, said, error = command(tables, "1", "--detectors", "fcos", "--collect", "--out", tmp_path,
                                "--readme", page)
    assert code == 1 and page.read_text() == before and "rewrote" not in said
    assert f"{page} is left as it is" in error and f"FCOS, {E2E}" in error and O2M not in error


# ------------------------------------------------------------------------------------------------
# rows that train
# ------------------------------------------------------------------------------------------------

TINY = ("--width 16 --depth 1 --steps 8 --batch-size 4 --train-sizes 64 --train-longest 64 "
        "--test-size 64 --test-longest 64 --log-every 1 --checkpoint-every 4 --device cpu "
        "--precision fp32").split()


def table_1(scenes, out, *extra):
    """The words of tables.py for FCOS, on 24 pictures."""
    return ["1", "--detectors", "fcos", "--jobs", "2", "--out", str(out), "--",
            "--data-dir", str(scenes), *TINY, *extra]


def test_rows_train_and_one_that_was_killed_goes_on_and_is_not_trained_twice(
        tiny_scenes, tmp_path, command, monkeypatch):
    """Killed in step 6, two steps after its checkpoint; a sitting of 30 minutes is known."""
    folder = tmp_path / "scenes-fcos-one-to-many-seed0"
    real, calls = train.match, []

    def die_in_step_6(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyError("killed")
        return real(*args)

    monkeypatch.setattr(train, "match", die_in_step_6)
    with pytest.raises(KeyError):
        train.main(["--data-dir", str(tiny_scenes), *TINY, "--assign", "one-to-many", "--seed",
                    "0", "--data", "scenes", "--detector", "fcos", "--out", str(folder)])
    (folder / "minutes.txt").write_text("30.0 OMP_NUM_THREADS=2\n")
    code, said, error = command(tables, *table_1(tiny_scenes, tmp_path))
    assert code in (0, 1) and not error, error
    assert "3 runs, 3 of them to train, 2 at a time" in said and "0 to go" in said

    steps = [line.split(",")[0] for line in (folder / "log.csv").read_text().splitlines()]
    assert steps == ["step", *map(str, range(1, 9))]
    sittings = runs.sittings(folder)
    assert len(sittings) == 2 and sittings[1][0] < 30
    assert "without NMS" in (folder / "output.txt").read_text() or (
        "AP(+NMS)" in (folder / "output.txt").read_text())

    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/metrics.json")}
    assert len(before) == 3
    code, said, _ = command(tables, *table_1(tiny_scenes, tmp_path))
    assert "0 of them to train" in said
    assert before == {file: file.stat().st_mtime_ns for file in before}

    # the same folders for another schedule: refused row by row, and nothing is overwritten
    code, _, error = command(tables, *table_1(tiny_scenes, tmp_path, "--steps", "9"))
    assert code == 2 and error.count("--steps (was 8, now 9)") == 3
    assert before == {file: file.stat().st_mtime_ns for file in before}


def test_a_row_that_fails_is_named_and_the_others_go_on(tiny_scenes, tmp_path, command):
    page = tmp_path / "page.md"
    page.write_text("<!-- table 1 -->\nold\n<!-- end of table 1 -->")
    (tmp_path / "scenes-fcos-one-to-many-seed0").mkdir()
    (tmp_path / "scenes-fcos-one-to-many-seed0" / "last.pt").write_text("no checkpoint")
    code, _, error = command(tables, "--readme", page, *table_1(tiny_scenes, tmp_path))
    lines = error.strip().splitlines()
    assert code == 2 and len(lines) == 1
    assert "scenes-fcos-one-to-many-seed0: train.py: " in lines[0] and "last.pt" in lines[0]
    assert len(list(tmp_path.glob("*/metrics.json"))) == 2
    assert page.read_text().splitlines()[1] == "old"


def test_a_request_to_end_lets_the_rows_save_their_step(tiny_scenes, tmp_path):
    words = table_1(tiny_scenes, tmp_path, "--steps", "100000", "--checkpoint-every", "5")
    process = subprocess.Popen([sys.executable, str(ROOT / "tables.py"), *words],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    checkpoints = ()
    for _ in range(3000):                    # a busy machine takes minutes
        time.sleep(0.1)
        checkpoints = list(tmp_path.glob("*/last.pt"))
        if len(checkpoints) == 2:
            break
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error.strip().endswith("the same command goes on")
    assert len(checkpoints) == 2
    for file in checkpoints:
        assert "is saved: go on with" in (file.parent / "output.txt").read_text()
        assert len(runs.sittings(file.parent)) == 1


@pytest.mark.parametrize("words, hint", [
    (["1", "3"], "stands alone"),
    (["1", "many"], "stands alone"),
    (["3", "--detectors", "centernet"], "fcos, retinanet on crowd"),
    (["1", "--data", "crowd"], "scenes and coco"),
    (["1", "--seeds", "0", "0"], "--seeds"),
    (["1", "--jobs", "0"], "--jobs"),
    (["1", "--readme", "nowhere.md"], "nowhere.md"),
    (["1", "--readme", str(ROOT / "LICENSE")], "<!-- table 1 -->"),
    (["1", "--", "--seed", "3"], "--seed"),
    (["1", "--", "--assign=min-cost"], "--assign"),
    (["1", "--", "--steps", "0"], "--steps 0"),
    (["1", "--detectors", "retinanet", "--", "--box-prior", "3"], "retinanet"),
    (["1", "--", "--epochs", "3"], "--steps"),
    (["4"], "4"),
])
def test_bad_input_is_one_sentence(command, tmp_path, words, hint):
    at = words.index("--") if "--" in words else len(words)
    code, _, error = command(tables, *words[:at], "--out", tmp_path / "out", *words[at:])
    assert code == 2 and hint in error.strip().splitlines()[-1] and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_run_whose_files_are_damaged_is_named(collected, tmp_path):
    folder = made_up(tmp_path, "fcos", E2E, 0, {"AP": (40, 40), "AP50": (60, 60)})
    (folder / "metrics.json").write_text('{"AP": 4')
    code, _, _, error = collected("--detectors", "fcos", seeds=[0])
    assert code == 2 and str(folder) in error and "cannot be read" in error


def test_without_other_wishes_the_runs_share_the_cores(tmp_path, monkeypatch):
    """Two at a time on five cores: two threads each.  OMP_NUM_THREADS of one's own is kept."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(5), raising=False)
    say = [sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'])"]
    for own, expected in ((None, "2"), ("1", "1")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if own:
            monkeypatch.setenv("OMP_NUM_THREADS", own)
        assert runs.side_by_side({tmp_path / "a": (say, 1), tmp_path / "b": (say, 1)}, 2) == {}
        assert (tmp_path / "b" / "output.txt").read_text().split() == [expected]
