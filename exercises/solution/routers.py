"""Two routers that model.py does not have, and a test that one of them fails.

A router is a function (logits (S, E), k, step) -> (gates, experts), each (S, k), with a row of ROUTERS in model.py.
"""

import torch

from model import Router


def sigmoid(logits, k, step):
    """Scores that do not compete: each logit goes through its own sigmoid (DeepSeek-V3, section 2.1.2).

        s_i = 1 / (1 + exp(-(W x)_i))      for every expert
        g_i = s_i / sum_j s_j              over the k experts with the largest s; the others get nothing

    logits: (S, E). Returns gates (S, k), largest first, and the experts (S, k) that they belong to.
    """
    scores, experts = logits.sigmoid().topk(k, dim=-1)  # (S, k)
    return scores / scores.sum(dim=-1, keepdim=True), experts


def expert_choice(logits, k, step):
    """Experts choose tokens (Zhou et al. 2022): perfect balance, without a balancing loss.

        p = SoftMax(W x)                      (S, E), over each token's row
        c = max(1, 2 S / E), rounded down     how many tokens an expert takes: 2 experts per token on average
        g_ti = p_ti                           if t is among the c tokens with the largest p_ti; else 0

    logits: (S, E). Here k = E: a token may get any number of experts, so all are listed, in the order 0 .. E - 1.
    Returns gates (S, E) and experts (S, E).
    """
    probs = logits.softmax(dim=-1)  # (S, E)
    tokens, num_experts = probs.shape
    best = probs.topk(max(1, 2 * tokens // num_experts), dim=0).indices  # (c, E)
    chosen = torch.zeros_like(probs).scatter(0, best, 1.0)  # (S, E)
    return probs * chosen, torch.arange(num_experts).expand(tokens, -1)


def rows():
    """{name: Router}: this file's entries for ROUTERS, under the names "sigmoid" and "expert-choice".

    See Router in model.py: k is None if num_experts_per_tok decides, and "all" for all of them.
    """
    return {"sigmoid": Router(sigmoid), "expert-choice": Router(expert_choice, k="all")}


@torch.no_grad()
def first_leak(model, ids):
    """The first position before the last whose logits change when the last token does; None if there is none.

    A language model predicts position t + 1 from tokens 0 .. t. If the logits at t depend on later tokens, the training
    loss is a fraud: the model reads the answer, which it cannot do in generation.

    model: a Transformer. ids: (B, T). For each token v of the vocabulary: put v at the end of every row and run once.
    Returns the smallest position before the last whose logits any v has moved, in any row, by more than 1e-4.
    """
    leaks = []
    logits = model(ids).logits[:, :-1]  # (B, T - 1, V)
    for token in range(model.config.vocab_size):
        changed = ids.clone()
        changed[:, -1] = token
        difference = (model(changed).logits[:, :-1] - logits).abs().amax(dim=(0, 2))  # (T - 1,)
        leaks += (difference > 1e-4).nonzero().flatten().tolist()
    return min(leaks, default=None)
