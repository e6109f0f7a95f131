"""How a run stands: which recipe a folder holds, how far it has come, and what came before it.

    run.json    how the weights came to be: recipe, progress, and the cost of every run behind them
    state.pt    weights, optimizer and position, to resume training from; see common/state.py
    log.jsonl   one line per evaluation
    README.md   the model card of a finished run

A recipe is a run's config with the hashes of its data, of the source code that decides its result, and of its
parents. A folder that holds a run of another recipe is refused, so nothing is overwritten and nothing stale is taken
for fresh. A finished run whose weights are missing or damaged counts as unfinished.
"""

import ast
import contextlib
import fcntl
import hashlib
import io
import json
import os
import platform
import tokenize
from importlib.metadata import version

from common.card import CARD, write_card
from common.errors import UserError
from common.files import read_json, write_json
from common.shape import read_config
from common.state import STATE, remove_shards
from common.weights import WEIGHTS, fingerprint, remove_weights, weights_hash

LOG = "log.jsonl"
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# ---- recipes ----


def hash_of(value):
    """16 hex digits that are equal for equal values: for a recipe, they stand for the weights that it leads to."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def bare(source):
    """Python source without comments, docstrings and blank lines: two texts of one program are equal."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
            lines[first.lineno - 1 : first.end_lineno] = [""] * (first.end_lineno - first.lineno + 1)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def code_hashes(*files):
    """{file: hash of its bare source}, paths from the repository's root: a recipe's "code"."""
    found = {}
    for name in files:
        with open(os.path.join(ROOT, name), encoding="utf-8") as file:
            found[name] = hash_of(bare(file.read()))
    return found


def code_changed(made, old, new, same_code):
    """Whether the source differs between `old`, with which the file or folder `made` was made, and `new`, both from
    code_hashes. UserError when it does, unless `same_code`."""
    files = [name for name, value in new.items() if old.get(name) != value]
    if files and not same_code:
        raise UserError(
            f"{' and '.join(files)} changed since {made} was made; --overwrite=True makes it anew, --same_code=True "
            "keeps it, where the change does not touch its result"
        )
    return bool(files)


