"""What a run leaves, and how it goes on: folder, logs, random states, signals, processes."""
import argparse
import contextlib
import csv
import io
import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoints
import runs

ALONE = runs.Process(0, 1, "cpu")


def rows(file):
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


# ------------------------------------------------------------------------------------------------
# processes
# ------------------------------------------------------------------------------------------------

def test_without_torchrun_there_is_one_process(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert runs.join_processes("cpu") == (0, 1, "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runs.join_processes() == (0, 1, "cpu")


def test_a_single_gpu_is_named_by_its_index(monkeypatch):
    """torch.cuda.set_device wants one."""
    chosen = []
    monkeypatch.setattr(runs, "usable_device", lambda name: name or "cuda")
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert runs.join_processes().device == "cuda:0"
    assert runs.join_processes("cuda:3").device == "cuda:3"
    assert chosen == ["cuda:0", "cuda:3"]


def test_several_processes_do_not_share_one_gpu(monkeypatch):
    """Refused before they wait for each other."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(runs, "usable_device", lambda name: name)
    monkeypatch.setattr(torch.distributed, "init_process_group", None)
    with pytest.raises(runs.RunError, match="--device cuda:1: .*leave --device out"):
        runs.join_processes("cuda:1")


def test_each_process_takes_the_gpu_of_its_place_on_the_machine(monkeypatch):
    """The third of four on the second machine of two: rank 6, GPU 2."""
    for name, value in (("WORLD_SIZE", 8), ("RANK", 6), ("LOCAL_RANK", 2)):
        monkeypatch.setenv(name, str(value))
    called = []
    monkeypatch.setattr(runs, "usable_device", lambda name: name)
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url: iter([(None, 6, 8)]))
    monkeypatch.setattr(torch.distributed, "PrefixStore", lambda prefix, store: None)
    monkeypatch.setattr(torch.distributed, "init_process_group",
                        lambda backend, rank, world_size, store: called.append(backend))
    monkeypatch.setattr(torch.cuda, "set_device", called.append)
    assert runs.join_processes("cuda") == (6, 8, "cuda:2")
    assert called == ["nccl", "cuda:2"]


@pytest.mark.parametrize("name", ["nonsense", "cpu:x", "meta", "cuda:99"])
def test_a_device_that_computes_nothing_is_refused_by_name(name):
    """"meta" is PyTorch's device without numbers; no machine has a hundred GPUs."""
    with pytest.raises(runs.RunError, match=f"--device {name}: nothing computes there"):
        runs.usable_device(name)
    assert runs.usable_device("cpu") == "cpu"


def test_process_0_alone_speaks(capsys):
    runs.Process(1, 2, "cpu").say("I am the other one")
    assert capsys.readouterr().out == ""
    runs.Process(0, 2, "cpu").say("two", "words", end="")
    assert capsys.readouterr().out == "two words"


@pytest.mark.parametrize("rank, expected", [(0, ["block", "barrier"]), (1, ["barrier", "block"])])
def test_process_0_goes_first(monkeypatch, rank, expected):
    order = []
    monkeypatch.setattr(torch.distributed, "barrier", lambda: order.append("barrier"))
    with runs.main_first(runs.Process(rank, 2, "cpu")):
        order.append("block")
    assert order == expected


def test_one_process_waits_for_nobody(monkeypatch):
    monkeypatch.setattr(torch.distributed, "barrier", None)
    with runs.main_first(ALONE):
        pass
    assert runs.gather("mine", ALONE) == ["mine"]


@pytest.mark.parametrize("text, expected", [
    ("flags : fpu avx512f avx512_bf16", "bf16"),
    ("flags : fpu avx512f", "fp32"),
    (None, "fp32"),
])
def test_a_cpu_computes_in_bfloat16_only_where_it_says_so(monkeypatch, text, expected):
    """/proc/cpuinfo with and without the instruction, and a machine that has no such file."""
    monkeypatch.setattr(Path, "exists", lambda file: text is not None)
    monkeypatch.setattr(Path, "read_text", lambda file: text)
    assert runs.native_precision("cpu") == expected


@pytest.mark.parametrize("native, expected", [(True, "bf16"), (False, "fp32")])
def test_a_gpu_computes_in_bfloat16_where_it_need_not_emulate_it(monkeypatch, native, expected):
    def supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert runs.native_precision("cuda:0") == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_the_old_handlers_come_back(number):
    def old(number, frame):
        old.called = True

    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        signal.signal(number, old)
        with contextlib.suppress(ZeroDivisionError), runs.signals_noted() as noted:
            assert noted == []
            os.kill(os.getpid(), number)
            assert noted == [number] and not hasattr(old, "called")
            1 / 0                            # also when the block fails
        assert signal.getsignal(number) is old
        os.kill(os.getpid(), number)
        assert old.called
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


# ------------------------------------------------------------------------------------------------
# the folder
# ------------------------------------------------------------------------------------------------

def test_the_first_free_name_counts_from_2(tmp_path):
    assert runs.free_name(tmp_path / "run") == str(tmp_path / "run")
    for name in ("run", "run-2", "run-4"):
        (tmp_path / name).mkdir()
    assert runs.free_name(tmp_path / "run") == str(tmp_path / "run-3")


def test_a_folder_with_a_run_is_refused_and_another_one_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "mine"
    assert runs.claim_folder(str(out), "name", ALONE) == str(out)
    out.mkdir()
    (out / "notes.txt").write_text("no run")
    assert runs.claim_folder(str(out), "name", ALONE) == str(out)
    (out / "last.pt").write_bytes(b"")
    with pytest.raises(runs.RunError, match="--out .*mine holds a run already; add --resume"):
        runs.claim_folder(str(out), "name", ALONE)
    (out / "last.pt").rename(out / "metrics.json")       # its checkpoint was deleted, to save disk
    with pytest.raises(runs.RunError, match="holds what a run has measured"):
        runs.claim_folder(str(out), "name", ALONE)


def test_without_out_a_run_gets_a_free_folder_in_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert runs.claim_folder(None, "name", ALONE) == str(Path("runs") / "name")
    # it is made at once, so that a run that starts at the same time takes another
    assert runs.claim_folder(None, "name", ALONE) == str(Path("runs") / "name-2")


def test_of_two_runs_that_want_one_name_at_the_same_time_one_takes_the_next(
        tmp_path, monkeypatch):
    """Both saw the first name free."""
    (tmp_path / "theirs").mkdir()
    free = iter([tmp_path / "theirs", tmp_path / "ours"])
    monkeypatch.setattr(runs, "free_name", lambda wanted: str(next(free)))
    assert runs.claim_folder(None, "name", ALONE) == str(tmp_path / "ours")
    assert (tmp_path / "ours").is_dir()


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path):
    with runs.held(tmp_path / "run", ALONE):
        (tmp_path / "run" / "args.json").touch()
        with pytest.raises(runs.RunError, match="another run is at work"):
            with runs.held(tmp_path / "run", ALONE, patience=0.3):
                pass
        with runs.held(tmp_path / "run", runs.Process(1, 2, "cpu")):     # of the same run
            pass
    with runs.held(tmp_path / "run", ALONE), runs.held(tmp_path / "empty", ALONE):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_a_run_that_ends_in_time_is_waited_for(tmp_path, monkeypatch):
    """One that was killed a moment ago, whose workers still hold its folder."""
    with contextlib.ExitStack() as first:
        first.enter_context(runs.held(tmp_path / "run", ALONE))
        (tmp_path / "run" / "args.json").touch()
        monkeypatch.setattr(runs.time, "sleep", lambda seconds: first.close())
        with runs.held(tmp_path / "run", ALONE), pytest.raises(runs.RunError):
            with runs.held(tmp_path / "run", ALONE, patience=-1):
                pass


def test_a_number_below_the_least_is_refused(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=runs.at_least(1))
    assert parser.parse_args(["--n", "12"]).n == 12
    for wrong in ("0", "-1", "1.5", "many"):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args([f"--n={wrong}"])
        assert stop.value.code == 2 and wrong in capsys.readouterr().err


def test_all_processes_get_the_folder_that_process_0_chose(tmp_path, monkeypatch):
    def from_process_0(objects):
        objects[0] = str(tmp_path / "theirs")

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", from_process_0)
    process = runs.Process(1, 2, "cpu")
    assert runs.claim_folder(None, "name", process) == str(tmp_path / "theirs")


def test_two_writers_of_one_file_do_not_meet_halfway(tmp_path, monkeypatch):
    """The one that ends first puts its own in place, whole, and not a part of the other's."""
    with runs.whole(tmp_path / "a") as ours:
        ours.write_text("ours, wh")
        monkeypatch.setattr(runs.os, "getpid", lambda: 1)            # another process
        runs.write_whole(tmp_path / "a", b"theirs")
        assert (tmp_path / "a").read_text() == "theirs" and ours.read_text() == "ours, wh"
        ours.write_text("ours, whole")
    assert (tmp_path / "a").read_text() == "ours, whole"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    runs.write_json(tmp_path / "a.json", {"AP": 1})
    with pytest.raises(TypeError):
        runs.write_json(tmp_path / "a.json", {"AP": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"AP": 1}
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]


def test_a_link_is_followed_and_what_is_no_plain_file_is_refused(tmp_path):
    """`temporary.replace` alone would put a file where the link, or /dev/null, was."""
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    runs.write_json(tmp_path / "link.json", 1)
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real.json").read_text() == "1"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OSError, match=f"not a plain file.*{name}"):
            runs.write_json(tmp_path / name, 1)
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "folder").is_dir()


