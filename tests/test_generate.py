"""Generation with the cache: every shape and router against one pass over the whole text, and against transformers; and
that an edit of the model reaches it."""

import copy

import pytest
import torch
from test_routing import shape
from transformers import AutoModelForCausalLM

from model import MLP, ROUTERS, Experts, MoE, Transformer, generate

SHAPES = {router: {"router": router} for router in ROUTERS}
SHAPES |= {"dense": {"num_local_experts": 0}, "tied, qk_norm": {"tie_word_embeddings": True, "qk_norm": True}}
SHAPES |= {"dense, qk_norm": {"num_local_experts": 0, "qk_norm": True}, "a head of 4": {"head_dim": 4}}
PROMPTS = [[5, 9, 2, 71, 8, 8, 3], [4], [60, 1, 33]]


def random_model(**changes):
    torch.manual_seed(2)
    model = Transformer(shape(**changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def read_again(model, prompt, new_tokens):
    """Greedy continuation that reads the whole text again for every token."""
    ids = list(prompt)
    for _ in range(new_tokens):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("name", SHAPES)
def test_one_token_at_a_time_equals_one_pass(name, rows):
    model = random_model(**SHAPES[name])
    ids = torch.randint(model.config.vocab_size, (rows, 12))
    cache, pieces = model.new_cache(rows, 12), [ids[:, :5], *ids[:, 5:].split(1, dim=1)]
    with torch.no_grad():
        logits = torch.cat([model(piece, cache=cache).logits for piece in pieces], dim=1)
    assert cache[0].length == 12
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["dense", "dense, qk_norm", "topk", "soft", "tied, qk_norm", "a head of 4"])
def test_greedy_text_is_that_of_transformers(name, tmp_path):
    """Prompts of different lengths in one batch, here; one at a time, there."""
    model = random_model(**SHAPES[name])
    model.save_pretrained(str(tmp_path))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False}
        expected.append(theirs.generate(ids, pad_token_id=0, **options)[0, len(prompt) :].tolist())
    assert generate(model, PROMPTS, 20) == expected
    assert len({tuple(row) for row in expected}) == len(PROMPTS)  # prompts matter


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("experts", [0, 4])
def test_in_bfloat16_weights_are_rounded_and_stay_what_they_are(experts, rows):
    """The tokens of a model whose weights are bfloat16 numbers already, but for the routers', which stay in float32."""
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


def test_the_cache_of_bfloat16_holds_bfloat16():
    model = random_model()
    model.compute_dtype = torch.bfloat16
    cache = model.new_cache(2, 8)
    model(torch.tensor([[1, 2], [3, 4]]), cache=cache)
    assert {layer.keys.dtype for layer in cache} == {torch.bfloat16} and cache[0].length == 2


def relu(self, x):
    return self.down_proj(torch.relu(self.gate_proj(x)))


def turned(self, x, ends):
    return x.roll(1, dims=-1)


def half(forward):
    """A mixture that gives half of what its experts say."""

    def edited(self, x, step=None):
        y, gates, stats = forward(self, x, step)
        return y / 2, gates, stats

    return edited


EDITS = {
    "MLP": (MLP, relu, {"num_local_experts": 0}),
    "Experts": (Experts, turned, {}),
    "MoE": (MoE, half(MoE.forward), {}),
}


@pytest.mark.parametrize("part", EDITS)
def test_an_edit_of_a_sublayer_reaches_generation(part, monkeypatch):
    """With another forward pass there, the text is another one: the one that the edited model gives without a cache."""
    cls, edited, changes = EDITS[part]
    model = random_model(**changes)
    before = generate(model, PROMPTS, 12)
    monkeypatch.setattr(cls, "forward", edited)
    after = generate(model, PROMPTS, 12)
    assert after != before
    assert after == [read_again(model, prompt, 12) for prompt in PROMPTS]
