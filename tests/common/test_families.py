"""Checkpoints of other families, written by transformers with random weights: the same logits here as there."""

import json
import os

import pytest
import torch
from helpers import error_line, must, run
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from common.errors import UserError
from common.hf import INDEX
from model import ModelConfig, Transformer

SHAPE = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32, "rope_theta": 500.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "llama3": LlamaConfig(**SHAPE, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama-linear": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}),
    "llama-narrow-heads": LlamaConfig(**SHAPE, head_dim=4),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "mistral-wide-window": MistralConfig(**SHAPE, sliding_window=64, head_dim=16),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "qwen3-tied": Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=3, num_experts_per_tok=2),
    "mixtral-wide-heads": MixtralConfig(**SHAPE, num_local_experts=3, head_dim=16, rope_parameters=LLAMA3),
    "qwen3-moe": Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=16),
}


def written_by_transformers(config, folder, dtype=torch.float32, **options):
    """A random model, its weights large enough that every part shows in the logits, saved into folder."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    model.to(dtype).save_pretrained(folder, **options)
    return model


@torch.no_grad()
def assert_equal_logits(folder, theirs=None):
    ids = torch.randint(80, (3, 50), generator=torch.Generator().manual_seed(2))
    theirs = theirs or AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits, reference = Transformer.from_pretrained(str(folder))(ids).logits, theirs(ids).logits
    assert reference.std() > 0.5  # the comparison is about something
    assert (logits - reference).abs().max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_and_survive_our_writing(family, tmp_path):
    theirs = written_by_transformers(FAMILIES[family], tmp_path / "theirs")
    assert_equal_logits(tmp_path / "theirs", theirs)
    Transformer.from_pretrained(str(tmp_path / "theirs")).save_pretrained(str(tmp_path / "ours"))
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert again.config.model_type == theirs.config.model_type.replace("mistral", "llama")
    assert_equal_logits(tmp_path / "ours", theirs)
    assert_equal_logits(tmp_path / "ours", again.eval())


@pytest.mark.parametrize("family", ["llama3", "mixtral", "qwen3", "qwen3-moe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_shards(family, dtype, tmp_path):
    written_by_transformers(FAMILIES[family], tmp_path, dtype, max_shard_size="15KB")
    assert os.path.exists(tmp_path / INDEX)
    assert_equal_logits(tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_stacked_experts_as_transformers_5_holds_them_and_mergekit_writes_them(family, tmp_path):
    theirs = written_by_transformers(FAMILIES[family], tmp_path)
    tensors = theirs.state_dict()
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors and "model.layers.0.mlp.gate.weight" in tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    assert_equal_logits(tmp_path, theirs)
    rewrite_config(tmp_path, intermediate_size=16, moe_intermediate_size=16)
    with pytest.raises(UserError, match=r"gate_up_proj has shape \(\d, \d+, 32\), but config.json says"):
        Transformer.from_pretrained(str(tmp_path))


def rewrite_config(folder, **changes):
    path = os.path.join(folder, "config.json")
    with open(path) as file:
        found = {**json.load(file), **changes}
    with open(path, "w") as file:
        json.dump({name: value for name, value in found.items() if value is not ...}, file)


def test_frequencies_that_old_files_hold_are_ignored(tmp_path):
    theirs = written_by_transformers(FAMILIES["llama"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert_equal_logits(tmp_path, theirs)


@pytest.mark.parametrize("family", ["llama3", "llama-linear"])
def test_rope_in_the_words_of_transformers_4(family, tmp_path):
    theirs = written_by_transformers(FAMILIES[family], tmp_path)
    rope = {**theirs.config.rope_parameters}
    if family == "llama-linear":
        rope["type"] = rope.pop("rope_type")
    rewrite_config(tmp_path, rope_parameters=..., rope_theta=rope.pop("rope_theta"), rope_scaling=rope)
    assert_equal_logits(tmp_path, theirs)


def test_keys_that_are_missing_mean_what_they_mean_in_transformers(tmp_path):
    """Mistral's window is 4,096 tokens where config.json does not say; eps and theta differ between families."""
    wide = {**SHAPE, "max_position_embeddings": 4096}
    theirs = written_by_transformers(MistralConfig(**wide), tmp_path)
    missing = ("sliding_window", "rms_norm_eps", "rope_parameters", "head_dim")
    rewrite_config(tmp_path, **dict.fromkeys(missing, ...))
    assert AutoConfig.from_pretrained(tmp_path).sliding_window == 4096
    assert_equal_logits(tmp_path, theirs)
    rewrite_config(tmp_path, max_position_embeddings=8192)
    message = error_line(run("mix.py", f"--experts={tmp_path},{tmp_path}", f"--out_dir={tmp_path}/mixed"))
    assert "sliding_window 4096" in message