@pytest.fixture
def small_files():
    """No file of this process may grow beyond 64 KiB, as on a full disk or with a quota."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, small_files):
    file = tmp_path / "last.pt"
    checkpoints.save_whole({"step": 1}, file)
    with pytest.raises(OSError) as error:
        checkpoints.save_whole({"step": 2, "model": torch.zeros(2 ** 16)}, file)
    assert torch.load(file, weights_only=True) == {"step": 1}
    assert [f.name for f in tmp_path.iterdir()] == ["last.pt"]
    said = runs.machine_fault(error.value)
    assert said.startswith(f"{file}: no space left") and "saved before" in said


def test_a_row_is_appended_under_one_header(tmp_path):
    """Floats with six digits, whole numbers and words as they are."""
    file = tmp_path / "log.csv"
    log = runs.Log(file, 0)
    assert not file.exists()
    log.row({"step": 1, "loss": 1 / 3, "lr": 1e-7, "images": 1234567, "note": "a, b"})
    first = 'step,loss,lr,images,note\n1,0.333333,1e-07,1234567,"a, b"\n'
    assert file.read_text() == first
    log.row({"step": 2, "loss": 1234567.0, "lr": 0.5, "images": 0, "note": ""})
    assert file.read_text() == first + "2,1.23457e+06,0.5,0,\n"


@pytest.mark.parametrize("step, kept", [
    (0, []),
    (19, []),
    (20, ["20"]),
    (45, ["20", "40"]),
    (60, ["20", "40", "60"]),
])
def test_rows_after_the_step_are_cut_off_on_resume(tmp_path, step, kept):
    file = tmp_path / "log.csv"
    log = runs.Log(file, 0)
    for done in (20, 40, 60):
        log.row({"step": done, "loss": done / 10})

    log = runs.Log(file, step)
    assert [row["step"] for row in rows(file)] == kept
    log.row({"step": step + 20, "loss": 0.5})
    assert [row["step"] for row in rows(file)] == [*kept, str(step + 20)]
    assert file.read_text().count("step,loss") == 1


def test_a_new_run_takes_no_header_of_an_old_one(tmp_path):
    """eval.csv of a run on crowds; first_step - 1 is -1 in a new run."""
    (tmp_path / "eval.csv").write_text("step,AP50,mMR\n10,80,20\n")
    runs.Log(tmp_path / "eval.csv", -1).row({"step": 5, "AP": 50.0})
    assert (tmp_path / "eval.csv").read_text() == "step,AP\n5,50\n"


@pytest.mark.parametrize("end", ["60,6", "60,6.0", "60\n", "6x,1\n", "\0\0\0\n", ""])
def test_what_a_kill_left_of_a_row_is_cut_off(tmp_path, end):
    """Without its line end a number may lack digits: such a row is none."""
    file = tmp_path / "log.csv"
    file.write_text("step,loss\n20,2.0\n40,4.0\n" + end)
    runs.Log(file, 100)
    assert file.read_text() == "step,loss\n20,2.0\n40,4.0\n"


# ------------------------------------------------------------------------------------------------
# going on exactly
# ------------------------------------------------------------------------------------------------

def draw():
    return (random.random(), random.gauss(0, 1), torch.rand(3).tolist(), torch.randn(3).tolist(),
            np.random.random(), np.random.normal())


def test_random_states_give_the_same_numbers_after_a_checkpoint():
    """Through a file that is read without running code; with half a pair of normals drawn."""
    draw()
    file = io.BytesIO()
    torch.save(runs.random_states("cpu"), file)
    expected = draw()
    assert draw() != expected
    file.seek(0)
    runs.set_random_states(torch.load(file, weights_only=True), "cpu")
    assert draw() == expected


def test_each_process_gets_its_own_share_again_and_more_processes_those_of_the_first():
    shares = [runs.own_share("ab", runs.Process(rank, 3, "cpu")) for rank in range(3)]
    assert shares == ["a", "b", "a"]
    assert runs.own_share("ab", ALONE) == "a"


def progress(log, first_step=0, steps=100, every=10):
    return runs.Progress(log, first_step, steps, images=4, every=every, process=ALONE)


VALUES = {"class": 1.25, "l1": 0.5, "giou": 0.25, "gradient_norm": 7.0}


def test_a_row_of_the_log_holds_the_sum_of_the_terms_and_a_speed(tmp_path):
    with progress(runs.Log(tmp_path / "log.csv", 0)) as bar:
        time.sleep(0.01)
        bar.row(10, VALUES, lr=0.001)
    (row,) = rows(tmp_path / "log.csv")
    assert list(row) == ["step", "loss", *VALUES, "lr", "images_per_second", "seconds_waiting",
                         "gigabytes"]
    assert row["step"] == "10" and float(row["loss"]) == 2.0 and float(row["lr"]) == 0.001
    assert float(row["gradient_norm"]) == 7.0
    assert 0 < float(row["images_per_second"]) <= 10 * 4 / 0.01


def test_the_memory_of_a_row_is_the_most_that_was_held_and_stays(tmp_path):
    with progress(runs.Log(tmp_path / "log.csv", 0)) as bar:
        bar.row(10, VALUES, lr=0.001)
        before = float(rows(tmp_path / "log.csv")[0]["gigabytes"])
        held = torch.ones(int(1e9 * (before + 0.2)), dtype=torch.uint8)
        del held
        bar.row(20, VALUES, lr=0.001)
    after = float(rows(tmp_path / "log.csv")[1]["gigabytes"])
    assert 0.05 < before and before + 0.2 < after < 2 * before + 0.4


class Clock:
    """Stands in for the clock of runs.py: a second passes when the test says so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(runs.time, "perf_counter", lambda: self.now)


