"""Operations with a backward pass of their own, where autograd's wastes time. Each says what it gains.

Gains are of a training step in fp32 on one core (4 layers, vocabulary 2,048, 4,096 tokens a step, width 64), as CPU
time of steps that took turns in one process. Sizes in comments are those of model.py.
"""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

CHUNK = {"cpu": 2**20, "cuda": 2**26}  # logits that are there at a time: a CPU's cache, a GPU's spare memory


def _turn(x, cos, sin):
    (a, b), y = x.chunk(2, dim=-1), torch.empty_like(x)
    first, second = y.chunk(2, dim=-1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=second).addcmul_(a, sin)
    return y


class Rotate(Function):
    """Each pair (x_i, x_{i + K/2}) turned by its position's angle; backwards, turned back. 7 % of a step.

    x: (B, heads, T, K); cos, sin: (T, K / 2).
    """

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        cos, sin = ctx.saved_tensors
        return _turn(gradient, cos, -sin), None, None


class Dispatch(Function):
    """x[tokens], whose gradient is a gather and a sum over k where autograd's is an index_add: on a CPU level with it,
    on a GPU without atomics (issue 11 expects 10 % of a mixture's step; unmeasured).

    x: (S, D); tokens: (R,); places: (S, k), the rows of each token. Rows that are nobody's place get no gradient.
    """

    @staticmethod
    def forward(ctx, x, tokens, places):
        ctx.save_for_backward(places)
        return x.index_select(0, tokens)  # (R, D)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (places,) = ctx.saved_tensors
        rows = gradient.index_select(0, places.flatten())  # (S * k, D)
        return rows.unflatten(0, places.shape).sum(dim=1), None, None


class Collect(Function):
    """rows[places], no place twice; the gradient is copied back to the places, and zero elsewhere. See Dispatch.

    rows: (R, D); places: (S, k). Returns (S * k, D).
    """

    @staticmethod
    def forward(ctx, rows, places):
        ctx.save_for_backward(places)
        ctx.rows = len(rows)
        return rows.index_select(0, places.flatten())

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (places,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.rows, gradient.size(1)).index_copy(0, places.flatten(), gradient), None


def row_multiple(rows, device, dtype):
    """The number that each expert's rows are padded to a multiple of: 1, but for many rows in bfloat16 on a CPU.

    There oneDNN compiles a matmul for each new number of rows; a sixteenth of the mean leaves few. 1.35 to 1.4 times
    as fast at width 128, in bf16.
    """
    return max(1, rows // 16 // 32 * 32) if device.type == "cpu" and dtype == torch.bfloat16 else 1
