"""Training on several processes: `torchrun --nproc_per_node=8 train.py ...`, on one machine or many.

PyTorch does the work: fully_shard (FSDP2; the idea is ZeRO, Rajbhandari et al. 2020) keeps weights, gradients and
optimizer state in pieces, gathers each layer's weights just before it runs, frees them afterwards, and averages
gradients in the backward pass. --shard_size says how many processes share one copy: 1 is plain data parallelism, a
copy for each; all of them needs the least memory; in between, a copy can stay within one machine, so that only
gradients travel between machines. --expert_parallel=N spreads a mixture's experts over processes: expert_parallel.py.

Reading order: Processes, which is all that train.py sees; then the sharded model. The parts of torch needed only by
several processes take seconds to load, so they are imported inside functions.
"""

import os
import sys
import warnings

import torch
import torch.distributed as dist

from common.errors import UserError

LAUNCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets


def place_in_launch():
    """(the number of this process, how many there are), from torchrun's variables; (0, 1) without them. UserError if
    only some are set, as a cluster's own scripts may leave them."""
    given = {name: os.environ[name] for name in LAUNCH if os.environ.get(name)}
    try:
        rank, world = (int(given.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    except ValueError:
        rank, world = -1, 1
    missing = [name for name in LAUNCH if name not in given]
    if not 0 <= rank < world or (world > 1 and missing):
        found = " ".join(f"{name}={value}" for name, value in given.items())
        lacks = f" without {', '.join(missing)}" if missing else ""
        raise UserError(f"{found}{lacks} does not describe a launch; start with torchrun, or unset these variables")
    return rank, world


class Processes:
    """The processes of one training run: a single one, or `world` of them under torchrun (gloo on CPU, NCCL on GPU).

    Use it in a `with` statement, which closes the connection. Only the first process prints, except for errors.
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
                remedy = "give torchrun another --master_port, or check the network"
                raise UserError(f"processes cannot connect at {place} ({reason}); {remedy}") from None

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
            raise UserError(f"{reason}; run the same command to resume from the last checkpoint") from None

    def from_first(self, function, *arguments):
        """Call a function in the first process only, and return its result in all of them; the others wait."""
        found = [function(*arguments) if self.first else None]
        if self.world > 1:
            dist.broadcast_object_list(found)
        return found[0]

    def shard(self, model, shard_size, expert_parallel):
        """Distribute a model over the processes, in place: each group of `shard_size` neighbours (0: all) shares one
        copy, each group of `expert_parallel` divides its experts. A model on the CPU moves to the device layer by
        layer. Afterwards its parameters are DTensors."""
        shard(model, self.device, self.world, shard_size or self.world, expert_parallel)

    def micro_batches(self, batch_size, micro_batch_size):
        """The rows of a batch that this process takes: (start, stop) for each forward pass. A share smaller than the
        micro-batch is taken in one pass."""
        share = batch_size // self.world
        begin, size = self.rank * share, min(micro_batch_size, share)
        return [(start, start + size) for start in range(begin, begin + share, size)]

    def clip_gradients(self, model, max_norm):
        """Scale the gradients down to a norm of at most max_norm; returns the norm before that, a tensor."""
        if self.world == 1:
            return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        return clip_sharded_gradients(model, max_norm)

    def mean(self, metrics):
        """{name: mean over the processes} of tensors on the device, sent as a single message."""
        if self.world == 1:
            return metrics
        vector = torch.cat([value.double().flatten() for value in metrics.values()])
        dist.all_reduce(vector)
        parts = (vector / self.world).split([value.numel() for value in metrics.values()])
        return {name: part.view(metrics[name].shape) for name, part in zip(metrics, parts, strict=True)}

    def whole_weights(self, model):
        """{name: tensor} of all weights, on the CPU of the first process; {} in the others."""
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
    for module in (*model.model.layers, model):  # last, the model itself with what is in no layer
        _shard(module, mesh)


def _shard(module, mesh):
    """fully_shard the parameters of a module that are not distributed yet, over the mesh's second dimension."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    def placement(parameter):  # cut stacked experts (E, F, D) within each expert: there may be fewer than shards
        return Shard(1) if parameter.dim() == 3 and parameter.size(1) % mesh.size(1) == 0 else Shard(0)

    fully_shard(module, mesh=mesh, shard_placement_fn=placement)
    module.set_force_sum_reduction_for_comms(True)  # gloo can add, but not every version of it can average


def clip_sharded_gradients(model, max_norm):
    """See Processes.clip_gradients. Experts may be on another mesh than the rest, and no operation takes both; the
    first dimension of each mesh is the number of copies of a piece."""
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
    """This process's parts of a single process's checkpoint: (weights, the optimizer's state), as DTensors distributed
    like the model."""
    from torch.distributed.tensor import distribute_tensor

    def part_of(tensor, like):
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

    own = model.state_dict()
    weights = {name: part_of(value, own[name]) for name, value in weights.items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in moments["state"].items():
        for name, value in values.items():
            values[name] = part_of(value, parameters[number]) if value.dim() else value  # the step count is a scalar
    return weights, moments


def _contents(model, optimizer, step):
    """What the shards of a checkpoint contain. Before the first step the optimizer has no state yet."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict

    if step == 0:
        return {"model": get_model_state_dict(model)}
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def save_shards(path, step, model, optimizer):
    """Write weights and optimizer state into a folder of shards (torch.distributed.checkpoint); all processes call it
    together."""
    import torch.distributed.checkpoint as dcp

    dcp.save(_contents(model, optimizer, step), checkpoint_id=path)


def load_shards(path, step, model, optimizer):
    """Read a folder of shards into model and optimizer, on any number of processes. ValueError if it is damaged."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a single process is told that nothing is distributed
        state = _contents(model, optimizer, step)
        try:
            dcp.load(state, checkpoint_id=path)
        except dcp.api.CheckpointException as error:  # a BaseException
            raise ValueError(str(error)) from None
    if step:
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    else:
        model.load_state_dict(state["model"])
