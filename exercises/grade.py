"""Grades a student's copy: one point for every test in exercises/tests that passes. See grade.sh.

python exercises/grade.py FOLDER [number of one exercise]
"""

import ast
import glob
import json
import os
import signal
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.append(os.path.dirname(HERE))  # a script only looks in its own folder

from exercises.strip import copied_files  # noqa: E402

SECONDS = 60  # per exercise, against endless loops


def tests_in(path):
    """The names of a file's tests, from its text, so that a copy that cannot be imported does not change the total."""
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def title(path):
    """'test_05_drop.py' -> ('5', 'drop')"""
    number, _, name = os.path.basename(path).removeprefix("test_").removesuffix(".py").partition("_")
    return number.lstrip("0"), name.replace("_", " ")


def run_pytest(folder, names, verbose):
    """(what conftest.py recorded, how pytest ended) for one run of pytest that imports only from `folder`."""
    command = [sys.executable, "-m", "pytest", *(os.path.join(HERE, "tests", name) for name in names)]
    command += ["-c", os.devnull, "--rootdir", HERE, "--import-mode=append", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", "-q", "--tb=short"]
    options = {} if verbose else {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with tempfile.TemporaryDirectory() as scratch:
        path = os.path.join(scratch, "record.jsonl")
        environment = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"GRADE_RECORD": path, "GRADE_SECONDS": str(SECONDS)}
        environment["CUDA_VISIBLE_DEVICES"] = ""  # a CPU is enough, and CUDA needs more memory than a test may use
        code = subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, **options).returncode
        lines = []
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                lines = [json.loads(line) for line in file]
    return lines, f"not done after {SECONDS} seconds" if code == -signal.SIGALRM else f"pytest ended with code {code}"


def run_tests(folder, tests, verbose):
    """{(file, test): None if it passes, else why not}. tests: {file: its tests}. If code ends pytest or hangs, the
    tests in its file that did not run fail, and pytest starts again with the other files."""
    found, left = {}, list(tests)
    while left:
        lines, end = run_pytest(folder, left, verbose)
        found |= {(line["file"], line["test"]): line["why"] for line in lines if "test" in line}
        if lines and "finished" in lines[-1]:
            break
        begun = [line["begin"] for line in lines if "begin" in line]
        for name in begun[-1:] or left:  # all of them, if pytest itself cannot start
            found = {(name, test): end for test in tests[name]} | found
        left = [name for name in left if not {(name, test) for test in tests[name]} <= found.keys()]
    return found


def main(folder, only=None):
    paths = sorted(glob.glob(os.path.join(HERE, "tests", "test_*.py")))
    tests = {os.path.basename(path): tests_in(path) for path in paths if only in (None, title(path)[0])}
    if not tests:
        raise SystemExit(f"error: there is no exercise {only}")
    if not os.path.isdir(folder):
        raise SystemExit(f"error: there is no folder {folder}; make it first: python -m exercises.strip {folder}")
    lacking = [name for name in copied_files() if not os.path.exists(os.path.join(folder, name))]
    if lacking:  # pytest would take them from here, where they are solved
        print(f"{folder} lacks {', '.join(lacking)}; name a folder made by python -m exercises.strip")
    results = {} if lacking else run_tests(os.path.abspath(folder), tests, verbose=only is not None)
    points = 0
    for file, names in tests.items():
        reasons = [results.get((file, test), "the file could not be imported") for test in names]
        points += reasons.count(None)
        number, name = title(file)
        why = ascii(next((reason for reason in reasons if reason), ""))[1:-1]
        print(f"{number:>2}  {name:16s} {reasons.count(None)} of {len(names)}   {why[:70]}".rstrip())
    print(f"points: {points} of {sum(map(len, tests.values()))}")


if __name__ == "__main__":
    main(*sys.argv[1:])
