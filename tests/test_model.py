"""The model against transformers, a mixture that runs every expert, hand-counted numbers and brute force."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from common.hf import INDEX
from model import IGNORE, ModelConfig, MoE, Transformer, generate, load_balancing_loss, rotate

DENSE = ModelConfig(
    vocab_size=80,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
SHAPES = {
    "dense": {},
    "dense-no-gqa": {"num_key_value_heads": 4},
    "dense-tied": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "dense-other-constants": {"rope_theta": 50_000.0, "rms_norm_eps": 1e-3},
    "mixed": {"num_local_experts": 4},
    "mixed-no-gqa": {"num_local_experts": 4, "num_key_value_heads": 4, "num_experts_per_tok": 1},
    "mixed-tied": {"num_local_experts": 3, "tie_word_embeddings": True, "num_experts_per_tok": 3},
    "mixed-other-constants": {"num_local_experts": 5, "rope_theta": 50_000.0, "rms_norm_eps": 1e-3},
}


def random_model(**changes):
    """A model with weights large enough that every part of it shows in the logits."""
    torch.manual_seed(1)
    model = Transformer(dataclasses.replace(DENSE, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model


def save(model, folder):
    """A checkpoint folder of the model; there is no tokenizer to copy."""
    model.save_pretrained(str(folder))
    return str(folder)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape, tmp_path):
    ours = random_model(**SHAPES[shape])
    theirs = AutoModelForCausalLM.from_pretrained(save(ours, tmp_path)).eval()
    expected = "MixtralForCausalLM" if "mixed" in shape else "LlamaForCausalLM"
    assert type(theirs).__name__ == expected and theirs.dtype == torch.float32
    ids = torch.randint(80, (3, 40))
    with torch.no_grad():
        logits, reference = ours(ids).logits, theirs(ids).logits
    assert reference.std() > 0.5  # the comparison is about something
    assert (logits - reference).abs().max() <= 1e-5
    assert ours.num_parameters()[1] == sum(parameter.numel() for parameter in theirs.parameters())


@pytest.mark.parametrize("shape", ["dense", "dense-tied"])
def test_loss_and_gradients_equal_transformers(shape, tmp_path):
    ours = random_model(**SHAPES[shape])
    theirs = AutoModelForCausalLM.from_pretrained(save(ours, tmp_path))
    ids = torch.randint(80, (3, 41))
    targets = ids[:, 1:].clone()
    targets[0, :7] = IGNORE
    loss = ours(ids[:, :-1], targets).loss
    reference = F.cross_entropy(theirs(ids[:, :-1]).logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-6)
    loss.backward()
    reference.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients.pop(name), rtol=1e-4, atol=1e-6)
    assert not gradients


def test_a_checkpoint_of_transformers_loads(tmp_path):
    """In the layouts that large checkpoints come in: several files, half precision."""
    model = random_model(num_local_experts=3, num_experts_per_tok=1, rope_theta=1e6)
    theirs = AutoModelForCausalLM.from_pretrained(save(model, tmp_path / "ours")).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    assert (tmp_path / "theirs" / INDEX).exists()
    ids = torch.randint(80, (2, 30))
    again = Transformer.from_pretrained(str(tmp_path / "theirs"))
    assert (again(ids).logits - theirs(ids).logits).abs().max() <= 1e-5

    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    rounded = Transformer.from_pretrained(str(tmp_path / "half"))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    assert next(rounded.parameters()).dtype == torch.float32
    assert (rounded(ids).logits - reference(ids).logits).abs().max() <= 1e-5


def test_a_dense_tied_checkpoint_of_transformers_loads(tmp_path):
    theirs = AutoModelForCausalLM.from_pretrained(save(random_model(**SHAPES["dense-tied"]), tmp_path / "ours")).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]  # as transformers 4 wrote it
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    ids = torch.randint(80, (2, 30))
    again = Transformer.from_pretrained(str(tmp_path / "theirs"))
    assert (again(ids).logits - theirs(ids).logits).abs().max() <= 1e-5


def test_rotate_is_a_rotation_of_pairs():
    torch.manual_seed(1)
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    angles = torch.randn(5, 4, dtype=torch.float64)
    pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(rotate(x, angles.cos(), angles.sin()), torch.cat((pairs.real, pairs.imag), -1))


# ---- the mixture of experts ----


def every_expert(moe, x):
    """What the MoE layer should compute, token by token: run all experts, weigh those that the router took."""
    rows = []
    for token in x.flatten(0, 1):
        logits = moe.gate.weight @ token
        chosen = sorted(range(len(logits)), key=lambda e: -logits[e].item())[: moe.k]
        outputs = [
            moe.experts.w2[e] @ (F.silu(moe.experts.w1[e] @ token) * (moe.experts.w3[e] @ token))
            for e in range(len(logits))
        ]
        odds = torch.stack([logits[e].exp() for e in chosen])
        rows.append(sum(odd / odds.sum() * outputs[e] for odd, e in zip(odds, chosen, strict=True)))
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize(("k", "experts", "width"), [(1, 4, 8), (2, 4, 24), (2, 5, 40), (3, 3, 48)])
def test_moe_equals_running_every_expert(k, experts, width):
    torch.manual_seed(2)
    config = dataclasses.replace(
        DENSE, hidden_size=16, intermediate_size=width, num_local_experts=experts, num_experts_per_tok=k
    )
    moe = MoE(config)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x = torch.randn(2, 9, 16)
    if k < experts:
        x[..., 0] = 1
        moe.gate.weight.data[1, 0] = -100.0  # nobody asks expert 1
    x.requires_grad_()
    inputs = [x, *moe.parameters()]
    weight = torch.randn(x.shape)  # some function of the output, to differentiate

    y, gates, _ = moe(x)
    gradients = torch.autograd.grad((y * weight).sum(), inputs)
    reference = every_expert(moe, x)
    expected = torch.autograd.grad((reference * weight).sum(), inputs, materialize_grads=True)
    torch.testing.assert_close(y, reference, rtol=1e-4, atol=1e-5)
    for gradient, one in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, one, rtol=1e-4, atol=1e-5)
    assert ((gates > 0).sum(dim=1) == k).all()
    torch.testing.assert_close(gates.sum(dim=1), torch.ones(18))
    if k < experts:
        assert (gates[:, 1] == 0).all()
        for gradient in gradients[-3:]:  # w1, w2, w3: a real zero, not what the memory held
            assert (gradient[1] == 0).all() and gradient[0].abs().sum() > 0


def test_moe_in_bfloat16_is_the_same_function():
    model = random_model(num_local_experts=4)
    ids = torch.randint(80, (2, 20))
    exact = model(ids, ids)
    model.compute_dtype = torch.bfloat16
    rounded = model(ids, ids)
    assert rounded.gates.dtype == torch.float32
    assert abs(rounded.loss - exact.loss) < 0.05 * exact.loss
    assert rounded.loss != exact.loss


def test_balancing_loss_by_hand():
    gates = torch.tensor([[1.0, 0.0], [0.25, 0.75]])  # mean: 0.625, 0.375
    probs = torch.tensor([[0.5, 0.5], [0.2, 0.8]])  # mean: 0.35, 0.65
    expected = 2 * (0.625 * 0.35 + 0.375 * 0.65)
    assert load_balancing_loss(gates, probs).item() == pytest.approx(expected)  # 0.925
    even = torch.eye(4).repeat(3, 1)
    assert load_balancing_loss(even, torch.full((12, 4), 0.25)).item() == pytest.approx(1)
    assert load_balancing_loss(even[:1], even[:1]).item() == pytest.approx(4)  # all to one expert


def test_balancing_loss_gradient_is_that_of_finite_differences():
    torch.manual_seed(3)
    gates, probs = (torch.rand(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(load_balancing_loss, (gates, probs))


def router_loss(x, weight, k):
    """The balancing loss of one router, in numpy's float64."""
    logits = x @ weight.T
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    kept = np.where(np.argsort(np.argsort(-logits, axis=1), axis=1) < k, probs, 0)
    gates = kept / kept.sum(axis=1, keepdims=True)
    return len(weight) * (gates.mean(axis=0) * probs.mean(axis=0)).sum()


