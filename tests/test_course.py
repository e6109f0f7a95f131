"""The course: exercises that grade as they should, a lecture whose numbers are true, a notebook that runs."""

import ast
import contextlib
import glob
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from helpers import ROOT, SHORT, error_line, must, prose, read, read_json, read_log, run

import model
from common.config import parse
from common.errors import UserError
from data.prepare import DataConfig
from eval import EvalConfig
from exercises import grade as grade_file
from exercises import leaderboard
from exercises.solution.routers import rows
from exercises.strip import EXERCISES, OWN, copied_files, definitions, make_copy, open_answers, strip
from finetune import FinetuneConfig
from mix import MixConfig
from study import chain as chain_file
from study.chain import ChainConfig
from study.report import differences
from train import TrainConfig


def source(path):
    return read(os.path.join(ROOT, path)).decode()


# ---- stripping ----


@pytest.mark.parametrize("path", EXERCISES)
def test_stripped_functions_have_their_signature_and_docstring_alone(path):
    text, tasks = source(path), EXERCISES[path]
    stub = strip(text, tasks)
    before, after = definitions(text), definitions(stub)
    assert before.keys() == after.keys()
    for name, node in after.items():
        if name in tasks:
            assert ast.dump(before[name].args) == ast.dump(node.args)
            assert ast.get_docstring(before[name]) == ast.get_docstring(node)
            *docstring, error = node.body
            assert (
                len(docstring) <= 1
                and ast.unparse(error) == f"raise NotImplementedError('exercise {tasks[name].split('.')[0]}')"
            )
        elif not isinstance(node, ast.ClassDef):
            assert ast.get_source_segment(text, before[name]) == ast.get_source_segment(stub, node)
    assert stub.count('raise NotImplementedError("exercise') == len(tasks)
    for name in tasks:
        body = "\n".join(text.splitlines()[before[name].body[-1].lineno - 1 : before[name].end_lineno])
        assert body.strip() and body not in stub


def test_the_solved_copy_is_the_tree_and_the_students_differs_in_the_exercises(tmp_path):
    make_copy(tmp_path / "solved", solution=True)
    make_copy(tmp_path / "student")
    for target, path in copied_files().items():
        assert read(tmp_path / "solved" / target) == read(os.path.join(ROOT, path)), target
        same = read(tmp_path / "student" / target) == read(os.path.join(ROOT, path))
        assert same == (path not in EXERCISES and path != f"{OWN}predictions.json"), target
    own = {target for target in copied_files() if target.startswith("exercises")}
    assert own == {
        f"exercises/{name}" for name in ("__init__.py", "compute.py", "muon.py", "predictions.json", "routers.py")
    }


@pytest.mark.parametrize("folder", ["common", "data", "study"])
def test_the_students_copy_has_all_that_is_read(folder):
    """Also what is no Python: text and templates are read when data is prepared."""
    files = {os.path.join(path, name) for path, _, names in os.walk(os.path.join(ROOT, folder)) for name in names}
    files = {os.path.relpath(path, ROOT) for path in files if "__pycache__" not in path}
    assert files <= set(copied_files()) and len(files) >= 10


def test_methods_nested_indents_and_docstrings_survive():
    head = 'def f(x):\n    """Doc."""\n'
    text = f"{head}    # why\n    return x\n\n\n"
    text += 'class A:\n    def g(self):\n        """Two\n        lines."""\n        if self:\n            return 1\n'
    text += "        return 2\n\n    y = 1\n\n    def h(\n        self,\n    ):\n"
    text += "        for _ in self:\n            return 3\n        return 4\n"
    tasks = {"f": "7. Do f.", "A.g": "7. Do g,\nwell.", "A.h": "8. Do h."}
    stub = strip(text, tasks)
    assert "return" not in stub and "        # well.\n" in stub and "\n    y = 1\n" in stub and "for _" not in stub
    assert stub.startswith(f'{head}    # Exercise 7. Do f.\n    raise NotImplementedError("exercise 7")\n\n\nclass A:')
    assert stub.endswith('    ):\n        # Exercise 8. Do h.\n        raise NotImplementedError("exercise 8")\n')
    with pytest.raises(KeyError, match="missing"):
        strip(text, {"missing": "7. Do it."})


