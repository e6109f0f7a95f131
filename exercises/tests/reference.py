"""What the tests measure against: small models, and a mixture's layer written as the plain loop that it stands for.

Nothing here uses a function that an exercise empties.
"""

import torch
import torch.nn.functional as F


def config(**changes):
    """The shape of a tiny model; with num_local_experts a mixture."""
    from model import ModelConfig

    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    return ModelConfig(**{**sizes, **changes})


def random_model(seed=1, std=0.3, **changes):
    from model import Transformer

    torch.manual_seed(seed)
    model = Transformer(config(**changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=std)
    return model


def random_layer(router="topk", k=2, experts=4, seed=2, **changes):
    """A MoE layer, and an input of 2 x 9 tokens."""
    from model import MoE

    torch.manual_seed(seed)
    layer = MoE(config(router=router, num_experts_per_tok=k, num_local_experts=experts, **changes))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return layer, torch.randn(2, 9, 16, requires_grad=True)


def plain_loop(layer, x, gates):
    """sum_e gates[:, e] FF_e(x), every expert on every token. x: (S, D), gates: (S, E)."""
    w1, w2, w3 = layer.experts.w1, layer.experts.w2, layer.experts.w3
    return sum(gates[:, e : e + 1] * ((F.silu(x @ w1[e].T) * (x @ w3[e].T)) @ w2[e].T) for e in range(len(w1)))


def gates_of(layer, x, step=None):
    """(S, E): what the layer's router says of x (S, D), in full width."""
    logits = x @ layer.gate.weight.T
    top, experts = layer.router.choose(logits, layer.k, step)
    return torch.zeros_like(logits).scatter(1, experts, top), logits


def use_plain_loop(monkeypatch, choose=None):
    """Give MoE a forward pass that is a loop, so that a test stands without exercises 2 and 3.

    choose: function (logits) -> gates (S, E), in the place of the layer's own router.
    """
    from model import MoE

    def forward(self, x, step=None):
        tokens = x.flatten(0, 1)
        if choose is None:
            gates, logits = gates_of(self, tokens, step)
        else:
            logits = tokens @ self.gate.weight.T
            gates = choose(logits)
        zero = logits.sum() * 0
        return plain_loop(self, tokens, gates).view(x.shape), gates, {"balance_loss": zero, "z_loss": zero}

    monkeypatch.setattr(MoE, "forward", forward)


def tensors_of(model):
    """A dense model as mix.py reads it from a folder: {name: tensor}."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def load(model, tensors):
    """Put {name on disk: tensor} of a mixture or a dense model into `model`."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                prefix, matrix = name.rsplit(".", 1)
                stack = [tensors[f"{prefix}.{e}.{matrix}.weight"] for e in range(len(parameter))]
                parameter.copy_(torch.stack(stack))
            else:
                parameter.copy_(tensors[name])
    return model


def slope(function, x, direction, h=1e-4):
    """The derivative of a number along a direction, by central differences, in float64."""
    x, direction = x.detach().double(), direction.double()
    return (function(x + h * direction) - function(x - h * direction)) / (2 * h)
