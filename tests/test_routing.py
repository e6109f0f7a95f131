"""Routers: each against a reference that runs every expert, token by token, in numpy's or torch's float64."""

import dataclasses
import math
import signal

import pytest
import torch
import torch.nn.functional as F
from helpers import SHORT, must, read_json, read_log, run, run_process, same_bits
from transformers import AutoModelForCausalLM

import model as moe_file
from model import (
    BALANCES,
    ROUTERS,
    ModelConfig,
    MoE,
    Transformer,
    generate,
    load_balancing_loss,
    router_z_loss,
    temperature,
)

SHAPE = ModelConfig(
    vocab_size=80,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    num_local_experts=4,
)
MODES = [(router, step) for router in ROUTERS for step in (None, 3000)]  # evaluation and training
CAPACITY = 6  # 1.5 * 18 tokens / 4 experts, rounded down


def shape(router="topk", **changes):
    """SHAPE with another router, and as many experts per token as it wants."""
    k = ROUTERS[router].experts_per_token(2, 4)
    return dataclasses.replace(SHAPE, **{"router": router, "num_experts_per_tok": k, **changes})


def random_model(std=0.3, **changes):
    torch.manual_seed(1)
    model = Transformer(shape(**changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=std)
    return model


def random_layer(router, dtype=torch.float32, **changes):
    """A MoE layer and an input of 18 tokens, both asking for gradients."""
    torch.manual_seed(2)
    layer = MoE(shape(router, **changes)).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return layer, torch.randn(2, 9, 16, dtype=dtype, requires_grad=True)


def at(step):
    """The step as MoE wants it, and torch's generator as train_step would leave it."""
    torch.manual_seed(5)
    return None if step is None else torch.tensor(step)


def gumbel(shape, dtype):
    """The noise that a sample router draws next; leaves the generator as it was."""
    state = torch.get_rng_state()
    noise = -torch.empty(shape, dtype=dtype).exponential_().log()
    torch.set_rng_state(state)
    return noise


def reference_gates(layer, router, logits, step, noise):
    """(S, E) gates before any token is dropped, written token by token from the definitions. A router without one here
    is taken at its word: what is checked of it is everything that follows."""
    if router not in ("topk", "soft", "switch", "sample"):
        return torch.zeros_like(logits).scatter(1, *reversed(layer.router.choose(logits, layer.k, at(step))))
    rows = []
    for token in range(len(logits)):
        row = logits[token]
        best = max(range(len(row)), key=lambda e: row[e].item())
        one_hot = torch.tensor([float(e == best) for e in range(len(row))])
        if router == "topk":
            order = sorted(range(len(row)), key=lambda e: -row[e].item())[: layer.k]
            odds = torch.stack([row[e].exp() if e in order else row[e] * 0 for e in range(len(row))])
            rows.append(odds / odds.sum())
        elif router == "soft":
            rows.append(row.exp() / row.exp().sum())
        elif router == "switch":
            rows.append(row.exp() / row.exp().sum() * one_hot)
        elif step is None:
            rows.append(one_hot)
        else:
            odds = ((row + noise[token]) / max(0.5, math.exp(-1e-4 * step))).exp()
            rows.append(odds / odds.sum() * (odds == odds.max()))
    return torch.stack(rows)


def reference(layer, router, x, step, noise):
    """(y, gates, balancing loss, z-loss): every expert on every token, weighted with the gates above."""
    tokens = x.flatten(0, 1)
    logits = tokens @ layer.gate.weight.T
    gates = reference_gates(layer, router, logits, step, noise)
    probs = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    balance = 4 * sum(gates[:, e].mean() * probs[:, e].mean() for e in range(4))
    if router == "switch" and step is not None:
        seen, kept = [0] * 4, []
        for expert in gates.argmax(dim=1).tolist():
            seen[expert] += 1
            kept.append(float(seen[expert] <= CAPACITY))
        gates = gates * torch.tensor(kept).unsqueeze(1)
    w1, w2, w3 = layer.experts.w1, layer.experts.w2, layer.experts.w3
    outputs = torch.stack([(F.silu(tokens @ w1[e].T) * (tokens @ w3[e].T)) @ w2[e].T for e in range(4)], dim=1)
    y = (gates.unsqueeze(-1) * outputs).sum(dim=1).view(x.shape)
    return y, gates, balance, logits.exp().sum(dim=1).log().square().mean()


def grouped_mm_loop(x, w, offs):
    """F.grouped_mm, which knows no float64, as a loop."""
    starts = [0, *offs.tolist()[:-1]]
    return torch.cat([x[start:end] @ w[e] for e, (start, end) in enumerate(zip(starts, offs.tolist(), strict=True))])


def test_capacity_is_what_the_reference_says():
    layer, x = random_layer("switch")
    gates, stats = layer(x, at(1))[1:]
    assert ((gates > 0).sum(dim=0) <= CAPACITY).all() and (gates > 0).sum(dim=0).max() == CAPACITY
    assert stats["dropped"].item() == pytest.approx(1 - (gates > 0).sum().item() / 18)
    assert stats["dropped"] > 0  # so that the tests below are about something
    assert "dropped" not in layer(x)[2] and (layer(x)[1] > 0).sum() == 18  # in evaluation everyone is served


@pytest.mark.parametrize(("router", "step"), MODES)
def test_router_equals_running_every_expert(router, step):
    layer, x = random_layer(router)
    inputs = [x, *layer.parameters()]
    weight = torch.randn(x.shape)  # some function of the outputs, to differentiate
    number = at(step)
    noise = gumbel((18, 4), torch.float32)
    y, gates, stats = layer(x, number)
    expected, expected_gates, balance, z_loss = reference(layer, router, x, step, noise)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gates, expected_gates)
    torch.testing.assert_close(stats["balance_loss"], balance)
    torch.testing.assert_close(stats["z_loss"], z_loss)
    ours = torch.autograd.grad((y * weight).sum() + stats["balance_loss"] + stats["z_loss"], inputs)
    theirs = torch.autograd.grad((expected * weight).sum() + balance + z_loss, inputs)
    for gradient, one in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, one, rtol=1e-4, atol=1e-5)
    assert ours[1].abs().sum() > 0  # the router learns


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize(("router", "step"), MODES)
def test_gradients_are_those_of_finite_differences(router, step, balance, monkeypatch):
    """In float64, of the output and of both losses, with respect to the input and every parameter."""
    monkeypatch.setattr(F, "grouped_mm", grouped_mm_loop)
    layer, x = random_layer(router, torch.float64, balance=balance, hidden_size=8, intermediate_size=8)
    x = torch.randn(1, 7, 8, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def run_layer(x, *values):
        number = at(step)  # the same noise each time
        parameters = dict(zip(names, values, strict=True))
        y, _, stats = torch.func.functional_call(layer, parameters, (x, number))
        return y, stats["balance_loss"], stats["z_loss"]

    assert torch.autograd.gradcheck(run_layer, (x, *layer.parameters()), fast_mode=True)  # along random directions


# ---- what routers promise ----


def test_soft_is_topk_with_every_expert():
    ids = torch.randint(80, (2, 30))
    soft, every = random_model(router="soft"), random_model(num_experts_per_tok=4)
    ours, theirs = soft(ids, ids, step=torch.tensor(1)), every(ids, ids)
    assert ours.loss == theirs.loss and ours.gates.equal(theirs.gates) and (ours.gates > 0).all()
    assert ours.aux_loss == theirs.aux_loss


@pytest.mark.parametrize("router", ROUTERS)
def test_identical_experts_are_the_dense_model(router):
    """Wherever gates sum to 1, which is everywhere but with switch, whose gate scales the one expert it asks."""
    layer, x = random_layer(router)
    for parameter in layer.experts.parameters():
        parameter.data[:] = parameter.data[0].clone()
    w1, w2, w3 = (parameter[0] for parameter in (layer.experts.w1, layer.experts.w2, layer.experts.w3))
    dense = (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T
    y, gates, _ = layer(x)
    total = gates.sum(dim=1).view(2, 9, 1)
    if router == "switch":
        assert (total < 1).all() and (total >= 0.25).all()
        dense = dense * total
    torch.testing.assert_close(total, total if router == "switch" else torch.ones(2, 9, 1))
    torch.testing.assert_close(y, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("router", "step"), MODES)
def test_no_router_looks_ahead(router, step):
    """Changing a text's last token changes no logit before it. (Experts that choose tokens fail here.)"""
    model = random_model(router=router)
    ids = torch.randint(80, (1, 30))
    for last in range(20):
        other = ids.clone()
        other[0, -1] = last
        ours, theirs = (model(one, step=at(step)).logits[:, :-1] for one in (ids, other))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_router_that_leaves_no_choice_refuses_one():
    for router, k in (("switch", 2), ("sample", 2), ("soft", 2)):
        with pytest.raises(ValueError, match=f"router {router} sends each token to"):
            dataclasses.replace(SHAPE, router=router, num_experts_per_tok=k)


@pytest.mark.parametrize("router", ROUTERS)
def test_evaluation_is_bit_identical(router):
    model = random_model(router=router)
    ids = torch.randint(80, (2, 30))
    first = model(ids).logits
    text = generate(model, [[3, 4, 5]], 10)
    torch.rand(100)
    model(ids, ids, step=torch.tensor(7))  # training in between leaves nothing behind
    assert model(ids).logits.equal(first)
    assert generate(model, [[3, 4, 5]], 10) == text
    assert model(ids[:1]).logits.equal(first[:1]) or torch.allclose(model(ids[:1]).logits, first[:1], atol=1e-5)


def test_noise_depends_on_the_generator_and_exists_in_training_alone():
    model = random_model(router="sample")
    ids = torch.randint(80, (2, 30))
    outputs = [model(ids, ids, step=at(7)) for _ in range(2)]
    assert outputs[0].loss == outputs[1].loss and outputs[0].gates.equal(outputs[1].gates)
    other = model(ids, ids, step=torch.tensor(7))
    assert not other.gates.equal(outputs[0].gates)
    training, evaluation = outputs[0].gates, model(ids, ids).gates
    for gates in (training, evaluation):
        assert (gates[0] > 0).all()  # the first layer is soft
        assert ((gates[1:] > 0).sum(dim=-1) == 1).all()
    assert (evaluation[1:].sum(dim=-1) == 1).all() and (training[1:].sum(dim=-1) < 1).any()


def test_sampled_experts_follow_the_softmax():
    logits = torch.tensor([[0.5, -1.0, 1.5, 0.0]])
    for step in (0, 100_000):
        gates, experts = moe_file.sample(logits.expand(40_000, 4), 1, at(step))
        share = F.one_hot(experts[:, 0], 4).float().mean(dim=0)
        expected = logits[0].softmax(dim=0)
        assert ((share - expected).abs() < 4 * (expected / 40_000).sqrt()).all()
        assert (gates > 0.25).all() and (gates <= 1).all()


def test_temperature_anneals_and_the_gate_sharpens_towards_evaluation(monkeypatch):
    assert temperature(torch.tensor(0)) == 1
    assert temperature(torch.tensor(1000)).item() == pytest.approx(math.exp(-0.1))
    assert temperature(torch.tensor(6931)).item() == pytest.approx(0.5, abs=1e-4)
    assert temperature(torch.tensor(10**6)) == 0.5
    logits = torch.randn(2000, 4)
    early, late = (moe_file.sample(logits, 1, at(step))[0].mean() for step in (0, 10**6))
    assert early < late < 1
    monkeypatch.setattr(moe_file, "FINAL_TEMPERATURE", 1e-6)
    assert moe_file.sample(logits, 1, at(10**8))[0].mean() > 0.9999
    # and with logits that leave no doubt, the sample is the choice that evaluation makes
    sure = 100 * logits
    apart = sure.topk(2).values.diff().abs()[:, 0] > 30
    drawn, hard = (moe_file.sample(sure, 1, step)[1][apart] for step in (at(0), None))
    assert drawn.equal(hard) and apart.sum() > 1000


def test_switch_drops_the_late_tokens_of_a_full_expert():
    config = shape("switch", num_local_experts=2)
    layer = MoE(config)
    for parameter in layer.experts.parameters():
        torch.nn.init.normal_(parameter)
    layer.gate.weight.data.zero_()
    layer.gate.weight.data[1, 0] = 1.0  # a token with a positive first entry goes to expert 1
    x = torch.randn(1, 8, 16)
    x[0, :, 0] = torch.tensor([1, 1, -1, 1, 1, 1, 1, 1])  # seven for expert 1, which takes 1.5 * 8 / 2 = 6
    y, gates, stats = layer(x, torch.tensor(0))
    assert (gates > 0).tolist() == [[i == 2, i not in (2, 7)] for i in range(8)]
    assert (y[0, 7] == 0).all() and (y[0, :7].abs().sum(dim=1) > 0).all()
    assert stats["dropped"] == 1 / 8
    torch.testing.assert_close(gates[0, 1], torch.tensor(math.e / (math.e + 1)))
    torch.testing.assert_close(layer(x)[0][0, :7], y[0, :7])
    assert (layer(x)[0][0, 7].abs() > 0).any()


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


# ---- losses ----


def test_balancing_by_tokens_by_hand():
    gates = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.6, 0.4]])
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
    # choices 1, 2, 1 of 4; mean probabilities 0.35, 0.25, 0.4
    expected = 3 * (0.25 * 0.35 + 0.5 * 0.25 + 0.25 * 0.4)
    assert load_balancing_loss(gates, probs, "tokens").item() == pytest.approx(expected)
    even = torch.eye(4).repeat(3, 1)
    assert load_balancing_loss(0.3 * even, torch.full((12, 4), 0.25), "tokens").item() == pytest.approx(1)


