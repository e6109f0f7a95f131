"""The house's plan: rooms, the arrows between them, and how much a reader has to open. Read from the files' imports."""

import ast
import os
import subprocess
import sys

import pytest
from helpers import ROOT

FOLDERS = ("study", "data", "common")


def python_files():
    """Paths from the root of all of the project's Python files but tests and configs."""
    found = [name for name in os.listdir(ROOT) if name.endswith(".py")]
    for folder in FOLDERS:
        found += [f"{folder}/{name}" for name in os.listdir(os.path.join(ROOT, folder)) if name.endswith(".py")]
    return sorted(found)


def room(path):
    """ "study/btm.py" -> "study"; "train.py" -> "train"."""
    return path.split("/")[0].removesuffix(".py")


def imported(path):
    """The first parts of the modules that a file imports, wherever in it."""
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        tree = ast.parse(file.read())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


FILES = python_files()
ROOMS = {room(path) for path in FILES}
ARROWS = {(room(path), name) for path in FILES for name in imported(path) & ROOMS if name != room(path)}


def floor(name):
    """Studies stand on the root's files, these on data, and all on common."""
    return {"study": 3, "data": 1, "common": 0}.get(name, 2)


def test_no_arrow_points_upward():
    assert {arrow for arrow in ARROWS if floor(arrow[0]) < floor(arrow[1])} == set()


def test_there_is_no_circle():
    """Rooms that need no other are taken away until none is left."""
    left = set(ROOMS)
    while free := {name for name in left if not any(source == name and target in left for source, target in ARROWS)}:
        left -= free
    assert left == set()


def modules(folder):
    return [path for path in FILES if path.startswith(f"{folder}/") and not path.endswith("__init__.py")]


def test_the_folders_stay_small():
    assert len(modules("common")) <= 10
    assert len(modules("study")) <= 14


@pytest.mark.parametrize(("module", "most"), [("model", 5), ("train", 12), ("mix", 9)])
def test_reading_path(module, most):
    """How many of the project's files an import loads, counted in a process of its own."""
    program = f"import sys, {module}; print(*(getattr(m, '__file__', None) or '' for m in list(sys.modules.values())))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    known = {os.path.join(ROOT, path) for path in FILES if not path.endswith("__init__.py")}
    loaded = known & {*done.stdout.split()}
    assert os.path.join(ROOT, f"{module}.py") in loaded
    assert len(loaded) <= most, sorted(loaded)
