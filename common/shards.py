"""A model spread over several processes: FSDP2's side of common/parallel.py, torch.distributed.checkpoint's of
common/state.py.

Imported only where there are several processes, or shards to read: these parts of torch take half a second to load,
which no other start need wait for.
"""

import warnings

import torch.distributed as dist
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
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from common.expert_parallel import place_experts


def spread(model, device, world, shard_size, expert_parallel):
    """See Processes.spread; shard_size is from 1 to world."""
    mesh = (world // shard_size, shard_size)
    mesh = init_device_mesh(device.type, mesh, mesh_dim_names=("copies", "shards"))
    if expert_parallel > 1:
        pieces = max(1, shard_size // expert_parallel)  # of each expert
        places = (world // (pieces * expert_parallel), pieces, expert_parallel)
        places = init_device_mesh(device.type, places, mesh_dim_names=("copies", "shards", "experts"))
        for layer in model.model.layers:
            experts = layer.block_sparse_moe.experts
            place_experts(experts, places["experts"])
            _shard(experts, places["copies", "shards"])
    for module in (*model.model.layers, model):  # the model itself holds what no layer does
        _shard(module, mesh)


def _shard(module, mesh):
    """fully_shard over the mesh's second dimension, whatever of a module is not spread yet."""

    def placement(parameter):  # stacked experts (E, F, D) are cut within each expert: E may be less than the shards
        return Shard(1) if parameter.dim() == 3 and parameter.size(1) % mesh.size(1) == 0 else Shard(0)

    fully_shard(module, mesh=mesh, shard_placement_fn=placement)
    module.set_force_sum_reduction_for_comms(True)  # gloo can add; not every version of it has a mean


def clip_gradients(model, max_norm):
    """See Processes.clip_gradients. Experts may be spread over another mesh than the rest, and no operation takes both;
    the first dimension of either counts the copies of a piece."""
    meshes = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            meshes.setdefault(parameter.device_mesh, []).append(parameter)
    pieces = {mesh: [parameter.grad.to_local() for parameter in found] for mesh, found in meshes.items()}
    square = sum(get_total_norm(found).square() / mesh.size(0) for mesh, found in pieces.items())
    dist.all_reduce(square)
    for found in meshes.values():
        clip_grads_with_norm_(found, max_norm, square.sqrt())
    return square.sqrt()


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
