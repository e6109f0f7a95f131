"""A mixture's experts on different processes: `torchrun --nproc_per_node=2 finetune.py ... --expert_parallel=2`.

N neighbouring processes hold E / N of the E experts each, which the Branch-Train-MiX paper mentions and leaves open.
In each layer a token's rows travel to the processes of its experts and back: two exchanges (all-to-all) in the forward
pass and two in the backward pass, as in GShard (Lepikhin et al. 2021).
"""

from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import Shard, distribute_tensor


class Exchange(Function):
    """Send rows to the processes that need them; in the backward pass, their gradients return.

    rows: (R, D), by receiver; sent, received: N numbers, how many go to and come from each. Returns (R', D), by sender.
    """

    @staticmethod
    def forward(ctx, rows, sent, received, group):
        ctx.home = received, sent, group
        found = rows.new_empty(sum(received), rows.size(1))
        dist.all_to_all_single(found, rows.contiguous(), received, sent, group=group)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return Exchange.apply(gradient, *ctx.home), None, None, None


def distribute_experts(experts, mesh):
    """Leave this process its E / N of a layer's stacked experts (model.Experts), in place. From now on parameters are
    DTensors (E, F, D) of which it holds a part; forward takes and returns the same as before.

    mesh: the DeviceMesh of the N processes that hold one copy of the experts between them.
    """
    for name, parameter in list(experts.named_parameters()):
        part = distribute_tensor(parameter.data, mesh, [Shard(0)], src_data_rank=None)
        setattr(experts, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
    experts.forward = partial(run_experts, experts, type(experts).forward, mesh)


@torch.compiler.disable
def run_experts(experts, run, mesh, x, ends):
    """model.Experts.forward, passed as `run`, with each row computed where its expert is. x: (R, D), sorted by expert;
    ends: (E,) int32, where each expert's rows end. Returns (R, D)."""
    group = mesh.get_group()
    counts = ends.diff(prepend=ends.new_zeros(1)).view(mesh.size(), -1)  # (N, E / N): rows that we send, by receiver
    asked = torch.empty_like(counts)  # (N, E / N): rows for each of our experts, by sender
    dist.all_to_all_single(asked, counts, group=group)
    sent, received = torch.stack((counts.sum(dim=1), asked.sum(dim=1))).tolist()  # here the host waits for the device
    rows = Exchange.apply(x, sent, received, group)  # (R', D): by sender, and of each by expert
    own = torch.arange(asked.size(1), device=x.device).repeat(mesh.size())
    own = own.repeat_interleave(asked.flatten(), output_size=len(rows))  # (R',): the expert of each row
    if not len(rows):  # nobody asks: use a row of zeros, so that our experts take part in the backward pass too
        rows, own = F.pad(rows, (0, 0, 0, 1)), own.new_zeros(1)
    order = own.argsort(stable=True)  # (R',): by expert
    ends = F.one_hot(own, asked.size(1)).sum(dim=0).cumsum(dim=0).int()  # (E / N,)
    y = run(own_experts(experts, mesh.size()), rows[order], ends)[order.argsort()]  # (R', D), by sender again
    return Exchange.apply(y[: sum(received)], received, sent, group)


def own_experts(experts, processes):
    """The weights that this process holds, (E / N, F, D) each, under the names that model.Experts.forward reads.

    Their gradients add up over rows from N processes, each with a mean loss of its own. FSDP averages only over the
    processes that hold the same experts, so the mean over these N is taken here.
    """
    parts = {name: parameter.to_local() for name, parameter in experts.named_parameters()}
    for part in parts.values():
        if torch.is_grad_enabled() and part.requires_grad:
            part.register_hook(lambda gradient: gradient / processes)
    return SimpleNamespace(**parts)
