"""The mixture of experts: N feed-forward networks in the place of one, and a router that picks among them.

    FF_MoE(x) = sum_i g_i(W x) FF_i(x)              (Branch-Train-MiX, section 3.2)

A router is the choice of g. All of them are here, each a function of the logits W x of all tokens:

    topk      SoftMax(TopK(W x)): softmax over the k selected logits alone
    switch    the expert with the largest logit; its gate is its share of the softmax over all logits
    sample    one expert, drawn with Gumbel noise while training
    soft      SoftMax(W x): every expert runs, which is topk with k = N

Letters in comments are those of model.py: S tokens, D hidden_size, F intermediate_size, E experts, k experts a token.
Reading order: the routers, the losses, Experts, MoE.
"""

import torch
import torch.nn.functional as F
from torch import nn

ROUTERS = ("topk", "switch", "sample", "soft")
BALANCES = ("gates", "tokens")
CAPACITY_FACTOR = 1.5  # switch: how many times its fair share of the tokens an expert takes in training
ANNEALING_RATE = 1e-4  # sample: how fast the temperature falls, per step
FINAL_TEMPERATURE = 0.5


class Linear(nn.Linear):
    """A linear map without bias. Weights stay in fp32 and are cast to the input's dtype where they are used."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


# ---- routers: logits (S, E) -> gates (S, k) and the experts they belong to (S, k) ----


def topk(logits, k):
    """The k largest logits of each token and the softmax over these alone, so that gates sum to 1."""
    top_logits, experts = logits.topk(k, dim=-1)  # (S, k)
    return top_logits.softmax(dim=-1), experts


def switch(logits):
    """Top-1 with the full softmax's value as gate, which gives the router a gradient (Fedus et al. 2022, eq. 2)."""
    return logits.softmax(dim=-1).max(dim=-1, keepdim=True)  # (S, 1), (S, 1)


def temperature(step):
    """max(0.5, exp(-r t)) with r = 1e-4, as in Jang et al. 2016; the BTX paper prints max(0.5, -r t), a slip.

    step: a 0-dimensional tensor, so that torch.compile does not compile anew for each number.
    """
    return torch.exp(-ANNEALING_RATE * step).clamp(min=FINAL_TEMPERATURE)


def sample(logits, step):
    """Top-1 of a Gumbel-softmax sample (Jang et al. 2016) in training; without noise, and with gate 1, elsewhere.

    In training, noise = -log(-log(uniform)) makes the largest of logits + noise a draw from SoftMax(logits). The
    gate is the largest entry of SoftMax((logits + noise) / temperature), the other entries count as zero.
    In evaluation (step None) the choice is hard, as the paper has it: the one-hot vector that the softmax comes near
    to as the temperature falls, so the gate is 1, and annealing brings training closer to evaluation.
    """
    if step is None:
        experts = logits.argmax(dim=-1, keepdim=True)  # (S, 1)
        return torch.ones_like(logits[:, :1]), experts
    return F.gumbel_softmax(logits, temperature(step)).max(dim=-1, keepdim=True)  # (S, 1), (S, 1)


def within_capacity(used):
    """used: (S, E) bool, who goes where. True for the first 1.5 S / E tokens of each expert, False for later ones.

    S counts one forward pass, so it is a micro-batch that must keep the balance, not the whole batch.
    """
    capacity = int(CAPACITY_FACTOR * len(used) / used.size(1))
    return used.cumsum(dim=0) <= capacity  # (S, E)


# ---- losses of a router, each a number, computed in fp32 and without its coefficient ----


