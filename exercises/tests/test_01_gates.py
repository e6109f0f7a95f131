import math

import torch
from reference import slope


def logits(rows=50, experts=5):
    torch.manual_seed(1)
    return torch.randn(rows, experts, dtype=torch.float64)


def test_top_2_by_hand():
    """exp(2) and exp(1) of (1, 0, 2): the gates are 1 / (1 + 1/e) and the rest."""
    from model import topk

    gates, experts = topk(torch.tensor([[1.0, 0.0, 2.0]]), 2, None)
    first = 1 / (1 + math.exp(-1))
    assert experts.tolist() == [[2, 0]]
    torch.testing.assert_close(gates, torch.tensor([[first, 1 - first]]))


def test_top_k_token_by_token():
    from model import topk

    for k in (1, 2, 5):
        gates, experts = topk(logits(), k, None)
        assert gates.shape == experts.shape == (50, k)
        for row, ours, chosen in zip(logits().tolist(), gates.tolist(), experts.tolist(), strict=True):
            best = sorted(range(5), key=lambda e: -row[e])[:k]
            total = sum(math.exp(row[e]) for e in best)
            assert sorted(chosen) == sorted(best)
            for e, gate in zip(chosen, ours, strict=True):
                assert abs(gate - math.exp(row[e]) / total) < 1e-9


def test_a_logit_that_lost_has_no_gradient():
    from model import topk

    x = torch.tensor([[1.0, 0.0, 2.0, -1.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(topk(x, 2, None)[0][0, 0], x)
    assert gradient[0, 1] == gradient[0, 3] == 0
    for e in (0, 2):
        direction = torch.zeros(1, 4)
        direction[0, e] = 1
        assert abs(slope(lambda z: topk(z, 2, None)[0][0, 0], x, direction) - gradient[0, e]) < 1e-7


def test_switch_by_hand():
    """The softmax of (log 1, log 2, log 5) is (1/8, 2/8, 5/8)."""
    from model import switch

    gates, experts = switch(torch.tensor([[1.0, 2.0, 5.0], [6.0, 1.0, 1.0]]).log(), 1, None)
    assert experts.tolist() == [[2], [0]]
    torch.testing.assert_close(gates, torch.tensor([[5 / 8], [6 / 8]]))


def test_every_logit_moves_the_gate_of_switch():
    """The winner's gate falls when any other logit grows: without that, the router could not learn from one expert."""
    from model import switch

    x = torch.tensor([[1.0, 0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(switch(x, 1, None)[0].sum(), x)
    assert gradient[0, 2] > 0 and gradient[0, 0] < 0 and gradient[0, 1] < 0
