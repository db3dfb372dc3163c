"""What a run leaves and how it goes on: folder, logs, random states, signals, processes.

Nothing here knows what is trained.
"""
import argparse
import contextlib
import csv
import errno
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

try:
    import fcntl
except ImportError:             # Windows has none
    fcntl = None


class RunError(ValueError):
    """A run cannot be started as asked: one sentence that says why."""


class TrainingStopped(RuntimeError):
    """NaN or Inf in the losses, or a strategy that fails: says at which step, for which images."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or a request to end; the checkpoint is written."""


# ------------------------------------------------------------------------------------------------
# processes
# ------------------------------------------------------------------------------------------------

class Process(NamedTuple):
    """This training process: its number, how many there are, and where it computes."""
    rank: int
    world: int
    device: str

    @property
    def is_main(self):
        return self.rank == 0

    def say(self, *words, **options):
        """Prints in process 0 only."""
        if self.is_main:
            print(*words, **options)


def join_processes(device=None):
    """The Process that torchrun's environment, if there is one, and --device describe.

    Raises RunError.
    """
    names = ("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)
    world, rank, local = (int(os.environ.get(name, default)) for name, default in names)
    device = usable_device(device)
    if world > 1:
        if device.startswith("cuda:"):
            raise RunError(f"--device {device}: with several processes each takes a GPU of its "
                           f"own; leave --device out")
        # a restart by torchrun with --master-port would find the addresses of processes that are
        # gone (torch 2.14), but for a prefix of its own
        store, _, _ = next(dist.rendezvous("env://"))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group("nccl" if "cuda" in device else "gloo", rank=rank,
                                world_size=world, store=dist.PrefixStore(attempt, store))
    if device == "cuda":
        device = f"cuda:{local}"                                     # set_device wants an index
    if "cuda" in device:
        torch.cuda.set_device(device)
    return Process(rank, world, device)


def usable_device(name=None):
    """`name`, or "cuda" if there is one, else "cpu".  Raises RunError if nothing computes there."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(f"--device {name}: nothing computes there ({reason}); use cpu") from None
    return name


def peak_memory(device):
    """Gigabytes that this process has held at most: on the GPU it computes on, else in all."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource                      # which Windows has not
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@contextlib.contextmanager
def main_first(process):
    """Process 0 runs the block first, the others once it is done: it draws, downloads, measures."""
    if not process.is_main:
        dist.barrier()
    yield
    if process.is_main and process.world > 1:
        dist.barrier()


def native_precision(device):
    """"bf16" where the device computes in bfloat16 natively, so that it is faster, else "fp32"."""
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    cpuinfo = Path("/proc/cpuinfo")          # the only public place to ask: Linux
    native = cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()
    return "bf16" if native and torch.device(device).type == "cpu" else "fp32"


@contextlib.contextmanager
def signals_noted():
    """Ctrl-C and requests to end only fill a list: the loop ends its step, saves, and stops."""
    noted = []
    numbers = signal.SIGINT, signal.SIGTERM
    old = {n: signal.signal(n, lambda number, frame: noted.append(number)) for n in numbers}
    try:
        yield noted
    finally:
        for n, handler in old.items():
            signal.signal(n, handler)


@contextlib.contextmanager
def faults_told(program, *kinds):
    """Errors of these kinds, and what the machine lacks, become one sentence and exit code 2.

    Ctrl-C is one sentence too, and code 130.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):   # a notebook's cannot
            # names in other people's files may hold what a terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        return
    except KeyboardInterrupt as error:
        print(f"{program}: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(130)
    except (*kinds, OSError, RuntimeError, ValueError, MemoryError) as error:
        told = isinstance(error, kinds) and not isinstance(error, OSError)
        words = str(error) if told else machine_fault(error)
        if not words:
            raise
    print(f"{program}: {words}", file=sys.stderr)
    if words != OTHER_ENDED:
        tell_torchrun(words)
    sys.exit(2)


def at_least(least):
    """A type of argparse: a whole number, not below `least`."""
    def number(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
        return int(text)
    return number


OTHER_ENDED = "another process of this run has ended; its own message says why"


def machine_fault(error):
    """What the machine lacks, if that is what an error says; "" otherwise."""
    text = str(error)
    if isinstance(error, OSError):
        file = f"{error.filename}: " if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return (f"{file}no space left on the disk, or no more allowed ({error.strerror}); what "
                    f"was saved before is whole: make room, then go on")
        return f"{file}{error.strerror or text}"
    if "DataLoader worker" in text:
        return ("a process that reads pictures was killed, which happens where memory or /dev/shm "
                "runs out; use fewer --workers, or 0")
    if "ancdata" in text:                    # file descriptors did not arrive
        return ("too many open files between the processes that read pictures; use fewer "
                "--workers, a smaller --batch-size, or raise the limit (ulimit -n)")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
        return ("out of memory; use a smaller --batch-size, a larger --accumulate (the same step "
                "in more parts), or smaller --train-sizes and --test-size")
    if "more than 1 value per channel" in text:
        return ("batch norm cannot learn from one value per channel; use a larger --batch-size, a "
                "smaller --accumulate, or larger --train-sizes")
    # a connection that breaks: Gloo names its source file, NCCL has a class of errors
    if dist.is_initialized() and ("gloo" in text or isinstance(error, dist.DistError)):
        return OTHER_ENDED
    return ""


def tell_torchrun(words):
    """torchrun ends with a summary of the processes that failed; this puts `words` into it."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        # a second back: before those that end because of this one
        write_json(file, {"message": words, "timestamp": int(time.time()) - 1})


# ------------------------------------------------------------------------------------------------
# the folder
# ------------------------------------------------------------------------------------------------

def free_name(wanted):
    """`wanted`, or with -2, -3, ... behind it the first folder that does not exist yet."""
    path, n = Path(wanted), 1
    while path.exists():
        n += 1
        path = Path(f"{wanted}-{n}")
    return str(path)


def claim_folder(out, name, process):
    """The folder of a new run: `out`, or a free one in runs/.  The same in all processes.

    Raises RunError if it holds a run already.
    """
    chosen = [out]
    while process.is_main and not chosen[0]:
        wanted = free_name(Path("runs") / name)
        with contextlib.suppress(FileExistsError):       # another run has just made it
            Path(wanted).mkdir(parents=True)
            chosen = [wanted]
    if process.world > 1:
        dist.broadcast_object_list(chosen)
    if (Path(chosen[0]) / "last.pt").exists():
        raise RunError(f"--out {chosen[0]} holds a run already; add --resume to go on with it, or "
                       f"choose another folder")
    if (Path(chosen[0]) / "metrics.json").exists():
        raise RunError(f"--out {chosen[0]} holds what a run has measured, without its last.pt; "
                       f"choose another folder, or remove it")
    return chosen[0]


@contextlib.contextmanager
def held(folder, process, patience=10):
    """Keeps other runs out of a folder; one that stays empty is removed at the end.

    patience: seconds to wait for a run that has just been killed, whose workers still end
    Raises RunError if another run is at work in it.
    """
    if not process.is_main:
        yield
        return

    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        end = time.time() + patience
        while lock is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.time() > end:
                    raise RunError(f"--out {folder}: another run is at work in it; wait for its "
                                   f"end, or choose another folder") from None
                time.sleep(0.2)
            except OSError:                  # a file system without locks
                break
        yield
    finally:
        if lock is not None:
            os.close(lock)
        with contextlib.suppress(OSError):
            Path(folder).rmdir()             # of an empty one alone


def how_to_go_on(out, step=None):
    """What to say of a run that was interrupted, after which step if that has just been saved."""
    if not (Path(out) / "last.pt").exists():
        return "interrupted before anything was saved"
    saved = "what was reached" if step is None else f"step {step}"
    return (f"interrupted; {saved} is saved: go on with  python train.py --resume "
            f"--out {shlex.quote(out)}")


@contextlib.contextmanager
def whole(file):
    """A file to write instead, which takes the place of `file` at the end, or is gone on an error.

    A symbolic link stays: what it leads to is replaced.  Raises OSError, naming `file`; also if
    that is there already and not a plain file.
    """
    target = Path(os.path.realpath(file))
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "is not a plain file; choose another name", str(file))
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")     # each writer its own
    try:
        yield temporary
        temporary.replace(target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(file)
        raise


def write_whole(file, content):
    """Bytes, written whole or not at all, and on the disk before an old file goes."""
    with whole(file) as temporary, open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def check_writable(file, flag):
    """Raises RunError if a file cannot be written, before minutes are spent on its content."""
    folder = Path(file).resolve().parent
    if not os.access(folder, os.W_OK) or Path(file).is_dir():
        raise RunError(f"{flag} {file}: {folder} is not there, or it cannot be written to")


def write_json(file, content, indent=None):
    """Written whole or not at all."""
    with whole(file) as temporary:
        temporary.write_text(json.dumps(content, indent=indent))


class Log:
    """A CSV file, opened anew for each row.

    On resume, rows after `step` are cut off, and what a kill or a full disk left of a row.
    """

    def __init__(self, file, step):
        self.file = Path(file)
        if self.file.exists():
            text = self.file.read_text(errors="replace")
            complete = text[:text.rfind("\n") + 1]
            header, *lines = list(csv.reader(complete.splitlines())) or [[]]
            kept = [row for row in lines if len(row) == len(header)
                    and row[0].isdigit() and int(row[0]) <= step]
            with whole(self.file) as temporary, open(temporary, "w", newline="") as stream:
                if step > 0 and header:
                    csv.writer(stream, lineterminator="\n").writerows([header, *kept])

    def row(self, values):
        new = not self.file.exists() or self.file.stat().st_size == 0
        columns = list(values)
        if not new:                          # of an older version, the file may have fewer
            with open(self.file) as stream:
                columns = stream.readline().strip().split(",")
        with open(self.file, "a", newline="") as stream:
            writer = csv.DictWriter(stream, columns, extrasaction="ignore", lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value
                             for name, value in values.items()})


