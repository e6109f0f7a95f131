"""The transformer: a Llama-shaped dense model, or a Mixtral-shaped mixture of experts.

Configuration keys and parameter names are Hugging Face's, so either library loads the other's checkpoints.
Tensor sizes in comments:

    B sequences   T tokens   S = B * T   D hidden_size   V vocab_size   L layers
    H heads   G key-value heads   K head_dim   F intermediate_size   E experts   k experts per token

Reading order: ModelConfig, rotary positions, Attention, MLP, the routers and their losses, Experts, MoE, Layer,
Transformer, LayerCache, generate. The head's loss is in common/ops.py, checkpoint formats are in common/hf.py.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.errors import UserError
from common.hf import (
    WeightFiles,
    check_memory,
    expected_tensors,
    read_config,
    to_disk,
    write_config,
    write_weights,
)
from common.ops import IGNORE, head_loss, token_losses

BALANCES = ("gates", "tokens")
WIDTH = 8  # the sizes of experts' matrices are multiples of this: grouped_mm's alignment
ANNEALING_RATE = 1e-4  # of the sample router's temperature, per step
FINAL_TEMPERATURE = 0.5


@dataclasses.dataclass
class ModelConfig:
    """The shape of a model, under Hugging Face's names. `num_local_experts = 0` means a dense model.

    Raises ValueError for sizes that do not fit together."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    head_dim: int | None = None  # None: hidden_size over num_attention_heads
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # for models stretched to longer texts; see SCALINGS
    qk_norm: bool = False  # norms on queries and keys, as in Qwen3
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None  # the token that ends a document
    num_local_experts: int = 0
    # for mixtures only; transformers reads the first two and ignores the rest, so it computes topk and soft as we do
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float = 0.01  # alpha of the balancing loss
    router_z_loss_coef: float = 0.0
    router: str = "topk"  # Mixtral's; see ROUTERS for the others
    balance: str = "gates"  # what the balancing loss counts: gate weights or tokens
    expert_names: tuple = ()  # labels for pictures

    def __post_init__(self):
        if self.head_dim is None:
            self.head_dim, rest = divmod(self.hidden_size, self.num_attention_heads)
            if rest:
                raise ValueError("hidden_size must be a multiple of num_attention_heads")
        if self.head_dim % 2:
            raise ValueError(f"the size of an attention head must be even, not {self.head_dim}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        if self.router not in ROUTERS or self.balance not in BALANCES:
            raise ValueError(f"router must be one of {tuple(ROUTERS)} and balance one of {BALANCES}")
        if self.num_local_experts:
            self._check_experts()

    def _check_experts(self):
        if self.hidden_size % WIDTH or self.intermediate_size % WIDTH:
            raise ValueError(f"hidden_size and intermediate_size of a mixture must be multiples of {WIDTH}")
        if not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise ValueError(f"num_experts_per_tok must lie between 1 and the model's {self.num_local_experts} experts")
        fixed = ROUTERS[self.router].experts_per_token(self.num_experts_per_tok, self.num_local_experts)
        if self.num_experts_per_tok != fixed:
            k = self.num_experts_per_tok
            raise ValueError(f"router {self.router} sends each token to {fixed} expert(s), num_experts_per_tok is {k}")

    @classmethod
    def from_pretrained(cls, folder, **changes):
        """Read the shape of a checkpoint folder, ours or Hugging Face's, with some values changed. A new router brings
        its own number of experts per token, unless `changes` sets that too."""
        found = {**read_config(folder), **changes}
        names = [field.name for field in dataclasses.fields(cls)]
        try:
            if "router" in changes and "num_experts_per_tok" not in changes:
                router, k = ROUTERS[changes["router"]], found["num_experts_per_tok"]
                found["num_experts_per_tok"] = router.experts_per_token(k, found["num_local_experts"])
            return cls(**{name: found[name] for name in names if name in found})
        except (TypeError, ValueError) as error:
            raise UserError(f"{os.path.join(folder, 'config.json')}: {error}") from None


class Output(NamedTuple):
    """What a forward pass returns.

    logits: (B, T, V) in compute dtype; None with targets, when only the loss is needed.
    loss: mean negative log-likelihood in nats; None without targets.
    losses: (B, T) negative log-likelihood of each target in fp32; None without targets, or with gradients enabled.
    aux_loss: the routers' losses, times their coefficients and summed over layers; 0 for a dense model.
    gates: (L, B, T, E) gate weights in fp32, zero for unused experts; None for a dense model.
    stats: {name: (L,)} the routers' statistics for the log (see MoE.forward); empty for a dense model.
    """

    logits: torch.Tensor | None
    loss: torch.Tensor | None
    losses: torch.Tensor | None
    aux_loss: torch.Tensor
    gates: torch.Tensor | None
    stats: dict


class Linear(nn.Linear):
    """A linear map without bias. Weights stay in fp32 and are cast to the input's dtype when used."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm (Zhang and Sennrich 2019), with weights cast as in Linear."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


# ---- rotary positions (Su et al. 2021), and how published models stretch them to longer texts ----


def linear(frequencies, factor):
    """Position interpolation (Chen et al. 2023): divide every angle by `factor`."""
    return frequencies / factor


def llama3(frequencies, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings):
    """Llama 3.1's scaling: divide the low frequencies by `factor`, keep the high ones, interpolate in between."""
    # full turns within the length that the model was trained on
    turns = original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / factor


SCALINGS = {"linear": linear, "llama3": llama3}  # common/hf.py reads their arguments from config.json


def rotary_table(config):
    """cos and sin of every position's angles, each (max_position_embeddings, K / 2), on the CPU."""
    dimensions = torch.arange(0, config.head_dim, 2, device="cpu").float()
    frequencies = config.rope_theta ** (-dimensions / config.head_dim)  # (K / 2,)
    if config.rope_scaling:
        settings = {**config.rope_scaling}
        scale = SCALINGS[settings.pop("rope_type")]
        frequencies = scale(frequencies, **settings)
    positions = torch.arange(config.max_position_embeddings, device="cpu").float()
    angles = positions[:, None] * frequencies  # (positions, K / 2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotate each pair (x_i, x_{i + K/2}) by its position's angle. The pairing is Hugging Face's.

    x: (B, heads, T, K); cos, sin: (T, K / 2).
    """
    a, b = x.chunk(2, dim=-1)  # (B, heads, T, K / 2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# ---- the two sublayers of a dense layer ----


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al. 2023) with rotary positions."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_size)
        self.k_proj = Linear(config.hidden_size, kv_size)
        self.v_proj = Linear(config.hidden_size, kv_size)
        self.o_proj = Linear(q_size, config.hidden_size)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x, cos, sin, cache=None):
        """x: (B, T, D); cos, sin: (T, K / 2); cache: the layer's LayerCache, which holds the earlier tokens."""
        heads = *x.shape[:2], -1, self.config.head_dim
        q = self.q_proj(x).view(heads)  # (B, T, H, K)
        k = self.k_proj(x).view(heads)  # (B, T, G, K)
        v = self.v_proj(x).view(heads)  # (B, T, G, K)
        if self.config.qk_norm:
            q = self.q_norm(q)
            k = self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or G, T, K)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(k, v)  # (B, G, all tokens so far, K)
        # a single new token may attend to everything before it, so it needs no mask
        grouped = self.config.num_key_value_heads < self.config.num_attention_heads
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) > 1, enable_gqa=grouped)  # (B, H, T, K)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """The dense feed-forward sublayer: SwiGLU (Shazeer 2020)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# ---- routers: the choice of g in FF_MoE(x) = sum_i g_i(W x) FF_i(x)   (Branch-Train-MiX, section 3.2) ----
#
# Each is a function (logits W x (S, E), k, step) -> gates (S, k) and the experts they belong to (S, k).
# step: the training step as a tensor; None in evaluation, which adds no noise.


