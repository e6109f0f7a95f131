"""The training state: all that a stopped or killed run needs to go on to the bit.

    state.pt    position, log and sums; and weights and optimizer, where one process trains
    shards.0    weights and optimizer, where several do, each writing its own part (torch.distributed.checkpoint)

state.pt alone decides where a run resumes, and it is replaced in one move. It names the folder of shards that belongs
to it, and the next save writes into the other one of shards.0 and shards.1. Either kind is read by any number of
processes.
"""

import os
import pickle
import shutil
import zipfile

import torch
import torch.distributed as dist

from common.errors import UserError
from common.files import atomic_file
from common.weights import fingerprint

STATE = "state.pt"
SHARDS = ("shards.0", "shards.1")
TYPES = {"step": int, "seconds": float, "log": str, "sums": dict}
WHOLE = {"model": dict, "optimizer": dict}
IN_SHARDS = {"shards": str, "files": dict}


def new_state():
    """The state of a run that begins, but for model and optimizer."""
    return {"step": 0, "seconds": 0.0, "log": "", "sums": {}, "shards": ""}


def save_state(folder, state, model, optimizer, processes):
    """Replace the training state in one move; all processes call it together. state: what TYPES names and, of the state
    before this one, "shards". Returns the new "shards": the folder they are in, or "" where state.pt holds all."""
    if processes.world == 1:
        state = {**state, "shards": "", "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    else:
        from common import shards

        name = SHARDS[state["shards"] == SHARDS[0]]
        if processes.first:
            remove_shards(folder, keep=state["shards"])
        processes.barrier()
        shards.save(os.path.join(folder, name), state["step"], model, optimizer)
        state = {**state, "shards": name}
    if processes.first:
        if state["shards"]:
            state["files"] = _fingerprints(folder, state["shards"])
        with atomic_file(os.path.join(folder, STATE)) as file:
            torch.save(state, file)
        remove_shards(folder, keep=state["shards"])
    return state["shards"]


def load_state(folder, last_step, model, optimizer):
    """Put a saved training state into model and optimizer; returns the rest of it (step, seconds, ...), or that of a
    run that begins where there is none. UserError when it is damaged."""
    path = os.path.join(folder, STATE)
    if not os.path.exists(path):
        return new_state()
    try:
        if damaged := zipfile.ZipFile(path).testzip():  # torch.load does not compare checksums
            raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        where = state.setdefault("shards", "")
        for name, kind in (TYPES | (IN_SHARDS if where else WHOLE)).items():
            if not isinstance(state.get(name), kind):
                raise ValueError(f"{name} is no {kind.__name__}")
        if not 0 <= state["step"] <= last_step:
            raise ValueError(f"step {state['step']} is beyond the last, {last_step}")
        if not where:
            _load_whole(state.pop("model"), state.pop("optimizer"), model, optimizer)
        elif _fingerprints(folder, where) == state["files"]:
            from common import shards

            shards.load(os.path.join(folder, where), state["step"], model, optimizer)
        else:
            raise ValueError(f"{where}, which belongs to it, is not as it was written")
    except (
        *(RuntimeError, OSError, EOFError, KeyError, ValueError, TypeError, AttributeError, IndexError),
        *(pickle.UnpicklingError, zipfile.BadZipFile),
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged ({reason}); delete it to start the run anew") from None
    return state


def _load_whole(weights, moments, model, optimizer):
    """What a single process has saved; of a model that is spread over several, each takes its part."""
    if dist.is_initialized():
        from common import shards

        weights, moments = shards.parts_of(weights, moments, model, optimizer)
    model.load_state_dict(weights)
    optimizer.load_state_dict(moments)


def _fingerprints(folder, name):
    """{file: fingerprint} of a folder of shards."""
    where = os.path.join(folder, name)
    return {file: fingerprint(os.path.join(where, file)) for file in sorted(os.listdir(where))}


def remove_shards(folder, keep=""):
    """Remove the shards that no state.pt speaks of any more."""
    for name in SHARDS:
        if name != keep:
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
