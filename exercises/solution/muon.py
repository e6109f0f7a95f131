"""Muon (Jordan et al. 2024): updates with equal weight in all directions, for matrices and stacks of them."""

import torch

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # a, b, c: steep near 0, so that small singular values grow fast


def orthogonalize(gradient, steps=5):
    """U V^T, roughly, where gradient = U S V^T: all singular values near 1 (between about 0.7 and 1.2).

    Newton-Schulz: X_0 = gradient / |gradient|_F, and then `steps` times

        A = X X^T,   X <- a X + (b A + c A A) X

    gradient: (..., rows, columns); treat every matrix of a stack separately: an expert's step must not depend on other
    experts. It is cheaper if X is wide, so transpose a tall gradient, and back at the end. Add 1e-7 to the norm.
    """
    a, b, c = COEFFICIENTS
    tall = gradient.size(-2) > gradient.size(-1)
    x = gradient.mT if tall else gradient
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum, for matrices and stacks of them; everything else is left to AdamW."""

    def __init__(self, parameters, lr=0.02, momentum=0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        """For each parameter W (..., rows, columns) with gradient G, momentum m and buffer M, which starts at 0:

        M <- m M + G
        W <- W - lr * sqrt(max(1, rows / columns)) * orthogonalize(G + m M)     (Nesterov's look-ahead)
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                buffer = state.setdefault("momentum", torch.zeros_like(parameter))
                buffer.mul_(group["momentum"]).add_(parameter.grad)
                update = orthogonalize(parameter.grad + group["momentum"] * buffer)
                scale = max(1, parameter.size(-2) / parameter.size(-1)) ** 0.5
                parameter.add_(update, alpha=-group["lr"] * scale)


def split_parameters(model):
    """(names for Muon, names for AdamW): two disjoint lists that together name every parameter of a Transformer.

    Muon takes the matrices of attention and feed-forwards, including stacks of experts. The rest is AdamW's: embeddings
    and head look up rows rather than transform vectors, norms are vectors, and each router row belongs to one expert.
    """
    muon, adamw = [], []
    for name, _ in model.named_parameters():
        matrix = ".self_attn." in name or ".mlp." in name or ".experts." in name
        (muon if matrix else adamw).append(name)
    return muon, adamw
