import dataclasses
import math

import pytest
import torch
from reference import config, random_model, use_plain_loop


@pytest.fixture
def sigmoid_row(monkeypatch):
    """The student's line, in ROUTERS."""
    from exercises.routers import rows

    import model

    monkeypatch.setitem(model.ROUTERS, "sigmoid", rows()["sigmoid"])


def test_by_hand():
    """sigmoid(0) = 1/2, sigmoid(log 3) = 3/4: of the two, 2/5 and 3/5."""
    from exercises.routers import sigmoid

    gates, experts = sigmoid(torch.tensor([[0.0, -9.0, math.log(3)]]), 2, None)
    assert experts.tolist() == [[2, 0]]
    torch.testing.assert_close(gates, torch.tensor([[0.6, 0.4]]))


def test_token_by_token():
    from exercises.routers import sigmoid

    torch.manual_seed(1)
    logits = 3 * torch.randn(40, 6)
    for k in (1, 2, 6):
        gates, experts = sigmoid(logits, k, torch.tensor(5))
        for row, ours, chosen in zip(logits.tolist(), gates.tolist(), experts.tolist(), strict=True):
            best = sorted(range(6), key=lambda e: -row[e])[:k]
            total = sum(1 / (1 + math.exp(-row[e])) for e in best)
            assert chosen == best
            assert all(abs(g - 1 / (1 + math.exp(-row[e])) / total) < 1e-5 for g, e in zip(ours, best, strict=True))


def test_copies_are_one_model(sigmoid_row, monkeypatch):
    from model import Transformer

    use_plain_loop(monkeypatch)
    dense = random_model()
    mixture = Transformer(dataclasses.replace(dense.config, num_local_experts=3, router="sigmoid"))
    theirs = dict(dense.named_parameters())
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    with torch.no_grad():
        for name, parameter in mixture.named_parameters():
            if ".experts." in name:
                layer, matrix = name.split(".block_sparse_moe")[0], names[name[-2:]]
                parameter.copy_(theirs[f"{layer}.mlp.{matrix}.weight"].expand_as(parameter))
            elif ".gate." not in name:
                parameter.copy_(theirs[name])
    ids = torch.randint(24, (2, 20))
    torch.testing.assert_close(mixture(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


def test_it_is_causal(sigmoid_row, monkeypatch):
    use_plain_loop(monkeypatch)
    model = random_model(num_local_experts=4, router="sigmoid")
    ids = torch.randint(24, (2, 20))
    changed = ids.clone()
    changed[:, 12:] = (ids[:, 12:] + 1) % 24
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert (before[:, 12:] - after[:, 12:]).abs().max() > 0.01


def test_end_to_end_a_mixture_learns(sigmoid_row, monkeypatch):
    """Fifty steps of AdamW on one sentence: the loss falls, and every router moves."""
    from model import Transformer

    use_plain_loop(monkeypatch)
    torch.manual_seed(1)
    model = Transformer(config(num_local_experts=4, router="sigmoid"))
    routers = {name: p.detach().clone() for name, p in model.named_parameters() if ".gate." in name}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = torch.randint(24, (1, 21))
    losses = []
    for step in range(50):
        loss = model(text[:, :-1], text[:, 1:], step=torch.tensor(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    named = dict(model.named_parameters())
    assert all((named[name] - before).abs().max() > 1e-3 for name, before in routers.items())


def test_finetune_knows_it(sigmoid_row):
    from model import ROUTERS

    assert ROUTERS["sigmoid"].experts_per_token(2, 4) == 2
    assert config(num_local_experts=4, router="sigmoid", num_experts_per_tok=3).router == "sigmoid"