def versions():
    """{name: version} of what decides a run's digits."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy")}}


def _flatten(recipe):
    """{"a": {"b": 1}} -> {"a.b": 1}, to name what differs between two recipes."""
    flat = {}
    for name, value in recipe.items():
        inner = _flatten(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{name}.{key}".strip("."): one for key, one in inner.items()}
    return flat


def _changed(old, new):
    """'a 1 -> 2, b.c 3 -> 4': where two recipes differ, three places at most; '' for equal ones."""
    old, new = _flatten(old), _flatten(new)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} {old.get(name)!r} -> {new.get(name)!r}" for name in names[:3])


# ---- run.json ----


def read_run(folder):
    """run.json of a folder, or None. A foreign checkpoint has none."""
    path = os.path.join(folder, "run.json")
    if not os.path.exists(path):
        return None
    run = read_json(path, "delete the folder and run again")
    if not isinstance(run, dict) or not {"id", "recipe", "step", "finished", "history"} <= run.keys():
        raise UserError(f"{path} is no run.json of this project; delete the folder and run again")
    return run


def write_run(folder, run):
    write_json(os.path.join(folder, "run.json"), run, indent=2)


def finish_run(folder, run, weights=None):
    """Write the model card and run.json of a run whose weights are complete, with their hash: `weights` where the
    caller knows it, since large ones take long to read."""
    write_card(folder, run, read_config(folder))
    write_run(folder, {**run, "finished": True, "weights": weights or weights_hash(folder)})


def is_intact(folder, run):
    """Whether the weights of a finished run are there and as they were written."""
    found = weights_hash(folder)
    return found is not None and found == run.get("weights")


@contextlib.contextmanager
def locked(folder, create=False):
    """Keep other processes out of a folder; UserError when one is in there. The lock ends with its process, also
    with one that is killed. A folder that is not there yet is left alone unless `create`."""
    if create:
        os.makedirs(folder, exist_ok=True)
    elif not os.path.isdir(folder):
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"another process is writing into {folder}; let it finish, or choose another --out_dir"
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)


def find_run(folder, recipe, overwrite=False, same_code=False):
    """(run.json of a folder that holds a run of this recipe, True), or (a fresh one, not written yet, False).

    Refuses a folder that holds another run, unless `overwrite`, which always starts anew; one whose source code has
    changed since, unless `overwrite` or `same_code`; one that the run itself starts from; and files not of a run.
    """
    fresh = {"id": hash_of(recipe), "recipe": recipe, "step": 0, "finished": False, "history": {}}
    behind = {name for parent in recipe["parents"] for name in (parent, *parent_of(parent)[1])}
    for name in behind:
        if os.path.realpath(name) == os.path.realpath(folder):
            raise UserError(f"--out_dir={folder} holds weights that this run starts from; choose another --out_dir")
    run = read_run(folder)
    if run is None:
        if os.path.isdir(folder) and set(os.listdir(folder)) - {"run.json.tmp"}:  # left by a kill in write_run
            raise UserError(f"{folder} holds files that are not of a run; choose another --out_dir or empty it")
        return fresh, False
    if overwrite:
        return fresh, False
    if difference := _changed({**run["recipe"], "code": recipe["code"]}, recipe):
        raise UserError(f"{folder} holds another run ({difference}); use --overwrite=True or another --out_dir")
    if code_changed(folder, run["recipe"].get("code", {}), recipe["code"], same_code):
        run["recipe"]["code"] = recipe["code"]
        write_run(folder, run)
    if run["finished"] and not is_intact(folder, run):
        print(f"{folder}: {WEIGHTS} is missing or damaged; making it again")
        run["finished"] = False
    return run, True


def start_run(folder, run):
    """Begin a fresh run: claim the folder, and clear what an overwritten one left.

    A kill in between leaves the old run without state.pt, or the new one without it: both can be started again.
    """
    os.makedirs(folder, exist_ok=True)
    _remove(os.path.join(folder, STATE))
    write_run(folder, run)
    for name in (LOG, CARD):
        _remove(os.path.join(folder, name))
    remove_shards(folder)
    remove_weights(folder)


def _remove(path):
    if os.path.exists(path):
        os.remove(path)


# ---- what came before ----


def parent_of(folder):
    """(id, history) of a finished checkpoint; a foreign one is known by its config and its weights."""
    run = read_run(folder)
    if run is None:
        shape = {**read_config(folder)}
        files = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
        return hash_of([shape, *(fingerprint(os.path.join(folder, name)) for name in files)]), {}
    if not run["finished"]:
        raise UserError(f"{folder} is not finished (step {run['step']}); run its command again, it resumes")
    return run["id"], run["history"]


def history_of(folder):
    """The runs behind a checkpoint, {folder: cost}; none behind a foreign one, or where no folder is named."""
    run = read_run(folder) if folder else None
    return run["history"] if run else {}


def trained_on(folder):
    """{domain: share} that a checkpoint's own run was trained on."""
    recipe = (read_run(folder) or {}).get("recipe", {})
    if "mixture" not in recipe:
        raise UserError(f"{folder} does not say what it was trained on (no training run.json), which is needed here")
    return recipe["mixture"]


def joint_history(histories):
    """The runs behind several checkpoints together; one that is behind several of them counts once."""
    return {name: cost for history in histories for name, cost in history.items()}


def total_cost(history):
    """Sum {"tokens", "flops", "seconds"} over every training run behind some weights."""
    return {name: sum(run[name] for run in history.values()) for name in ("tokens", "flops", "seconds")}


def read_log(folder):
    """The lines of log.jsonl."""
    with open(os.path.join(folder, LOG), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_results(path):
    """results.json, as eval.py wrote it."""
    found = read_json(path, "make it first: python eval.py --model=DIR,DIR")
    rows = found.get("rows") if isinstance(found, dict) else None
    needed = {"name", "id", "bpb", "accuracy", "runs"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and needed <= row.keys() for row in rows):
        raise UserError(f"{path} is no results.json of eval.py; choose another folder or move it away")
    return found