def topk(logits, k, step):
    """SoftMax(TopK(W x)): keep each token's k largest logits and take the softmax over those alone: gates sum to 1."""
    top_logits, experts = logits.topk(k, dim=-1)  # (S, k)
    return top_logits.softmax(dim=-1), experts


def switch(logits, k, step):
    """Top-1, gated by its value in the full softmax, which gives the router a gradient (Fedus et al. 2022, eq. 2)."""
    return logits.softmax(dim=-1).max(dim=-1, keepdim=True)  # (S, 1), (S, 1)


def temperature(step):
    """max(0.5, exp(-r t)) with r = 1e-4, as in Jang et al. 2016; the BTX paper prints max(0.5, -r t), a slip.

    step: a 0-dimensional tensor, so that torch.compile does not recompile at every step.
    """
    return torch.exp(-ANNEALING_RATE * step).clamp(min=FINAL_TEMPERATURE)


def sample(logits, k, step):
    """In training, the top-1 of a Gumbel-softmax sample (Jang et al. 2016); in evaluation, the argmax with gate 1.

    With noise = -log(-log(uniform)), the argmax of logits + noise is a draw from SoftMax(logits). The gate is the
    largest entry of SoftMax((logits + noise) / temperature); the other entries count as zero.
    In evaluation the choice is hard, as in the paper: a one-hot vector, which the softmax approaches as the
    temperature falls. So annealing brings training closer to evaluation.
    """
    if step is None:
        return torch.ones_like(logits[:, :1]), logits.argmax(dim=-1, keepdim=True)  # (S, 1), (S, 1)
    return F.gumbel_softmax(logits, temperature(step)).max(dim=-1, keepdim=True)  # (S, 1), (S, 1)


