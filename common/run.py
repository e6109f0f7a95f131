"""A run on disk: its folder, its run.json, and what it needs to resume.

    run.json        settings, progress and parents of the run, and hashes of the source code in each of its legs
    state.pt        step, log and averages; with one process also the weights and the optimizer state
    shards.0        with several processes, weights and optimizer state, each process writing its own part
    log.jsonl       one line per evaluation
    router_sums.pt  in a mixture's folder: what its routers were solved from

A recipe is a run's config with the hashes of its data and of its parents. A folder that holds a run of another recipe
is refused, so nothing is overwritten. Source code is different: you are meant to change this repository. A run made
before a file changed is still used, and one line says so. A finished run whose weights are missing or damaged counts
as unfinished.

state.pt alone decides where a run resumes, and it is replaced atomically. It names the folder of shards that belongs
to it; the next save writes to the other of shards.0 and shards.1. Either kind can be read by any number of processes.
"""

import ast
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import pickle
import platform
import shutil
import sys
import time
import zipfile
from importlib.metadata import version

import torch
import torch.distributed as dist

from common.errors import UserError, atomic_file, read_json, write_atomically, write_json
from common.hf import CARD, WEIGHTS, copy_tokenizer, fingerprint, read_config, remove_weights, weights_hash, write_card

LOG = "log.jsonl"
RECORD = "run.json"
SUMS = "router_sums.pt"
STATE = "state.pt"
SHARDS = ("shards.0", "shards.1")
TYPES = {"step": int, "seconds": float, "log": str, "sums": dict, "shards": str}  # in every state.pt;
WHOLE = {"model": dict, "optimizer": dict}  # in addition, with one process,
IN_SHARDS = {"files": dict}  # or with several
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# ---- hashes of recipes and source ----


def hash_of(value):
    """16 hex digits, equal for equal values; those of a recipe identify the weights it leads to."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def source_hash(path):
    """The hash of one of the project's files without comments and docstrings; None if it is gone or not Python."""
    try:
        with open(os.path.join(ROOT, path), encoding="utf-8") as file:
            tree = ast.parse(file.read())
    except (OSError, SyntaxError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False):
            node.body[0] = ast.Pass()
    return hash_of(ast.unparse(tree))


def source():
    """{file: source_hash} of the project's own modules that this process has loaded: what decides its results."""
    found = {}
    for module in list(sys.modules.values()):
        folder, name = os.path.split(os.path.relpath(getattr(module, "__file__", None) or "/", ROOT))
        if name.endswith(".py") and folder in ("", "common", "data", "study"):
            path = os.path.join(folder, name)
            found[path] = source_hash(path)
    return {path: value for path, value in sorted(found.items()) if value}  # some torch modules' files are not paths


def changed_files(files):
    """Those names in an earlier result of `source`, {file: source_hash}, whose code has changed since."""
    return [name for name, value in files.items() if source_hash(name) != value]


def versions():
    """{name: version} of the packages that affect a run's digits."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy")}}


def _flatten(recipe):
    """{"a": {"b": 1}} -> {"a.b": 1}, to name the places where two recipes differ."""
    flat = {}
    for name, value in recipe.items():
        inner = _flatten(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{name}.{key}".strip("."): one for key, one in inner.items()}
    return flat


def differing_settings(old, new):
    """The names of the settings in which two recipes differ, a list."""
    return [name for name in {**old, **new} if old.get(name) != new.get(name)]


def _difference(old, new):
    """'a 1 -> 2, b.c 3 -> 4': up to three places where two recipes differ; '' if they are equal."""
    old, new = _flatten(old), _flatten(new)
    names = differing_settings(old, new)
    return ", ".join(f"{name} {old.get(name)!r} -> {new.get(name)!r}" for name in names[:3])


# ---- run.json, and the runs before a run ----


def read_run(folder):
    """The run.json of a folder, or None: a foreign checkpoint has none."""
    path = os.path.join(folder, RECORD)
    if not os.path.exists(path):
        return None
    record = read_json(path, "delete the folder and run again")
    needed = {"id": str, "recipe": dict, "step": int, "finished": bool, "history": dict}
    well_formed = isinstance(record, dict) and all(isinstance(record.get(name), kind) for name, kind in needed.items())
    if not well_formed or not all(isinstance(cost, dict) for cost in record["history"].values()):
        raise UserError(f"{path} is not a run.json of this project; delete the folder and run again")
    return record


def parent_of(folder):
    """(id, history) of a finished checkpoint. The id identifies its recipe and its weights, since the same recipe may
    give other weights after a change of source code; for a foreign checkpoint, its config and its weights."""
    record = read_run(folder)
    if record is None:
        config = {**read_config(folder)}
        files = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
        return hash_of([config, *(fingerprint(os.path.join(folder, name)) for name in files)]), {}
    if not record["finished"]:
        raise UserError(f"{folder} is not finished (step {record['step']}); run its command again to resume it")
    return hash_of([record["id"], record.get("weights")]), record["history"]


def history_of(folders):
    """The runs behind some checkpoints, {folder: cost}. A run behind several of them counts once; two runs in folders
    of the same name count twice."""
    found = {}
    for name, cost in [run for folder in folders for run in parent_of(folder)[1].items()]:
        while found.setdefault(name, cost) != cost:
            name += "'"
    return found


def total_cost(history):
    """Sum {"tokens", "flops", "seconds"} over every training run behind some weights."""
    return {name: sum(run[name] for run in history.values()) for name in ("tokens", "flops", "seconds")}


def trained_on(folder):
    """{domain: share} that a checkpoint's own run was trained on."""
    recipe = (read_run(folder) or {}).get("recipe", {})
    if "mixture" not in recipe:
        raise UserError(f"{folder} does not say what it was trained on (no training run's run.json); name another")
    return recipe["mixture"]


