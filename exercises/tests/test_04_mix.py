import dataclasses

import torch
from reference import config, load, random_model, tensors_of, use_plain_loop


def mixture(models, **options):
    """What mix.py makes of dense models, as {name on disk: tensor}, and the mixture's config."""
    from common.hf import expected_tensors
    from mix import MixConfig, mix

    shape = dataclasses.replace(models[0].config, num_local_experts=len(models), num_experts_per_tok=2)
    shapes = expected_tensors(shape)
    torch.manual_seed(9)
    routers = {name: torch.randn(size) for name, size in shapes.items() if "moe.gate" in name}
    made = list(mix([tensors_of(model) for model in models], shapes, routers, MixConfig(**options)))
    assert [name for name, _ in made] == list(shapes)  # all of them, in the order of the file
    return dict(made), shape, routers


def random_gates(logits):
    """Any gates that sum to 1, whatever the logits are."""
    return torch.rand(logits.shape, generator=torch.Generator().manual_seed(5)).softmax(dim=-1)


def test_copies_are_one_model_under_any_router(monkeypatch):
    from model import Transformer

    dense = random_model()
    ids = torch.randint(24, (2, 20))
    tensors, shape, _ = mixture([dense] * 3)
    use_plain_loop(monkeypatch, random_gates)
    logits = load(Transformer(shape), tensors)(ids).logits
    torch.testing.assert_close(logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


def test_what_is_averaged():
    models = [random_model(seed) for seed in (1, 2, 3)]
    tensors, _, _ = mixture(models)
    for name in tensors:
        if "moe" not in name:
            three = torch.stack([dict(model.named_parameters())[name].detach() for model in models])
            torch.testing.assert_close(tensors[name].float(), three.sum(dim=0) / 3)
    assert sum("moe" not in name for name in tensors) == 2 * 6 + 3


def test_what_is_stacked_and_what_is_new():
    models = [random_model(seed) for seed in (1, 2, 3)]
    tensors, _, routers = mixture(models)
    for layer in range(2):
        for e, model in enumerate(models):
            mlp = model.model.layers[layer].mlp
            ours = {
                w: tensors[f"model.layers.{layer}.block_sparse_moe.experts.{e}.{w}.weight"] for w in ("w1", "w2", "w3")
            }
            assert ours["w1"].equal(mlp.gate_proj.weight) and ours["w2"].equal(mlp.down_proj.weight)
            assert ours["w3"].equal(mlp.up_proj.weight)
        name = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        assert tensors[name].equal(routers[name])


def test_copies_average_to_themselves_to_the_bit():
    from mix import mean

    torch.manual_seed(0)
    for copies in (2, 3, 5, 7):
        tensor = torch.randn(1000)
        assert mean([tensor] * copies).to(tensor.dtype).equal(tensor), f"{copies} copies"


def test_what_is_averaged_stays_as_it_is():
    """In float64, where a step without a copy would write into the models themselves, too."""
    from mix import mean

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        torch.manual_seed(0)
        tensors = [torch.randn(7, 5).to(dtype) for _ in range(3)]
        before = [tensor.clone() for tensor in tensors]
        torch.testing.assert_close(mean(tensors).to(dtype), (sum(t.double() for t in before) / 3).to(dtype))
        assert all(tensor.equal(old) for tensor, old in zip(tensors, before, strict=True)), dtype


def test_the_soup_is_a_dense_model():
    from common.hf import expected_tensors
    from mix import MixConfig, mix

    models = [random_model(seed) for seed in (1, 2)]
    made = dict(mix([tensors_of(model) for model in models], expected_tensors(config()), {}, MixConfig(method="soup")))
    for name, tensor in made.items():
        one, two = (dict(model.named_parameters())[name].detach() for model in models)
        torch.testing.assert_close(tensor.float(), (one + two) / 2)


def test_what_the_seed_keeps():
    models = [random_model(seed) for seed in (1, 2, 3)]
    tensors, _, _ = mixture(models, keep="embeddings,norms")
    for name, tensor in tensors.items():
        if "moe" not in name:
            three = [dict(model.named_parameters())[name].detach() for model in models]
            kept = "embed" in name or "norm" in name
            torch.testing.assert_close(tensor.float(), three[-1] if kept else sum(three) / 3)