class Router(NamedTuple):
    """A row of ROUTERS: how tokens find their experts.

    choose: one of the functions above. k: how many experts it picks: a number, "all", or None if num_experts_per_tok
    decides. capacity: in training, an expert takes at most this many times its fair share of the tokens and drops
    the rest. first_layer: the first layer's router, if it is a different one.
    """

    choose: Callable
    k: int | str | None = None
    capacity: float = math.inf
    first_layer: str | None = None

    def experts_per_token(self, k, num_experts):
        """This router's own number of experts per token, or k if it leaves the choice open."""
        return {None: k, "all": num_experts}.get(self.k, self.k)


ROUTERS = {
    "topk": Router(topk),
    "switch": Router(switch, k=1, capacity=1.5),
    "sample": Router(sample, k=1, first_layer="soft"),
    "soft": Router(topk, k="all"),  # SoftMax(W x): every expert runs
}


def within_capacity(used, factor):
    """used: (S, E) bool, which tokens go to which experts. Returns (S, E) bool: True for each expert's first
    floor(factor S / E) tokens, False for later ones; entries where `used` is False do not matter.

    S is the tokens of one forward pass, so the limit applies to each micro-batch, not to the whole batch.
    """
    return used.cumsum(dim=0) <= int(factor * len(used) / used.size(1))  # (S, E)


# ---- a router's losses: scalars, computed in fp32, without their coefficients ----


def load_balancing_loss(gates, probs, balance="gates"):
    """N * sum_i u_i * p_i: 1 when both are even over the N experts, and N when one expert has everything. It can fall
    below 1 when the two disagree, so it pushes towards balance but does not measure it.

        p_i = 1/S sum_x SoftMax_i(W x)                      the mean probability of expert i
        u_i = 1/S sum_x g_i(W x)                            "gates": its mean gate weight (BTX, section 3.3)
        u_i = 1/S sum_x [expert i is chosen for x] / k      "tokens": its share of choices (Switch, eqs. 4 to 6)

    gates, probs: (S, E). k: how many of a token's gates are above zero; count them. With "gates" the gradient flows
    through both factors; counts have none. If gates sum to less than 1 (switch, sample), so do the u_i.
    """
    if balance == "tokens":
        choices = (gates > 0).sum(dim=0)  # (E,)
        usage = choices / choices.sum()
    else:
        usage = gates.mean(dim=0)  # (E,)
    return gates.size(-1) * (usage * probs.mean(dim=0)).sum()


