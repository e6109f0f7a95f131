"""Parents that are not quite alike: what mix.py refuses, chooses, fills up, or says before it mixes."""

import json
import os
import shutil

import numpy as np
import torch
from helpers import SHORT, TOKENS, error_line, must, read, run, weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SHAPE = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENIZER = {"added_tokens": [], "model": {"vocab": {"a": 0, "b": 1}, "merges": []}}


def llama(folder, draw=1, added=(), **config):
    """A random Llama that transformers wrote, with a tokenizer and what instruct models have beside it."""
    torch.manual_seed(draw)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "intermediate_size": 48, **config}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    model.save_pretrained(folder)
    added = [{"id": 2 + i, "content": content} for i, content in enumerate(added)]
    (folder / "tokenizer.json").write_text(json.dumps({**TOKENIZER, "added_tokens": added}))
    (folder / "chat_template.jinja").write_text(f"template of {folder.name}")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": config.get("eos_token_id", 2)}))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text(f"tools of {folder.name}")
    return str(folder)


def mix(*folders, **flags):
    return run("mix.py", f"--experts={','.join(folders)}", *(f"--{name}={value}" for name, value in flags.items()))


@torch.no_grad()
def logits(folder, ids):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits


IDS = torch.arange(60).view(2, 30)


# ---- what a choice is for ----


def test_base_and_instruct_are_mixed_by_choice(tmp_path):
    base = llama(tmp_path / "base", eos_token_id=2, max_position_embeddings=64)
    chat = llama(tmp_path / "chat", added=["<|im_end|>"], eos_token_id=[2, 7], max_position_embeddings=128)
    out = tmp_path / "mixed"
    refused = error_line(mix(base, chat, out_dir=out))
    assert f"{chat} has max_position_embeddings 128, but {base} has 64" in refused and "--config_from" in refused
    must(mix(base, chat, out_dir=out, config_from=chat))
    config = AutoModelForCausalLM.from_pretrained(out).config
    assert config.eos_token_id == [2, 7] and config.max_position_embeddings == 128
    assert read(out / "tokenizer.json") == read(f"{chat}/tokenizer.json")
    card = read(out / "README.md").decode()
    assert "eos_token_id is [2, 7], as in chat" in card and "max_position_embeddings is 128" in card


def test_a_choice_is_no_way_round_other_text_or_shapes(tmp_path):
    one, deep = llama(tmp_path / "one"), llama(tmp_path / "deep", num_hidden_layers=3)
    assert "num_hidden_layers 3" in error_line(mix(one, deep, out_dir=tmp_path / "mixed", config_from=one))
    other = llama(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps({**TOKENIZER, "model": {"vocab": {"c": 0}}}))
    assert "another tokenizer" in error_line(mix(one, other, out_dir=tmp_path / "mixed", config_from=one))
    assert "not one of the experts" in error_line(mix(one, one, out_dir=tmp_path / "mixed", config_from=other))


def test_files_beside_the_weights_come_along(tmp_path):
    first, second = llama(tmp_path / "first"), llama(tmp_path / "second")
    must(mix(first, second, out_dir=tmp_path / "mixed"))
    for name in ("chat_template.jinja", "generation_config.json", "additional_chat_templates/tools.jinja"):
        assert read(tmp_path / "mixed" / name) == read(f"{first}/{name}")
    must(mix(second, second, out_dir=tmp_path / "mixed", overwrite=True))
    assert read(tmp_path / "mixed" / "additional_chat_templates" / "tools.jinja") == b"tools of second"


def test_training_keeps_them_too(tmp_path, data, seed):
    chat = tmp_path / "chat"
    shutil.copytree(seed, chat)
    (chat / "run.json").unlink()
    for name in ("chat_template.jinja", "generation_config.json"):
        (chat / name).write_text(name)
    must(
        run(
            "train.py", *SHORT, "--max_steps=1", f"--data_dir={data}", f"--init_from={chat}", f"--out_dir={tmp_path}/on"
        )
    )
    for name in ("chat_template.jinja", "generation_config.json"):
        assert read(tmp_path / "on" / name) == name.encode()


# ---- relatives and strangers ----


def test_strangers_are_named(tmp_path, seed, experts):
    said = must(mix(llama(tmp_path / "a", draw=1), llama(tmp_path / "b", draw=2), out_dir=tmp_path / "noise"))
    assert "b is unrelated to a (cosine of embeddings 0.0" in said.out.replace("-0.0", "0.0")
    assert "unrelated" in read(tmp_path / "noise" / "README.md").decode()
    assert "unrelated" not in must(mix(*experts, seed, out_dir=tmp_path / "branches")).out


def test_a_dry_run_says_it_all_and_writes_nothing(tmp_path, seed, experts):
    out = tmp_path / "mixed"
    said = must(run("mix.py", f"--experts={','.join([*experts, seed])}", f"--out_dir={out}", "--dry_run")).out
    assert not out.exists() and "nothing was written" in said
    tables = [weights(folder)["model.embed_tokens.weight"].astype(np.float64).ravel() for folder in (*experts, seed)]
    for folder, table in zip((*experts, seed), tables, strict=True):
        cosine = table @ tables[0] / np.linalg.norm(table) / np.linalg.norm(tables[0])
        line = next(line for line in said.splitlines() if line.startswith(f"{folder}: float32, tokenizer "))
        assert line.endswith(f"{cosine:.3f}") and cosine > 0.9
    assert f"common ancestors in run.json: {seed}\n" in said
    done = must(mix(*experts, seed, out_dir=out))
    assert done.out.splitlines()[:3] == [line for line in said.splitlines() if " tensors, " in line]
    size = os.path.getsize(out / "model.safetensors") / 1e9
    assert "mixtral, " in said and f"{size:.3f} GB in float32" in said


