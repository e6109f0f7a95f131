import torch
from reference import slope


def scores():
    torch.manual_seed(3)
    return torch.randn(12, 4, dtype=torch.float64)


def top_2(logits):
    """Gates of two experts a token, without the student's topk."""
    cut = logits.sort(dim=-1).values[:, -2:-1]
    return torch.where(logits >= cut, logits.exp(), 0.0) / torch.where(logits >= cut, logits.exp(), 0.0).sum(-1, True)


def test_by_hand():
    """Two tokens, two experts: u = (0.5, 0.5), p = (0.6, 0.4), so 2 * (0.3 + 0.2) = 1. Then u = (1, 0): 2 * 0.6."""
    from model import load_balancing_loss

    probs = torch.tensor([[0.7, 0.3], [0.5, 0.5]])
    assert abs(load_balancing_loss(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), probs) - 1.0) < 1e-6
    assert abs(load_balancing_loss(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), probs) - 1.2) < 1e-6


def test_perfect_balance_is_1_and_collapse_is_the_number_of_experts():
    from model import load_balancing_loss

    even, one = torch.full((8, 4), 0.25), torch.zeros(8, 4)
    one[:, 2] = 1
    for balance in ("gates", "tokens"):
        assert abs(load_balancing_loss(even, even, balance) - 1) < 1e-6
        assert abs(load_balancing_loss(one, one, balance) - 4) < 1e-6


def test_tokens_are_counted_per_choice():
    """Three tokens with two experts each: six choices, of which expert 0 has three, whatever the gates weigh."""
    from model import load_balancing_loss

    gates = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.0, 0.2], [0.7, 0.3, 0.0]])
    probs = torch.tensor([[0.5, 0.3, 0.2]]).expand(3, -1)
    expected = 3 * (3 / 6 * 0.5 + 2 / 6 * 0.3 + 1 / 6 * 0.2)
    assert abs(load_balancing_loss(gates, probs, "tokens") - expected) < 1e-6


def test_the_gradient_of_gates_flows_through_both_factors():
    from model import load_balancing_loss

    def loss(z):
        return load_balancing_loss(top_2(z), z.softmax(dim=-1))

    z = scores().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(z), z)
    for i in range(4):
        direction = torch.randn(12, 4, generator=torch.Generator().manual_seed(i))
        assert abs(slope(loss, z, direction) - (gradient * direction).sum()) < 1e-7
    (one_factor,) = torch.autograd.grad(load_balancing_loss(top_2(z).detach(), z.softmax(dim=-1)), z)
    assert (gradient - one_factor).abs().max() > 1e-4


def test_counts_carry_no_gradient():
    from model import load_balancing_loss

    z = scores().requires_grad_()
    gates = top_2(z)
    (through_gates,) = torch.autograd.grad(
        load_balancing_loss(gates, z.softmax(dim=-1), "tokens"), gates, allow_unused=True, retain_graph=True
    )
    assert through_gates is None or (through_gates == 0).all()
    share = (gates > 0).sum(dim=0) / 24
    probs = z.softmax(dim=-1)
    by_hand = 4 / 12 * probs * (share - (probs * share).sum(dim=1, keepdim=True))  # of softmax, by the chain rule
    (gradient,) = torch.autograd.grad(load_balancing_loss(gates, probs, "tokens"), z)
    torch.testing.assert_close(gradient, by_hand.detach())