def mixtures_of(folders, published=None):
    """For each checkpoint, the {domain: share} it was trained on. Without a run.json (a published model) nobody knows:
    it counts as trained on `published`, {domain: share}, or else evenly on all domains that the others read."""
    found = {folder: trained_on(folder) for folder in folders if read_run(folder)}
    foreign = dict.fromkeys(folder for folder in folders if folder not in found)
    if foreign and not published:
        domains = sorted({domain for mixture in found.values() for domain in mixture})
        if not domains:
            trained_on(next(iter(foreign)))  # raises the error
        published = {domain: 1 / len(domains) for domain in domains}
    for folder in foreign:
        print(f"{folder} has no record of its training: it counts as trained on {', '.join(published)}")
    return [found.get(folder, published) for folder in folders]


def ancestors(folder):
    """The folders of the runs behind a checkpoint, as its run.json knows them."""
    record = read_run(folder) or {"history": {}, "recipe": {"parents": {}}}
    return {folder, *record["history"], *record["recipe"]["parents"]}


def read_log(folder):
    """The lines of log.jsonl."""
    with open(os.path.join(folder, LOG), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _open_and_lock(folder, wait):
    """A file descriptor that holds a folder's lock; see `locked`."""
    try:
        os.makedirs(folder, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:  # a file, a link to nowhere, another user's
        raise UserError(f"{folder or 'a folder without a name'}: {error.strerror}; choose another --out_dir") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            remedy = "let it finish, or choose another --out_dir"
            raise UserError(f"another process is writing into {folder}; {remedy}") from None
        # some network drives have no locks; without one, two runs could write into one folder
        raise UserError(f"{folder} cannot be locked ({error.strerror}); choose an --out_dir on another drive") from None
    return descriptor


@contextlib.contextmanager
def locked(folder, wait=False):
    """Keep other processes out of a folder, creating it if it is missing. If another process is in it: UserError, or
    with `wait` wait for it. A lock ends with its process, even if that is killed. An empty folder is removed again."""
    descriptor = _open_and_lock(folder, wait)
    while not os.path.exists(folder) or not os.path.samestat(os.fstat(descriptor), os.stat(folder)):
        os.close(descriptor)  # the process before us has removed the folder, as below
        descriptor = _open_and_lock(folder, wait)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(folder)  # if it is empty
        os.close(descriptor)


# ---- a run ----


class Run:
    """A run of a recipe in a folder, which stays locked for the duration of the `with` statement.

    processes: a parallel.Processes, if several may train. All of them take part, since each may hold only a piece of
    the weights; the first one reads and writes the folder.

    UserError for a folder that holds another run, unless `overwrite`, which always starts over; for one that the run
    itself starts from; and for one with files that do not belong to a run.
    """

    def __init__(self, folder, recipe, overwrite=False, processes=None):
        self.folder, self.recipe, self.overwrite = folder, recipe, overwrite
        self.processes = processes
        self.first = processes is None or processes.first  # the one that writes
        self.lock = contextlib.ExitStack()
        self.log = ""  # the text of log.jsonl
        self.sums = {}  # of the metrics, over all steps since its last line
        self.shards = ""  # the folder of shards that state.pt names
        self.before = history_of(recipe["parents"])  # the runs before this one
        self.stage = len(self.before)

    def __enter__(self):
        if self.first:
            self.lock.enter_context(locked(self.folder))
        try:
            self.record, self.resumed = self.processes.from_first(self._find) if self.processes else self._find()
        except BaseException:
            self.lock.close()
            raise
        self.finished = self.record["finished"]
        return self

    def __exit__(self, *error):
        return self.lock.__exit__(*error)

    def _find(self):
        """(the folder's run.json, True) if it holds a run of this recipe, else (a new one, not written yet, False)."""
        for name in {*self.recipe["parents"], *self.before}:
            if os.path.realpath(name) == os.path.realpath(self.folder):
                raise UserError(f"--out_dir={self.folder} holds weights that this run starts from; choose another one")
        fresh = {"id": hash_of(self.recipe), "recipe": self.recipe, "step": 0, "finished": False}
        fresh |= {"history": self.before, "source": [{"step": 0, "files": source()}]}
        record = read_run(self.folder)
        if record is None:
            if set(os.listdir(self.folder)) - {f"{RECORD}.tmp"}:  # left by a kill in _write
                raise UserError(
                    f"{self.folder} holds files that do not belong to a run; choose another --out_dir or empty it"
                )
            return fresh, False
        if self.overwrite:
            return fresh, False
        record["recipe"].pop("code", None)  # in runs from when a change of source code was refused
        if difference := _difference(record["recipe"], self.recipe):
            raise UserError(f"{self.folder} holds another run ({difference}); {self._remedy(record)}")
        if record["finished"] and not _is_intact(self.folder, record):
            print(f"{self.folder}: {WEIGHTS} is missing or damaged; making it again")
            record["finished"] = False
        self._note_source(record)
        return record, True

    def _remedy(self, record):
        """What to do about a folder that holds a different run."""
        if "init_from" not in record["recipe"].get("config", {}):
            return "use --overwrite=True or another --out_dir"
        if record["finished"]:
            keep = f"to train its weights further, use --init_from={self.folder} with another --out_dir"
        else:
            keep = "to finish it, use the settings it began with"
        return f"{keep}; --overwrite=True discards it"

    def _note_source(self, record):
        """Print which source files have changed since the run was made; it continues with them as a new leg."""
        legs = record.setdefault("source", [{"step": 0, "files": {}}])
        if files := sorted({name for leg in legs for name in changed_files(leg["files"])}):
            names = " and ".join(files)
            print(f"{self.folder}: made before {names} changed; --overwrite=True makes it again")
        if not record["finished"] and legs[-1]["files"] != source():
            legs.append({"step": record["step"], "files": source()})

    @property
    def seconds(self):
        """How long the run has trained, over all of its legs."""
        return time.monotonic() - self.started

    def begin(self):
        """Claim the folder for a new run, and clear what an overwritten one left.

        A kill in between leaves a run.json, old or new, without state.pt: either can be started again.
        """
        if not self.first:
            return
        old = [name for name in os.listdir(self.folder) if not name.startswith(RECORD)]
        if STATE in old:
            os.remove(os.path.join(self.folder, STATE))
        self._write()
        if old:
            clear(self.folder)

    def resume(self, model, optimizer, last_step):
        """Load a saved state into model and optimizer. Returns the step at which the run resumes, 0 for a new one."""
        state = load_state(self.folder, last_step, model, optimizer) if self.resumed else None
        if self.processes.world > 1:
            self.processes.barrier()  # all have read the folder before the first one changes it
        self.started = time.monotonic()  # of training: loading a model does not count in its speed
        if state is None or state["step"] == 0:
            self.begin()
            return 0
        self.log, self.shards = state["log"], state["shards"]
        from common.device import widest_float  # not at the top: mix.py has runs too, and needs no device

        device = next(model.parameters()).device
        self.sums = {name: value.to(device, widest_float(device)) for name, value in state["sums"].items()}
        self.started -= state["seconds"]
        if self.first:  # a line that was written after the state is not part of it
            write_atomically(os.path.join(self.folder, LOG), self.log)
        return state["step"]

    def add(self, line):
        """Append a line to log.jsonl, and reset the sums."""
        self.log += json.dumps(line) + "\n"
        self.sums = {}
        if self.first:
            write_atomically(os.path.join(self.folder, LOG), self.log)

    def save(self, step, model, optimizer, tokenizer, cost, finished=False):
        """Write a checkpoint: the training state, which decides where a killed run resumes, then the model. tokenizer:
        the folder with the model's tokenizer. cost: the tokens, FLOPs and seconds of this run so far."""
        state = {"step": step, "seconds": self.seconds, "log": self.log, "sums": self.sums, "shards": self.shards}
        self.shards = save_state(self.folder, state, model, optimizer, self.processes)
        weights = self.processes.whole_weights(model)
        if self.first:
            model.save_pretrained(self.folder, weights)
            copy_tokenizer(tokenizer, self.folder)
            self.record["step"] = step
            self.record["history"] = {**self.before, self.folder: cost}
            self.finish() if finished else self._write()

    def finish(self, weights=None, notes=()):
        """Mark the run as finished; a mixture gets its model card, with `notes` on it. weights: the weights' hash, if
        the caller knows it, since large files take long to read."""
        if read_config(self.folder)["num_local_experts"]:
            tokens = total_cost(self.record["history"])["tokens"]
            write_card(self.folder, list(self.recipe["parents"]), tokens, list(self.recipe.get("mixture", ())), notes)
        self.record |= {"finished": True, "weights": weights or weights_hash(self.folder)}
        self._write()

    def _write(self):
        write_json(os.path.join(self.folder, RECORD), self.record, indent=2)


def _is_intact(folder, record):
    """Whether the weights of a finished run are present and unchanged."""
    found = weights_hash(folder)
    return found is not None and found == record.get("weights")


def clear(folder):
    """Remove everything a run wrote except its state and run.json."""
    for name in (LOG, CARD, SUMS):
        if os.path.exists(os.path.join(folder, name)):
            os.remove(os.path.join(folder, name))
    remove_shards(folder)
    remove_weights(folder)


# ---- what a mixture's routers were solved from ----


def write_sums(folder, sums):
    """Store the fields of a mix.Regression in a mixture's folder."""
    with atomic_file(os.path.join(folder, SUMS)) as file:
        torch.save(sums, file)


def read_sums(folder):
    """The fields of the mix.Regression in the folder of a mixture, or of one that it was finetuned from."""
    names = list(read_config(folder)["expert_names"])
    places = [folder]
    for place in places:  # back along the finetunings, each of which has one parent
        path = os.path.join(place, SUMS)
        if os.path.exists(path):
            try:
                found = torch.load(path, weights_only=True, mmap=True)  # read where a sum is used
            except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
                raise UserError(f"{path} is damaged ({type(error).__name__}); mix {place} again") from None
            if found["names"] != names:
                raise UserError(f"{path} is for {', '.join(found['names'])}, but {folder} has {', '.join(names)}")
            return found
        parents = (read_run(place) or {"recipe": {"parents": {}}})["recipe"]["parents"]
        places += parents if len(parents) == 1 else ()
    raise UserError(f"{folder} has no {SUMS}, nor have those it was finetuned from; mix with --router_init=ridge")


# ---- the training state ----


def save_state(folder, state, model, optimizer, processes):
    """Replace the training state atomically; all processes call it together. state: the keys of TYPES, with the
    "shards" of the previous state. Returns the new "shards": their folder, or "" if everything is in state.pt."""
    if processes.world == 1:
        state = {**state, "shards": "", "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    else:
        name = SHARDS[state["shards"] == SHARDS[0]]
        if processes.first:
            remove_shards(folder, keep=state["shards"])
        processes.barrier()
        from common.parallel import save_shards

        save_shards(os.path.join(folder, name), state["step"], model, optimizer)
        state = {**state, "shards": name}
    if processes.first:
        if state["shards"]:
            state["files"] = _fingerprints(folder, state["shards"])
        with atomic_file(os.path.join(folder, STATE)) as file:
            torch.save(state, file)
        remove_shards(folder, keep=state["shards"])
    return state["shards"]


def load_state(folder, last_step, model, optimizer):
    """Load a saved training state into model and optimizer; returns the rest of it, or None if there is none.
    UserError if it is damaged."""
    path = os.path.join(folder, STATE)
    if not os.path.exists(path):
        return None
    try:
        if damaged := zipfile.ZipFile(path).testzip():  # torch.load does not check checksums
            raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        where = state.setdefault("shards", "")
        for name, kind in (TYPES | (IN_SHARDS if where else WHOLE)).items():
            if not isinstance(state.get(name), kind):
                raise ValueError(f"{name} is not of type {kind.__name__}")
        if not 0 <= state["step"] <= last_step:
            raise ValueError(f"step {state['step']} is beyond the last, {last_step}")
        if not where:
            _load_whole(state.pop("model"), state.pop("optimizer"), model, optimizer)
        elif _fingerprints(folder, where) == state["files"]:
            from common.parallel import load_shards

            load_shards(os.path.join(folder, where), state["step"], model, optimizer)
        else:
            raise ValueError(f"{where}, which belongs to it, has changed since it was written")
    except (
        *(RuntimeError, OSError, EOFError, KeyError, ValueError, TypeError, AttributeError, IndexError),
        *(pickle.UnpicklingError, zipfile.BadZipFile),
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged ({reason}); delete it to start the run again") from None
    return state


def _load_whole(weights, moments, model, optimizer):
    """Load what a single process saved; if the model is distributed, each process takes its part."""
    if dist.is_initialized():
        from common.parallel import own_parts

        weights, moments = own_parts(weights, moments, model, optimizer)
    model.load_state_dict(weights)
    optimizer.load_state_dict(moments)


def _fingerprints(folder, name):
    """{file: fingerprint} for a folder of shards."""
    where = os.path.join(folder, name)
    return {file: fingerprint(os.path.join(where, file)) for file in sorted(os.listdir(where))}


def remove_shards(folder, keep=""):
    """Remove the shards that state.pt no longer names."""
    for name in SHARDS:
        if name != keep:
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
