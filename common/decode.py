"""One new token at a time: the forward pass of model.py for generation, in as few operations as it takes.

With so little to compute, what costs is the number of operations and of Python's calls between them. Hence weights side
by side, tables made once, no modules and no statistics of the routers: 1.6 to 2.8 times the tokens a second of
model.py's own pass (width 64, one core). Sizes in comments are those of model.py.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from common.fused import collect, dispatch, lay_out

FEW_ROWS = 32  # that an expert gets; see all_at_once


class Block(NamedTuple):
    """A layer's weights in the compute dtype. With experts gate_up is (E, 2 F, D), down (E, D, F)."""

    norm: torch.Tensor  # (D,)
    qkv: torch.Tensor  # ((H + 2 G) K, D)
    qk_norm: torch.Tensor | None  # (H + G, 1, K)
    o: torch.Tensor  # (D, H K)
    ff_norm: torch.Tensor  # (D,)
    gate_up: torch.Tensor  # (2 F, D)
    down: torch.Tensor  # (D, F)
    moe: object  # the layer's model.MoE, or None


def lay_side_by_side(layer, config, dtype):
    """The Block of a model.Layer: q, k and v as one matrix, gate and up as one, cast once a text and not once a token,
    which was a quarter of a mixture's time in bf16. The weights need their memory once more, in the compute dtype."""
    attention, moe = layer.self_attn, getattr(layer, "block_sparse_moe", None)
    if moe is None:
        gate, up, down = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight
    else:
        gate, up, down = moe.experts.w1, moe.experts.w3, moe.experts.w2
    qk_norm = None
    if config.qk_norm:
        heads = (config.num_attention_heads, config.num_key_value_heads)
        norms = (attention.q_norm.weight, attention.k_norm.weight)
        qk_norm = torch.cat([norm.expand(n, 1, -1) for norm, n in zip(norms, heads, strict=True)]).to(dtype)
    return Block(
        norm=layer.input_layernorm.weight.to(dtype),
        qkv=torch.cat([one.weight.to(dtype) for one in (attention.q_proj, attention.k_proj, attention.v_proj)]),
        qk_norm=qk_norm,
        o=attention.o_proj.weight.to(dtype),
        ff_norm=layer.post_attention_layernorm.weight.to(dtype),
        gate_up=torch.cat([gate.to(dtype), up.to(dtype)], dim=-2),
        down=down.to(dtype),
        moe=moe,
    )


def feed_forward(x, gate_up, down):
    """SwiGLU. x: (B, D). Returns (B, D)."""
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def mixture(x, block):
    """sum_i g_i FF_i(x), as model.MoE computes it. x: (B, D). Returns (B, D).

    One token's experts run one after another: 0.4 of the time that laying out rows takes, 0.65 in bf16."""
    moe, gate_up, down = block.moe, block.gate_up, block.down
    logits = F.linear(x.to(moe.gate.weight.dtype), moe.gate.weight)  # (B, E)
    gates, chosen = moe.router.choose(logits, moe.k, None)  # (B, k), (B, k)
    if len(x) == 1 and x.device.type == "cpu":
        rows = torch.cat([feed_forward(x, gate_up[e], down[e]) for e in chosen[0].tolist()])  # (k, D)
    elif all_at_once(chosen, len(down)):
        gate, up = torch.bmm(x.expand(len(down), -1, -1), gate_up.transpose(1, 2)).chunk(2, dim=-1)  # (E, B, F)
        rows = torch.bmm(F.silu(gate) * up, down.transpose(1, 2))[chosen, torch.arange(len(x)).unsqueeze(1)]
    else:
        places, tokens, ends = lay_out(chosen, len(down), x.dtype)
        up = F.grouped_mm(dispatch(x, tokens, places), gate_up.transpose(1, 2), offs=ends)
        gate, up = up.chunk(2, dim=-1)
        rows = collect(F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends), places)
    return (rows.view(*chosen.shape, -1) * gates.unsqueeze(-1).to(x.dtype)).sum(dim=1)


def all_at_once(chosen, num_experts):
    """Whether all experts run on all rows: at most twice the products, but always of the same sizes, and no layout.
    On a CPU 1.1 times as fast at a batch of 32, 1.2 times in bf16. chosen: (B, k)."""
    return (
        chosen.device.type == "cpu" and num_experts <= 2 * chosen.size(1) and chosen.numel() <= FEW_ROWS * num_experts
    )


class Decoder:
    """What a model knows of B texts, with room for `length` tokens: their keys and values, and the step to the next."""

    def __init__(self, model, batch_size, length):
        config, self.model, self.length, self.blocks = model.config, model, 0, None
        shape = batch_size, config.num_key_value_heads, length, config.head_dim
        place, layers = {"device": model.cos.device, "dtype": model.compute_dtype}, range(config.num_hidden_layers)
        self.keys, self.values = ([torch.zeros(shape, **place) for _ in layers] for _ in range(2))

    @torch.no_grad()
    def extend(self, layer, k, v):
        """Store k, v (B, G, T, K) behind what is there; return all of the layer's keys and values."""
        start, count = self.length, k.size(2)
        keys, values = self.keys[layer], self.values[layer]
        keys.narrow(2, start, count).copy_(k)
        values.narrow(2, start, count).copy_(v)
        return keys.narrow(2, 0, start + count), values.narrow(2, 0, start + count)

    def prepare(self):
        """Weights and tables for `step`, before the first."""
        model, dtype = self.model, self.model.compute_dtype
        self.blocks = [lay_side_by_side(layer, model.config, dtype) for layer in model.model.layers]
        self.norm, self.head = model.model.norm.weight.to(dtype), model.lm_head.weight.to(dtype)
        cos, sin = model.cos.to(dtype), model.sin.to(dtype)
        self.cos, self.sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)  # (positions, K)

    @torch.no_grad()
    def step(self, ids):
        """The logits (B, V) behind one more token of each text. ids: (B,)."""
        if self.blocks is None:
            self.prepare()
        config, t = self.model.config, self.length
        H, G, K, eps = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.rms_norm_eps
        cos, sin = self.cos[t], self.sin[t]  # (K,)
        x = F.embedding(ids, self.model.model.embed_tokens.weight).to(self.norm.dtype)  # (B, D)
        for i, block in enumerate(self.blocks):
            h = F.rms_norm(x, block.norm.shape, block.norm, eps)
            qk, v = F.linear(h, block.qkv).view(len(x), -1, 1, K).split((H + G, G), dim=1)
            if block.qk_norm is not None:
                qk = F.rms_norm(qk, (K,), None, eps) * block.qk_norm
            qk = torch.addcmul(qk * cos, qk.roll(K // 2, -1), sin)  # rotated, as fused.Rotate does
            q, k = qk.split((H, G), dim=1)
            keys, values = self.extend(i, k, v)  # (B, G, t + 1, K)
            y = F.scaled_dot_product_attention(q, keys, values, enable_gqa=G < H)  # (B, H, 1, K)
            x = x + F.linear(y.reshape(len(x), H * K), block.o)
            h = F.rms_norm(x, block.ff_norm.shape, block.ff_norm, eps)
            x = x + (mixture(h, block) if block.moe is not None else feed_forward(h, block.gate_up, block.down))
        self.length = t + 1
        return F.linear(F.rms_norm(x, self.norm.shape, self.norm, eps), self.head)