def test_a_dry_run_lists_all_that_differs_before_it_refuses(tmp_path):
    one = llama(tmp_path / "one")
    two = llama(tmp_path / "two", eos_token_id=5, num_key_value_heads=2, rope_parameters={"rope_theta": 500.0})
    done = mix(one, two, out_dir=tmp_path / "mixed", dry_run=True)
    assert "num_key_value_heads 2" in error_line(done)
    for words in (
        "eos_token_id differs: 2, 5",
        "num_key_value_heads differs: 4, 2",
        "rope_theta differs: 10000.0, 500",
    ):
        assert words in done.out


# ---- widths and dtypes ----


def test_a_dense_model_may_have_any_width_and_is_filled_up_where_it_is_mixed(tmp_path):
    """172 is no multiple of 8: two copies make a mixture of 176 that computes what transformers computes of one."""
    odd = llama(tmp_path / "odd", intermediate_size=172)
    must(mix(odd, odd, out_dir=tmp_path / "mixed"))
    expected = logits(odd, IDS)
    assert expected.std() > 0.5 and (logits(tmp_path / "mixed", IDS) - expected).abs().max() < 1e-4
    expert = weights(tmp_path / "mixed")["model.layers.1.block_sparse_moe.experts.1.w2.weight"]
    assert expert.shape == (32, 176) and not expert[:, 172:].any()
    assert (expert[:, :172] == weights(odd)["model.layers.1.mlp.down_proj.weight"]).all()


@torch.no_grad()
def test_branches_of_unequal_width(tmp_path):
    """With equal gates a mixture of two is a dense model whose feed-forwards are the mean of its parents' two."""
    narrow, wide = llama(tmp_path / "narrow", intermediate_size=20), llama(tmp_path / "wide", intermediate_size=36)
    shared = {name: one for name, one in load_file(f"{narrow}/model.safetensors").items() if ".mlp." not in name}
    save_file({**load_file(f"{wide}/model.safetensors"), **shared}, f"{wide}/model.safetensors", {"format": "pt"})
    said = must(mix(narrow, wide, out_dir=tmp_path / "mixed", router_init="zero")).out
    assert "feed-forwards of width 20, 36: the narrower ones are zero-padded" in said
    one, two = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (narrow, wide))
    for layer, other in zip(one.model.layers, two.model.layers, strict=True):
        layer.mlp.register_forward_hook(lambda _, x, y, other=other: (y + other.mlp(x[0])) / 2)
    expected = one(IDS).logits
    assert (expected - logits(narrow, IDS)).abs().max() > 0.1
    assert (logits(tmp_path / "mixed", IDS) - expected).abs().max() < 1e-4
    assert "intermediate_size 36" in error_line(mix(narrow, wide, out_dir=tmp_path / "soup", method="soup"))


def test_nothing_is_rounded_where_dtypes_differ(tmp_path):
    full, half = llama(tmp_path / "full"), llama(tmp_path / "half")
    tensors = load_file(f"{half}/model.safetensors")
    save_file({name: one.bfloat16() for name, one in tensors.items()}, f"{half}/model.safetensors", {"format": "pt"})
    must(mix(half, full, out_dir=tmp_path / "mixed"))
    mixed, name = weights(tmp_path / "mixed"), "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    assert mixed[name].dtype == np.float32
    assert (mixed[name] == weights(full)["model.layers.0.mlp.gate_proj.weight"]).all()


def test_one_tensor_in_a_narrow_dtype_rounds_no_other(tmp_path):
    one = llama(tmp_path / "one")
    tensors = load_file(f"{one}/model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, f"{one}/model.safetensors", {"format": "pt"})
    must(mix(one, one, out_dir=tmp_path / "mixed"))
    mixed = load_file(tmp_path / "mixed" / "model.safetensors")
    assert mixed["model.embed_tokens.weight"].equal(tensors["model.embed_tokens.weight"])


def test_another_spelling_of_a_path_is_the_same_mixture(tmp_path, monkeypatch):
    one = llama(tmp_path / "one")
    must(mix(one, one, out_dir=tmp_path / "mixed"))
    monkeypatch.chdir(tmp_path)
    must(mix("one/", f"./{os.path.basename(one)}", out_dir="mixed2/"))
    assert "nothing to do" in must(mix(one, "one", out_dir="./mixed2")).out


def test_two_runs_in_folders_of_one_name_cost_twice(tmp_path, experts):
    """As when each was trained on its own machine, and moved: their run.json say the same folder."""
    for name, folder in zip(("one", "two"), experts, strict=True):
        shutil.copytree(folder, tmp_path / name)
        record = json.loads(read(tmp_path / name / "run.json"))
        record["history"]["run"] = record["history"].pop(folder)
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    must(mix(str(tmp_path / "one"), str(tmp_path / "two"), out_dir=tmp_path / "mixed"))
    costs = json.loads(read(tmp_path / "mixed" / "run.json"))["history"].values()
    assert sum(cost["tokens"] for cost in costs) == 3 * TOKENS