# a value that stands twice in config.json and is not the same: versions of transformers take one or the other
TWICE = {
    "llama": ({"rope_theta": 7.0}, "rope_theta is 7.0, rope_parameters.rope_theta is 10000.0"),
    "llama3": (
        {"rope_scaling": {**LLAMA3, "factor": 2.0}},
        "rope_scaling.factor is 2.0",
    ),
    "llama-linear": ({"rope_scaling": {"type": "default"}}, "rope_scaling.type is 'default'"),
    "mixtral": ({"num_experts": 4}, "num_local_experts is 3, num_experts is 4"),
    "qwen3-moe": ({"num_experts": 2, "num_local_experts": 4}, "num_local_experts is 4"),
}


@pytest.mark.parametrize("family", TWICE)
def test_a_config_that_contradicts_itself_is_refused(family, tmp_path):
    theirs = written_by_transformers(FAMILIES[family], tmp_path)
    same = {"rope_scaling": theirs.config.rope_parameters, "rope_theta": theirs.config.rope_parameters["rope_theta"]}
    rewrite_config(tmp_path, **same)
    assert_equal_logits(tmp_path, theirs)
    change, words = TWICE[family]
    rewrite_config(tmp_path, **change)
    with pytest.raises(UserError, match="contradicts itself") as caught:
        Transformer.from_pretrained(str(tmp_path))
    assert words in str(caught.value)


