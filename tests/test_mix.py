"""mix.py: what it averages, stacks and makes anew, against numpy and against the models it was made from."""

import os

import numpy as np
import pytest
import torch
from helpers import error_line, must, read, read_json, run, val_tokens, weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from common import run as runs
from common.hf import expected_tensors
from mix import MixConfig, mix
from model import ModelConfig, Transformer

MATRICES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@pytest.fixture
def ids(data):
    return torch.from_numpy(val_tokens(data, "math")[:200]).view(2, 100)


def test_every_tensor_is_what_it_should_be(seed, experts, mixed):
    parents, result = [weights(folder) for folder in (*experts, seed)], weights(mixed)
    kinds = {"averaged": 0, "stacked": 0, "new": 0}
    for name, tensor in result.items():
        if ".experts." in name:
            layer, expert, matrix = name.split(".")[2], int(name.split(".")[5]), name.split(".")[6]
            source = f"model.layers.{layer}.mlp.{MATRICES[matrix]}.weight"
            assert tensor.tobytes() == parents[expert][source].tobytes()
            assert tensor.tobytes() != parents[expert - 1][source].tobytes()
            kinds["stacked"] += 1
        elif name.endswith("gate.weight"):
            assert tensor.shape == (3, 32) and 0.015 < tensor.std() < 0.025
            kinds["new"] += 1
        else:
            mean = np.mean([parent[name].astype(np.float64) for parent in parents], axis=0)
            np.testing.assert_allclose(tensor, mean, rtol=2e-7, atol=1e-7)
            assert np.abs(tensor - parents[0][name]).max() > 1e-5  # the parents do differ
            kinds["averaged"] += 1
    # 2 layers: q, k, v, o and two norms each; embeddings and the last norm; 3 experts of 3 matrices; a router
    assert kinds == {"averaged": 2 * 6 + 2, "stacked": 2 * 3 * 3, "new": 2}


def test_the_summary_adds_up(seed, experts, tmp_path):
    """The printed numbers of parameters are those of the file, by kind."""
    done = must(run("mix.py", f"--experts={','.join([*experts, seed])}", f"--out_dir={tmp_path}/mixed"))
    printed = {line.split()[0]: int(line.split()[3].replace(",", "")) for line in done.out.splitlines()[:3]}
    sizes = {name: tensor.size for name, tensor in weights(tmp_path / "mixed").items()}
    stacked = sum(size for name, size in sizes.items() if ".experts." in name)
    new = sum(size for name, size in sizes.items() if name.endswith("gate.weight"))
    assert printed == {"averaged": sum(sizes.values()) - stacked - new, "stacked": stacked, "new": new}


def test_the_soup_is_the_mean_of_everything(seed, experts, tmp_path):
    must(run("mix.py", f"--experts={','.join(experts)}", f"--out_dir={tmp_path}/soup", "--method=soup"))
    parents, soup = [weights(folder) for folder in experts], weights(tmp_path / "soup")
    assert soup.keys() == parents[0].keys()
    for name, tensor in soup.items():
        np.testing.assert_allclose(
            tensor, np.mean([p[name].astype(np.float64) for p in parents], axis=0), rtol=2e-7, atol=1e-7
        )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "soup").config.model_type == "llama"


@pytest.mark.parametrize("method", ["btx", "soup"])
def test_copies_of_one_model_are_that_model(method, seed, ids, tmp_path):
    must(run("mix.py", f"--experts={seed},{seed},{seed}", f"--out_dir={tmp_path}/copies", f"--method={method}"))
    one, copies = Transformer.from_pretrained(seed), Transformer.from_pretrained(f"{tmp_path}/copies")
    assert copies.config.num_local_experts == (3 if method == "btx" else 0)
    with torch.no_grad():
        assert (one(ids).logits - copies(ids).logits).abs().max() <= 1e-5


def test_transformers_agrees_on_a_mixed_model(btx, ids):
    theirs = AutoModelForCausalLM.from_pretrained(btx)
    assert type(theirs).__name__ == "MixtralForCausalLM"
    with torch.no_grad():
        assert (Transformer.from_pretrained(btx)(ids).logits - theirs(ids).logits).abs().max() <= 1e-5