def test_aux_loss_and_its_gradient_on_the_whole_model():
    """alpha times the sum over layers; and what a router's weights feel is the slope of the same in float64."""
    model = random_model(num_local_experts=4, router_aux_loss_coef=0.5)
    layers = [layer.block_sparse_moe for layer in model.model.layers]
    inputs = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().double().flatten(0, 1).numpy()))
    output = model(torch.randint(80, (2, 20)))
    routers = [layer.gate.weight.detach().double().numpy() for layer in layers]
    expected = 0.5 * sum(router_loss(x, weight, 2) for x, weight in zip(inputs, routers, strict=True))
    assert output.aux_loss.item() == pytest.approx(expected, rel=1e-5)

    (gradient,) = torch.autograd.grad(output.aux_loss, layers[-1].gate.weight)
    numeric, step = np.zeros(gradient.shape), 1e-6
    for place in np.ndindex(*gradient.shape):
        nudge = np.zeros(gradient.shape)
        nudge[place] = step
        up, down = (router_loss(inputs[-1], routers[-1] + sign * nudge, 2) for sign in (1, -1))
        numeric[place] = 0.5 * (up - down) / (2 * step)
    assert np.abs(numeric).max() > 1e-3
    np.testing.assert_allclose(gradient.numpy(), numeric, rtol=1e-3, atol=1e-6)


