"""Weights in several files: what a shard may hold, that they load here and there, and that a kill leaves no whole."""

import os
import re

import pytest
import torch
from helpers import SHAPE, SHORT, error_line, must, read, read_json, run, run_process, weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common import device, runs
from common import weights as module
from common.hf import INDEX, WEIGHTS, remove_weights, shards, weights_hash
from model import Transformer

LIMIT = 30_000  # bytes; a tiny mixture is about ten times as large


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", LIMIT)


def shard_names(folder):
    return sorted(name for name in os.listdir(folder) if re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name))


def test_shards_by_hand():
    sizes = {"a": 4, "b": 4, "c": 1, "d": 20, "e": 2, "f": 8}
    assert shards(sizes, 10) == [["a", "b", "c"], ["d"], ["e", "f"]]
    assert shards(sizes, 100) == [[*"abcdef"]]


@pytest.mark.parametrize("method", ["btx", "soup"])
def test_shards_hold_what_one_file_would(method, seed, experts, tmp_path, monkeypatch):
    flags = f"--experts={','.join([*experts, seed])}", f"--method={method}"
    must(run("mix.py", *flags, f"--out_dir={tmp_path}/one"))
    monkeypatch.setattr(module, "SHARD_BYTES", LIMIT)
    must(run("mix.py", *flags, f"--out_dir={tmp_path}/many"))
    names, index = shard_names(tmp_path / "many"), read_json(tmp_path / "many" / INDEX)
    assert len(names) > 3 and not os.path.exists(tmp_path / "many" / WEIGHTS)
    assert sorted(set(index["weight_map"].values())) == names
    together, whole = {}, weights(tmp_path / "one")
    for name in names:
        assert (
            os.path.getsize(tmp_path / "many" / name) <= LIMIT + 4000 or len(load_file(tmp_path / "many" / name)) == 1
        )
        found = load_file(tmp_path / "many" / name)
        assert {index["weight_map"][key] for key in found} == {name}
        together |= found
    assert {key: tensor.numpy().tobytes() for key, tensor in together.items()} == {
        key: tensor.tobytes() for key, tensor in whole.items()
    }
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    ids = torch.randint(320, (2, 20))
    with torch.no_grad():
        ours = Transformer.from_pretrained(f"{tmp_path}/many")(ids).logits
        assert ours.equal(Transformer.from_pretrained(f"{tmp_path}/one")(ids).logits)
        assert (AutoModelForCausalLM.from_pretrained(tmp_path / "many")(ids).logits - ours).abs().max() <= 1e-5


def test_a_damaged_or_missing_shard_is_made_again(seed, experts, tmp_path, small_shards):
    mix = "mix.py", f"--experts={','.join(experts)}", f"--out_dir={tmp_path}/mixed"
    must(run(*mix))
    folder, before = tmp_path / "mixed", weights_hash(tmp_path / "mixed")
    assert read_json(folder / "run.json")["weights"] == before
    assert "nothing to do" in must(run(*mix)).out
    name = shard_names(folder)[2]
    content = bytearray(read(folder / name))
    content[-5] ^= 1
    for damage in (lambda: (folder / name).write_bytes(content), lambda: os.remove(folder / name)):
        damage()
        assert weights_hash(folder) != before
        assert "missing or damaged; making it again" in must(run(*mix)).out
        assert weights_hash(folder) == before
    os.remove(folder / INDEX)
    assert weights_hash(folder) is None
    assert "missing or damaged" in must(run(*mix)).out and weights_hash(folder) == before


def test_a_kill_leaves_nothing_that_looks_complete(seed, experts, tmp_path):
    """Killed while it writes each of the files in turn; then the same command makes it whole."""
    mix = "mix.py", f"--experts={','.join(experts)}", f"--out_dir={tmp_path}/mixed"
    folder = tmp_path / "mixed"
    limit = f"from common import weights\nweights.SHARD_BYTES = {LIMIT}\n"
    for number in (1, 2, 4):
        hook = f"""{limit}
import os
from common import files, weights
whole, calls = weights.atomic_file, []
def dying(path):
    calls.append(path)
    if len(calls) == {number}:
        open(path + ".tmp", "wb").write(b"half")
        os._exit(9)
    return whole(path)
weights.atomic_file = dying
"""
        assert run_process(*mix, hook=hook).code == 9
        assert len(shard_names(folder)) == number - 1
        assert not os.path.exists(folder / INDEX) and weights_hash(folder) is None
        assert not runs.read_run(folder)["finished"]
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(folder)
        assert "is not finished" in error_line(run("mix.py", f"--experts={folder},{folder}", f"--out_dir={tmp_path}/x"))
    hook = f"{limit}import os\nweights.write_json = lambda *arguments, **options: os._exit(9)"  # the index
    assert run_process(*mix, hook=hook).code == 9
    assert len(shard_names(folder)) > 4 and weights_hash(folder) is None
    must(run_process(*mix, hook=limit))
    assert runs.is_intact(folder, runs.read_run(folder)) and not [name for name in os.listdir(folder) if "tmp" in name]