# ------------------------------------------------------------------------------------------------
# going on exactly
# ------------------------------------------------------------------------------------------------

def seed_everything(seed):
    """The generators that weights, dropout and a strategy of one's own may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)


def random_states(device):
    """The states of every generator that training draws from, as plain values and tensors."""
    method, numbers, *rest = np.random.get_state()
    states = {"python": random.getstate(), "torch": torch.get_rng_state(),
              "numpy": [method, numbers.tolist(), *rest]}
    kind = torch.device(device).type
    if kind == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif kind == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_states(states, device):
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(states["torch"])
    if "numpy" in states:                    # older checkpoints have none
        np.random.set_state(tuple(states["numpy"]))
    kind = torch.device(device).type
    if kind == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif kind == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])


def own_share(shares, process):
    """This process's share of what `gather` gathered; there may have been fewer processes."""
    return shares[process.rank % len(shares)]


def gather(own, process):
    """What every process has to say, in process 0; None in the others."""
    if process.world == 1:
        return [own]
    shares = [None] * process.world if process.is_main else None
    dist.gather_object(own, shares)
    return shares


class Progress:
    """The bar with the time left, and the rows of log.csv: a context around the loop.

    log: a Log, or None in the other processes   images: of one step   every: steps between rows
    """

    def __init__(self, log, first_step, steps, images, every, process):
        self.log, self.first_step, self.steps = log, first_step, steps
        self.images, self.every, self.process = images, every, process
        self.logged = first_step                                     # the last step with a row
        self.waited = 0.0                                            # seconds, for data
        self.began = self.since = time.perf_counter()
        self.bar = tqdm(total=steps, initial=first_step, disable=None if process.is_main else True,
                        unit="step", smoothing=0.05)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def fetch(self, batches, count):
        """The next `count` batches; the time they take is what training waits for data."""
        start = time.perf_counter()
        fetched = [next(batches) for _ in range(count)]
        self.waited += time.perf_counter() - start
        return fetched

    @contextlib.contextmanager
    def pause(self):
        """Around what is not training, so that it does not count in images a second."""
        self.bar.clear()
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def row(self, done, values, lr, positives=None):
        """Logs step `done`.  values: the terms of the loss, and the norm of the gradient.

        positives: further columns, of which the bar shows the score gap
        """
        positives = positives or {}
        terms = {name: value for name, value in values.items() if name != "gradient_norm"}
        steps, elapsed = done - self.logged, time.perf_counter() - self.since
        row = {"step": done, "loss": sum(terms.values()), **values, "lr": lr,
               "images_per_second": steps * self.images / elapsed, "seconds_waiting": self.waited,
               "gigabytes": peak_memory(self.process.device), **positives}
        speed = f"{row['images_per_second']:.0f}"
        parts = ", ".join(f"{name} {value:.3f}" for name, value in terms.items())
        gap = positives.get("gap")
        gap = "" if gap is None else f"score gap {gap:.2f}, "
        memory = "" if row["gigabytes"] is None else f", {row['gigabytes']:.1f} GB"
        self.bar.set_postfix_str(f"loss {row['loss']:.3f} ({parts}), {gap}{speed} img/s, waited "
                                 f"{self.waited:.1f} s{memory}", refresh=False)
        if self.log is not None:
            self.log.row(row)
            # without a terminal, a line now and then
            if self.bar.disable and done % (10 * self.every) == 0:
                pace = (time.perf_counter() - self.began) / (done - self.first_step)
                print(f"step {done}/{self.steps}  loss {row['loss']:.3f}  {speed} images/s  "
                      f"{pace * (self.steps - done) / 60:.1f} min left", flush=True)
        self.logged, self.waited, self.since = done, 0.0, time.perf_counter()