def test_images_a_second_count_the_steps_since_the_last_row(tmp_path, monkeypatch):
    """Also after a resume between two rows, and without the time of an evaluation between two."""
    clock = Clock(monkeypatch)
    with progress(runs.Log(tmp_path / "log.csv", 0), first_step=6) as bar:
        clock.now = 2.0
        bar.row(10, VALUES, 0.1)                             # 4 steps of 4 images in 2 seconds
        clock.now = 5.0
        with bar.pause():
            clock.now = 100.0
        clock.now = 102.0
        bar.row(20, VALUES, 0.1)                             # 10 steps in 3 + 2 seconds
        clock.now = 103.0
        bar.row(23, VALUES, 0.1)                             # the end: 3 steps in a second
    found = [float(row["images_per_second"]) for row in rows(tmp_path / "log.csv")]
    assert found == [8, 8, 12]


def test_the_time_that_batches_take_is_waited_and_told_once(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)

    def batches():
        for n in range(5):
            clock.now += 0.5
            yield n

    stream = batches()
    with progress(runs.Log(tmp_path / "log.csv", 0)) as bar:
        assert bar.fetch(stream, 3) == [0, 1, 2]
        clock.now += 2
        assert bar.fetch(stream, 1) == [3]
        bar.row(10, VALUES, 0.1)
        clock.now += 1
        bar.row(20, VALUES, 0.1)
    assert [float(row["seconds_waiting"]) for row in rows(tmp_path / "log.csv")] == [2, 0]


