"""The shape of a model on disk: config.json, in the words of the transformers library.

Read: Llama, Mistral, Qwen3 (dense), Mixtral, Qwen3-MoE (mixtures), as transformers 4 and 5 write them. Written: Llama's
and Mixtral's words, or Qwen3's and Qwen3-MoE's where queries and keys are normed. A mixture whose router transformers
does not have is written as `nanobtx`, a model_type that only this repository reads: nobody loads it as a Mixtral that
computes something else.

Functions that take a `config` want a model.ModelConfig.
"""

import dataclasses
import json
import os

import torch

from common.errors import UserError
from common.files import read_json, write_json
from common.rope import SCALINGS

# what transformers takes for keys that are not in the file
DEFAULTS = {
    "llama": {"rms_norm_eps": 1e-6},
    "mistral": {"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen3": {"rms_norm_eps": 1e-6, "head_dim": 128},
    "mixtral": {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "rope_theta": 1e6},
    "qwen3_moe": {"rms_norm_eps": 1e-6, "norm_topk_prob": False, "num_experts_per_tok": 8},
    "nanobtx": {},
}
MIXTURES = ("mixtral", "qwen3_moe", "nanobtx")
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "nanobtx": "NanoBTXForCausalLM",
}
# what model.py does not have, as (key, the values that do no harm); keys that are missing do none
ONLY = (
    ("attention_bias", (False, None)),
    ("mlp_bias", (False, None)),
    ("hidden_act", ("silu",)),
    ("quantization_config", (None,)),
    ("norm_topk_prob", (True,)),
    ("decoder_sparse_step", (1,)),
    ("mlp_only_layers", ([], None)),
)
LIKE_MIXTRAL = ("topk", "soft")  # the routers that transformers computes as model.py does
MIXTURE_KEYS = ("num_local_experts", "num_experts_per_tok", "expert_names", "router", "balance")
MIXTURE_KEYS += ("router_aux_loss_coef", "router_z_loss_coef")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "max_position_embeddings", "head_dim")


def model_type(config):
    """The word of config.json for an architecture."""
    if not config.num_local_experts:
        return "qwen3" if config.qk_norm else "llama"
    if config.router not in LIKE_MIXTRAL:
        return "nanobtx"
    return "qwen3_moe" if config.qk_norm else "mixtral"


def write_config(folder, config, dtype=torch.float32):
    """Write config.json. The architectures' defaults differ, so every value is written out. dtype: the weights'."""
    kind, shape = model_type(config), dataclasses.asdict(config)
    left_out = () if config.num_local_experts else MIXTURE_KEYS
    left_out += () if config.qk_norm else ("qk_norm",)
    shape = {name: value for name, value in shape.items() if name not in left_out}
    rope = {"rope_theta": config.rope_theta, **(config.rope_scaling or {"rope_type": "default"})}
    shape |= {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "rope_parameters": rope,  # transformers 5 reads only this, transformers 4 rope_theta and rope_scaling
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if kind == "qwen3_moe":
        shape |= {"num_experts": config.num_local_experts, "moe_intermediate_size": config.intermediate_size}
        shape |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    write_json(os.path.join(folder, "config.json"), shape, indent=2)


def read_config(folder):
    """config.json of our own or of a Hugging Face checkpoint, with the keys of ModelConfig and defaults filled in.
    UserError for what model.py does not compute."""
    path = os.path.join(folder, "config.json")
    found = read_json(path, "name a checkpoint folder, such as one that train.py wrote")
    kind = found.get("model_type") if isinstance(found, dict) else None
    if kind not in DEFAULTS:
        raise UserError(f"{path}: model_type {kind!r} is none that model.py reads: {', '.join(DEFAULTS)}")
    found = {**DEFAULTS[kind], **found}
    found["qk_norm"] = kind.startswith("qwen3") or bool(found.get("qk_norm"))
    if kind == "qwen3_moe":
        found["intermediate_size"] = found.get("moe_intermediate_size")
        found["num_local_experts"] = found.get("num_experts", found.get("num_local_experts"))
    if found.get("num_key_value_heads") is None:
        found["num_key_value_heads"] = found.get("num_attention_heads")
    try:
        if found.get("head_dim") is None:
            found["head_dim"] = found["hidden_size"] // found["num_attention_heads"]
    except (KeyError, TypeError, ZeroDivisionError):
        found["head_dim"] = 1  # the sizes that it follows from are refused below
    for name in SIZES:
        if type(found.get(name)) is not int or found[name] < 1:
            raise UserError(f"{path}: {name} must be a whole number of at least 1, it is {found.get(name)!r}")
    check_supported(path, found)
    found["rope_scaling"] = read_rope(path, found)
    for name in ("rope_theta", "rms_norm_eps"):
        if not is_positive(found.get(name, 1.0)):
            raise UserError(f"{path}: {name} must be a positive number, it is {found[name]!r}")
    experts = found.get("num_local_experts", 0)
    if type(experts) is not int or experts < (kind in MIXTURES):
        raise UserError(f"{path}: num_local_experts must be a whole number of at least 1, it is {experts!r}")
    found["expert_names"] = tuple(found.get("expert_names", map(str, range(experts))))
    return found


def check_supported(path, found):
    """UserError that names the key and the value of config.json that model.py does not compute."""
    wrong = [key for key, harmless in ONLY if key in found and found[key] not in harmless]
    window = found.get("sliding_window") if found.get("use_sliding_window", True) else None
    if type(window) is int and window < found["max_position_embeddings"]:
        wrong.append("sliding_window")
    elif set(found.get("layer_types") or ()) - {"full_attention", "sliding_attention"}:
        wrong.append("layer_types")
    if wrong:
        value = json.dumps(found[wrong[0]])
        value = value if len(value) <= 100 else f"{value[:100]}..."
        raise UserError(f"{path}: the checkpoint has {wrong[0]} {value}, which model.py does not compute")


def read_rope(path, found):
    """Set found["rope_theta"], and return ModelConfig's rope_scaling: None, or {"rope_type": ..., its numbers}."""
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters must be a table, it is {rope!r}")
    if found.get("rope_theta") is None or "rope_theta" in rope:
        found["rope_theta"] = rope.get("rope_theta", 10000.0)
    if (share := rope.get("partial_rotary_factor", found.get("partial_rotary_factor"))) not in (None, 1):
        raise UserError(f"{path}: the checkpoint has partial_rotary_factor {share!r}, which model.py does not compute")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in SCALINGS:
        known = ", ".join(("default", *SCALINGS))
        raise UserError(f"{path}: the checkpoint has rope_type {kind!r}, model.py computes {known}")
    rope = {"original_max_position_embeddings": found["max_position_embeddings"], **rope}
    scaling = {"rope_type": kind, **{name: rope.get(name) for name in SCALINGS[kind][1]}}
    for name in SCALINGS[kind][1]:
        if not is_positive(scaling[name]):
            raise UserError(f"{path}: rope_type {kind} needs a positive {name}, it is {scaling[name]!r}")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError(f"{path}: rope_type llama3 needs a low_freq_factor below high_freq_factor, it has {rope!r}")
    return scaling


def is_positive(value):
    return type(value) in (int, float) and 0 < value < float("inf")