# ------------------------------------------------------------------------------------------------
# several runs, side by side
# ------------------------------------------------------------------------------------------------

def last_row(file):
    """The last row of a CSV file, {} where there is none."""
    file = Path(file)
    rows = list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []
    return rows[-1] if rows else {}


def finished(folder):
    """(flags, figures) of a run that was evaluated after its last step, else None.

    An evaluation on the way leaves a metrics.json too: eval.csv tells whose it is.  Raises RunError
    if a file cannot be read.
    """
    files = [Path(folder) / name for name in ("args.json", "metrics.json", "eval.csv")]
    if not all(file.exists() for file in files):
        return None
    try:
        flags, figures = (json.loads(file.read_text()) for file in files[:2])
        row = last_row(files[2])
        # killed between the row and the figures, these are of an earlier step
        same = row and abs(float(row["AP50"]) - figures["AP50"]) < 1e-3
        same = same and abs(float(row["AP50_nms"]) - figures["nms"]["AP50"]) < 1e-3
        return (flags, figures) if same and int(row["step"]) == flags["steps"] else None
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{folder}: args.json, metrics.json or eval.csv cannot be read ({error!r}); "
                       f"remove the folder to train anew") from error


class Sitting:
    """A training command under way: its output goes to FOLDER/output.txt, its time to minutes.txt.

    words: the command   steps: of the whole run   threads: how many it may use
    Raises RunError if another run is at work in the folder.
    """

    def __init__(self, folder, words, steps, threads):
        self.folder, self.steps = Path(folder), steps
        self.threads, self.began = threads, time.time()
        with held(self.folder, Process(0, 1, "cpu"), patience=0):
            if not (self.folder / "last.pt").exists():   # what an attempt left is not this run's
                for name in ("output.txt", "minutes.txt", "log.csv"):
                    (self.folder / name).unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with open(self.folder / "output.txt", "a") as output:
            self.process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT,
                                            env=environment)
        self.first = self.step()
        self.bar = tqdm(total=steps, initial=self.first, desc=self.folder.name, unit="step",
                        leave=False, disable=None)

    def step(self):
        return int(last_row(self.folder / "log.csv").get("step") or 0)

    def is_over(self):
        self.bar.update(self.step() - self.bar.n)
        return self.process.poll() is not None

    def end(self):
        """Waits for its end; a run that still trains is asked for it, and saves its step."""
        if self.process.poll() is None:
            self.process.terminate()
        code = self.process.wait()
        self.bar.close()
        with open(self.folder / "minutes.txt", "a") as stream:
            minutes = (time.time() - self.began) / 60
            stream.write(f"{minutes:.3f} OMP_NUM_THREADS={self.threads}\n")
        return code