def test_without_a_terminal_a_line_comes_every_tenth_row(tmp_path, capsys, monkeypatch):
    clock = Clock(monkeypatch)
    with progress(runs.Log(tmp_path / "log.csv", 0), steps=300) as bar:
        bar.bar.disable = True
        for done in range(10, 201, 10):
            clock.now += 6
            bar.row(done, VALUES, 0.1)
    said = capsys.readouterr().out.splitlines()
    assert said == ["step 100/300  loss 2.000  7 images/s  2.0 min left",
                    "step 200/300  loss 2.000  7 images/s  1.0 min left"]


def test_other_processes_write_no_rows(capsys):
    other = runs.Process(1, 2, "cpu")
    with runs.Progress(None, 0, 100, 4, 1, other) as bar:
        time.sleep(0.001)
        bar.row(10, VALUES, 0.1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error, words", [
    (MemoryError(), "out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "--accumulate"),
    (OSError(28, "No space left on device", "runs/a.csv"), "runs/a.csv: no space left"),
    (OSError(30, "Read-only file system", "runs/a.csv"), "runs/a.csv: Read-only file system"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "--workers"),
    (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None)])
def test_what_the_machine_lacks_is_told_and_a_fault_of_the_program_is_not(error, words):
    said = runs.machine_fault(error)
    assert words in said if words else said == ""