def test_training_leaves_shards_and_goes_on_from_them(data, tmp_path, small_shards):
    seed = f"{tmp_path}/seed"
    must(run("train.py", *SHAPE, *SHORT, "--max_steps=1", f"--data_dir={data}", f"--out_dir={seed}"))
    assert len(shard_names(seed)) > 1 and read_json(f"{seed}/run.json")["weights"] == weights_hash(seed)
    flags = *SHORT, "--max_steps=1", f"--data_dir={data}"
    must(run("train.py", *flags, f"--init_from={seed}", f"--out_dir={tmp_path}/branch"))
    assert "nothing to do" in must(run("train.py", *flags, f"--init_from={seed}", f"--out_dir={tmp_path}/branch")).out


def test_one_file_and_shards_take_each_others_place(seed, experts, tmp_path, monkeypatch):
    model, folder = Transformer.from_pretrained(seed), tmp_path / "model"
    model.save_pretrained(str(folder))
    monkeypatch.setattr(module, "SHARD_BYTES", LIMIT)
    model.save_pretrained(str(folder))
    assert not os.path.exists(folder / WEIGHTS) and len(shard_names(folder)) > 1
    monkeypatch.undo()
    model.save_pretrained(str(folder))
    assert sorted(os.listdir(folder)) == ["config.json", WEIGHTS]
    assert read(folder / WEIGHTS) == read(os.path.join(seed, WEIGHTS))
    for name in ("model.safetensors.txt", "my-model.safetensors"):
        (folder / name).write_text("someone's own")
    remove_weights(folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors.txt", "my-model.safetensors"]


def test_half_precision_goes_in_and_out_shard_by_shard(seed, experts, tmp_path, small_shards):
    for name, folder in zip("ab", experts, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16)
        model.save_pretrained(tmp_path / name, max_shard_size="20KB")
    must(run("mix.py", f"--experts={tmp_path}/a,{tmp_path}/b", f"--out_dir={tmp_path}/mixed"))
    found = {}
    for name in shard_names(tmp_path / "mixed"):
        found |= load_file(tmp_path / "mixed" / name)
    a, b = (
        {k: v for name in shard_names(tmp_path / x) for k, v in load_file(tmp_path / x / name).items()} for x in "ab"
    )
    assert len(shard_names(tmp_path / "a")) > 1 and len(shard_names(tmp_path / "mixed")) > 1
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    name = "model.embed_tokens.weight"
    assert found[name].equal(((a[name].double() + b[name].double()) / 2).bfloat16())
    expert = found["model.layers.0.block_sparse_moe.experts.1.w3.weight"]
    assert expert.equal(b["model.layers.0.mlp.up_proj.weight"])


def test_infinity_is_found_and_a_large_sum_is_none(seed, tmp_path):
    """Numbers are summed to find NaN and infinity; a sum that overflows is looked at again."""
    config = read(os.path.join(seed, "config.json"))
    tensors = load_file(os.path.join(seed, WEIGHTS))
    name = "model.layers.0.mlp.up_proj.weight"
    for value, fine in ((3e38, True), (float("inf"), False), (float("nan"), False)):
        (tmp_path / "config.json").write_bytes(config)
        save_file({**tensors, name: torch.full_like(tensors[name], value)}, tmp_path / WEIGHTS)
        if fine:
            Transformer.from_pretrained(str(tmp_path))
        else:
            assert f"{name} holds NaN or infinity" in error_line(
                run("mix.py", f"--experts={tmp_path},{tmp_path}", f"--out_dir={tmp_path}/mixed-{value}")
            )


def test_a_model_that_does_not_fit_is_refused_with_what_it_needs(mixed, monkeypatch):
    parameters = Transformer.from_pretrained(mixed).num_parameters()[1]
    monkeypatch.setattr(device, "free_memory", lambda: 4 * parameters - 1)
    needed = f"{mixed} needs {4 * parameters / 1e9:.1f} GB of memory in float32"
    assert needed in error_line(run("sample.py", f"--model={mixed}"))
    monkeypatch.setattr(device, "free_memory", lambda: 4 * parameters)
    Transformer.from_pretrained(mixed)
    monkeypatch.undo()
    assert 1e8 < device.free_memory() < 1e14
