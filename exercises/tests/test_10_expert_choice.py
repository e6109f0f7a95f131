import pytest
import torch
from reference import random_model, use_plain_loop


@pytest.fixture
def routers(monkeypatch):
    """A line for expert choice, and the plain loop for a layer."""
    import model
    from exercises import routers

    monkeypatch.setitem(model.ROUTERS, "expert-choice", model.Router(routers.expert_choice, k="all"))
    use_plain_loop(monkeypatch)
    return routers


def scores(tokens=20, experts=4):
    torch.manual_seed(4)
    return torch.randn(tokens, experts)


def test_every_expert_takes_as_many_tokens():
    from exercises.routers import expert_choice

    for tokens, experts, share in ((20, 4, 10), (9, 4, 4), (3, 8, 1)):
        gates, order = expert_choice(scores(tokens, experts), experts, None)
        assert gates.shape == order.shape == (tokens, experts)
        assert ((gates > 0).sum(dim=0) == share).all()


def test_each_takes_those_that_like_it_best():
    from exercises.routers import expert_choice

    logits = scores()
    gates, order = expert_choice(logits, 4, None)
    assert (order == torch.arange(4)).all()
    probs = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    for e in range(4):
        best = sorted(range(20), key=lambda t: -probs[t, e].item())[:10]
        expected = torch.tensor([probs[t, e] if t in best else 0.0 for t in range(20)])
        torch.testing.assert_close(gates[:, e], expected)


def test_a_router_that_looks_at_one_token_has_no_leak(monkeypatch):
    from exercises.routers import first_leak

    use_plain_loop(monkeypatch, lambda logits: logits.softmax(dim=-1))
    for seed in (1, 2, 3):
        model = random_model(seed, num_local_experts=4)
        assert first_leak(model, torch.randint(24, (2, 12))) is None


def test_expert_choice_leaks(routers):
    """Some last token takes an expert's place from an earlier one. Where, is computed here position by position."""
    model = random_model(num_local_experts=4, router="expert-choice", num_experts_per_tok=4)
    ids = torch.randint(24, (2, 12))
    with torch.no_grad():
        logits, positions = model(ids).logits, set()
        for token in range(24):
            changed = ids.clone()
            changed[:, -1] = token
            moved = (model(changed).logits - logits).abs().amax(dim=(0, 2)) > 1e-4
            positions |= {t for t in range(11) if moved[t]}
    assert positions, "this example leaks"
    assert routers.first_leak(model, ids) == min(positions)


def test_the_row_runs_every_expert():
    from exercises.routers import expert_choice, rows

    row = rows()["expert-choice"]
    assert row.choose is expert_choice and row.experts_per_token(2, 7) == 7