def test_routers_depend_on_their_seed_alone(seed, mixed, experts, tmp_path):
    names = ",".join([*experts, seed])
    for number in (1, 2):
        must(run("mix.py", f"--experts={names}", f"--out_dir={tmp_path}/{number}", f"--seed={number}"))
    assert read(tmp_path / "1" / "model.safetensors") == read(os.path.join(mixed, "model.safetensors"))
    first, second = weights(tmp_path / "1"), weights(tmp_path / "2")
    differ = {name for name in first if first[name].tobytes() != second[name].tobytes()}
    assert differ == {f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(2)}


def test_half_precision_experts_are_averaged_in_full(seed, experts, tmp_path):
    """Hugging Face checkpoints often come in bfloat16: the mean is rounded once, at the end."""
    for name, folder in zip("ab", experts, strict=True):
        (tmp_path / name).mkdir()
        tensors = load_file(os.path.join(folder, "model.safetensors"))
        save_file({key: one.bfloat16() for key, one in tensors.items()}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_bytes(read(os.path.join(folder, "config.json")))
    must(run("mix.py", f"--experts={tmp_path}/a,{tmp_path}/b", f"--out_dir={tmp_path}/mixed"))
    a, b, result = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b", "mixed"))
    name = "model.layers.1.self_attn.q_proj.weight"
    assert result[name].dtype == torch.bfloat16
    assert result[name].equal(((a[name].double() + b[name].double()) / 2).bfloat16())
    stacked = result["model.layers.1.block_sparse_moe.experts.1.w2.weight"]
    assert stacked.equal(b["model.layers.1.mlp.down_proj.weight"])


class Watched(dict):
    """An expert's tensors that note how often each was read."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.reads = dict.fromkeys(tensors, 0)

    def __getitem__(self, name):
        self.reads[name] += 1
        return super().__getitem__(name)


@pytest.mark.parametrize("method", ["btx", "soup"])
def test_every_tensor_of_every_expert_is_used_once(seed, experts, mixed, method):
    watched = [Watched(load_file(os.path.join(folder, "model.safetensors"))) for folder in (*experts, seed)]
    shapes = expected_tensors(ModelConfig.from_pretrained(mixed if method == "btx" else seed))
    routers = {name: torch.zeros(shape) for name, shape in shapes.items() if ".gate." in name}
    for name, tensor in mix(watched, shapes, routers, MixConfig()):
        assert tensor.shape == shapes[name]
    assert all(set(one.reads.values()) == {1} for one in watched)


def test_costs_count_the_shared_seed_once(seed, experts, mixed):
    history = read_json(os.path.join(mixed, "run.json"))["history"]
    assert set(history) == {seed, *experts}
    assert runs.total_cost(history)["tokens"] == 3 * 12 * 8 * 32


def test_a_finished_mixture_is_left_alone(seed, experts, mixed):
    before = os.stat(os.path.join(mixed, "model.safetensors")).st_mtime_ns
    flags = f"--experts={','.join([*experts, seed])}", f"--out_dir={mixed}"
    assert "nothing to do" in must(run("mix.py", *flags)).out
    assert os.stat(os.path.join(mixed, "model.safetensors")).st_mtime_ns == before
    assert "seed 1 -> 2" in error_line(run("mix.py", *flags, "--seed=2"))


def foreign(folder, seed, tokenizer='{"version": "1.0"}'):
    """A checkpoint that transformers wrote, with a tokenizer in Hugging Face's own format beside it."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=99, eos_token_id=[7, 8], **shape)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def test_foreign_checkpoints_keep_their_tokenizer_and_stop_token(tmp_path):
    folders = [foreign(tmp_path / name, seed) for seed, name in enumerate("ab")]
    mix = "mix.py", f"--experts={folders[0]},{folders[1]}", f"--out_dir={tmp_path}/mixed"
    must(run(*mix))
    assert read(tmp_path / "mixed" / "tokenizer.json") == b'{"version": "1.0"}'
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mixed")
    assert model.config.eos_token_id == [7, 8] and model.config.model_type == "mixtral"
    assert "finished" in must(run(*mix)).out
    foreign(folders[1], seed=5)  # other weights of the same size in the same place: not the same mixture
    assert "another run" in error_line(run(*mix))


def test_foreign_checkpoints_of_another_tokenizer_are_refused(tmp_path):
    folders = [foreign(tmp_path / name, 0, tokenizer=f'{{"model": {{"vocab": {{"{name}": 0}}}}}}') for name in "ab"]
    done = run("mix.py", f"--experts={folders[0]},{folders[1]}", f"--out_dir={tmp_path}/mixed")
    assert f"{folders[1]} has another tokenizer" in error_line(done)
