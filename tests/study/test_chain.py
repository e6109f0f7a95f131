"""Jobs side by side: order, threads, logs, failures and signals, with small programs in the place of training. And that
all jobs of all studies read the same prepared text."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, error_line, run

from common.config import parse
from common.errors import UserError
from eval import EvalConfig
from finetune import FinetuneConfig
from mix import MixConfig
from study import ablate, compare, regime
from study.btm import EnsembleConfig
from study.chain import Chain, ChainConfig, Job, chain_of, follow, pipeline, run_jobs, terminal_width
from study.route import RouteConfig
from train import TrainConfig

NOTE = "import sys, time; open(sys.argv[1], 'a').write(sys.argv[2] + ' begins\\n'); time.sleep(float(sys.argv[3]));"
NOTE += " open(sys.argv[1], 'a').write(sys.argv[2] + ' ends\\n'); print(sys.argv[2], 'done')"


def job(name, notes, needs=(), seconds=0.3):
    return Job(name, ("-c", NOTE, str(notes), name, str(seconds)), needs)


def test_a_job_waits_for_what_it_needs_and_others_run_beside_it(tmp_path, capsys):
    notes = tmp_path / "notes"
    jobs = [job("c", notes, ("a", "b")), job("a", notes, seconds=0.8), job("b", notes, seconds=0.8)]
    run_jobs(jobs, str(tmp_path), slots=2)
    lines = notes.read_text().splitlines()
    assert sorted(lines[:2]) == ["a begins", "b begins"]  # before either ends: side by side
    assert lines.index("c begins") > max(lines.index("a ends"), lines.index("b ends"))
    assert capsys.readouterr().out.count("done") == 3
    assert (tmp_path / "logs" / "c.log").read_text() == "c done\n"


def test_one_slot_runs_one_at_a_time(tmp_path):
    notes = tmp_path / "notes"
    run_jobs([job("a", notes), job("b", notes)], str(tmp_path), slots=1)
    assert notes.read_text().splitlines() == ["a begins", "a ends", "b begins", "b ends"]


def test_jobs_side_by_side_have_one_thread_each_and_a_job_alone_has_all(tmp_path):
    code = "import os, time; time.sleep(0.5); print(os.environ.get('OMP_NUM_THREADS'))"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        jobs = [Job("a", ("-c", code)), Job("b", ("-c", code)), Job("last", ("-c", code), ("a", "b"))]
        run_jobs(jobs, str(tmp_path), slots=2)
    said = {name: (tmp_path / "logs" / f"{name}.log").read_text().strip() for name in ("a", "b", "last")}
    assert said == {"a": "1", "b": "1", "last": "None"}


def test_one_slot_gives_a_job_all_cores(tmp_path):
    code = "import os; print(os.environ.get('OMP_NUM_THREADS'))"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        run_jobs([Job("a", ("-c", code)), Job("b", ("-c", code))], str(tmp_path), slots=1)
    assert [(tmp_path / "logs" / f"{name}.log").read_text() for name in "ab"] == ["None\n"] * 2


def test_a_last_line_without_its_end_is_not_lost(tmp_path):
    run_jobs([Job("a", ("-c", "import sys; sys.stdout.write('first\\nlast')"))], str(tmp_path), slots=1)
    assert (tmp_path / "logs" / "a.log").read_text() == "first\nlast\n"


def test_a_failure_is_named_and_the_others_go_on(tmp_path):
    notes = tmp_path / "notes"
    broken = Job("broken", ("-c", "import sys; print('error: no such data'); sys.exit(2)"))
    jobs = [broken, job("a", notes), job("child", notes, ("broken",)), job("b", notes, ("a",))]
    with pytest.raises(UserError, match=r"broken failed \(error: no such data\); see .*logs/broken.log"):
        run_jobs(jobs, str(tmp_path), slots=2)
    assert notes.read_text().splitlines() == ["a begins", "a ends", "b begins", "b ends"]


def test_progress_bars_are_shown_and_not_logged(tmp_path):
    code = "print('first'); print('x: 10%|#', end='\\r'); print('x: 100%|##'); "
    code += "print('old; --overwrite=True'); print('end')"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    shown, said = [], []
    with open(tmp_path / "log", "w") as log:
        assert follow(process, log, shown.append, said.append) == "end"
    process.wait()
    assert (tmp_path / "log").read_text() == "first\nold; --overwrite=True\nend\n"
    assert shown == ["x: 10%|#", "x: 100%|##"] and said == ["old; --overwrite=True"]


def test_a_signal_is_passed_on(tmp_path):
    """A driver that is told to stop stops its job, which may save, and starts no other."""
    driver = f"""
