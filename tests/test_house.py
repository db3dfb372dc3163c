"""The house: which file may import which, how wide and how dense one may be, the README's list.

Each check is a function of a text; it is shown to find a fault in a made-up file before it is put
to the repository's own.
"""
import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 100                 # columns
LONGEST = 95                # lines of a function
TARGETS = 3                 # names that one tuple gives values to

# one concept a file; a file imports only from the floors below its own
FLOORS = (
    "models pictures runs theory positives ideas coco",
    "assign queries variants labels detect scenes duplicates",
    "losses annotations",
    "data crowd",
    "checkpoints",
    "figures recipes convert pretrain",
    "evaluate claims",
    "train",
    "tables bench grade",
)
FLOOR_OF = {name: n for n, names in enumerate(FLOORS, 1) for name in names.split()}


def python_files():
    """The repository's Python files; one that git does not know, like a student's, is not of it."""
    listed = []
    try:
        git = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
        listed = [ROOT / line for line in git.stdout.splitlines()]
    except OSError:                                 # no git here
        pass
    files = listed or [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]
    return sorted(file for file in files if file.exists())


def modules():
    return [file for file in python_files() if file.parent == ROOT]


# ------------------------------------------------------------------------------------------------
# checks: the text of a file -> its faults, pairs (line, what is wrong)
# ------------------------------------------------------------------------------------------------

def nodes(text, *kinds):
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]


def wide_lines(text):
    lines = enumerate(text.split("\n"), 1)
    return [(n, f"{len(line)} columns") for n, line in lines if len(line) > WIDTH]


def tuple_statements(text):
    """Two thoughts in one line: `a(), b()`."""
    return [(node.lineno, "a tuple that nothing takes: write a line for each")
            for node in nodes(text, ast.Expr) if isinstance(node.value, ast.Tuple)]


def named_lambdas(text):
    """`x = lambda ...`.  One that takes the place of another object's method has its name there."""
    faults = []
    for node in nodes(text, ast.Assign, ast.AnnAssign, ast.NamedExpr):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if isinstance(node.value, ast.Lambda) and isinstance(targets[0], ast.Name):
            faults.append((node.lineno, "a lambda with a name: write a def"))
    return faults


def crowded_assignments(text):
    """`a, b, c, d = 1, 2, 3, 4`.  To take apart what a call returns is another thing."""
    return [(node.lineno, f"{len(node.value.elts)} assignments in one: at most {TARGETS}")
            for node in nodes(text, ast.Assign)
            if isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple)
            and len(node.value.elts) > TARGETS]


def long_functions(text):
    faults = []
    for node in nodes(text, ast.FunctionDef, ast.AsyncFunctionDef):
        length = node.end_lineno - node.lineno + 1
        if length > LONGEST:
            faults.append((node.lineno, f"{node.name} has {length} lines, at most {LONGEST}"))
    return faults


def upward_imports(name, text):
    """Imports, also inside functions, of modules that do not lie on a lower floor than `name`."""
    faults = []
    for node in nodes(text, ast.Import, ast.ImportFrom):
        if isinstance(node, ast.ImportFrom) and node.module:
            imported = [node.module]
        else:                                       # also `from . import losses`
            imported = [alias.name for alias in node.names]
        for module in [dotted.split(".")[0] for dotted in imported]:
            if FLOOR_OF.get(module, 0) >= FLOOR_OF[name]:
                faults.append((node.lineno, f"{name} (floor {FLOOR_OF[name]}) imports {module} "
                                            f"(floor {FLOOR_OF[module]})"))
    return faults


def unnamed(names, readme):
    """Modules that the README does not name as `name.py`."""
    return [name for name in names if not re.search(rf"`{name}\.py\b", readme)]


