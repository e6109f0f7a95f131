import torch
from reference import config, random_model, use_plain_loop


def stack(experts=3, rows=24, columns=16):
    torch.manual_seed(6)
    return torch.randn(experts, rows, columns)


def test_every_direction_counts_the_same():
    """Singular values of the result lie between 0.6 and 1.3, those of the input differ fiftyfold."""
    from exercises.muon import orthogonalize

    u, _, v = torch.linalg.svd(torch.randn(16, 24, generator=torch.Generator().manual_seed(1)), full_matrices=False)
    gradient = u @ torch.diag(torch.linspace(1, 0.02, 16)) @ v
    values = torch.linalg.svdvals(orthogonalize(gradient, steps=8))
    assert values.min() > 0.6 and values.max() < 1.3


def test_it_is_near_the_polar_factor():
    """The svd's U V^T is the exact answer."""
    from exercises.muon import orthogonalize

    for shape in ((16, 16), (24, 8), (8, 24)):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        u, _, v = torch.linalg.svd(gradient, full_matrices=False)
        ours, exact = orthogonalize(gradient), u @ v
        assert ours.shape == gradient.shape
        assert (ours * exact).sum() / (ours.norm() * exact.norm()) > 0.97


def test_a_stack_is_every_expert_by_itself():
    from exercises.muon import orthogonalize

    for gradient in (stack(), stack(rows=8, columns=40)):
        together = orthogonalize(gradient)
        torch.testing.assert_close(together, torch.stack([orthogonalize(one) for one in gradient]))
        loud = gradient * torch.tensor([1.0, 1.0, 1000.0]).view(3, 1, 1)  # a loud expert does not silence the others
        torch.testing.assert_close(orthogonalize(loud), together, rtol=1e-3, atol=1e-4)


def test_two_steps_by_hand():
    from exercises.muon import Muon, orthogonalize

    weight = torch.nn.Parameter(stack())
    start, gradients = weight.detach().clone(), [stack(experts=3) * 0.5, -stack(experts=3) + 1]
    optimizer = Muon([weight], lr=0.1, momentum=0.9)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    one, two = gradients
    scale = 0.1 * (24 / 16) ** 0.5
    expected = start - scale * orthogonalize(one + 0.9 * one) - scale * orthogonalize(two + 0.9 * (0.9 * one + two))
    torch.testing.assert_close(weight.detach(), expected)


def test_who_is_muons():
    from exercises.muon import split_parameters

    for shape in ({}, {"num_local_experts": 4}, {"tie_word_embeddings": True}):
        model = random_model(**shape)
        muon, adamw = split_parameters(model)
        assert sorted(muon + adamw) == sorted(name for name, _ in model.named_parameters())
        matrices = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
        for name, parameter in model.named_parameters():
            ours = name.removesuffix(".weight").split(".")[-1] in matrices
            assert (name in muon) == ours and (not ours or parameter.dim() > 1), name


def test_a_mixture_learns(monkeypatch):
    from exercises.muon import Muon, split_parameters

    from model import Transformer

    use_plain_loop(monkeypatch, lambda logits: logits.softmax(dim=-1))
    torch.manual_seed(1)
    model = Transformer(config(num_local_experts=3))
    named, (muon, adamw) = dict(model.named_parameters()), split_parameters(model)
    optimizers = [Muon([named[name] for name in muon], lr=0.01)]
    optimizers += [torch.optim.AdamW([named[name] for name in adamw], lr=3e-3)]
    text, losses = torch.randint(24, (1, 21)), []
    for _ in range(40):
        loss = model(text[:, :-1], text[:, 1:]).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