def load_balancing_loss(gates, probs, balance="gates"):
    """N * sum_i u_i * p_i, which is least when tokens spread evenly over the N experts.

        p_i = 1/S sum_x SoftMax_i(W x)                      the mean probability of expert i
        u_i = 1/S sum_x g_i(W x)                            "gates": its mean gate weight (BTX, section 3.2)
        u_i = 1/S sum_x [expert i is chosen for x] / k      "tokens": its share of choices (Switch, eqs. 4 to 6)

    gates, probs: (S, E). With "gates" the gradient flows through both factors; counts have none. At perfect balance
    the loss is 1 where gates sum to 1; a router whose gates sum to less (switch, sample) has a smaller u_i.
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


# ---- the layer ----


class Experts(nn.Module):
    """E feed-forward networks, stacked: w1 is `gate_proj`, w3 `up_proj`, w2 `down_proj` (Mixtral's names)."""

    def __init__(self, config):
        super().__init__()
        E, D, F_ = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.w1 = nn.Parameter(torch.empty(E, F_, D))
        self.w2 = nn.Parameter(torch.empty(E, D, F_))
        self.w3 = nn.Parameter(torch.empty(E, F_, D))

    def forward(self, x, ends):
        """x: (rows, D) sorted by expert; expert e owns the rows before ends[e] (int32) that e - 1 does not."""
        w1, w2, w3 = (w.to(x.dtype).transpose(1, 2) for w in (self.w1, self.w2, self.w3))
        h = F.silu(F.grouped_mm(x, w1, offs=ends)) * F.grouped_mm(x, w3, offs=ends)  # (rows, F)
        return F.grouped_mm(h, w2, offs=ends)  # (rows, D)


class MoE(nn.Module):
    """FF_MoE(x) = sum_i g_i(W x) FF_i(x). One routing decision a token.

    An expert may get any number of rows; only switch in training drops tokens, by choice.
    """

    def __init__(self, config):
        super().__init__()
        self.router, self.balance, self.k = config.router, config.balance, config.num_experts_per_tok
        self.gate = Linear(config.hidden_size, config.num_local_experts)
        self.experts = Experts(config)

    def route(self, logits, step):
        """Gates (S, k) and experts (S, k) of each token."""
        if self.router == "switch":
            return switch(logits)
        if self.router == "sample":
            return sample(logits, step)
        return topk(logits, self.k)  # and soft, whose k is N

    def forward(self, x, step=None):
        """x: (B, T, D). step: the training step as a tensor; None elsewhere: no noise, no capacity.

        Returns y (B, T, D), gates (S, E) in fp32, zero where an expert was not used, and a dict of numbers: the
        router's losses, and for switch in training the share of tokens that were dropped.
        """
        shape, x = x.shape, x.flatten(0, 1)  # (S, D)
        logits = self.gate(x.to(self.gate.weight.dtype))  # (S, E), in fp32: near-ties must not flip with rounding
        top_gates, top_experts = self.route(logits, step)  # (S, k), (S, k)
        gates = torch.zeros_like(logits).scatter(1, top_experts, top_gates)  # (S, E)
        balance_loss = load_balancing_loss(gates, logits.softmax(dim=-1), self.balance)
        stats = {"balance_loss": balance_loss, "z_loss": router_z_loss(logits)}
        if self.router == "switch" and step is not None:
            # a token over capacity contributes zero: only the residual stream carries it past this layer
            gates = gates * within_capacity(gates > 0)
            top_gates = gates.gather(1, top_experts)
            stats["dropped"] = (top_gates == 0).to(gates.dtype).mean()

        # sort the S * k (token, expert) pairs by expert, run each expert on its run of rows, undo the sort
        pair_expert = top_experts.flatten()  # (S * k,)
        order = pair_expert.argsort(stable=True)  # (S * k,)
        ends = F.one_hot(pair_expert, logits.size(-1)).sum(dim=0).cumsum(dim=0).int()  # (E,)
        rows = x.index_select(0, order // self.k)  # (S * k, D)
        rows = self.experts(rows, ends).index_select(0, order.argsort())  # (S * k, D), in token order again
        y = (rows.unflatten(0, (-1, self.k)) * top_gates.unsqueeze(-1).to(x.dtype)).sum(dim=1)  # (S, D)
        return y.view(shape), gates, stats
