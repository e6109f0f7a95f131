"""How the routers of a fresh mixture start: at random, at zero, or knowing each expert's own text.

    normal    drawn from a normal distribution, as in the BTX paper
    zero      all logits are equal: every gate starts at 1 / k, and ties decide who is asked until training breaks them
    domain    row i is the direction of the mean hidden state on expert i's training text
    contrast  row i is what sets that mean apart from the mean over all experts, large enough to decide at once

A mean state is mostly what all text has in common, so `domain` says little; `contrast` sends most of a domain's tokens
to its own expert from the first step. Both need the averaged model in memory (it is small beside the mixture) and some
of the training text.
"""

import numpy as np
import torch
import torch.nn.functional as F

from common.corpus import cut

FROM_TEXT = "domain", "contrast"
STARTS = "normal", "zero", *FROM_TEXT
MARGIN = 4.0  # how far the logit of an expert's own text stands above that of average text, with contrast
WINDOWS, LENGTH = 16, 256  # of training text per domain; a mean over 4,096 tokens is steady enough


def normal_routers(shapes, std, seed):
    """{name: (E, D)} drawn from a normal distribution. shapes: {name: (E, D)}, one router per layer."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.normal(0.0, std, shape, generator=generator) for name, shape in shapes.items()}


@torch.no_grad()
def mean_states(model, corpus, domain):
    """(L, D): what enters each layer's feed-forward sublayer, averaged over windows of a domain's training text."""
    length = min(LENGTH, model.max_length)
    tokens = corpus.tokens(domain, "train", length)
    windows, _ = cut(tokens, np.linspace(0, len(tokens) - length - 1, WINDOWS).astype(int), length)
    means = []
    norms = [layer.post_attention_layernorm for layer in model.model.layers]
    hooks = [norm.register_forward_hook(lambda _, x, h: means.append(h.mean(dim=(0, 1)))) for norm in norms]
    model(windows, windows)  # with targets it keeps no logits
    for hook in hooks:
        hook.remove()
    return torch.stack(means)


def routers_from_text(start, shapes, std, averaged, mixtures, corpus):
    """{name: (E, D)}: the routers of `start` domain or contrast, from the mean state m_i of layer l on expert i's text.

    domain: row i has the direction of m_i and the norm that a row drawn from normal(0, std) has on average,
    std * sqrt(D), so that the two starts differ in direction alone. contrast: row i is c_i = m_i - mean over i of m_i,
    times MARGIN / (mean over i of |c_i|^2): on its own text, a row's logit is MARGIN above that on average text.
    The chunks of a split expert share its row, and so are chosen together at first.
    averaged: the averaged model, a Transformer. mixtures: for each expert the {domain: share} it was trained on.
    """
    domains = dict.fromkeys(domain for mixture in mixtures for domain in mixture)
    states = {domain: mean_states(averaged, corpus, domain) for domain in domains}
    own = torch.stack([sum(share * states[d] for d, share in mixture.items()) for mixture in mixtures])  # (N, L, D)
    if start == "domain":
        rows = F.normalize(own, dim=-1) * std * own.size(-1) ** 0.5
    else:
        contrast = own - own.mean(dim=0)  # (N, L, D)
        rows = contrast * MARGIN / contrast.pow(2).sum(dim=-1, keepdim=True).mean(dim=0)
    return {
        name: rows[:, layer].repeat_interleave(shape[0] // len(mixtures), dim=0)
        for layer, (name, shape) in enumerate(shapes.items())
    }
