"""How the routers of a fresh mixture start: at random, at zero, or pointing at each expert's own text.

    normal    drawn from a normal distribution, as in the BTX paper
    zero      all logits are equal: every gate starts at 1 / k, and ties decide who is asked until training breaks them
    domain    row i is the direction of the mean hidden state on expert i's training text

The last needs the averaged model in memory (it is small beside the mixture) and some of the training text.
"""

import numpy as np
import torch
import torch.nn.functional as F

from data.loader import cut, read_tokens
from model import Transformer

STARTS = ("normal", "zero", "domain")
WINDOWS, LENGTH = 16, 256  # of training text per domain; a mean over 4,096 tokens is steady enough


def normal_routers(shapes, std, seed):
    """{name: (E, D)} drawn from a normal distribution. shapes: {name: (E, D)}, one router a layer."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.normal(0.0, std, shape, generator=generator) for name, shape in shapes.items()}


@torch.no_grad()
def mean_states(model, data_dir, domain):
    """(L, D): what enters each layer's feed-forward sublayer, averaged over windows of a domain's training text."""
    length = min(LENGTH, model.max_length)
    tokens = read_tokens(data_dir, domain, "train", length)
    windows, _ = cut(tokens, np.linspace(0, len(tokens) - length - 1, WINDOWS).astype(int), length)
    means = []
    norms = [layer.post_attention_layernorm for layer in model.model.layers]
    hooks = [norm.register_forward_hook(lambda _, x, h: means.append(h.mean(dim=(0, 1)))) for norm in norms]
    model(windows, windows)  # with targets it keeps no logits
    for hook in hooks:
        hook.remove()
    return torch.stack(means)


def domain_routers(shapes, std, config, averaged, mixtures, data_dir):
    """{name: (E, D)}: row i of layer l has the direction of the mean state that enters FF l on expert i's text.

    Each row has the norm that a row drawn from normal(0, std) has on average, std * sqrt(D), so that the two starts
    differ in direction alone. The chunks of a split expert share its row, and so are chosen together at first.
    config, averaged: shape and tensors ((name, tensor) pairs) of the averaged model. mixtures: for each expert the
    {domain: weight} it was trained on.
    """
    model = Transformer(config)
    parameters = dict(model.named_parameters())
    for name, tensor in averaged:
        parameters[name].data.copy_(tensor)
    domains = dict.fromkeys(domain for mixture in mixtures for domain in mixture)
    states = {domain: mean_states(model, data_dir, domain) for domain in domains}
    own = torch.stack([sum(share * states[d] for d, share in mixture.items()) for mixture in mixtures])  # (N, L, D)
    rows = F.normalize(own, dim=-1) * std * config.hidden_size**0.5
    return {
        name: rows[:, layer].repeat_interleave(shape[0] // len(mixtures), dim=0)
        for layer, (name, shape) in enumerate(shapes.items())
    }