def test_a_tied_head_that_is_another_is_refused(tmp_path):
    """Transformers keeps the two apart and warns; a head that is the embeddings is read."""
    theirs = written_by_transformers(FAMILIES["llama3"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert_equal_logits(tmp_path, theirs)
    tensors["lm_head.weight"][3, 3] += 0.1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="tie_word_embeddings true, but lm_head") as caught:
        Transformer.from_pretrained(str(tmp_path))
    assert "set tie_word_embeddings to false" in str(caught.value)
    rewrite_config(tmp_path, tie_word_embeddings=False)
    assert_equal_logits(tmp_path)


def test_a_tied_head_may_be_the_name_under_which_the_embeddings_are_stored(tmp_path):
    theirs = written_by_transformers(FAMILIES["llama3"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert_equal_logits(tmp_path, theirs)


def test_keys_of_mixtures_mean_nothing_in_a_dense_model(tmp_path):
    theirs = written_by_transformers(FAMILIES["llama"], tmp_path)
    rewrite_config(tmp_path, expert_names=None, num_experts_per_tok="2")
    assert_equal_logits(tmp_path, theirs)


OTHERS = {
    "pytorch_model.bin": "there are pickles",
    "adapter_model.safetensors": "there is a LoRA adapter; merge it first",
    "model.fp16.safetensors": "there are other safetensors files; rename one to model.safetensors",
    "model-Q4_0.gguf": "there is a GGUF file",
}


@pytest.mark.parametrize("name", OTHERS)
def test_weights_in_another_form_are_named_with_what_helps(name, tmp_path):
    written_by_transformers(FAMILIES["llama"], tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(UserError, match=OTHERS[name]):
        Transformer.from_pretrained(str(tmp_path))


def test_a_pointer_that_git_lfs_left_is_named(tmp_path):
    written_by_transformers(FAMILIES["llama"], tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match="run git lfs pull"):
        Transformer.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("family", ["llama", "qwen3-tied", "mixtral"])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "base_model.model."])
def test_names_with_another_tools_prefix(family, prefix, tmp_path):
    theirs = written_by_transformers(FAMILIES[family], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({prefix + name: one for name, one in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        ids = torch.arange(60).view(2, 30)
        ours = Transformer.from_pretrained(str(tmp_path))
        assert (ours(ids).logits - theirs(ids).logits).abs().max() <= 1e-5


def test_a_model_without_a_head_is_read_where_the_head_is_tied(tmp_path):
    theirs = written_by_transformers(FAMILIES["qwen3-tied"], tmp_path)
    theirs.model.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    rewrite_config(tmp_path, architectures=["Qwen3ForCausalLM"])
    assert_equal_logits(tmp_path, theirs)


def test_stop_tokens_that_are_missing_are_those_of_transformers(tmp_path):
    written_by_transformers(FAMILIES["llama"], tmp_path)
    rewrite_config(tmp_path, eos_token_id=..., bos_token_id=...)
    ours, theirs = ModelConfig.from_pretrained(str(tmp_path)), AutoConfig.from_pretrained(tmp_path)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("qwen3", {"use_sliding_window": True, "sliding_window": 16}, "sliding_window 16"),
        ("qwen3", {"layer_types": ["full_attention", "chunked"]}, 'layer_types ["full_attention", "chunked"]'),
        ("qwen3-moe", {"norm_topk_prob": False}, "norm_topk_prob false"),
        ("qwen3-moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
        ("qwen3-moe", {"mlp_only_layers": [0]}, "mlp_only_layers [0]"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts must be a whole number of at least 1, not 0"),
        ("mistral", {"sliding_window": 8}, "sliding_window 8"),
        ("llama3", {"rope_parameters": {**LLAMA3, "low_freq_factor": 9}}, "low_freq_factor below high_freq_factor"),
        ("llama", {"rope_parameters": "fast"}, "rope_parameters must be a table, not 'fast'"),
        ("mixtral", {"num_experts_per_tok": 2.0}, "num_experts_per_tok must be int, not 2.0"),
        ("mixtral", {"router_aux_loss_coef": None}, "router_aux_loss_coef must be float or int, not None"),
        ("qwen3-moe", {"expert_names": 3}, "expert_names must be list, not 3"),
        ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings must be bool, not 'false'"),
        ("llama", {"eos_token_id": "</s>"}, "eos_token_id must be int or list or NoneType, not '</s>'"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(family, change, words, tmp_path):
    written_by_transformers(FAMILIES[family], tmp_path / "a")
    rewrite_config(tmp_path / "a", **change)
    message = error_line(run("mix.py", f"--experts={tmp_path}/a,{tmp_path}/a", f"--out_dir={tmp_path}/mixed"))
    assert words in message and str(tmp_path / "a") in message


def test_quantised_weights_are_refused(tmp_path):
    written_by_transformers(FAMILIES["llama"], tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, path)
    message = error_line(run("mix.py", f"--experts={tmp_path}/a,{tmp_path}/a", f"--out_dir={tmp_path}/mixed"))
    assert "model.norm.weight is stored as I8" in message


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": null}}'])
def test_a_damaged_index_is_named(content, tmp_path):
    written_by_transformers(FAMILIES["llama"], tmp_path / "a", max_shard_size="15KB")
    (tmp_path / "a" / INDEX).write_text(content)
    message = error_line(run("mix.py", f"--experts={tmp_path}/a,{tmp_path}/a", f"--out_dir={tmp_path}/mixed"))
    assert INDEX in message


@pytest.mark.parametrize(("family", "kind"), [("qwen3", "qwen3_moe"), ("llama3", "mixtral"), ("mistral", "mixtral")])
def test_a_mixture_of_seeds_is_what_transformers_reads(family, kind, tmp_path):
    """Two random models of a family, mixed; both sides compute the same, and copies of one are that one."""
    theirs = written_by_transformers(FAMILIES[family], tmp_path / "a")
    other = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float32)
    other.save_pretrained(tmp_path / "b")
    must(run("mix.py", f"--experts={tmp_path}/a,{tmp_path}/b", f"--out_dir={tmp_path}/mixed", "--router_std=1"))
    mixed, info = AutoModelForCausalLM.from_pretrained(tmp_path / "mixed", output_loading_info=True)
    assert mixed.config.model_type == kind and not any(info.values())
    assert ModelConfig.from_pretrained(str(tmp_path / "mixed")).expert_names == ("a", "b")
    ids = torch.randint(80, (2, 50))
    ours = Transformer.from_pretrained(str(tmp_path / "mixed"))
    with torch.no_grad():
        assert (ours(ids).logits - mixed.eval()(ids).logits).abs().max() <= 1e-5
    must(run("mix.py", f"--experts={tmp_path}/a,{tmp_path}/a", f"--out_dir={tmp_path}/copies"))
    with torch.no_grad():
        assert (
            Transformer.from_pretrained(str(tmp_path / "copies"))(ids).logits - theirs(ids).logits
        ).abs().max() <= 1e-5


def test_an_adapter_that_transformers_would_add_is_refused(tmp_path):
    written_by_transformers(FAMILIES["llama"], tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="also holds a LoRA adapter; merge it first"):
        Transformer.from_pretrained(str(tmp_path))
