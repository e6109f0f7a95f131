"""The head's loss, which has a backward pass of its own: against plain torch."""

import pytest
import torch
import torch.nn.functional as F

from common import ops
from common.ops import IGNORE, head_loss, token_losses


@pytest.mark.parametrize("chunk", [7, 40, 2**20])
def test_head_loss_equals_cross_entropy(chunk, monkeypatch):
    """In chunks of one row, of several with a rest, and in one; with targets that do not count, also whole chunks."""
    monkeypatch.setitem(ops.CHUNK, "cpu", chunk)
    torch.manual_seed(1)
    x, weight = torch.randn(9, 4, requires_grad=True), torch.randn(10, 4, requires_grad=True)
    targets = torch.tensor([1, IGNORE, IGNORE, IGNORE, IGNORE, 9, 0, IGNORE, 5])
    expected = F.cross_entropy(x @ weight.T, targets, reduction="sum")
    ours = head_loss(x, weight, targets)
    torch.testing.assert_close(ours, expected)
    for mine, theirs in zip(*(torch.autograd.grad(3 * one, (x, weight)) for one in (ours, expected)), strict=True):
        torch.testing.assert_close(mine, theirs)
    each = F.cross_entropy(x @ weight.T, targets, reduction="none")
    with torch.no_grad():
        torch.testing.assert_close(token_losses(x, weight, targets), each)


def test_head_loss_keeps_no_logits():
    sizes = []
    x, weight = torch.randn(500, 8, requires_grad=True), torch.randn(300, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()) or tensor, lambda t: t):
        head_loss(x, weight, torch.randint(300, (500,)))
    assert sorted(sizes) == [300 * 8, 500 * 8]