# ------------------------------------------------------------------------------------------------
# a check finds what it is for, and nothing else
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("check, bad, good", [
    (wide_lines, "x = 1\n#" + WIDTH * "-", "x = 1\n#" + (WIDTH - 1) * "-"),
    (tuple_statements, "x = 1\na.eval(), b.eval()", "x = 1\nx = a.eval(), b.eval()\nf((1, 2))"),
    (named_lambdas, "x = 1\ntwice = lambda v: 2 * v",
     "rows.sort(key=lambda row: row[0])\nm.act = lambda v: v"),
    (named_lambdas, "def f():\n    twice: object = lambda v: 2 * v", "def f():\n    twice: object"),
    (crowded_assignments, "x = 1\na, b, c, d = 1, 2, 3, 4",
     "a, b, c = 1, 2, 3\na, b, c, d = box\nfor a, b, c, d in boxes: pass\ncorners = 1, 2, 3, 4"),
    (long_functions, "x = 1\ndef f():\n" + LONGEST * "    a = 1\n",
     "x = 1\ndef f():\n" + (LONGEST - 1) * "    a = 1\n" + "b = 1\n"),
])
def test_a_check_finds_the_fault_in_line_2_and_none_where_there_is_none(check, bad, good):
    assert [line for line, _ in check(bad)] == [2]
    assert check(good) == []


@pytest.mark.parametrize("name, text, faults", [
    ("losses", "import torch\nimport assign, models", 0),
    ("losses", "import torch\nfrom assign import match", 0),
    ("losses", "import torch\nimport train", 1),
    ("losses", "import torch\nfrom train import main", 1),
    ("losses", "def f():\n    import torch, annotations as q", 1),    # its own floor
    ("assign", "if True:\n    from losses import match", 1),      # and back: a circle
    ("train", "import torch\nfrom . import bench, tables, models", 2),
    ("evaluate", "import torchvision.models\nfrom torch.utils import data\nimport crowd", 0),
])
def test_an_import_of_ones_own_floor_or_a_higher_one_is_found(name, text, faults):
    assert [line for line, _ in upward_imports(name, text)] == faults * [2]


def test_a_module_that_the_readme_only_mentions_in_passing_is_found():
    readme = "`assign.py`: the paper; `train.py --steps 3`; the data, and data.py; `my_models.py`"
    assert unnamed(["assign", "train", "data", "models"], readme) == ["data", "models"]


# ------------------------------------------------------------------------------------------------
# the repository
# ------------------------------------------------------------------------------------------------

def refuse(faults):
    """Fail with a line for each fault, (file, line, what is wrong)."""
    if faults:
        lines = [f"{file.relative_to(ROOT)}:{line}: {what}" for file, line, what in sorted(faults)]
        pytest.fail("\n".join(lines), pytrace=False)


@pytest.mark.parametrize("check", [
    wide_lines, tuple_statements, named_lambdas, crowded_assignments, long_functions])
def test_no_file_has_any(check):
    refuse([(file, line, what)
            for file in python_files() for line, what in check(file.read_text())])


def test_every_module_has_a_floor():
    homeless = [file.name for file in modules() if file.stem not in FLOOR_OF]
    assert not homeless, f"give them a place in FLOORS: {', '.join(homeless)}"
    names = " ".join(FLOORS).split()
    assert len(names) == len(set(names)), "a module stands on two floors"


def test_a_module_imports_only_from_lower_floors():
    """So nothing imports in a circle either."""
    housed = [file for file in modules() if file.stem in FLOOR_OF]
    refuse([(file, line, what)
            for file in housed for line, what in upward_imports(file.stem, file.read_text())])


def test_the_readme_names_every_module():
    missing = unnamed([file.stem for file in modules()], (ROOT / "README.md").read_text())
    assert not missing, f"the README does not name {', '.join(f'{name}.py' for name in missing)}"


def test_requirements_and_pyproject_name_the_same():
    tomllib = pytest.importorskip("tomllib", reason="in Python's own library since 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = project["dependencies"] + project["optional-dependencies"]["tests"]
    assert named == (ROOT / "requirements.txt").read_text().split()