def test_z_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    assert router_z_loss(logits).item() == pytest.approx((math.log(2) ** 2 + math.log(4) ** 2) / 2)


@pytest.mark.parametrize(("alpha", "z"), [(0.0, 0.0), (0.3, 0.0), (0.3, 0.01), (0.0, 0.01)])
@pytest.mark.parametrize("router", ROUTERS)
def test_aux_loss_is_the_weighted_sum_over_layers(router, alpha, z):
    model = random_model(router=router, router_aux_loss_coef=alpha, router_z_loss_coef=z)
    ids = torch.randint(80, (2, 30))
    output = model(ids, ids, step=at(1))
    assert all(value.shape == (3,) for value in output.stats.values())
    assert ("dropped" in output.stats) == (router == "switch")
    expected = alpha * output.stats["balance_loss"].sum() + z * output.stats["z_loss"].sum()
    torch.testing.assert_close(output.aux_loss, expected)
    plain = random_model(router=router, router_aux_loss_coef=0.0)(ids, ids, step=at(1))
    assert output.loss == plain.loss  # the loss itself is the likelihood alone
    (output.loss + output.aux_loss).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())  # none is left out of training


# ---- counting, saving, compiling ----


def test_active_parameters_and_flops_by_hand():
    ff, layers = 3 * 16 * 24, 3
    totals = {}
    for router, experts in {"topk": 3 * 2, "switch": 3, "sample": 2 + 4, "soft": 3 * 4}.items():
        model = random_model(router=router)
        active, total = model.num_parameters()
        assert total - active == (layers * 4 - experts) * ff
        totals[router] = model.flops_per_token(32) - 6 * experts * ff
    assert len(set(totals.values())) == 1


