import torch
from reference import plain_loop, random_layer


def gates_by_hand(logits, k):
    """(S, E): the softmax over the k largest, token by token."""
    gates = torch.zeros_like(logits)
    for t, row in enumerate(logits):
        best = sorted(range(len(row)), key=lambda e: -row[e].item())[:k]
        gates[t, best] = row[best].exp() / row[best].exp().sum()
    return gates


def expected(layer, x, k):
    tokens = x.flatten(0, 1)
    gates = gates_by_hand(tokens @ layer.gate.weight.T, k)
    return plain_loop(layer, tokens, gates).view(x.shape), gates


def test_output_and_gates_equal_the_plain_loop():
    for k, experts in ((1, 4), (2, 4), (3, 3), (2, 7)):
        layer, x = random_layer(k=k, experts=experts)
        y, gates, _ = layer(x)
        expected_y, expected_gates = expected(layer, x, k)
        torch.testing.assert_close(y, expected_y, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gates, expected_gates)


def test_gradients_equal_the_plain_loop():
    layer, x = random_layer()
    inputs, weight = [x, *layer.parameters()], torch.randn(x.shape)
    ours = torch.autograd.grad((layer(x)[0] * weight).sum(), inputs)
    theirs = torch.autograd.grad((expected(layer, x, 2)[0] * weight).sum(), inputs)
    for gradient, one in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, one, rtol=1e-4, atol=1e-5)


def test_experts_that_nobody_asks():
    """All tokens go to experts 1 and 2; the others get no rows, and no gradient."""
    layer, x = random_layer()
    x = x.detach().abs()
    with torch.no_grad():
        layer.gate.weight.fill_(-1.0)
        layer.gate.weight[1:3] = torch.tensor([[2.0], [1.0]])
    y, gates, _ = layer(x)
    assert ((gates > 0).sum(dim=0) == torch.tensor([0, 18, 18, 0])).all()
    torch.testing.assert_close(y, expected(layer, x, 2)[0], rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(y.sum(), layer.experts.w1)
    assert (gradient[[0, 3]] == 0).all() and (gradient[[1, 2]] != 0).any()


def test_the_statistics_of_a_layer():
    layer, x = random_layer()
    stats = layer(x)[2]
    logits = x.flatten(0, 1) @ layer.gate.weight.T
    usage, probs = gates_by_hand(logits, 2).mean(dim=0), logits.softmax(dim=-1).mean(dim=0)
    torch.testing.assert_close(stats["balance_loss"], 4 * (usage * probs).sum())
    torch.testing.assert_close(stats["z_loss"], logits.exp().sum(dim=1).log().pow(2).mean())
    assert "dropped" not in stats


def test_capacity_serves_those_who_come_first():
    from model import within_capacity

    used = torch.tensor([[1, 0], [1, 0], [0, 1], [1, 0], [1, 1], [1, 0]], dtype=torch.bool)
    served = within_capacity(used, 1.0) & used  # 6 tokens, 2 experts: 3 places each
    assert served[:, 0].tolist() == [True, True, False, True, False, False]
    assert served[:, 1].tolist() == [False, False, True, False, True, False]


def test_a_dropped_token_contributes_nothing_and_only_in_training():
    layer, x = random_layer("switch", k=1)
    y, gates, stats = layer(x, torch.tensor(0))
    chosen = (x.flatten(0, 1) @ layer.gate.weight.T).argmax(dim=1).tolist()
    seen, dropped = [0] * 4, []
    for expert in chosen:
        seen[expert] += 1
        dropped.append(seen[expert] > 6)  # 1.5 * 18 / 4, rounded down
    assert any(dropped)
    dropped = torch.tensor(dropped)
    assert (y.flatten(0, 1)[dropped] == 0).all() and (y.flatten(0, 1)[~dropped] != 0).any(dim=1).all()
    assert (gates[dropped] == 0).all()
    torch.testing.assert_close(stats["dropped"], dropped.float().mean())
    assert (layer(x)[1].sum(dim=1) > 0).all() and "dropped" not in layer(x)[2]
