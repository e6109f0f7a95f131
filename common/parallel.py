"""Training on several processes: `torchrun --nproc_per_node=8 train.py ...`, on one machine or many.

PyTorch's own engine does it: fully_shard (FSDP2; the idea is ZeRO, Rajbhandari et al. 2020) keeps weights, gradients
and optimizer in pieces, gathers each layer's weights just before it runs and frees them after, and averages gradients
while the backward pass goes on. --shard_size says how many processes share one copy: 1 is plain data parallelism, a
copy for each; all of them is the least memory; in between, copies lie within a machine and only gradients pass between
machines.
"""

import os
import sys

import torch
import torch.distributed as dist

from common.errors import UserError


class Processes:
    """The processes of one training run: one alone, or `world` of them under torchrun (gloo on CPU, NCCL on GPU).

    To be used in a `with`, which ends the connection. The first process speaks for all: the others print errors alone.
    """

    def __init__(self, device=None):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = device
        if self.world > 1:
            dist.init_process_group()

    def __enter__(self):
        if not self.first:
            sys.stdout = open(os.devnull, "w")
        return self

    def __exit__(self, kind, error, trace):
        if self.world == 1:
            return
        dist.destroy_process_group()
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            reason = f"process {self.rank} lost touch with the others: one of them has ended, or the network failed"
            raise UserError(f"{reason}; the same command goes on from the last checkpoint") from None

    @property
    def first(self):
        return self.rank == 0

    def from_first(self, function, *arguments):
        """What a function returns in the first process, in all of them; the others wait for it."""
        found = [function(*arguments) if self.first else None]
        if self.world > 1:
            dist.broadcast_object_list(found)
        return found[0]

    def spread(self, model, shard_size, expert_parallel):
        """Spread a model over the processes, in place: each `shard_size` neighbours, 0 for all, share one copy, each
        `expert_parallel` divide the experts up. A model on the CPU goes to the device layer by layer. Its parameters
        are DTensors from here on."""
        if self.world == 1:
            return model
        from common import shards

        shards.spread(model, self.device, self.world, shard_size or self.world, expert_parallel)
        return model

    def micro_batches(self, batch_size, micro_batch_size):
        """The rows of a batch that this process takes: (start, stop) of each forward pass. A process whose share is
        smaller than the micro-batch takes it at once."""
        share = batch_size // self.world
        begin, size = self.rank * share, min(micro_batch_size, share)
        return [(start, start + size) for start in range(begin, begin + share, size)]

    def expect(self, model, last):
        """Say whether the coming backward pass is a step's last: only then do the copies average their gradients."""
        if self.world > 1:
            model.set_requires_all_reduce(last)

    def clip_gradients(self, model, max_norm):
        """Scale the gradients down to a norm of max_norm at most; returns the norm that they had, a tensor."""
        if self.world == 1:
            return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        from common import shards

        return shards.clip_gradients(model, max_norm)

    def mean(self, tensor):
        """The mean of a tensor over all processes."""
        if self.world == 1:
            return tensor
        dist.all_reduce(tensor)
        return tensor / self.world

    def whole_weights(self, model):
        """{name: tensor} of all weights, in the first process and on the CPU; {} in the others."""
        if self.world == 1:
            return model.state_dict()
        from common import shards

        return shards.whole_weights(model)

    def barrier(self):
        if self.world > 1:
            dist.barrier()