def test_router_survives_saving_and_transformers_still_reads_topk_and_soft(tmp_path):
    ids = torch.randint(80, (2, 30))
    for router in ROUTERS:
        changes = {"router": router, "balance": "tokens", "router_z_loss_coef": 0.01}
        model = random_model(**changes)
        model.save_pretrained(str(tmp_path / router))
        again = Transformer.from_pretrained(str(tmp_path / router))
        assert again.config == model.config
        assert again(ids).logits.equal(model(ids).logits)
        if router in ("topk", "soft"):
            theirs = AutoModelForCausalLM.from_pretrained(tmp_path / router).eval()
            assert (theirs(ids).logits - model(ids).logits).abs().max() <= 1e-5
        else:  # it would compute something else, so it must not load
            with pytest.raises(ValueError, match="nanobtx"):
                AutoModelForCausalLM.from_pretrained(tmp_path / router)
        switched = Transformer.from_pretrained(str(tmp_path / router), router="switch")
        assert switched.config.num_experts_per_tok == 1


@pytest.mark.parametrize("router", [*ROUTERS, "dense"])
def test_compiles_once_for_all_steps(router):
    counted = []

    def backend(graph, inputs):
        counted.append(graph)
        return graph

    model = random_model(num_local_experts=0) if router == "dense" else random_model(router=router)
    model.compute_dtype = torch.bfloat16  # the only one in which torch.compile takes grouped_mm
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    ids = torch.randint(80, (2, 30))
    for step in range(4):
        ours, theirs = (one(ids, ids, step=at(step)).loss.item() for one in (compiled, model))
        assert ours == pytest.approx(theirs, rel=1e-2)  # a graph's addcmul rounds twice
    assert len(counted) == 1


