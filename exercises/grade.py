"""Grades a student's copy: a point for every test of exercises/tests that passes. See grade.sh.

python exercises/grade.py FOLDER [number of one exercise]
"""

import ast
import glob
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml

HERE = os.path.dirname(os.path.abspath(__file__))
TIME_LIMIT = 300  # seconds, against a loop without an end


def tests_in(path):
    """The names of a file's tests, from its text, so that a copy that cannot be imported changes no total."""
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def title(path):
    """'test_05_drop.py' -> ('5', 'drop')"""
    number, _, name = os.path.basename(path).removeprefix("test_").removesuffix(".py").partition("_")
    return number.lstrip("0"), name.replace("_", " ")


def run_tests(folder, paths, verbose):
    """{(file, test): None when it passes, else why not}, from a pytest of its own that imports from `folder` alone."""
    with tempfile.TemporaryDirectory() as scratch:
        report = os.path.join(scratch, "report.xml")
        command = [sys.executable, "-m", "pytest", *paths, f"--junit-xml={report}", "-c", os.devnull]
        command += ["--rootdir", HERE, "--import-mode=append", "-p", "no:cacheprovider", "-q", "--tb=short"]
        environment = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        options = {"capture_output": not verbose, "text": True, "timeout": TIME_LIMIT}
        try:
            done = subprocess.run(command, cwd=folder, env=environment, **options)
        except subprocess.TimeoutExpired:
            remedy = "grade one exercise by itself"
            raise SystemExit(f"error: the tests took longer than {TIME_LIMIT} seconds; {remedy}") from None
        if not os.path.exists(report):
            raise SystemExit(f"error: pytest did not run: {done.stderr or done.stdout}")
        found = {}
        for case in xml.parse(report).iter("testcase"):
            bad = [child for child in case if child.tag in ("failure", "error")]
            reason = (bad[0].get("message") or "it failed").splitlines()[0] if bad else None
            found[case.get("classname").rsplit(".", 1)[-1], case.get("name")] = reason
        return found


def main(folder, only=None):
    paths = sorted(glob.glob(os.path.join(HERE, "tests", "test_*.py")))
    paths = [path for path in paths if only in (None, title(path)[0])]
    if not paths:
        raise SystemExit(f"error: there is no exercise {only}")
    results = run_tests(os.path.abspath(folder), paths, verbose=only is not None)
    points = total = 0
    for path in paths:
        tests, module = tests_in(path), os.path.basename(path).removesuffix(".py")
        reasons = [results.get((module, test), "the file could not be imported") for test in tests]
        passed = reasons.count(None)
        points, total = points + passed, total + len(tests)
        number, name = title(path)
        why = next((f"   {reason[:70]}" for reason in reasons if reason), "")
        print(f"{number:>2}  {name:16s} {passed} of {len(tests)}{why}")
    print(f"points: {points} of {total}")


if __name__ == "__main__":
    main(*sys.argv[1:])
