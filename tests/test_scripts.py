"""The shell scripts on other people's machines: bash 3.2 and a Mac's tools, an old Python, a stale .venv, CRLF."""

import glob
import os
import re
import shutil
import subprocess

import pytest
from helpers import ROOT, read

SCRIPTS = sorted(
    os.path.relpath(path, ROOT)
    for pattern in ("*.sh", "*/*.sh", "config/*/*.sh", ".ci/run")
    for path in glob.glob(os.path.join(ROOT, pattern))
)


def version(shell):
    done = subprocess.run([shell, "-c", "echo ${BASH_VERSINFO[0]}.${BASH_VERSINFO[1]}"], capture_output=True, text=True)
    return done.stdout.strip()


# a Mac's own bash is 3.2; elsewhere BASH32 may name one that was built
OLD = [path for path in (os.environ.get("BASH32"), "/bin/bash") if path and version(path) == "3.2"]
SHELLS = ["bash", *OLD[:1]]

LATER_THAN_3_2 = {
    "mapfile and readarray": r"\b(mapfile|readarray)\b",
    "associative arrays and references": r"\b(declare|local|typeset) -\w*[Ang]",
    "letter case": r"\$\{\w+(\[[^]]*\])?(,|\^)",
    "${name@Q}": r"\$\{\w+@",
    "negative places": r"\$\{\w+\[-|\$\{\w+: -?\d+:-",
    "|& and &>>": r"\|&|&>>",
    ";& in case": r";&",
    "coproc": r"\bcoproc\b",
    "wait for any": r"\bwait -n\b",
    "-v of a variable": r"\[\[? -v ",
    "time of day by printf": r"%\(",
    "globstar": r"\bshopt\b",
    "$EPOCHSECONDS and others": r"\$\{?(EPOCH|SRANDOM|BASHPID)",
    "an array that may be empty": r"\w+=\(\)",
}
OF_GNU = {
    "commands": r"\b(nproc|realpath|timeout|tac|shuf|numfmt|getopt|free|md5sum|sha256sum|setsid|stdbuf)\b",
    "options": r"\b(readlink -f|sed -(i|r)|grep -\w*P|stat -c|date -d|sort -V|cp -\w*[at]|mktemp -p|xargs -r)",
    "long options": r"\b(sed|grep|cut|sort|head|tail|cp|rm|mkdir|paste|tr|cmp|wc|ls|cat) [^|;]*--[a-z]",
    "escapes": r"\becho -[en]",
    "of Linux": r"/proc/",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_keep_to_bash_3_2_and_to_what_a_mac_has(script):
    lines = [re.sub(r"(^|\s)#.*", "", line) for line in read(os.path.join(ROOT, script)).decode().splitlines()]
    for what, pattern in {**LATER_THAN_3_2, **OF_GNU}.items():
        assert [line for line in lines if re.search(pattern, line)] == [], what


def tree(folder):
    """The scripts and configs alone, so that nothing can run by mistake."""
    for path in [*SCRIPTS, "requirements.txt", *(os.path.relpath(p, ROOT) for p in glob.glob(f"{ROOT}/config/*/*.py"))]:
        os.makedirs(os.path.dirname(folder / path), exist_ok=True)
        shutil.copy(os.path.join(ROOT, path), folder / path)
    return folder


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


RECORDER = """#!/bin/sh
[ "$1" = -c ] && exit 0
for word; do printf '[%s]' "$word"; done >> "{said}"
echo >> "{said}"
"""


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("task", ["", "quick", "chain", "ablate", "compare", "regime"])
def test_run_sh_starts_every_stage_in_every_bash(shell, task, tmp_path):
    """With names that have a space, quotes, =, a comma and letters of other alphabets in them; PYTHON, too."""
    folder = tree(tmp_path / "a 'b\" c")
    said = tmp_path / "said"
    python = program(tmp_path / "my tools" / "python", RECORDER.format(said=said))
    odd = "out/x y='z\"é,ü"
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(python), "OUT": odd, "DATA": f"{odd}/data"}
    for size in ("smoke", "smollm"):
        done = subprocess.run(
            [shell, "run.sh", size, task], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = said.read_text().splitlines()
    assert len(lines) == 1 + 4 + 2 * (3 if task == "ablate" else 1)
    assert all(f"{odd}/data]" in line for line in lines)
    assert sum(f"[--out_dir={odd}]" in line for line in lines) == (4 if task == "ablate" else 2)
    assert sum("[--rivals=False]" in line for line in lines) == (2 if task == "quick" else 0)
    assert sum("[--report=False]" in line for line in lines) == (2 if task == "chain" else 0)


@pytest.mark.parametrize("shell", SHELLS)
def test_the_other_scripts_run_in_every_bash(shell, tmp_path):
    folder, said = tree(tmp_path / "tree"), tmp_path / "said"
    environment = {**os.environ, "PYTHON": str(program(tmp_path / "python", RECORDER.format(said=said)))}
    environment["TMPDIR"] = str(tmp_path / "nowhere")
    for words in (["test.sh"], ["test.sh", "-k", "mix"], ["exercises/grade.sh", "3"], ["exercises/grade.sh"]):
        (folder / "student").mkdir(exist_ok=True)
        done = subprocess.run([shell, *words], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "", (words, done.stderr)
    lines = said.read_text().splitlines()
    assert lines[2:] == ["[-m][pytest][-k][mix]", "[exercises/grade.py][student][3]", "[exercises/grade.py][student]"]


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("words", "more", "message"),
    [
        (["huge"], {}, "no config/huge; choose one of: cpu "),
        (["cpu", "fast"], {}, "there is no task 'fast'; choose quick, "),
        (["cpu"], {"DOMAINS": "  "}, "DOMAINS is blank"),
        (["cpu"], {"PYTHON": "/nowhere/python"}, "PYTHON=/nowhere/python is not a command"),
        (["cpu"], {"PYTHON": "false"}, "PYTHON=false is not Python 3.10 or newer"),
    ],
)
def test_mistakes_are_one_line(shell, words, more, message, tmp_path):
    environment = {"PATH": os.environ["PATH"], **more}
    command = [shell, "run.sh", *words]
    done = subprocess.run(command, cwd=tree(tmp_path), env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


# ---- .venv ----

# a python3 that knows its version and whether it has venv, and whose `-m venv .venv` makes another one
STAND_IN = """#!/bin/sh
echo "{name} $*" >> "{log}"
case "$*" in
    --version) echo "Python {version}" ;;
    *version_info*) {new} ;;
    *ensurepip*) {venv} ;;
    *_base_executable*) echo "$(command -v {name})" ;;
    "-m venv .venv")
        mkdir -p .venv/bin
        echo "$PWD/.venv" > .venv/bin/activate
        cp "{folder}/{name}" .venv/bin/python
        ;;
esac
"""


@pytest.fixture
def machine(tmp_path):
    """A PATH with no Python until one is added, and a folder in which setup.sh can run."""
    bin = tmp_path / "bin"
    bin.mkdir()
    for tool in ("sh", "bash", "cmp", "cp", "rm", "grep", "head", "cat", "mkdir"):
        os.symlink(shutil.which(tool), bin / tool)
    folder = tree(tmp_path / "tree")
    log = tmp_path / "log"

    class Machine:
        place = folder

        def add(self, name, version, venv=True, where=bin):
            minor = int(version.split(".")[1])
            new = "exit 0" if minor >= 10 else "exit 1"
            facts = {"name": name, "version": version, "new": new, "venv": "exit 0" if venv else "exit 1"}
            return program(where / name, STAND_IN.format(log=log, folder=bin, **facts))

        def set_up(self, shell="bash"):
            log.write_text("")
            words = [shell, "-euo", "pipefail", "-c", 'source ./setup.sh; echo "$python"']
            done = subprocess.run(words, cwd=folder, env={"PATH": str(bin)}, capture_output=True, text=True)
            return done, log.read_text().splitlines()

    return Machine()


@pytest.mark.parametrize("shell", [shutil.which(shell) for shell in SHELLS])
def test_a_venv_is_made_once(shell, machine):
    machine.add("python3", "3.12.1")
    done, asked = machine.set_up(shell)
    assert (done.returncode, done.stdout, done.stderr) == (0, ".venv/bin/python\n", "")
    assert "python3 -m venv .venv" in asked and any("pip install" in line for line in asked)
    done, asked = machine.set_up(shell)
    assert done.returncode == 0 and not any("-m" in line for line in asked)


def test_an_old_python_is_one_line_and_leaves_nothing(machine):
    machine.add("python3", "3.9.18")
    done, _ = machine.set_up()
    assert done.returncode == 2 and done.stderr == (
        "error: Python 3.10 or newer is needed, not Python 3.9.18; install one\n"
    )
    assert not (machine.place / ".venv").exists()
    machine.add("python3.12", "3.12.1")  # beside the old one
    done, asked = machine.set_up()
    assert done.returncode == 0 and "python3.12 -m venv .venv" in asked


def test_no_python_at_all_is_one_line(machine):
    done, _ = machine.set_up()
    assert done.returncode == 2 and done.stderr.startswith("error: Python 3.10 or newer is needed")
    assert done.stderr.count("\n") == 1


def test_a_python_without_venv_is_one_line(machine):
    machine.add("python3", "3.12.1", venv=False)
    done, _ = machine.set_up()
    assert done.returncode == 2 and "apt install python3-venv" in done.stderr and done.stderr.count("\n") == 1


def test_a_venv_of_an_old_python_or_of_one_that_is_gone_is_made_anew(machine):
    """Left by a first try with Python 3.9; by a system Python that has been removed."""
    machine.add("python3", "3.12.1")
    venv = machine.place / ".venv"
    for leave in (
        lambda: machine.add("python", "3.9.18", where=venv / "bin"),
        lambda: os.symlink("/nowhere/python3.9", venv / "bin" / "python"),
    ):
        shutil.rmtree(venv, ignore_errors=True)
        (venv / "bin").mkdir(parents=True)
        leave()
        (venv / "notes").write_text("of the old one")
        shutil.copy(machine.place / "requirements.txt", venv / "installed.txt")
        done, asked = machine.set_up()
        assert (
            done.returncode == 0 and "python3 -m venv .venv" in asked and any("pip install" in line for line in asked)
        )
        assert not (venv / "notes").exists()


def test_a_venv_that_was_moved_keeps_its_packages(machine):
    """Only what names the old folder is made again, by the Python that it is of."""
    machine.add("python3", "3.12.1")
    machine.set_up()
    (machine.place / ".venv" / "bin" / "activate").write_text("/old/place/.venv")
    (machine.place / ".venv" / "package").write_text("of the user's")
    done, asked = machine.set_up()
    assert done.returncode == 0 and "python3 -m venv .venv" in asked
    assert (machine.place / ".venv" / "package").exists()
    assert str(machine.place) in (machine.place / ".venv" / "bin" / "activate").read_text()


# ---- a checkout on Windows ----


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_scripts_have_their_line_ends_in_every_checkout(tmp_path):
    """A clone made with core.autocrlf=true, which turns others' text to CRLF."""
    source = tree(tmp_path / "source")
    (source / "notes.txt").write_text("one\ntwo\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.autocrlf=true"]
    for turn, attributes in (("without", None), ("with", ".gitattributes")):
        if attributes:
            shutil.copy(os.path.join(ROOT, attributes), source)
        for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
            subprocess.run([*git, *words], cwd=source, check=True, capture_output=True)
        subprocess.run([*git, "clone", "-q", source, tmp_path / turn], check=True, capture_output=True)
    assert b"\r\n" in read(tmp_path / "without" / "run.sh")  # the test can fail
    for script in SCRIPTS:
        assert b"\r" not in read(tmp_path / "with" / script), script


@pytest.mark.skipif(not shutil.which("dash"), reason="bash alone is here")
@pytest.mark.parametrize("script", ["run.sh", "test.sh", "exercises/grade.sh"])
def test_a_script_that_is_started_with_sh_goes_on_with_bash(script):
    """dash is the sh of Debian and Ubuntu."""
    command = ["dash", os.path.join(ROOT, script), "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": "no-such-python"})
    assert "Illegal option" not in done.stderr and done.stderr.count("\n") == 1 and "error: " in done.stderr