# ---- finetuning ----

FLAGS = (*SHORT, "--max_steps=2", "--eval_interval=2")


@pytest.mark.parametrize("router", ROUTERS)
def test_two_steps_of_finetuning(router, mixed, data, tmp_path):
    flags = f"--data_dir={data}", f"--init_from={mixed}", f"--out_dir={tmp_path}/run", f"--router={router}"
    must(run("finetune.py", *FLAGS, *flags, "--router_z_loss_coef=0.001"))
    assert read_json(tmp_path / "run" / "config.json")["router"] == router
    last = read_log(tmp_path / "run")[-1]
    expected = 0.01 * sum(last["balance_loss"]) + 0.001 * sum(last["z_loss"])
    assert len(last["balance_loss"]) == 2 and last["aux_loss"] == pytest.approx(expected, rel=1e-5)
    assert ("dropped" in last) == (router == "switch") and math.isfinite(last["loss"])
    if router == "switch":
        assert all(0 < share < 0.5 for share in last["dropped"])
    active, total = Transformer.from_pretrained(f"{tmp_path}/run").num_parameters()
    assert (active == total) == (router == "soft")


def test_without_balancing_and_with_token_counts(mixed, data, tmp_path):
    logs = {}
    for name, flag in {"none": "--router_aux_loss_coef=0.0", "tokens": "--balance=tokens", "gates": "--seed=1"}.items():
        flags = f"--data_dir={data}", f"--init_from={mixed}", f"--out_dir={tmp_path}/{name}", flag
        must(run("finetune.py", *FLAGS, *flags))
        logs[name] = read_log(tmp_path / name)
    assert logs["none"][-1]["aux_loss"] == 0 and min(logs["none"][-1]["balance_loss"]) > 0.5
    assert logs["tokens"][-1]["balance_loss"] != logs["gates"][-1]["balance_loss"]
    assert logs["none"][0]["bpb"] == logs["tokens"][0]["bpb"] == logs["gates"][0]["bpb"]


