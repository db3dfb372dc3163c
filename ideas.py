"""An idea of one's own: a strategy or a cost found in a file, called, and told what is wrong.

    python train.py --assign my.py:my_strategy      my_strategy(cost) -> prediction, object
    python train.py --cost my.py:my_cost            my_cost(one, target) -> (Q, G)

assign.py says what they are given and what they must return; `python grade.py my.py:f` checks it.
A function that names the keyword `progress` is told how far training is, from 0 to 1: it depends on
the step alone, so that a run that goes on later goes on exactly.
"""
import contextlib
import hashlib
import importlib.util
import inspect
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

SECONDS = 10                    # a call may take; the rules here take milliseconds


class AssignError(ValueError):
    """A strategy, a cost, or the numbers given to it, cannot be used: one sentence says why."""


class TimeUp(BaseException):
    """No Exception, so that no `except Exception` of the function holds it up."""


def load(flag, name):
    """`file.py:function` from its file.  Raises AssignError.

    flag: of the command line, for the message
    """
    file, _, function = name.rpartition(":")
    if not file:
        raise AssignError(f"{flag} {name}: which function of it? give {name}:my_function")
    if not Path(file).is_file():
        raise AssignError(f"{flag} {name}: the file {file} does not exist")
    # a name of its own, so that no module of ours is taken for it, nor the other way round
    spec = importlib.util.spec_from_file_location(f"idea_{Path(file).stem}", file)
    if spec is None:
        raise AssignError(f"{flag} {name}: {file} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module                              # a dataclass in it looks there
    sys.path.append(str(Path(file).resolve().parent))            # its neighbours can be imported
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:                               # it may raise anything
        raise AssignError(f"{flag} {name}: {file} does not run: {told(error, file)}") from error
    if not callable(getattr(module, function, None)):
        raise AssignError(f"{flag} {name}: {file} defines no function {function}")
    return getattr(module, function)


def digest(name):
    """SHA-256 of the file of a `file.py:function`."""
    return hashlib.sha256(Path(name.rpartition(":")[0]).read_bytes()).hexdigest()


def told(error, file):
    """An exception in one line, with the line of `file` that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    frames = [f for f in frames if Path(f.filename) == Path(file)] or frames[-1:]
    where = "".join(f" ({Path(f.filename).name}, line {f.lineno}: {f.line})" for f in frames[-1:])
    return f"{type(error).__name__}: {error}{where}"


def call(function, *arguments, progress=0.0):
    """What a function of one's own answers.  Whatever it raises becomes an AssignError."""
    plain = inspect.unwrap(getattr(function, "func", function))  # of a partial, of a wrapper
    code = getattr(plain, "__code__", None)
    more = {}
    if code and "progress" in code.co_varnames[:code.co_argcount + code.co_kwonlyargcount]:
        more = {"progress": progress}
    try:
        with time_limit(SECONDS):
            return function(*arguments, **more)
    except KeyboardInterrupt:
        raise
    except BaseException as error:                               # sys.exit too
        if "DataLoader worker" in str(error):      # torch's signal handler, in whatever code runs
            raise
        raise AssignError(told(error, code.co_filename if code else "")) from error


@contextlib.contextmanager
def time_limit(seconds):
    """Raises TimeUp inside when the time is up, where the system can do that."""
    can = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not can:
        yield
        return

    words = f"no answer after {seconds} seconds"
    told_before = []

    def stop(number, frame):
        # in two halves: of a process that was suspended for long the second begins now
        told_before.append(number)
        if len(told_before) == 1:
            signal.setitimer(signal.ITIMER_REAL, seconds / 2, seconds / 2)
            return
        if len(told_before) > 2:             # `except:` in a loop swallows every exception
            print(f"{words}, and an `except:` that catches the exception that would end it; "
                  f"write `except ValueError:` or what you mean", file=sys.stderr, flush=True)
            os._exit(2)
        raise TimeUp(words)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds / 2)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