def test_the_cpu_allocators_own_words_are_known():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2 ** 50)
    assert "out of memory" in runs.machine_fault(error.value)


def test_batch_norms_own_words_are_known():
    with pytest.raises(ValueError) as error:
        torch.nn.BatchNorm2d(3).train()(torch.ones(1, 3, 1, 1))
    assert "--train-sizes" in runs.machine_fault(error.value)


@contextlib.contextmanager
def fails_with_2():
    with pytest.raises(SystemExit) as stop:
        yield
    assert stop.value.code == 2


def test_torchruns_summary_gets_the_sentence(tmp_path, monkeypatch, capsys):
    """The format is PyTorch's: its own reader of such files must find the words."""
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with fails_with_2(), runs.faults_told("train.py", runs.RunError):
        raise runs.RunError("no such thing")
    assert capsys.readouterr().err == "train.py: no such thing\n"
    failure = ProcessFailure(0, 7, 2, str(tmp_path / "error.json"))
    # before those of the processes that end because of this one
    assert failure.message == "no such thing" and failure.timestamp <= time.time() - 1


def test_text_that_a_terminal_cannot_print_is_escaped(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stderr", terminal)
    with fails_with_2(), runs.faults_told("check.py", runs.RunError):
        raise runs.RunError("a na\u00efve \ud800 name")
    terminal.flush()
    assert terminal.buffer.getvalue() == b"check.py: a na\\xefve \\ud800 name\n"
