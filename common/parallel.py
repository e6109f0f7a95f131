"""Training on several processes: `torchrun --nproc_per_node=8 train.py ...`, on one machine or many.

PyTorch's own engine does it: fully_shard (FSDP2; the idea is ZeRO, Rajbhandari et al. 2020) keeps weights, gradients
and optimizer in pieces, gathers each layer's weights just before it runs and frees them after, and averages gradients
during the backward pass. --shard_size says how many processes share one copy: 1 is plain data parallelism, a copy for
each; all of them is the least memory; in between, copies lie within a machine and only gradients pass between machines.
--expert_parallel=N puts a mixture's experts on different processes: see expert_parallel.py.

Reading order: Processes, which is all that train.py knows; the sharded model. The parts of torch that only several
processes need take seconds to load, so the functions that use them import them.
"""

import os
import sys
import warnings

import torch
import torch.distributed as dist

from common.errors import UserError

LAUNCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets


def place_in_launch():
    """(the number of this process, how many there are), as torchrun's variables say; (0, 1) without them. UserError
    where they are there in part, as a cluster's own scripts leave them."""
    given = {name: os.environ[name] for name in LAUNCH if os.environ.get(name)}
    try:
        rank, world = (int(given.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    except ValueError:
        rank, world = -1, 1
    missing = [name for name in LAUNCH if name not in given]
    if not 0 <= rank < world or (world > 1 and missing):
        found = " ".join(f"{name}={value}" for name, value in given.items())
        lacks = f" without {', '.join(missing)}" if missing else ""
        raise UserError(f"{found}{lacks} is no launch of processes; start with torchrun, or unset these")
    return rank, world


class Processes:
    """The processes of one training run: one alone, or `world` of them under torchrun (gloo on CPU, NCCL on GPU).

    To be used in a `with`, which ends the connection. Only the first process prints, but for errors.
    """

    def __init__(self, device=None):
        self.rank, self.world = place_in_launch()
        self.first = self.rank == 0
        self.device = device
        if self.world > 1:
            try:
                dist.init_process_group()
            except dist.DistNetworkError as error:  # before `with`, so __exit__ does not see it
                place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                reason = str(error).splitlines()[0]
                remedy = "give torchrun another --master_port, or look at the network"
                raise UserError(f"processes cannot meet at {place} ({reason}); {remedy}") from None

    def __enter__(self):
        if not self.first:
            sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")
        return self

    def __exit__(self, kind, error, trace):
        if self.world == 1:
            return
        dist.destroy_process_group()
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            reason = f"process {self.rank} lost touch with the others: one of them has ended, or the network failed"
            raise UserError(f"{reason}; the same command goes on from the last checkpoint") from None

    def from_first(self, function, *arguments):
        """What a function returns in the first process, in all of them; the others wait for it."""
        found = [function(*arguments) if self.first else None]
        if self.world > 1:
            dist.broadcast_object_list(found)
        return found[0]

    def shard(self, model, shard_size, expert_parallel):
        """Distribute a model over the processes, in place: every `shard_size` neighbours, 0 for all, share one copy,
        every `expert_parallel` divide its experts. A model on the CPU moves to the device layer by layer. Its
        parameters are DTensors from here on."""
        shard(model, self.device, self.world, shard_size or self.world, expert_parallel)

    def micro_batches(self, batch_size, micro_batch_size):
        """The rows of a batch that this process takes: (start, stop) of each forward pass. A process whose share is
        smaller than the micro-batch takes it at once."""
        share = batch_size // self.world
        begin, size = self.rank * share, min(micro_batch_size, share)
        return [(start, start + size) for start in range(begin, begin + share, size)]

    def clip_gradients(self, model, max_norm):
        """Scale the gradients down to a norm of max_norm at most; returns the norm that they had, a tensor."""
        if self.world == 1:
            return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        return clip_sharded_gradients(model, max_norm)

    def mean(self, metrics):
        """{name: mean over the processes} of tensors on the device; one message for all of them."""
        if self.world == 1:
            return metrics
        vector = torch.cat([value.double().flatten() for value in metrics.values()])
        dist.all_reduce(vector)
        parts = (vector / self.world).split([value.numel() for value in metrics.values()])
        return {name: part.view(metrics[name].shape) for name, part in zip(metrics, parts, strict=True)}

    def whole_weights(self, model):
        """{name: tensor} of all weights, in the first process and on the CPU; {} in the others."""
        if self.world == 1:
            return model.state_dict()
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def barrier(self):
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()


# ---- a model in pieces (FSDP2) ----


def shard(model, device, world, shard_size, expert_parallel):
    """See Processes.shard; shard_size is from 1 to world."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device.type, (world // shard_size, shard_size), mesh_dim_names=("copies", "shards"))
    if expert_parallel > 1:
        from common.expert_parallel import distribute_experts

        pieces = max(1, shard_size // expert_parallel)  # of each expert
        sizes = (world // (pieces * expert_parallel), pieces, expert_parallel)
        cube = init_device_mesh(device.type, sizes, mesh_dim_names=("copies", "shards", "experts"))
        for layer in model.model.layers:
            experts = layer.block_sparse_moe.experts
            distribute_experts(experts, cube["experts"])
            _shard(experts, cube["copies", "shards"])
    for module in (*model.model.layers, model):  # the model itself holds what no layer does
        _shard(module, mesh)


def _shard(module, mesh):
    """fully_shard over the mesh's second dimension, whatever of a module is not distributed yet."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    def placement(parameter):  # stacked experts (E, F, D) are cut within each expert: E may be less than the shards
        return Shard(1) if parameter.dim() == 3 and parameter.size(1) % mesh.size(1) == 0 else Shard(0)

    fully_shard(module, mesh=mesh, shard_placement_fn=placement)
    module.set_force_sum_reduction_for_comms(True)  # gloo can add; not every version of it has a mean


def clip_sharded_gradients(model, max_norm):
    """See Processes.clip_gradients. Experts may lie on another mesh than the rest, and no operation takes both; the
    first dimension of either counts the copies of a piece."""
    from torch.nn.utils import clip_grads_with_norm_, get_total_norm

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


def own_parts(weights, moments, model, optimizer):
    """This process's parts of what a single process has saved: (weights, the optimizer's state), as DTensors that are
    distributed as the model is."""
    from torch.distributed.tensor import distribute_tensor

    def part_of(tensor, like):
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

    own = model.state_dict()
    weights = {name: part_of(value, own[name]) for name, value in weights.items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in moments["state"].items():
        for name, value in values.items():
            values[name] = part_of(value, parameters[number]) if value.dim() else value  # but the count of steps
    return weights, moments


def _contents(model, optimizer, step):
    """What the shards of a checkpoint hold. Before the first step the optimizer has nothing to keep yet."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict

    if step == 0:
        return {"model": get_model_state_dict(model)}
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def save_shards(path, step, model, optimizer):
    """Write weights and optimizer into a folder of shards (torch.distributed.checkpoint); all processes call it
    together."""
    import torch.distributed.checkpoint as dcp

    dcp.save(_contents(model, optimizer, step), checkpoint_id=path)


def load_shards(path, step, model, optimizer):
    """Read a folder of shards into model and optimizer, with any number of processes. ValueError when it is damaged."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

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