def test_loss_of_a_mixture_leaves_the_aux_loss_out():
    model = random_model(num_local_experts=4, router_aux_loss_coef=10.0)
    ids = torch.randint(80, (2, 20))
    nll = F.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten())
    assert model(ids, ids).loss.item() == pytest.approx(nll.item(), rel=1e-5)
    assert model(ids, ids).aux_loss > 1


# ---- generation ----


def greedy(model, prompt, new_tokens):
    """Greedy continuation that reads the whole text again for every token."""
    ids = list(prompt)
    for _ in range(new_tokens):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


PROMPTS = [[5, 9, 2, 71, 8, 8, 3], [4], [60, 1, 33], [12, 13, 14, 15, 16, 17, 18, 19, 20, 21]]


@pytest.mark.parametrize("shape", ["dense", "mixed"])
def test_cached_generation_equals_reading_it_all_again(shape):
    model = random_model(**SHAPES[shape])
    expected = [greedy(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(one) for one in expected}) == 4  # prompts matter
    assert generate(model, PROMPTS, 12) == expected
    assert generate(model, PROMPTS, 12, temperature=1.0, top_k=1) == expected
    stop = expected[0][4]
    cut = [one[: one.index(stop)] if stop in one else one for one in expected]
    assert len(cut[0]) <= 4
    assert generate(model, PROMPTS, 12, {stop}) == cut


def test_a_long_cache_gives_the_logits_of_one_pass():
    model = random_model(num_local_experts=4)
    ids = torch.randint(80, (2, 30))
    cache = model.new_cache(2, 30)
    pieces = [ids[:, :11], *ids[:, 11:].split(1, dim=1)]
    parts = [model(piece, cache=cache).logits for piece in pieces]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, rtol=1e-4, atol=1e-5)


def test_sampling_follows_the_distribution():
    model = random_model()
    generator = torch.Generator().manual_seed(1)
    n = 4000
    drawn = generate(model, [PROMPTS[0]] * n, 1, temperature=0.7, top_k=5, generator=generator)
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=80) / n
    logits = (model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.7).sort(descending=True)
    expected = torch.zeros(80)
    expected[logits.indices[:5]] = logits.values[:5].exp() / logits.values[:5].exp().sum()
    assert ((counts - expected).abs() <= 4 * (expected * (1 - expected) / n).sqrt()).all()


def test_a_sequence_longer_than_the_model_is_an_error():
    with pytest.raises(ValueError, match="65 tokens"):
        random_model()(torch.zeros(1, 65, dtype=torch.long))


# ---- counting ----


def test_flops_and_parameters_by_hand():
    shape = dict(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    dense = ModelConfig(**shape, num_key_value_heads=1, max_position_embeddings=16)
    attention = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8
    ff, head, norms = 3 * 8 * 16, 8 * 32, 3 * 8
    seen = 12 * 8 * 4  # attention to a sequence of 4
    assert Transformer(dense).flops_per_token(4) == 6 * (attention + ff + head) + seen
    assert Transformer(dense).num_parameters() == (attention + ff + 2 * head + norms,) * 2
    tied = Transformer(dataclasses.replace(dense, tie_word_embeddings=True))
    assert tied.flops_per_token(4) == 6 * (attention + ff + head) + seen
    assert tied.num_parameters() == (attention + ff + head + norms,) * 2

    mixed = Transformer(dataclasses.replace(dense, num_local_experts=4, num_experts_per_tok=2))
    router = 4 * 8
    everything = attention + 2 * head + norms + router
    assert mixed.num_parameters() == (everything + 2 * ff, everything + 4 * ff)
    assert mixed.flops_per_token(4) == 6 * (attention + 2 * ff + head + router) + seen
    mixed.model["layers"][0].block_sparse_moe.experts.requires_grad_(False)
    assert mixed.flops_per_token(4) == 6 * (attention + head + router) + 4 * 2 * ff + seen


@pytest.mark.parametrize("shape", ["dense", "dense-tied"])
def test_flops_equal_torchs_own_count(shape):
    """Of the matrix products; attention has a convention of its own (no discount for the causal mask)."""
    model = random_model(**SHAPES[shape])
    ids = torch.randint(80, (2, 16))
    with FlopCounterMode(display=False) as counter:
        model(ids, ids).loss.backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    attention = 12 * 2 * 32 * 16
    assert counted == (model.flops_per_token(16) - attention) * ids.numel()