def sittings(folder):
    """[(minutes, setting of the threads)] of what `side_by_side` trained.  Raises RunError."""
    file = Path(folder) / "minutes.txt"
    rows = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
    try:
        return [(float(minutes), threads) for minutes, threads in rows]
    except ValueError as error:
        raise RunError(f"{file}: each line has minutes and OMP_NUM_THREADS=N ({error}); remove the "
                       f"line") from error


def side_by_side(commands, jobs):
    """Runs training commands, `jobs` at a time, and shares the cores out.

    commands: {folder: (words, steps)}   returns {folder: the last line it said} of those that fail
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, cores // jobs)
    waiting, running, failed = list(commands.items()), [], {}
    began, learned = time.time(), 0                                  # steps, in this call
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                folder, (words, steps) = waiting.pop(0)
                try:
                    running.append(Sitting(folder, words, steps, threads))
                except RunError as error:                # at work for another call of this
                    failed[folder] = str(error)
            time.sleep(0.2)

            for sitting in [s for s in running if s.is_over()]:
                running.remove(sitting)
                said = "finished"
                if sitting.end() != 0:
                    lines = (sitting.folder / "output.txt").read_text().strip().splitlines()
                    said = failed[sitting.folder] = lines[-1] if lines else "it said nothing"

                # what is left, at the pace until now
                learned += sitting.step() - sitting.first
                now = {s: s.step() for s in running}
                left = (sum(steps for _, (_, steps) in waiting)
                        + sum(s.steps - step for s, step in now.items()))
                done = learned + sum(step - s.first for s, step in now.items())
                minutes = (time.time() - began) / 60 * left / max(done, 1)
                tqdm.write(f"{sitting.folder.name}: {said}; {len(waiting) + len(running)} to go, "
                           f"about {minutes:.0f} minutes")
    finally:
        for sitting in running:
            sitting.end()
    return failed