def test_sampling_killed_and_resumed_ends_with_the_same_bits(mixed, data, tmp_path):
    """Noise is a function of the step: it needs no generator state in the checkpoint."""
    flags = *SHORT, f"--data_dir={data}", f"--init_from={mixed}", "--router=sample"
    must(run("finetune.py", *flags, f"--out_dir={tmp_path}/whole"))
    kill = """
import os, common.corpus
fetch = common.corpus.Batches.__call__
def fetch_or_die(self, step, start, stop):
    if step == 8:
        os.kill(os.getpid(), 9)
    return fetch(self, step, start, stop)
common.corpus.Batches.__call__ = fetch_or_die
"""
    killed = run_process("finetune.py", *flags, f"--out_dir={tmp_path}/killed", hook=kill)
    assert killed.code == -signal.SIGKILL and read_json(tmp_path / "killed" / "run.json")["step"] == 5
    must(run("finetune.py", *flags, f"--out_dir={tmp_path}/killed"))
    same_bits(tmp_path / "whole", tmp_path / "killed")


def test_a_router_that_can_learn_nothing_is_said(seed, data, tmp_path):
    must(run("mix.py", f"--experts={seed},{seed}", f"--out_dir={tmp_path}/one", "--num_experts_per_tok=1"))
    flags = *SHORT, "--max_steps=1", f"--data_dir={data}", f"--init_from={tmp_path}/one"
    out = must(run("finetune.py", *flags, f"--out_dir={tmp_path}/topk")).out
    assert "--router=topk has gate 1" in out and "a warm-up of 3 steps outlasts the run" in out
    assert "gate 1" not in must(run("finetune.py", *flags, f"--out_dir={tmp_path}/switch", "--router=switch")).out