def test_no_answer_is_left_open_in_the_students_copy():
    text = source(f"{OWN}predictions.json")
    assert json.loads(open_answers(text)) == dict.fromkeys(json.loads(text), "?")


# ---- grading ----


def grade(*arguments):
    """The last line of exercises/grade.py and everything before it."""
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, "exercises", "grade.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def total():
    """How many tests there are, counted without grade.py."""
    folder = os.path.join(ROOT, "exercises", "tests")
    return sum(source(f"exercises/tests/{name}").count("\ndef test_") for name in os.listdir(folder) if "test_" in name)


def test_the_solution_scores_everything(total):
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", os.path.join(ROOT, "exercises", "grade.sh"), "--solution"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == f"points: {total} of {total}", done.stdout
    assert done.stdout.startswith(source(f"{OWN}answers.md"))


MISTAKES = [  # (exercise, file, right, wrong)
    (
        1,
        "model.py",
        "return top_logits.softmax(dim=-1), experts",
        "return logits.softmax(-1).gather(1, experts), experts",
    ),
    (2, "model.py", "usage = gates.mean(dim=0)", "usage = gates.detach().mean(dim=0)"),
    (
        3,
        "model.py",
        "rows = rows.index_select(0, order.argsort())",
        "rows = rows.index_select(0, order)",
    ),
    (4, "mix.py", "total = torch.zeros(piece.shape, dtype=torch.float64)", "total = torch.zeros(piece.shape)"),
    (5, "mix.py", "generator=generator(seed, expert))", "generator=generator(seed, name))"),
    (6, "study/btm.py", "if not self.prefix:", "if self.prefix:"),
    (7, "study/btm.py", "scatter(-1, nearest, -math.log(self.k))", "scatter(-1, nearest, 0.0)"),
    (8, "exercises/compute.py", "shape.num_experts_per_tok / shape.num_local_experts", "1"),
    (9, "exercises/routers.py", "scores / scores.sum(dim=-1, keepdim=True), experts", "scores, experts"),
    (10, "exercises/routers.py", "dim=0).indices", "dim=0).indices[:1]"),
    (11, "exercises/muon.py", "x.norm(dim=(-2, -1), keepdim=True)", "x.norm()"),
    (12, "exercises/predictions.json", '"btx"', '"dense"'),
]


def test_a_mistake_costs_points_in_its_exercise(tmp_path):
    """All typical mistakes at once: every exercise loses something, and none of them everything."""
    make_copy(tmp_path / "copy", solution=True)
    for _, path, right, wrong in MISTAKES:
        text = read(tmp_path / "copy" / path).decode()
        assert right in text, right
        (tmp_path / "copy" / path).write_text(text.replace(right, wrong))
    lines = grade(tmp_path / "copy")
    scores = {int(line.split()[0]): re.search(r"(\d+) of (\d+)", line).groups() for line in lines[:-1]}
    assert sorted(scores) == [number for number, *_ in MISTAKES]
    for number, (points, possible) in scores.items():
        assert 0 < int(points) < int(possible), (number, points)


def test_a_copy_that_cannot_be_imported_still_has_a_grade(tmp_path):
    make_copy(tmp_path / "copy", solution=True)
    (tmp_path / "copy" / "mix.py").write_text("def mix(:\n")
    assert grade(tmp_path / "copy", 4)[-1].startswith("points: 0 of ")


WRONG = [  # (file, function, what it does instead)
    ("study/btm.py", "expert_profiles", "return torch.zeros(2**36)"),  # more memory than there is
    ("exercises/compute.py", "training_flops", "import os; os._exit(0)"),
    ("exercises/routers.py", "sigmoid", "while True: pass"),
    ("exercises/muon.py", "split_parameters", "while True: print('lost in a loop', 'é' * 10**6)"),
]


