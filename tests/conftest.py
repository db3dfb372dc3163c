"""Shared by all tests: the import path, the option for a strategy of your own, a few pictures."""
import functools
import socket
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import evaluate
import figures
import scenes

torch.set_num_threads(1)        # the tensors are small, and the machine may be training
hypothesis.settings.register_profile("repository", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("repository")


def pytest_addoption(parser):
    parser.addoption("--assigner", action="append", default=[], metavar="my.py:my_function",
                     help="put a strategy of your own to the contract tests of test_assign.py; "
                          "may be repeated")
    parser.addoption("--cost", action="append", default=[], metavar="my.py:my_function",
                     help="the same for a cost of your own")


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random numbers, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def slow_judge(monkeypatch):
    """pycocotools judges everywhere, whether or not hotcoco is installed."""
    monkeypatch.setattr(evaluate, "hotcoco", None)


@pytest.fixture(autouse=True)
def few_drawn(monkeypatch):
    """A run draws a picture for each of its sheets: a dozen take longer than the run itself."""
    for name in ("training_pictures", "detections_beside_truth"):
        monkeypatch.setattr(figures, name, functools.partial(getattr(figures, name), count=1))


@pytest.fixture(scope="session")
def tiny_scenes(tmp_path_factory):
    """A folder with a small scenes data set: 24 pictures to train on, 7 to evaluate."""
    folder = tmp_path_factory.mktemp("scenes")
    return scenes.write(folder, seed=0, counts={"train": 24, "val": 7})


@pytest.fixture
def port():
    """A port that is free, in words: tests with processes of their own may run side by side."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a file's command line in this process.

    command(annotations, "check", ...) gives exit code, standard output and standard error.
    """
    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        try:
            module.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return code, said.out, said.err
    return run
