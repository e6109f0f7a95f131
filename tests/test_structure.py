"""The house's plan: rooms, the arrows between them, and how large they may be. Read from the files' imports."""

import ast
import os

from helpers import ROOT

FOLDERS = ("study", "data", "common")
METHOD = ("model.py", "train.py", "mix.py", "finetune.py", "eval.py")


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


def lines(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return len(file.readlines())


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


def test_there_are_few_arrows():
    assert len(ARROWS) <= 25, sorted(ARROWS)


def test_sizes():
    assert len([path for path in FILES if "/" not in path]) <= 8
    assert sum(lines(path) for path in METHOD) <= 1500
    limits = {path: 500 if path == "model.py" else 350 for path in FILES}
    assert {path: lines(path) for path in FILES if lines(path) > limits[path]} == {}
