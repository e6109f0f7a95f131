"""docs/crosscheck.md on stand-ins: small random Llamas, and the public recipe written out anew."""

import re

import pytest
import torch
from helpers import error_line, must, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

NAMES = "dense", "japanese", "english", "code"
SHAPE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 8}
SHAPE |= {"num_key_value_heads": 8, "max_position_embeddings": 4096, "vocab_size": 1024, "rms_norm_eps": 1e-5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Four dense models in bfloat16, and what branch_train_mix.py of Drop-Upcycling makes of them."""
    root = tmp_path_factory.mktemp("crosscheck")
    torch.manual_seed(1)
    models = [AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).bfloat16() for _ in NAMES]
    for name, model in zip(NAMES, models, strict=True):
        model.save_pretrained(root / name)
    sources = [load_file(root / name / "model.safetensors") for name in NAMES]
    config = MixtralConfig(**SHAPE, num_local_experts=8, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    target = AutoModelForCausalLM.from_config(config).bfloat16()
    state = target.state_dict()
    for name in state:
        layer = name.rpartition(".mlp.")[0]
        experts = [sources[e // 2] for e in range(8)]
        if name.endswith("gate_up_proj"):
            rows = [torch.cat([one[f"{layer}.mlp.{m}_proj.weight"] for m in ("gate", "up")]) for one in experts]
            state[name] = torch.stack(rows)
        elif name.endswith("experts.down_proj"):
            state[name] = torch.stack([one[f"{layer}.mlp.down_proj.weight"] for one in experts])
        elif name.endswith("gate.weight"):
            weights = torch.rand(state[name].shape)
            state[name] = (weights - weights.mean()) * 0.02 * 12**0.5
        else:
            state[name] = torch.stack([one[name] for one in sources]).mean(dim=0)
    target.load_state_dict(state)
    target.save_pretrained(root / "theirs")
    return root


def parts(out):
    return {name: float(value) for name, value in re.findall(r"^(\S+) +([\d.]+e[-+]\d+)$", out, re.M)}


def test_the_recipe_of_drop_upcycling(folders, tmp_path):
    names = ",".join(f"{folders}/{name}" for name in NAMES for _ in range(2))
    must(run("mix.py", f"--experts={names}", f"--out_dir={tmp_path}/mixed"))
    done = must(run("study/crosscheck.py", f"{tmp_path}/mixed", f"{folders}/theirs"))
    apart = parts(done.out)
    assert apart.pop("feed-forward") == 0 and 1.2 < apart.pop("router") < 1.6
    assert set(apart) == {"embeddings", "head", "attention", "norms"} and all(value < 2**-8 for value in apart.values())
    assert done.out.endswith("their experts are nearest to ours: 0 0 2 2 4 4 6 6\n")


def test_a_mixture_that_was_trained_on_is_still_recognised(folders, tmp_path):
    theirs = AutoModelForCausalLM.from_pretrained(folders / "theirs")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.5 * parameter.float().std(correction=0) * torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path / "trained")
    names = ",".join(f"{folders}/{name}" for name in ("code", "code", *NAMES[:3], *NAMES[:3]))
    must(run("mix.py", f"--experts={names}", f"--out_dir={tmp_path}/mixed"))
    done = must(run("study/crosscheck.py", f"{tmp_path}/mixed", f"{tmp_path}/trained"))
    assert (
        done.out.endswith("their experts are nearest to ours: 2 2 3 3 4 4 0 0\n")
        and parts(done.out)["feed-forward"] > 0.1
    )


def test_other_shapes_are_refused(folders):
    message = error_line(run("study/crosscheck.py", f"{folders}/theirs", f"{folders}/code"))
    assert "are not two mixtures of one shape" in message
    assert "give two folders" in error_line(run("study/crosscheck.py"))
