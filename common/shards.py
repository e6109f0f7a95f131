"""A model spread over several processes: FSDP2's side of common/parallel.py, torch.distributed.checkpoint's of
common/state.py.

Imported only where there are several processes, or shards to read: these parts of torch take half a second to load,
which no other start need wait for.
"""

import warnings

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor


def spread(model, device, world, shard_size):
    """See Processes.spread; shard_size is from 1 to world."""
    mesh = (world // shard_size, shard_size)
    mesh = init_device_mesh(device.type, mesh, mesh_dim_names=("copies", "shards"))

    def placement(parameter):  # stacked experts (E, F, D) are cut within each expert: E may be less than the shards
        return Shard(1) if parameter.dim() == 3 and parameter.size(1) % shard_size == 0 else Shard(0)

    for module in (*model.model.layers, model):  # the model itself holds what no layer does
        fully_shard(module, mesh=mesh, shard_placement_fn=placement)
    model.set_force_sum_reduction_for_comms(True)  # gloo can add, and has no mean


def whole_weights(model):
    """{name: tensor} of all weights, in the first process and on the CPU; {} in the others."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def parts_of(weights, moments, model, optimizer):
    """This process's parts of what a single process has saved: (weights, the optimizer's state), as DTensors that are
    spread as the model is."""
    own = model.state_dict()
    weights = {name: _part(value, own[name]) for name, value in weights.items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in moments["state"].items():
        for name, value in values.items():
            values[name] = _part(value, parameters[number]) if value.dim() else value  # but the count of steps
    return weights, moments


def _part(tensor, like):
    """A whole tensor, which every process has, as a DTensor that is spread as `like` is."""
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _contents(model, optimizer, step):
    """What shards hold. Before the first step the optimizer has nothing to keep yet."""
    if step == 0:
        return {"model": get_model_state_dict(model)}
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def save(path, step, model, optimizer):
    """Write weights and optimizer into a folder of shards; all processes call it together."""
    dcp.save(_contents(model, optimizer, step), checkpoint_id=path)


def load(path, step, model, optimizer):
    """Read a folder of shards into model and optimizer, with any number of processes. ValueError when it is damaged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that nothing is distributed, where a single process reads
        state = _contents(model, optimizer, step)
        try:
            dcp.load(state, checkpoint_id=path)
        except dcp.api.CheckpointException as error:  # a BaseException
            raise ValueError(str(error)) from None
    if step:
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    else:
        model.load_state_dict(state["model"])