def test_code_that_hangs_or_ends_the_process_costs_its_own_exercise_alone(tmp_path, monkeypatch, capsys):
    """A loop without an end, one that prints, an exit, memory without bounds, and an exit where a file is imported."""
    make_copy(tmp_path / "copy", solution=True)
    for path, name, body in WRONG:
        text = read(tmp_path / "copy" / path).decode()
        lines = text.splitlines(keepends=True)
        lines.insert(definitions(text)[name].body[0].lineno - 1, f"    {body}\n")
        (tmp_path / "copy" / path).write_text("".join(lines))
    with open(tmp_path / "copy" / "mix.py", "a") as file:
        file.write("raise SystemExit(0)\n")
    monkeypatch.setattr(grade_file, "SECONDS", 8)
    grade_file.main(str(tmp_path / "copy"))
    *rows, last = capsys.readouterr().out.splitlines()
    scores = {int(row.split()[0]): tuple(map(int, re.search(r"(\d+) of (\d+)", row).groups())) for row in rows}
    assert {number for number, (points, possible) in scores.items() if points == possible} == {1, 2, 3, 6, 10, 12}
    assert len(scores) == 12 and scores[11][0] > 0
    assert "not done after 8 seconds" in rows[8] and "pytest ended with code 0" in rows[7]
    assert last == f"points: {sum(points for points, _ in scores.values())} of {sum(of for _, of in scores.values())}"


def test_a_copy_in_which_nothing_starts_has_a_grade(tmp_path, total):
    """A file of the student's takes the place of one that Python needs."""
    make_copy(tmp_path / "copy")
    (tmp_path / "copy" / "signal.py").write_text("raise SystemExit(1)\n")
    assert grade(tmp_path / "copy")[-1] == f"points: 0 of {total}"


@pytest.mark.parametrize(("router", "k"), [("sigmoid", 2), ("expert-choice", 3)])
def test_the_solutions_routers_go_through_finetuning(router, k, data, mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "ROUTERS", {**model.ROUTERS, **rows()})
    flags = f"--data_dir={data}", f"--init_from={mixed}", f"--out_dir={tmp_path / 'btx'}", f"--router={router}"
    must(run("finetune.py", *SHORT, *flags))
    first, *_, last = read_log(tmp_path / "btx")
    assert last["bpb"]["avg"] < first["bpb"]["avg"]
    assert read_json(tmp_path / "btx" / "config.json")["num_experts_per_tok"] == k


# ---- what is handed out ----


