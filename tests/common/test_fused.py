"""Operations with a backward pass of their own: each against plain torch and finite differences in float64."""

import pytest
import torch
import torch.nn.functional as F
from test_routing import random_layer

from common import fused
from common.ops import IGNORE, Collect, Dispatch, Rotate, collect, dispatch, head_loss, lay_out, row_multiple


def test_rotate_is_a_rotation_of_pairs():
    torch.manual_seed(1)
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(5, 4, dtype=torch.float64)
    pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(Rotate.apply(x, angles.cos(), angles.sin()), torch.cat((pairs.real, pairs.imag), -1))
    strided = x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()  # as attention passes it
    for one in (x, strided):
        assert torch.autograd.gradcheck(lambda x: Rotate.apply(x, angles.cos(), angles.sin()), one)


@pytest.mark.parametrize("chunk", [7, 40, 2**20])
def test_head_loss_equals_cross_entropy(chunk, monkeypatch):
    """In chunks of one row, of several with a rest, and in one; with targets that do not count, also whole chunks."""
    monkeypatch.setitem(fused.CHUNK, "cpu", chunk)
    torch.manual_seed(1)
    x, weight = torch.randn(9, 4, requires_grad=True), torch.randn(10, 4, requires_grad=True)
    targets = torch.tensor([1, IGNORE, IGNORE, IGNORE, IGNORE, 9, 0, IGNORE, 5])
    expected = F.cross_entropy(x @ weight.T, targets, reduction="sum")
    ours = head_loss(x, weight, targets)
    torch.testing.assert_close(ours, expected)
    for mine, theirs in zip(*(torch.autograd.grad(3 * one, (x, weight)) for one in (ours, expected)), strict=True):
        torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        torch.testing.assert_close(head_loss(x, weight, targets), expected)


def test_head_loss_keeps_no_logits():
    sizes = []
    x, weight = torch.randn(500, 8, requires_grad=True), torch.randn(300, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()) or tensor, lambda t: t):
        head_loss(x, weight, torch.randint(300, (500,)))
    assert sorted(sizes) == [300 * 8, 500 * 8]


@pytest.mark.parametrize("pad", [1, 4])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_rows_are_laid_out_by_expert_and_come_back(k, pad, monkeypatch):
    """Also where an expert gets no row at all, and the padding reaches no result and no gradient."""
    monkeypatch.setattr(fused, "row_multiple", lambda *arguments: pad)
    torch.manual_seed(1)
    experts = torch.stack([torch.randperm(4)[:k] for _ in range(11)]) + 1  # expert 0 stays empty
    places, tokens, ends = lay_out(experts, 5, torch.float64)
    starts = [0, *ends.tolist()[:-1]]
    assert ends[-1] == len(tokens) and all(end % pad == 0 for end in ends.tolist()) and ends[0] == 0
    assert len(places.unique()) == experts.numel()
    for token, row in enumerate(places.tolist()):
        for expert, place in zip(experts[token].tolist(), row, strict=True):
            assert tokens[place] == token and starts[expert] <= place < ends[expert]
    for expert in range(5):  # stable: the tokens of an expert keep their order
        mine = places[experts == expert]
        assert mine.equal(mine.sort().values)
    x = torch.randn(11, 3, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        plain = collect(dispatch(x, tokens, places), places)
    back = collect(dispatch(x, tokens, places), places)
    assert plain.equal(back)
    assert back.unflatten(0, (11, k)).equal(x.unsqueeze(1).expand(-1, k, -1))
    assert torch.autograd.gradcheck(lambda x: Dispatch.apply(x, tokens, places)[places.flatten()], x)
    rows = torch.randn(len(tokens), 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: Collect.apply(rows, places), rows)


def test_padding_is_for_bfloat16_on_a_cpu_and_many_rows():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [row_multiple(rows, cpu, torch.bfloat16) for rows in (0, 100, 511, 512, 2048)] == [1, 1, 1, 32, 128]
    assert row_multiple(2048, cpu, torch.float32) == row_multiple(2048, cuda, torch.bfloat16) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_changes_nothing_but_the_time(dtype, monkeypatch):
    found = []
    for pad in (1, 4):
        monkeypatch.setattr(fused, "row_multiple", lambda *arguments, pad=pad: pad)
        layer, x = random_layer("topk")
        y = layer(x.to(dtype))[0]
        found.append((y, *torch.autograd.grad(y.float().square().sum(), (x, *layer.parameters()))))
    for plain, padded in zip(*found, strict=True):
        torch.testing.assert_close(plain, padded, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dead_expert_gets_zero_gradients_from_poisoned_memory(dtype):
    """grouped_mm must write the gradients of an expert without a row, not leave what was in memory before."""
    layer, x = random_layer("topk")
    x = x.detach().abs() + 0.1
    layer.gate.weight.data[0] = -9.0  # loses for every token
    for _ in range(3):
        poison = [torch.full(parameter.shape, float("nan")) for parameter in layer.parameters() for _ in range(4)]
        poison += [one.to(dtype) for one in poison]
        del poison
        y, gates, _ = layer(x.to(dtype))
        assert (gates[:, 0] == 0).all()
        layer.zero_grad()
        y.float().square().sum().backward()
        for weight in layer.experts.parameters():
            assert (weight.grad[0] == 0).all() and weight.grad.isfinite().all() and weight.grad[1:].any()
