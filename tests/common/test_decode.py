"""One token at a time against one pass over the whole text: every shape and router, on each way that experts run."""

import copy

import pytest
import torch
from test_routing import shape

from common import decode
from model import ROUTERS, Transformer, generate

SHAPES = {router: {"router": router} for router in ROUTERS}
SHAPES |= {"dense": {"num_local_experts": 0}, "tied, qk_norm": {"tie_word_embeddings": True, "qk_norm": True}}
SHAPES |= {"dense, qk_norm": {"num_local_experts": 0, "qk_norm": True}, "a head of 4": {"head_dim": 4}}


def random_model(**changes):
    torch.manual_seed(2)
    model = Transformer(shape(**changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("rows", [1, 3, 40])  # plain products, all experts on all rows, laid out by expert
@pytest.mark.parametrize("name", SHAPES)
def test_one_token_at_a_time_equals_one_pass(name, rows, monkeypatch):
    monkeypatch.setattr(decode, "FEW_ROWS", 8)
    model = random_model(**SHAPES[name])
    ids = torch.randint(model.config.vocab_size, (rows, 12))
    cache, pieces = model.new_cache(rows, 12), [ids[:, :5], *ids[:, 5:].split(1, dim=1)]
    with torch.no_grad():
        logits = torch.cat([model(piece, cache=cache).logits for piece in pieces], dim=1)
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("experts", [0, 4])
def test_in_bfloat16_weights_are_cast_once(experts, rows):
    """The tokens of a model whose weights are bfloat16 numbers already; the weights stay what they are."""
    model = random_model(num_local_experts=experts)
    rounded = copy.deepcopy(model)
    for name, parameter in rounded.named_parameters():
        if ".gate." not in name:
            parameter.data = parameter.data.bfloat16().float()
    before = copy.deepcopy(model.state_dict())
    model.compute_dtype = rounded.compute_dtype = torch.bfloat16
    prompts = torch.randint(model.config.vocab_size, (rows, 4)).tolist()
    assert generate(model, prompts, 20) == generate(rounded, prompts, 20)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(block.down.dtype == torch.bfloat16 for block in prepared(model))


def prepared(model):
    cache = model.new_cache(1, 2)
    cache.step(torch.tensor([1]))
    return cache.blocks


def test_all_experts_run_on_few_rows_only():
    few, many, sparse = (torch.zeros(n, 2, dtype=torch.long) for n in (64, 65, 1))
    assert decode.all_at_once(few, 4) and not decode.all_at_once(many, 4) and not decode.all_at_once(sparse, 5)