@pytest.fixture(scope="module")
def handed_out(tmp_path_factory):
    """What exercises/zip.sh has made of a copy of this tree, unzipped."""
    tree, folder = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("unzipped")
    for path in os.listdir(ROOT):
        if path not in (".git", ".venv", "out", "student"):
            os.symlink(os.path.join(ROOT, path), tree / path)
    os.unlink(tree / "exercises")  # where a script looks for its root
    shutil.copytree(os.path.join(ROOT, "exercises"), tree / "exercises")
    done = subprocess.run(
        ["bash", tree / "exercises" / "zip.sh"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    shutil.unpack_archive(tree / "out" / "nanobtx-exercises.zip", folder)
    [top] = os.listdir(folder)
    return folder / top


def bodies(path):
    """{function: its body without the docstring, each line stripped} of those that strip.py empties in a file."""
    nodes = {name: definitions(source(path))[name] for name in EXERCISES[path]}
    kept = {name: node.body[ast.get_docstring(node) is not None :] for name, node in nodes.items()}
    lines = source(path).splitlines()
    return {name: plain(lines[body[0].lineno - 1 : nodes[name].end_lineno]) for name, body in kept.items()}


def plain(lines):
    return "\n".join(line.strip() for line in lines if line.strip())


def test_nothing_solved_is_handed_out(handed_out):
    """Neither in the file that it was in nor in any other."""
    files = [os.path.join(path, name) for path, _, names in os.walk(handed_out) for name in names]
    names = {os.path.relpath(path, handed_out) for path in files}
    assert {"AGENTS.md", "model.py", "setup.sh", "exercises/muon.py", "exercises/tests/test_04_mix.py"} <= names
    assert not [name for name in names if "solution" in name or ".git" in name or name.endswith(".pyc")]
    found = {path: plain(read(path).decode(errors="replace").splitlines()) for path in files}
    solved = {name: body for path in EXERCISES for name, body in bodies(path).items()}
    assert len(solved) == 20 and all(solved.values())
    for name, body in solved.items():
        assert [path for path, text in found.items() if body in text] == [], name
    assert set(json.loads(read(handed_out / "exercises" / "predictions.json")).values()) == {"?"}


def test_pages_that_are_handed_out_link_to_what_is_there(handed_out):
    pages = glob.glob("**/*.md", root_dir=handed_out, recursive=True)
    assert {"docs/lecture.md", "exercises/README.md", "AGENTS.md"} <= {*pages}
    for page in pages:
        for link in re.findall(r"\]\(([^)\s#]+)", prose(source(handed_out / page))):
            there = os.path.join(handed_out, os.path.dirname(page), link)
            assert link.startswith("https://") or os.path.exists(there), f"{page}: {link}"
    lecture, course = source(handed_out / "docs" / "lecture.md"), source(handed_out / "exercises" / "README.md")
    assert "![Four tokens" in lecture and "](regime.md)" in lecture and "](variants.md)" not in lecture
    assert "solution/" not in course and "](../docs/lecture.md)" in course


def test_what_is_handed_out_scores_nothing(handed_out, total):
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", handed_out / "exercises" / "grade.sh"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 0 and last == f"points: 0 of {total}", done.stdout
    assert last in source("exercises/README.md") and last in source("docs/teaching.md")


# ---- the leaderboard ----

SMALL = "--max_steps=6 --freeze=embeddings,attention,norms"


def board(configs, out, entry, *more):
    """What exercises/leaderboard.py says of an entry."""
    flags = f"--configs={configs}", f"--out_dir={out}", "--domains=math,rain", "--seeds=3", *more
    return run("exercises/leaderboard.py", entry, *flags)


def test_an_entry_runs_as_it_says_and_the_next_meets_it(chain_configs, in_this_process, tmp_path):
    (tmp_path / "short.py").write_text(
        f"train_flags = '{SMALL} --learning_rate=4e-3'\nmix_flags = '--drop=0.5'\nfinetune_flags = '--max_steps=7'\n"
    )
    (tmp_path / "dense.py").write_text("method = 'dense'\ntrain_flags = '--max_steps=5 --learning_rate=2e-3'\n")
    first = must(board(chain_configs, tmp_path / "out", tmp_path / "short.py")).out
    assert first.splitlines()[-1] == "no other entry has these random seeds"
    last = must(board(chain_configs, tmp_path / "out", tmp_path / "dense.py")).out.splitlines()[-1]
    assert re.fullmatch(r"short has \d\.\d{4}; a test needs two random seeds", last)
    (tmp_path / "copies.py").write_text(
        "method = 'upcycle'\nmix_flags = '--drop=0.25'\nfinetune_flags = '--max_steps=3'\n"
    )
    last = must(board(chain_configs, tmp_path / "out", tmp_path / "copies.py", "--split=val")).out.splitlines()[-1]
    assert last == "no other entry has these random seeds"  # on validation text
    folder = tmp_path / "out" / "seed3"
    assert read_json(folder / "report-val" / "results.json")["config"]["split"] == "val"
    copies = [read_json(folder / name / "run.json")["recipe"] for name in ("parts/copies/mixed", "entries/copies")]
    assert [recipe["config"].get("drop") for recipe in copies] == [0.25, None]
    assert copies[0]["config"]["experts"].split(",") == [str(folder / "seed")] * 3
    recipes = {}
    for name in ("parts/short/expert-math", "parts/short/mixed", "entries/short", "entries/dense"):
        recipes[name] = read_json(folder / name / "run.json")["recipe"]["config"]
    values = [
        [recipe.get(name) for name in ("max_steps", "learning_rate", "freeze", "drop", "seed")]
        for recipe in recipes.values()
    ]
    assert values == [
        [6, 4e-3, "embeddings,attention,norms", None, 3],
        [None, None, None, 0.5, 3],
        [7, 3e-3, "none", None, 3],
        [5, 2e-3, "none", None, 3],
    ]


def test_an_entry_over_the_budget_is_refused_with_both_numbers(chain_configs, tmp_path):
    """A step of finetuning too many; or a third expert for each token, which its flags in the mixing ask for."""
    (tmp_path / "long.py").write_text("finetune_flags = '--max_steps=13'\n")
    said = board(chain_configs, tmp_path / "out", tmp_path / "long.py")
    flops, most = map(float, re.search(r"takes (\S+) FLOPs after the seed; the budget is (\S+);", said.err).groups())
    assert said.code == 2 and said.err.count("\n") == 1 and flops > most
    chain = leaderboard.chain_for(
        leaderboard.BoardConfig(configs=chain_configs, domains="math,rain"), leaderboard.Entry(), 3
    )
    assert flops - most == pytest.approx(8 * 32 * chain.budget.mixture_flops, rel=1e-2)
    assert most == pytest.approx(chain.budget.flops, rel=1e-3)
    more = leaderboard.Entry(mix_flags="--num_experts_per_tok=3")
    assert leaderboard.planned_flops(chain, more) > chain.budget.flops
    assert not os.path.exists(tmp_path / "out")


@pytest.mark.parametrize("flags", ["--seed=4", "--data_dir=elsewhere", "config/cpu/expert.py", "--learning_rat=1"])
def test_what_is_fixed_is_not_for_an_entry(flags):
    with pytest.raises(UserError):
        leaderboard.Entry(train_flags=flags)


def test_upcycling_has_no_branches_and_dense_training_no_mixture():
    with pytest.raises(UserError, match="trains no branches; use finetune_flags"):
        leaderboard.Entry(method="upcycle", train_flags="--max_steps=4")
    with pytest.raises(UserError, match="mixes nothing; use train_flags"):
        leaderboard.Entry(method="dense", finetune_flags="--max_steps=4")
    with pytest.raises(UserError, match="may not set --method=soup"):
        leaderboard.Entry(mix_flags="--method=soup")


def test_random_seeds_count_once(chain_configs, tmp_path):
    entry = os.path.join(ROOT, "exercises", "entries", "ours.py")
    for seeds in ("", "3,4,3"):
        said = board(chain_configs, tmp_path / "out", entry, f"--seeds={seeds}")
        assert "name random seeds, each once" in error_line(said)


def test_a_router_that_asks_more_experts_spends_more(chain_configs):
    """Soft routing asks three of three experts where top-2 asks two, switch one."""
    config = leaderboard.BoardConfig(configs=chain_configs, domains="math,rain")
    flops = {}
    for router in ("topk", "soft", "switch"):
        entry = leaderboard.Entry(finetune_flags=f"--router={router}")
        chain = leaderboard.chain_for(config, entry, 3)
        flops[router] = leaderboard.planned_flops(chain, entry)
    assert flops["soft"] - flops["topk"] == pytest.approx(flops["topk"] - flops["switch"], rel=1e-6)
    assert flops["switch"] < flops["topk"] == pytest.approx(chain.budget.flops)


def test_what_took_too_much_is_not_scored(chain_configs, in_this_process, monkeypatch, tmp_path):
    """An entry that the plan takes for cheap: its logs tell, and no later entry meets it."""
    (tmp_path / "sly.py").write_text(f"train_flags = '{SMALL}'\nfinetune_flags = '--max_steps=7'\n")
    monkeypatch.setattr(chain_file, "flops_per_token", lambda *_: 1.0)
    said = board(chain_configs, tmp_path / "out", tmp_path / "sly.py")
    assert "FLOPs after the seed; the budget is" in error_line(said)
    assert os.path.exists(tmp_path / "out/seed3/entries/sly") and not os.path.exists(tmp_path / "out/seed3/report")


@pytest.mark.parametrize("name", ["ours", "paper", "dense", "upcycle"])
def test_the_first_entries_spend_the_budget(name, monkeypatch):
    """All of it but for a thousandth: of the lesson's 512 tokens and three domains."""
    domains = ("code", "math", "wiki")
    corpus = SimpleNamespace(
        encoding=SimpleNamespace(n_vocab=512, eot_token=0), mixture=lambda _: dict.fromkeys(domains, 1 / 3)
    )
    monkeypatch.setattr(chain_file, "Corpus", lambda *_: corpus)
    monkeypatch.chdir(ROOT)
    entry = parse(leaderboard.Entry, [f"exercises/entries/{name}.py"])
    flops, most = (
        leaderboard.planned_flops(leaderboard.chain_for(leaderboard.BoardConfig(), one, 1), one)
        for one in (entry, leaderboard.Entry())
    )
    assert 0.999 * most <= flops <= most


def test_the_board_comes_from_its_runs_and_entries_have_the_best_rates_tried():
    found = json.loads(source("results/lesson/leaderboard.json"))
    board = found["test"]
    means = {name: statistics.mean(scores) for name, scores in board.items()}
    best = min(means, key=means.get)
    lines = re.findall(
        r"^\| \[(\w+)\]\(entries/\w+\.py\).*? \| (\S+) \| ?(.*?) ?\|$", source("exercises/README.md"), re.M
    )
    assert [name for name, *_ in lines] == sorted(means, key=means.get)
    for name, score, saved in lines:
        assert score == f"{means[name]:.4f}" and len(board[name]) == len(found["seeds"]) == 3
        if name == best:
            assert not saved and not found["saved_against_upcycle"].get(best)
            continue
        one = found["saved_against_upcycle"][name]
        assert one["lead"] == pytest.approx(means[best] - means[name], abs=2e-4)
        assert saved == f"{one['lead']:+.4f} ± {one['half']:.4f}"
    for name, tried in found["tried_with_seed_100_on_val"].items():
        entry = parse(leaderboard.Entry, [os.path.join(ROOT, "exercises", "entries", f"{name}.py")])
        chosen = min(tried, key=lambda one: one["bpb"])
        for stage in {"train", "finetune"} & {*chosen}:
            assert f"--learning_rate={chosen[stage]}" in getattr(entry, f"{stage}_flags").split()


def made_up(name, bits):
    """A row of results.json of one domain: the bits of four windows of 10 bytes each."""
    score = sum(bits) / 40
    return {"name": name, "bpb": {"math": score, "avg": score}, "bits": {"math": bits}, "bytes": {"math": [10] * 4}}


def test_a_record_takes_a_paired_test():
    """Windows that all save the same leave the random seeds alone: savings of 0.1, 0.2 and 0.3 have the bootstrap's
    error 0.1 / sqrt(3), t = 2 sqrt(3) with two degrees of freedom, p = 0.0742; nearly equal ones have less."""

    def chains(savings):
        rows = [[made_up("old", [10.0] * 4), made_up("worse", [20.0] * 4)] for _ in savings]
        return [[*two, made_up("new", [10.0 - 10 * saving] * 4)] for two, saving in zip(rows, savings, strict=True)]

    line, test = leaderboard.verdict("new", chains([0.1, 0.2, 0.3])).splitlines()
    assert line == "new: 0.8000 bits per byte (0.9000, 0.8000, 0.7000)"
    saved, p, words = re.fullmatch(r"(\S+) ± \S+ saved against old \(1\.0000\), p = (\S+): (.*)", test).groups()
    assert float(saved) == pytest.approx(0.2) and float(p) == pytest.approx(0.0742, abs=0.004)
    assert words == "not a record"
    assert leaderboard.verdict("new", chains([0.2, 0.2, 0.21])).endswith(": a new record")
    assert leaderboard.verdict("new", chains([0.2, 0.2])).endswith(": a record needs 3 random seeds")
    assert leaderboard.verdict("new", chains([0.2, 0.2, 0.21]), "val").endswith(": validation text sets no record")
    assert leaderboard.verdict("new", chains([-0.2, -0.2, -0.21])).endswith(": not a record")


# ---- documents ----


def test_marks_and_hours_add_up():
    """As docs/teaching.md says: 66 marks of 100 for the tests, fifteen hours of exercises."""
    rows = re.findall(r"^\| (\d+) \| .* \| ([\d.]+) \| (\d+) \|$", source("exercises/README.md"), re.M)
    numbers, hours, marks = (list(map(float, column)) for column in zip(*rows, strict=True))
    stripped = {int(task.split(".")[0]) for tasks in EXERCISES.values() for task in tasks.values()}
    assert numbers == [*sorted(stripped), 12] and sum(hours) == 15 and sum(marks) == 66


def numbers(text):
    """(the text with every number replaced, the numbers)"""
    pattern = r"-?\d+(?:\.\d+)?"
    return re.sub(pattern, "#", text), [float(number) for number in re.findall(pattern, text)]


def test_the_lectures_snippets_print_what_stands_below_them():
    """To the letter; numbers to a hundredth, or 5 %, since training on another machine rounds otherwise."""
    blocks = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", source("docs/lecture.md"), re.S)
    assert len(blocks) >= 10 and source("docs/lecture.md").count("```python") == len(blocks)
    namespace = {}
    for code, printed in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(code, namespace)
        words, found = numbers(out.getvalue())
        expected_words, expected_numbers = numbers(printed)
        assert words == expected_words
        assert found == pytest.approx(expected_numbers, abs=0.011, rel=0.05), out.getvalue()


def to_number(text):
    return float(text.replace("\N{MINUS SIGN}", "-"))


def test_the_figure_of_the_layer_shows_what_the_layer_does():
    """Its logits go through a MoE whose tokens are unit vectors, so the router's weights are the logits themselves."""
    shown = {}
    for text in ElementTree.parse(os.path.join(ROOT, "docs", "moe_layer.svg")).iterfind(".//{*}text"):
        for name in text.get("class", "").split():
            shown.setdefault(name, []).append(text.text)
    logits = torch.tensor([to_number(said) for said in shown["logit"]]).view(4, 3)
    gates, experts = model.topk(logits, 2, None)
    pairs = list(zip(gates.flatten().tolist(), experts.flatten().tolist(), strict=True))
    assert shown["gate"] == [f"expert {e}: {g:.2f}" for g, e in pairs]
    assert shown["sum"] == [f"{g:.2f} × expert {e}" for g, e in pairs]
    said = torch.tensor([float(text.split(": ")[1]) for text in shown["gate"]]).view(4, 2)
    assert said.sum(dim=1).tolist() == pytest.approx([1] * 4)  # after rounding, too

    sizes = {"vocab_size": 4, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 4}
    layer = model.MoE(model.ModelConfig(**sizes, num_local_experts=3, num_experts_per_tok=2))
    layer.gate.weight.data = torch.nn.functional.pad(logits.T, (0, 4))  # (E, D)
    seen = []
    layer.experts.register_forward_pre_hook(lambda _, given: seen.extend(given))
    layer(torch.eye(4, 8)[None])
    words = shown["token"][:4]
    assert words == shown["token"][4:]  # in and out
    assert shown["row"] == [words[token] for token in seen[0].argmax(dim=1)]
    assert shown["ends"] == [f"ends: {', '.join(map(str, seen[1].tolist()))}"]
    assert sorted(map(to_number, shown["kept"])) == sorted(logits.topk(2).values.flatten().tolist())


def test_the_notebook_runs_from_top_to_bottom(work, data, seed, experts, mixed, btx, monkeypatch, capsys):
    notebook = json.loads(source("docs/open_a_mixture.ipynb"))
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    monkeypatch.setenv("MIXTURE", work)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(ROOT)
    namespace = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)
    out = capsys.readouterr().out
    assert "stacked True" in out and "stacked False" not in out
    assert "without expert-math it is" in out and len(namespace["cost"]) == 3


def test_the_map_names_lines_that_are_there():
    rows = re.findall(r"\| \[([\w/.]+)\]\(\.\./([\w/.]+)\) \| `(.+?)` \|", source("docs/paper_map.md"))
    assert len(rows) >= 25
    for name, path, line in rows:
        assert name == path
        assert line in [text.strip() for text in source(path).splitlines()], f"{path}: {line}"


def test_links_of_the_course_lead_somewhere():
    for page in (
        "docs/lecture.md",
        "docs/teaching.md",
        "docs/paper_map.md",
        "exercises/README.md",
        "exercises/predictions.md",
        "exercises/solution/answers.md",
    ):
        for link in re.findall(r"\]\(([^)#]+)", source(page)):
            path = os.path.join(ROOT, os.path.dirname(page), link)
            assert link.startswith("https://") or os.path.exists(path), f"{page}: {link}"


# ---- the lesson ----


def table(**changes):
    return {name: {"bpb": {"avg": value}} for name, value in {"btx": 1.2, "dense": 1.3, **changes}.items()}


def test_a_table_is_compared_with_what_is_expected():
    wanted = {"bpb": {"btx": {"avg": [1.21, 0.02]}}, "ahead": [["btx", "dense", "avg", 0.05]]}
    assert [holds for _, holds in differences(table(), wanted)] == [True, True]
    assert [holds for _, holds in differences(table(btx=1.25), wanted)] == [False, True]
    assert [holds for _, holds in differences(table(dense=1.22), wanted)] == [True, False]


def test_the_lessons_configs_are_valid():
    flags = parse(ChainConfig, [os.path.join(ROOT, "config", "lesson", "chain.py")]).dense_flags.split()
    assert parse(TrainConfig, [os.path.join(ROOT, "config", "lesson", "expert.py"), *flags]).learning_rate == 6e-3
    classes = {"data": DataConfig, "seed": TrainConfig, "expert": TrainConfig, "mix": MixConfig}
    for stage, cls in {**classes, "finetune": FinetuneConfig, "eval": EvalConfig}.items():
        config = parse(cls, [os.path.join(ROOT, "config", "lesson", f"{stage}.py")])
        assert (
            config.out_dir.startswith("out/lesson/")
            and getattr(config, "data_dir", "out/lesson/data") == "out/lesson/data"
        )


def test_expected_results_of_the_lesson_are_complete():
    wanted = json.loads(source("config/lesson/expected.json"))
    assert {"seed", "soup", "mixed", "btx", "dense-cm"} <= wanted["bpb"].keys()
    assert ["btx", "dense-cm"] in [pair[:2] for pair in wanted["ahead"]]
    assert ["btx", "soup"] in [pair[:2] for pair in wanted["ahead"]]


def test_a_copy_is_never_written_over_work(tmp_path):
    done = subprocess.run([sys.executable, "-m", "exercises.strip", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "already exists" in done.stderr
    assert must(run("exercises/strip.py", tmp_path / "student")).out.endswith("functions to write\n")


def test_the_measured_predictions_are_the_committed_ones():
    measured = json.loads(source(f"{OWN}measured.json"))
    found, crossing = measured["branches"], measured["crossing"]
    page = source(f"{OWN}answers.md")
    assert all(f"{value:.3f}" in page for values in crossing["lesson"].values() for value in values)
    assert all(f"{sum(values) / len(values):.3f}" in page for values in crossing["smoke"].values())
    for row in found:
        cells = " | ".join(f"{row[name]:.3f}" for name in ("experts_at_home", "soup", "mixed", "btx"))
        assert re.search(rf"\| {row['steps']:,} \| [\w -]+ \| {re.escape(cells)} \|", page), cells
    _, short, long = found
    change = {name: long[name] - short[name] for name in ("experts_at_home", "soup", "btx")}
    words = {name: "same" if abs(d) <= 0.02 else "better" if d < 0 else "worse" for name, d in change.items()}
    answers = json.loads(source(f"{OWN}predictions.json"))
    for size, scores in crossing.items():
        assert answers[f"{size}_ahead"] == ("btx" if max(scores["btx"]) < min(scores["dense"]) else "dense")
    assert {name: answers[name] for name in words} == words


def test_what_a_copy_lacks_is_not_taken_from_the_solved_source(tmp_path, total):
    make_copy(str(tmp_path / "copy"))
    os.remove(tmp_path / "copy" / "model.py")
    lines = grade(tmp_path / "copy")
    assert "lacks model.py" in lines[0] and lines[-1] == f"points: 0 of {total}"
