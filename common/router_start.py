"""How the routers of a fresh mixture start: at random, at zero, or knowing each expert's own text.

    normal    drawn from a normal distribution, as in the BTX paper
    zero      all logits are equal: every gate starts at 1 / k, and ties decide who is asked until training breaks them
    domain    row i is the direction of the mean hidden state on expert i's training text
    contrast  row i is what sets that mean apart from the mean over all experts, large enough to decide at once
    ridge     the linear map that best tells a token's experts from its hidden state: ridge regression, in closed form

A mean state is mostly what all text has in common, so `domain` says little; `contrast` and `ridge` send most of a
domain's tokens to its own expert from the first step. The last three need the averaged model in memory (it is small
beside the mixture) and some of the training text.
"""

import numpy as np
import torch
import torch.nn.functional as F

from common.corpus import cut

FROM_TEXT = "domain", "contrast", "ridge"
STARTS = "normal", "zero", *FROM_TEXT
MARGIN = 4.0  # how far the logit of an expert's own text stands above that of average text, with contrast
WINDOWS, LENGTH = 16, 256  # of training text per domain; a mean over 4,096 tokens is steady enough
RIDGE_WINDOWS = 64  # a regression asks for more
RIDGE = 1e-2  # lambda, as a share of the states' mean square
RIDGE_SCALE = 3.0  # the logits of a well told domain stand so far apart; larger starts decide more and learn less


def normal_routers(shapes, std, seed):
    """{name: (E, D)} drawn from a normal distribution. shapes: {name: (E, D)}, one router per layer."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.normal(0.0, std, shape, generator=generator) for name, shape in shapes.items()}


@torch.no_grad()
def hidden_states(model, corpus, domain, count):
    """L tensors (S, D): what enters each layer's feed-forward sublayer in `count` windows of a domain's train text."""
    length = min(LENGTH, model.max_length)
    tokens = corpus.tokens(domain, "train", length)
    windows, _ = cut(tokens, np.linspace(0, len(tokens) - length - 1, count).astype(int), length)
    states = []
    norms = [layer.post_attention_layernorm for layer in model.model.layers]
    hooks = [norm.register_forward_hook(lambda _, x, h: states.append(h.flatten(0, 1))) for norm in norms]
    model(windows, windows)  # with targets it keeps no logits
    for hook in hooks:
        hook.remove()
    return states


def ridge_routers(shapes, averaged, experts, mixtures, corpus):
    """{name: (E, D)}: W = (X'X + lambda I)^-1 X'Y, scaled; rows of X are states, rows of Y say whose they are.

    The closed form is DUME's (arXiv 2603.29765). Theirs reads the averaged model; here a domain's text is read with the
    feed-forwards of its own expert in the averaged model, since those are the states of a mixture that routes right.
    Y's entry for expert i is the share that the domain had in its training, less the mean over experts: the seed, which
    was trained on all N domains, gets 1 / N of what a domain's own expert gets.
    averaged: a Transformer, left with other feed-forwards. experts: a list of {name: tensor}.
    """
    parameters = dict(averaged.named_parameters())
    squares, products = [0.0] * len(shapes), [0.0] * len(shapes)
    for domain in dict.fromkeys(domain for mixture in mixtures for domain in mixture):
        shares = torch.tensor([mixture.get(domain, 0.0) for mixture in mixtures])  # (N,)
        own = experts[int(shares.argmax())]
        for name, parameter in parameters.items():
            if ".mlp." in name:
                parameter.data.copy_(own[name])
        for layer, x in enumerate(hidden_states(averaged, corpus, domain, RIDGE_WINDOWS)):  # (S, D)
            squares[layer] = squares[layer] + x.T @ x  # (D, D)
            products[layer] = products[layer] + x.sum(dim=0).outer(shares - shares.mean())  # (D, N)
    rows = []
    for xx, xy in zip(squares, products, strict=True):
        penalty = RIDGE * xx.diagonal().mean() * torch.eye(len(xx))
        rows.append(RIDGE_SCALE * torch.linalg.solve(xx + penalty, xy).T)  # (N, D)
    return dict(zip(shapes, rows, strict=True))


def mean_routers(start, shapes, std, averaged, mixtures, corpus):
    """{name: (E, D)}: the routers of `start` domain or contrast, from the mean state m_i of layer l on expert i's text.

    domain: row i has the direction of m_i and the norm that a row drawn from normal(0, std) has on average,
    std * sqrt(D), so that the two starts differ in direction alone. contrast: row i is c_i = m_i - mean over i of m_i,
    times MARGIN / (mean over i of |c_i|^2): on its own text, a row's logit is MARGIN above that on average text.
    """
    states = {}  # (L, D) of each domain
    for domain in dict.fromkeys(domain for mixture in mixtures for domain in mixture):
        layers = hidden_states(averaged, corpus, domain, WINDOWS)
        states[domain] = torch.stack([x.mean(dim=0) for x in layers])
    own = torch.stack([sum(share * states[d] for d, share in mixture.items()) for mixture in mixtures])  # (N, L, D)
    if start == "domain":
        rows = F.normalize(own, dim=-1) * std * own.size(-1) ** 0.5
    else:
        contrast = own - own.mean(dim=0)  # (N, L, D)
        rows = contrast * MARGIN / contrast.pow(2).sum(dim=-1, keepdim=True).mean(dim=0)
    return {name: rows[:, layer] for layer, name in enumerate(shapes)}


def routers_from_text(start, shapes, std, averaged, experts, mixtures, corpus):
    """{name: (E, D)} of one of the starts FROM_TEXT. The chunks of a split expert share its row, and so are chosen
    together at first.

    shapes: {name: (E, D)}. std: as of a normal start. averaged: the averaged model, a Transformer. experts: the N dense
    models, each {name: tensor}. mixtures: for each of them the {domain: share} it was trained on.
    """
    if start == "ridge":
        rows = ridge_routers(shapes, averaged, experts, mixtures, corpus)
    else:
        rows = mean_routers(start, shapes, std, averaged, mixtures, corpus)
    return {name: row.repeat_interleave(shapes[name][0] // len(mixtures), dim=0) for name, row in rows.items()}