import sys
sys.path.insert(0, {ROOT!r})
from study.chain import Job, run_jobs
code = "import signal, sys, time; signal.signal(15, lambda *_: (print('saved'), sys.exit(143)));"
code += "print('up', flush=True); time.sleep(60)"
run_jobs([Job("a", ("-c", code)), Job("b", ("-c", "print(1)"), ("a",))], {str(tmp_path)!r}, slots=1)
"""
    process = subprocess.Popen([sys.executable, "-c", driver])
    log = tmp_path / "logs" / "a.log"
    for _ in range(300):
        if log.exists() and "up" in log.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert log.read_text() == "up\nsaved\n" and not os.path.exists(tmp_path / "logs" / "b.log")


def test_a_domain_is_read_or_unread():
    with pytest.raises(UserError, match="--unread=mail,law: law is also in --domains"):
        ChainConfig(domains="code,law", unread="mail,law")


# ---- the data ----

SCRIPTS = {
    "train.py": TrainConfig,
    "mix.py": MixConfig,
    "finetune.py": FinetuneConfig,
    "eval.py": EvalConfig,
    "study.btm": EnsembleConfig,
    "study.route": RouteConfig,
}
SECONDS = {"branch": 1, "finetuning": 1, "dense": 1, "upcycling": 1}  # of a step


class Stop(Exception):
    """Raised where jobs would run."""


def jobs_of_all_studies(given, monkeypatch):
    """Every job that a study would run: [(script, arguments)]."""
    found = []

    def run(made, quiet=False):
        found.extend(made.jobs)
        raise Stop

    monkeypatch.setattr(Chain, "run", run)
    monkeypatch.setattr(compare, "step_seconds", lambda *_: SECONDS)
    made = Chain(ChainConfig(**given, forms=True, unread="snow"))
    pipeline(made)
    found += made.jobs
    for sweep in ("", "dense-cm,upcycle-cm,btx-paper,btx"):
        config = compare.CompareConfig(**given, sweep=sweep)
        with pytest.raises(Stop):
            compare.sweep(config) if sweep else compare.train_and_score(config, "2")
    with pytest.raises(Stop):
        regime.measure_point(regime.RegimeConfig(**given), 16, 0.5, 1)
    config = ablate.AblateConfig(**given)
    made = chain_of(config, config.out_dir, 1)
    for variant in ablate.VARIANTS:
        ablate.add_variant(config, made, ["a", "b", "c"], variant, 1)
    found += made.jobs
    arguments = [job.arguments for job in found]
    return [(one[1], one[2:]) if one[0] == "-m" else (one[0], one[1:]) for one in arguments]


@pytest.mark.parametrize("elsewhere", [True, False])
def test_every_job_reads_the_data_that_a_study_is_given(elsewhere, chain_configs, data, tmp_path, monkeypatch):
    """--data_dir, or what the stages' configs say where it is empty."""
    folder = tmp_path / "elsewhere"
    folder.symlink_to(data)
    given = {"configs": chain_configs, "out_dir": str(tmp_path / "out"), "domains": "math,rain"}
    jobs = jobs_of_all_studies({**given, "data_dir": str(folder) if elsewhere else ""}, monkeypatch)
    assert {script for script, _ in jobs} == SCRIPTS.keys() and len(jobs) > 100
    for script, arguments in jobs:
        assert parse(SCRIPTS[script], arguments).data_dir == (str(folder) if elsewhere else data), (script, arguments)


@pytest.mark.parametrize("size", ["cpu", "smollm"])
@pytest.mark.parametrize("task", ["", "ablate", "compare", "regime"])
@pytest.mark.parametrize("given", ["", "some/where"])
def test_run_sh_hands_data_to_all_that_it_starts(given, task, size, tmp_path):
    """What prepares the text writes there, and every study reads there."""
    (tmp_path / "python").write_text(f'#!/bin/sh\n[ "$1" = -c ] || echo "$@" >> {tmp_path}/said\n')
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(tmp_path / "python"), **({"DATA": given} if given else {})}
    subprocess.run(["bash", "run.sh", size, *([task] if task else [])], cwd=ROOT, env=environment, check=True)
    started = [line.split() for line in (tmp_path / "said").read_text().splitlines()]
    assert len(started) == (4 if size == "smollm" else 1) + (3 if task == "ablate" else 1)
    for _, name, *flags in started:
        if name.startswith("data."):
            assert [flag for flag in flags if flag.startswith("--out_dir=")] == (
                [f"--out_dir={given}"] if given else []
            )
        else:
            usual = f"out/{size}/data" if name == "study.route" else ""  # a chain finds it in its stages' configs
            assert f"--data_dir={given or usual}" in flags


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--out_dir=a,b", "use a name without commas"),
        ("--flags=--dtype='float32", "no closing quotation; quote it as in a shell"),
        ("--domains=", "no domain is left to branch on"),
    ],
)
def test_settings_that_no_chain_can_use(flag, words):
    message = error_line(run("study/chain.py", "--size=smoke", flag))
    assert flag.split("=")[0] in message and words in message


@pytest.mark.parametrize(("columns", "width"), [(0, 79), (1, 0), (20, 19)])
def test_terminals_of_every_width(columns, width, monkeypatch):
    monkeypatch.setattr(os, "get_terminal_size", lambda number: os.terminal_size((columns, 24)))
    monkeypatch.setattr(sys, "stderr", sys.__stderr__)
    assert terminal_width() == width
