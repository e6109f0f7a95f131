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
import warnings
import zipfile

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import distribute_tensor

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
        name = SHARDS[state["shards"] == SHARDS[0]]
        if processes.first:
            remove_shards(folder, keep=state["shards"])
        processes.barrier()
        dcp.save(_contents(model, optimizer, state["step"]), checkpoint_id=os.path.join(folder, name))
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
        shards = state.setdefault("shards", "")
        for name, kind in (TYPES | (IN_SHARDS if shards else WHOLE)).items():
            if not isinstance(state.get(name), kind):
                raise ValueError(f"{name} is no {kind.__name__}")
        if not 0 <= state["step"] <= last_step:
            raise ValueError(f"step {state['step']} is beyond the last, {last_step}")
        if not shards:
            _load_whole(state.pop("model"), state.pop("optimizer"), model, optimizer)
        elif _fingerprints(folder, shards) == state["files"]:
            _load_shards(os.path.join(folder, shards), state["step"], model, optimizer)
        else:
            raise ValueError(f"{shards}, which belongs to it, is not as it was written")
    except (
        *(RuntimeError, OSError, EOFError, KeyError, ValueError, TypeError, AttributeError, IndexError),
        *(pickle.UnpicklingError, zipfile.BadZipFile, dcp.api.CheckpointException),
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged ({reason}); delete it to start the run anew") from None
    return state


def _load_whole(weights, moments, model, optimizer):
    """What a single process has saved; of a model that is spread over several, each takes its part."""
    if isinstance(model, FSDPModule):
        own = model.state_dict()
        weights = {name: _part(value, own[name]) for name, value in weights.items()}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for number, values in moments["state"].items():
            for name, value in values.items():
                values[name] = _part(value, parameters[number]) if value.dim() else value  # but the count of steps
    model.load_state_dict(weights)
    optimizer.load_state_dict(moments)


def _part(tensor, like):
    """A whole tensor, which every process has, as a DTensor that is spread as `like` is."""
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _contents(model, optimizer, step):
    """What shards hold. Before the first step the optimizer has nothing to keep yet."""
    if step == 0:
        return {"model": get_model_state_dict(model)}
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def _load_shards(path, step, model, optimizer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that nothing is distributed, where a single process reads
        state = _contents(model, optimizer, step)
        dcp.load(state, checkpoint_id=path)
    if step:
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    else:
        model.load_state_dict(state["model"])


def _fingerprints(folder, name):
    """{file: fingerprint} of a folder of shards."""
    where = os.path.join(folder, name)
    return {file: fingerprint(os.path.join(where, file)) for file in sorted(os.listdir(where))}


def remove_shards(folder, keep=""):
    """Remove the shards that no state.pt speaks of any more."""
    for name in SHARDS:
        if name != keep:
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