def router_z_loss(logits):
    """1/S sum_x (log sum_i exp(W x)_i)^2: keeps logits small (ST-MoE, Zoph et al. 2022, eq. 5)."""
    return logits.logsumexp(dim=-1).square().mean()


# ---- the mixture of experts: N feed-forward networks in place of one ----

LOOP_ON = ("mps",)  # device types on which experts run one after another


def grouped_mm(x, weights, ends):
    """Multiply each expert's rows by its own matrix. x: (R, I), sorted by expert; weights: (E, I, O); ends: (E,) int32,
    expert e owns rows ends[e - 1] to ends[e]. Returns (R, O)."""
    if x.device.type not in LOOP_ON:
        return F.grouped_mm(x, weights, offs=ends)
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([rows @ weight for rows, weight in zip(x.split(sizes), weights, strict=True)])


class Experts(nn.Module):
    """E feed-forward networks, stacked: w1 is `gate_proj`, w3 `up_proj`, w2 `down_proj` (Mixtral's names)."""

    def __init__(self, config):
        super().__init__()
        E, D, F_ = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.w1 = nn.Parameter(torch.empty(E, F_, D))
        self.w2 = nn.Parameter(torch.empty(E, D, F_))
        self.w3 = nn.Parameter(torch.empty(E, F_, D))

    def forward(self, x, ends):
        """x: (R, D), sorted by expert. ends: (E,) int32, where each expert's rows end. Returns (R, D)."""
        w1 = self.w1.to(x.dtype).transpose(1, 2)  # (E, D, F)
        w2 = self.w2.to(x.dtype).transpose(1, 2)  # (E, F, D)
        w3 = self.w3.to(x.dtype).transpose(1, 2)  # (E, D, F)
        h = F.silu(grouped_mm(x, w1, ends)) * grouped_mm(x, w3, ends)  # (R, F)
        return grouped_mm(h, w2, ends)  # (R, D)


