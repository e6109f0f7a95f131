"""Operations with a backward pass of their own, where autograd's wastes time. Each says what it gains.

Gains are of a training step in fp32 on one core (4 layers, vocabulary 2,048, 4,096 tokens a step, width 64), as CPU
time of steps that took turns in one process. Sizes in comments are those of model.py. Each class has a function that
uses it where gradients are wanted, and spares its overhead elsewhere: a tenth of generation.
"""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

IGNORE = -100  # a target that does not count, cross_entropy's default
CHUNK = {"cpu": 2**20}  # logits that are there at a time: what fits a CPU's cache,
LARGE_CHUNK = 2**26  # and a quarter of a GiB elsewhere


def _turn(x, cos, sin):
    y = x * torch.cat((cos, cos), dim=-1)
    (a, b), (first, second) = x.chunk(2, dim=-1), y.chunk(2, dim=-1)
    first.addcmul_(b, sin, value=-1)
    second.addcmul_(a, sin)
    return y


class Rotate(Function):
    """Each pair (x_i, x_{i + K/2}) turned by its position's angle; backwards, turned back. Gains 7 %, 4 % in bf16.

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


def chunk_rows(device_type, vocab_size):
    """How many rows of logits are there at a time."""
    return max(1, CHUNK.get(device_type, LARGE_CHUNK) // vocab_size)


def rotate(x, cos, sin):
    return Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else _turn(x, cos, sin)


def attend(q, k, v, **options):
    """scaled_dot_product_attention. On a CPU, bfloat16 is widened to fp32 for it: a step is 1.13 times as fast at width
    128, 1.11 times at 256."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, **options)


class HeadLoss(Function):
    """Cross-entropy of the head's logits, summed, that keeps no logits: each chunk's gradients are taken at once, while
    its logits are in the cache. Gains 8 %, nothing in bf16 (as Liger-Kernel does on GPUs, Hsu et al. 2024).

    x: (S, D); weight: (V, D) in fp32; targets: (S,), IGNORE does not count.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
        rows, head = chunk_rows(x.device.type, len(weight)), weight.to(x.dtype)
        total, x_gradients = x.new_zeros((), dtype=torch.float32), []
        weight_gradient = torch.zeros_like(weight)
        for h, t in zip(x.split(rows), targets.split(rows), strict=True):
            log_probs = F.log_softmax((h @ head.T).float(), dim=-1)  # (rows, V)
            total = total + F.nll_loss(log_probs, t, reduction="sum", ignore_index=IGNORE)
            counts = (t != IGNORE).unsqueeze(1)
            gradient = log_probs.exp_() * counts  # softmax minus the one-hot target
            gradient = gradient.scatter_add_(1, t.clamp(min=0).unsqueeze(1), -counts.float()).to(x.dtype)
            x_gradients.append(gradient @ head)
            weight_gradient += gradient.T @ h
        ctx.save_for_backward(torch.cat(x_gradients), weight_gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, scale):
        x_gradient, weight_gradient = ctx.saved_tensors
        return x_gradient * scale, weight_gradient * scale, None


def head_loss(x, weight, targets):
    """HeadLoss where gradients are wanted, the same sum without them elsewhere."""
    if torch.is_grad_enabled():
        return HeadLoss.apply(x, weight, targets)
    rows, head = chunk_rows(x.device.type, len(weight)), weight.to(x.dtype)
    chunks = zip(x.split(rows), targets.split(rows), strict=True)
    return sum(F.cross_entropy((h @ head.T).float(), t, reduction="sum") for h, t in chunks)


class Dispatch(Function):
    """x[tokens], whose gradient is a gather and a sum over k where autograd's is an index_add: on a CPU level with it,
    on a GPU without atomics, so in a fixed order (its gain there is unmeasured).

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


def dispatch(x, tokens, places):
    return Dispatch.apply(x, tokens, places) if torch.is_grad_enabled() else x.index_select(0, tokens)


def collect(rows, places):
    return Collect.apply(rows, places) if torch.is_grad_enabled() else rows.index_select(0, places.flatten())


def lay_out(experts, num_experts, dtype):
    """Rows for (token, expert) pairs so that each expert's lie together: a counting sort, which is stable.

    experts: (S, k). Returns places (S, k), the row of each pair; tokens (R,), the token of each row; and ends (E,),
    the row behind each expert's last, int32. R is S * k, or more where an expert's rows are padded (with token 0).
    """
    pairs, device = experts.numel(), experts.device
    pad = row_multiple(pairs // num_experts, device, dtype)
    total = (pairs + (num_experts + 1) * (pad - 1)) // pad * pad  # R: the same at every step, whatever the routing
    chosen = experts.reshape(-1, 1)  # (S * k, 1)
    seen = (chosen == torch.arange(num_experts, device=device)).cumsum(dim=0)  # (S * k, E): how many pairs so far
    sizes = seen[-1] if pad == 1 else (seen[-1] + pad - 1) // pad * pad  # (E,)
    ends = sizes.cumsum(dim=0)  # (E,)
    places = (seen + (ends - sizes - 1)).gather(1, chosen)  # (S * k, 1)
    tokens = torch.arange(pairs, device=device) // experts.size(1)  # (S * k,), of the pairs
    tokens = tokens.new_zeros(total).scatter_(0, places.flatten(), tokens)  # (R,), of the rows
    ends = ends.int()
    if pad > 1:
        ends[-1] = total  # the last expert takes what padding is left
    return places.view_as(experts), tokens, ends
