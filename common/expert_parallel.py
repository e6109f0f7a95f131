"""Experts on different processes: --expert_parallel=N, which Branch-Train-MiX leaves open.

N neighbours hold a mixture's E experts between them, E / N each; all the rest is spread as --shard_size says. In each
layer a token's rows travel to the processes of its experts and back: two exchanges (all-to-all) forwards and two
backwards, as in GShard (Lepikhin et al. 2021). Sizes in comments are model.py's; N is what --expert_parallel says.

Imported only where several processes train.
"""

from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import Shard, distribute_tensor

from common.fused import collect, dispatch, lay_out


class Exchange(Function):
    """Rows go to the processes that want them; backwards, their gradients come home.

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


def place_experts(experts, mesh):
    """Leave to this process its E / N of a layer's stacked experts (model.Experts), in place: from here on, parameters
    are DTensors (E, F, D) of which it holds a part, and forward, which takes and returns what it did, asks the others.

    mesh: the DeviceMesh of the N processes that hold one copy of the experts between them.
    """
    run, processes, group = type(experts).forward, mesh.size(), mesh.get_group()
    for name, parameter in list(experts.named_parameters()):
        part = distribute_tensor(parameter.data, mesh, [Shard(0)], src_data_rank=None)
        setattr(experts, name, nn.Parameter(part, requires_grad=parameter.requires_grad))

    def own_part(parameter):
        """(E / N, F, D). Its gradient is a sum over N processes' rows, each of which counts its own mean loss; what
        averages gradients over the holders of the same experts knows nothing of that."""
        part = parameter.to_local()
        if torch.is_grad_enabled() and part.requires_grad:
            part.register_hook(lambda gradient: gradient / processes)
        return part

    @torch.compiler.disable
    def forward(x, ends):
        counts = ends.diff(prepend=ends.new_zeros(1)).view(processes, -1)  # (N, E / N): rows for each, by receiver
        wanted = torch.empty_like(counts)
        dist.all_to_all_single(wanted, counts, group=group)  # (N, E / N): rows for each of ours, by sender
        sent, received = torch.stack((counts.sum(dim=1), wanted.sum(dim=1))).tolist()  # the host waits for the device
        rows = Exchange.apply(x, sent, received, group)  # (R', D): by sender, then by expert
        spare = int(len(rows) == 0)  # where nobody asks, a row of zeros, so that our experts have gradients, too
        chosen = torch.arange(wanted.size(1), device=x.device).repeat(processes)
        chosen = chosen.repeat_interleave(wanted.flatten(), output_size=len(rows))  # (R',): the expert of each row
        rows, chosen = F.pad(rows, (0, 0, 0, spare)), F.pad(chosen, (0, spare))
        places, tokens, ends = lay_out(chosen.unsqueeze(1), wanted.size(1), x.dtype)
        own = SimpleNamespace(**{name: own_part(parameter) for name, parameter in experts.named_parameters()})
        y = collect(run(own, dispatch(rows, tokens, places), ends), places)
        return Exchange.apply(y[: len(y) - spare], received, sent, group)  # (R, D): by expert, as they came

    experts.forward = forward