class MoE(nn.Module):
    """FF_MoE(x) = sum_i g_i(W x) FF_i(x), with one routing decision per token.

    An expert may get any number of rows; only the switch router drops tokens, by design, and only in training.
    """

    def __init__(self, config):
        super().__init__()
        self.router = ROUTERS[config.router]
        self.balance = config.balance
        self.k = config.num_experts_per_tok
        self.gate = Linear(config.hidden_size, config.num_local_experts)
        self.experts = Experts(config)

    def forward(self, x, step=None):
        """x: (B, T, D). step: the training step as a tensor; None otherwise: no noise, no capacity limit.

        Returns y (B, T, D), gates (S, E) in fp32, zero for unused experts, and a dict of scalars: the router's losses
        and, in training with a limited capacity, `dropped`, the share of (token, expert) pairs that were dropped.
        The balancing loss is computed from the gates before anything is dropped.
        """
        shape = x.shape
        x = x.flatten(0, 1)  # (S, D)
        logits = self.gate(x.to(self.gate.weight.dtype))  # (S, E), in fp32: near-ties must not flip with rounding
        top_gates, top_experts = self.router.choose(logits, self.k, step)  # (S, k), (S, k)
        gates = torch.zeros_like(logits).scatter(1, top_experts, top_gates)  # (S, E)
        balance_loss = load_balancing_loss(gates, logits.softmax(dim=-1), self.balance)
        stats = {"balance_loss": balance_loss, "z_loss": router_z_loss(logits)}
        if self.router.capacity < math.inf and step is not None:
            # a token over capacity contributes zero: only the residual stream carries it past this layer
            gates = gates * within_capacity(gates > 0, self.router.capacity)
            top_gates = gates.gather(1, top_experts)
            stats["dropped"] = (top_gates == 0).to(gates.dtype).mean()

        # every (token, expert) pair is a row; sort the rows by expert, so that each expert's are contiguous
        order = top_experts.flatten().argsort(stable=True)  # (S * k,)
        ends = F.one_hot(top_experts.flatten(), logits.size(-1)).sum(dim=0).cumsum(dim=0).int()  # (E,)
        rows = self.experts(x.index_select(0, order // self.k), ends)  # (S * k, D), by expert
        rows = rows.index_select(0, order.argsort())  # (S * k, D), by token again
        y = (rows.unflatten(0, (-1, self.k)) * top_gates.unsqueeze(-1).to(x.dtype)).sum(dim=1)  # (S, D)
        return y.view(shape), gates, stats


class Layer(nn.Module):
    """One transformer block. Its feed-forward sublayer is an MLP or an MoE; everything else is the same."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.num_local_experts:
            self.block_sparse_moe = MoE(config)
        else:
            self.mlp = MLP(config)

    def forward(self, x, cos, sin, cache=None, step=None):
        """x: (B, T, D). Returns the new x and the router's (gates, stats), or None if there is no router."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        h = self.post_attention_layernorm(x)
        if hasattr(self, "mlp"):
            return x + self.mlp(h), None
        y, gates, stats = self.block_sparse_moe(h, step)
        return x + y, (gates, stats)


class Transformer(nn.Module):
    """LlamaForCausalLM or, with experts, MixtralForCausalLM; with qk_norm, their Qwen3 versions. `compute_dtype`: the
    dtype of activations. `recompute`: keep no activations inside a layer; compute them again in the backward pass."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.max_length = config.max_position_embeddings  # the longest sequence, in tokens
        self.compute_dtype = torch.float32
        self.recompute = False
        first = config
        other = ROUTERS[config.router].first_layer  # sample needs a soft first layer (BTX, section 3.3)
        if config.num_local_experts and other:
            k = ROUTERS[other].experts_per_token(config.num_experts_per_tok, config.num_local_experts)
            first = dataclasses.replace(config, router=other, num_experts_per_tok=k)
        layers = [Layer(config if i else first) for i in range(config.num_hidden_layers)]
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(layers),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        for table in ("cos", "sin"):
            self.register_buffer(table, None, persistent=False)
        self.set_up()
        self.init_weights()

    def set_up(self):
        """Make what no checkpoint stores: the rotary tables and, if it is tied to the embeddings, the head."""
        self.cos, self.sin = rotary_table(self.config)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def init_weights(self):
        """Draw all matrices from a normal with std = 0.02 sqrt(768 / D): GPT-2's 0.02 at its width, and outputs of the
        same size at any other. Those that write to the residual stream get std / sqrt(2 L); norms are 1."""
        std = 0.02 * math.sqrt(768 / self.config.hidden_size)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                to_residual = name.endswith(("o_proj.weight", "down_proj.weight", "w2"))
                nn.init.normal_(parameter, std=std / math.sqrt(2 * len(self.model.layers)) if to_residual else std)

    def forward(self, ids, targets=None, cache=None, step=None):
        """ids, targets: (B, T) integers; a target of IGNORE does not count. Returns an Output.

        step: the training step, a 0-dimensional tensor, or None outside training: then routers have no noise and no
        capacity limit. Noise comes from torch's global generator. cache: from new_cache, holds the earlier tokens; the
        first call may have any number of tokens, later ones have one each.
        """
        start = cache[0].length if cache else 0
        end = start + ids.size(1)
        if end > self.max_length:
            raise ValueError(f"{end} tokens, but the model knows {self.max_length} positions")
        x = self.model.embed_tokens(ids).to(self.compute_dtype)  # (B, T, D)
        cos = self.cos[start:end].to(x.dtype)  # (T, K / 2)
        sin = self.sin[start:end].to(x.dtype)
        routed = []
        for layer, layer_cache in zip(self.model.layers, cache or [None] * len(self.model.layers), strict=True):
            run = partial(checkpoint, layer, use_reentrant=False) if self.recompute else layer
            x, routing = run(x, cos, sin, layer_cache, step)
            routed.append(routing)
        x = self.model.norm(x)  # (B, T, D)

        logits = None
        loss = None
        losses = None
        aux_loss = torch.zeros((), device=x.device)
        gates = None
        stats = {}
        if targets is None:
            logits = self.lm_head(x)  # (B, T, V)
        else:
            count = (targets != IGNORE).sum().clamp(min=1)
            flat = x.flatten(0, 1), self.lm_head.weight, targets.flatten()
            if torch.is_grad_enabled():
                loss = head_loss(*flat) / count
            else:
                losses = token_losses(*flat).view(targets.shape)  # (B, T)
                loss = losses.sum() / count
        if self.config.num_local_experts:
            gates = torch.stack([gates.unflatten(0, ids.shape) for gates, _ in routed])  # (L, B, T, E)
            stats = {name: torch.stack([stats[name] for _, stats in routed]) for name in routed[0][1]}  # (L,) each
            aux_loss = self.config.router_aux_loss_coef * stats["balance_loss"].sum()
            if self.config.router_z_loss_coef:  # otherwise it is only logged, and needs no backward pass
                aux_loss = aux_loss + self.config.router_z_loss_coef * stats["z_loss"].sum()
        return Output(logits, loss, losses, aux_loss, gates, stats)

    @classmethod
    def from_pretrained(cls, folder, **changes):
        """Load a checkpoint folder, ours or Hugging Face's, in fp32 on the CPU. changes: values of ModelConfig to use
        instead of the folder's own, such as another router."""
        files = WeightFiles(folder, ModelConfig.from_pretrained(folder))
        check_memory(folder, 4 * sum(torch.Size(shape).numel() for shape in expected_tensors(files.config).values()))
        with on_meta():  # weights are about to be read
            model = cls(ModelConfig.from_pretrained(folder, **changes))
        model.load_state_dict(files.read(model), strict=False, assign=True)  # a tied head is not among them
        model.set_up()
        return model

    def save_pretrained(self, folder, weights=None):
        """Write model.safetensors and config.json, which transformers' `from_pretrained` loads too. weights: the whole
        state_dict(), if this process holds only a part of it."""
        tensors = to_disk(weights or self.state_dict())
        write_weights(folder, self.config, ((name, tensors[name]) for name in expected_tensors(self.config)))
        write_config(folder, self.config)

    def new_cache(self, batch_size, length):
        """An empty LayerCache for each layer, with room for `batch_size` texts of at most `length` tokens."""
        shape = batch_size, self.config.num_key_value_heads, length, self.config.head_dim
        like = torch.empty(0, device=self.cos.device, dtype=self.compute_dtype)
        return [LayerCache(shape, like) for _ in self.model.layers]

    def active_numel(self, name, parameter):
        """How many of a parameter's weights one token uses: k of E experts, all of everything else."""
        if ".experts." not in name:
            return parameter.numel()
        layer = int(name.split(".")[2])  # model.layers.3.block_sparse_moe.experts.w1
        return parameter.numel() * self.model.layers[layer].block_sparse_moe.k // self.config.num_local_experts

    def num_parameters(self):
        """(parameters active for one token, all parameters); tied embeddings count once."""
        named = list(self.named_parameters())
        return sum(self.active_numel(*pair) for pair in named), sum(parameter.numel() for _, parameter in named)

    def flops_per_token(self, sequence_length):
        """Training FLOPs per token: 2 each for forward, activation gradient and weight gradient, per active weight in
        a matmul (including head and routers, but no embedding look-up; frozen weights need no weight gradient), plus
        12 L H K T for attention, with no discount for the causal mask (Chowdhery et al. 2022, appendix B)."""
        attention_size = self.config.num_attention_heads * self.config.head_dim
        flops = 12 * self.config.num_hidden_layers * attention_size * sequence_length
        for name, parameter in self.named_parameters():
            looked_up = name == "model.embed_tokens.weight" and not self.config.tie_word_embeddings
            if parameter.dim() > 1 and not looked_up:
                flops += self.active_numel(name, parameter) * (6 if parameter.requires_grad else 4)
        return flops


@contextlib.contextmanager
def on_meta():
    """Build modules on the meta device: shapes only, no memory, no numbers.

    nn.init.normal_ is patched for as long: on the meta device it would load torch's compiler, which takes a second.
    """
    draw = nn.init.normal_
    nn.init.normal_ = lambda tensor, *_, **__: tensor
    try:
        with torch.device("meta"):
            yield
    finally:
        nn.init.normal_ = draw


# ---- generation ----


class LayerCache:
    """One layer's keys and values for B texts, with room for `length` tokens, so that each token is read only once."""

    def __init__(self, shape, like):
        """shape: (B, G, length, K). like: a tensor with the right device and dtype."""
        self.keys = like.new_zeros(shape)
        self.values = like.new_zeros(shape)
        self.length = 0  # tokens so far

    def extend(self, k, v):
        """Append k, v (B, G, T, K). Returns all keys and values so far."""
        start, self.length = self.length, self.length + k.size(2)
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, stop=(), temperature=0.0, top_k=0, generator=None, unknown=()):
    """Continue each prompt (a list of token ids) until one of the ids in `stop`; return the new ids, a list per prompt.

    All sequences advance together, one position per step, from the end of the shortest prompt; a longer prompt's own
    tokens take precedence over sampled ones, so no padding is needed. temperature 0 is greedy; top_k 0 means no limit.
    unknown: a list of ids that are never chosen, such as vocabulary rows for which the tokenizer has no token.
    model: anything with `new_cache` and the forward pass of Transformer.
    """
    lengths = [len(prompt) for prompt in prompts]
    total = max(lengths) + max_new_tokens
    device = next(model.parameters()).device
    cache = model.new_cache(len(prompts), total)
    sequences = [list(prompt) for prompt in prompts]
    done = [False] * len(prompts)
    barred = torch.tensor(unknown, dtype=torch.long, device=device)
    ids = torch.tensor([prompt[: min(lengths)] for prompt in prompts], device=device)  # (B, T)
    for position in range(min(lengths), total):
        logits = model(ids, cache=cache).logits[:, -1].float()  # (B, V)
        if unknown:
            logits[:, barred] = -math.inf
        if temperature > 0:
            logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # at most 0: never overflows
            if top_k:
                smallest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
                logits[logits < smallest] = -math.inf
            sampled = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).flatten().tolist()
        else:
            sampled = likeliest(logits)
        for row, token in enumerate(sampled):
            if position >= lengths[row] and not done[row]:
                done[row] = token in stop or position >= lengths[row] + max_new_tokens
                if not done[row]:
                    sequences[row].append(token)
        if all(done):
            break
        column = [[sequence[min(position, len(sequence) - 1)]] for sequence in sequences]
        ids = torch.tensor(column, device=device)  # (B, 1)
    return [sequence[length:] for sequence, length in zip(sequences, lengths, strict=True)]


def likeliest(logits):
    """The index of each row's largest logit, a list. By numpy on a CPU: torch's argmax would take a tenth of a step."""
    return (logits.numpy() if logits.device.type == "cpu" else logits).argmax(-1).tolist()
