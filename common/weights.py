"""Weights in Hugging Face's format: a folder that `from_pretrained` loads, Llama's names or Mixtral's.

    config.json         the model's shape, in Hugging Face's words
    model.safetensors   the weights; a mixture has one tensor per expert
    tiktoken.json       the tokenizer, copied from the data folder, and its ranks in tokenizer.tiktoken

Functions that take a `config` want a model.ModelConfig. Sizes: D hidden_size, F intermediate_size, V vocab_size.
"""

import dataclasses
import hashlib
import json
import os

import torch
from safetensors import SafetensorError, safe_open

from common.errors import UserError
from common.files import atomic_file, read_json, write_atomically, write_json
from common.tokenizer import TOKENIZER_FILES, tokenizer_hash

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # how large Hugging Face checkpoints list their several files
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
FEED_FORWARD = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # Llama's name -> Mixtral's
MIXTURE_KEYS = ("num_local_experts", "num_experts_per_tok", "expert_names", "router", "balance")
MIXTURE_KEYS += ("router_aux_loss_coef", "router_z_loss_coef")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "max_position_embeddings")


# ---- the model's shape: config.json ----


def write_config(folder, config, dtype=torch.float32):
    """Write config.json. Both architectures' defaults differ, so every value is written out. dtype: the weights'."""
    mixed = config.num_local_experts > 0
    shape = dataclasses.asdict(config)
    if not mixed:
        shape = {name: value for name, value in shape.items() if name not in MIXTURE_KEYS}
    shape |= {
        "architectures": ["MixtralForCausalLM" if mixed else "LlamaForCausalLM"],
        "model_type": "mixtral" if mixed else "llama",
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # transformers 5 reads only this
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
        "dtype": str(dtype).removeprefix("torch."),
    }
    write_json(os.path.join(folder, "config.json"), shape, indent=2)


def read_config(folder):
    """config.json of our own or of a Llama- or Mixtral-shaped Hugging Face checkpoint, its defaults filled in."""
    path = os.path.join(folder, "config.json")
    found = read_json(path, "name a checkpoint folder, such as one that train.py wrote")
    kind = found.get("model_type") if isinstance(found, dict) else None
    if kind not in ("llama", "mixtral"):
        raise UserError(f"{path}: model_type {kind!r} is neither 'llama' nor 'mixtral'")
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    unsupported = {
        "rope scaling": rope.get("rope_type", rope.get("type", "default")) != "default",
        "biases": found.get("attention_bias") or found.get("mlp_bias"),
        "a sliding window": found.get("sliding_window"),
        "an activation other than silu": found.get("hidden_act", "silu") != "silu",
    }
    for what, present in unsupported.items():
        if present:
            raise UserError(f"{path}: the checkpoint uses {what}, which model.py does not have")
    if found.get("rope_theta") is None:
        found["rope_theta"] = rope.get("rope_theta", 10000.0)
    if found.get("num_key_value_heads") is None:
        found["num_key_value_heads"] = found.get("num_attention_heads")
    for name in SIZES:
        if type(found.get(name)) is not int or found[name] < 1:
            raise UserError(f"{path}: {name} must be a whole number of at least 1, it is {found.get(name)!r}")
    for name in ("rope_theta", "rms_norm_eps"):
        value = found.get(name, 1.0)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise UserError(f"{path}: {name} must be a positive number, it is {value!r}")
    head_dim = found["hidden_size"] // found["num_attention_heads"]
    if (found.get("head_dim") or head_dim) != head_dim:
        raise UserError(f"{path}: head_dim {found['head_dim']} is not hidden_size over num_attention_heads")
    experts = found.get("num_local_experts", 0)
    if type(experts) is not int or experts < (kind == "mixtral"):
        raise UserError(f"{path}: num_local_experts must be a whole number of at least 1, it is {experts!r}")
    found["expert_names"] = tuple(found.get("expert_names", map(str, range(experts))))
    return found


# ---- names and shapes ----


GROUPS = ("embeddings", "head", "attention", "norms", "router", "feed-forward")


def group_of(name):
    """Which part of a model, one of GROUPS, a tensor belongs to."""
    parts = {"embed_tokens": "embeddings", "lm_head": "head", "self_attn": "attention", "norm": "norms"}
    parts |= {".gate.": "router", ".mlp.": "feed-forward", ".experts.": "feed-forward"}
    return next(group for part, group in parts.items() if part in name)


def hidden_dim(name):
    """The dimension of a feed-forward matrix that counts hidden units: columns of the down projection, else rows."""
    return 1 if name.endswith(("down_proj.weight", "w2.weight")) else 0


def expected_tensors(config):
    """{name on disk: shape} of a checkpoint with this config, in the order of the file; a tied head is not stored."""
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    kv = config.num_key_value_heads * config.head_dim
    feed_forward = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
    shapes = {"model.embed_tokens.weight": (V, D)}
    for i in range(config.num_hidden_layers):
        layer = {"input_layernorm": (D,), "self_attn.q_proj": (D, D), "self_attn.k_proj": (kv, D)}
        layer |= {"self_attn.v_proj": (kv, D), "self_attn.o_proj": (D, D), "post_attention_layernorm": (D,)}
        if config.num_local_experts:
            layer["block_sparse_moe.gate"] = (config.num_local_experts, D)
            for ours, mixtral in FEED_FORWARD.items():
                experts = range(config.num_local_experts)
                layer |= {f"block_sparse_moe.experts.{e}.{mixtral}": feed_forward[ours] for e in experts}
        else:
            layer |= {f"mlp.{ours}": shape for ours, shape in feed_forward.items()}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (D,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    return shapes


def to_disk(weights):
    """Stacked experts become one tensor per expert: `...experts.w1` (E, F, D) -> `...experts.0.w1.weight` ..."""
    result = {}
    for name, tensor in weights.items():
        if ".experts." in name:
            prefix, matrix = name.rsplit(".", 1)
            result |= {f"{prefix}.{e}.{matrix}.weight": one for e, one in enumerate(tensor)}
        else:
            result[name] = tensor
    return result


# ---- writing ----


def write_weights(folder, shapes, tensors, dtype=torch.float32):
    """Write model.safetensors from an iterable of (name, tensor), one tensor in memory at a time.

    shapes: {name: shape}, which fixes the file's header before the first tensor is there. The format is
    8 bytes of header length, a JSON header, and the tensors' bytes (safetensors' own documentation).
    """
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned

    os.makedirs(folder, exist_ok=True)
    with atomic_file(os.path.join(folder, WEIGHTS)) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for expected, (name, tensor) in zip(shapes, tensors, strict=True):
            assert name == expected and tuple(tensor.shape) == tuple(shapes[name]), name
            file.write(tensor.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy())


def copy_tokenizer(source, folder):
    """Copy the tokenizer's files, ours or those of a foreign checkpoint."""
    for name in sorted(os.listdir(source)):
        if name.startswith(("tiktoken", "tokenizer", "special_tokens", "vocab", "merges")):
            with open(os.path.join(source, name), "rb") as file:
                write_atomically(os.path.join(folder, name), file.read())


def same_tokenizer(folders):
    """Raise UserError unless all of these folders that hold a tokenizer hold the same one."""
    hashes = {}
    for folder in folders:
        if os.path.exists(os.path.join(folder, TOKENIZER_FILES[0])):
            hashes[folder] = tokenizer_hash(folder)
        elif os.path.exists(foreign := os.path.join(folder, "tokenizer.json")):  # Hugging Face's
            hashes[folder] = fingerprint(foreign)
    for folder, found in hashes.items():
        if found != next(iter(hashes.values())):
            raise UserError(
                f"{folder} has another tokenizer than {next(iter(hashes))}; use checkpoints of one data folder"
            )


# ---- reading ----


class WeightFiles:
    """The tensors of a checkpoint folder by name, each read from disk when asked for. UserError unless its files hold
    just what a model of this config needs; one tensor with NaN or infinity is refused, too, when it is read."""

    def __init__(self, folder, config):
        self.folder = folder
        if os.path.exists(os.path.join(folder, INDEX)):
            self.files = read_json(os.path.join(folder, INDEX), "copy the checkpoint again")["weight_map"]
        else:
            self.files = dict.fromkeys(self._open(WEIGHTS, lambda file: list(file.keys())), WEIGHTS)
        expected = expected_tensors(config)
        if config.tie_word_embeddings:
            self.files.pop("lm_head.weight", None)  # some checkpoints store the tied head all the same
        missing, foreign = expected.keys() - self.files.keys(), self.files.keys() - expected.keys()
        if missing or foreign:
            what = f"lacks {min(missing)}" if missing else f"has an unknown tensor {min(foreign)}"
            raise UserError(f"{folder} does not fit its config.json: it {what}; use the folder as it was written")
        for name, shape in expected.items():
            found = self._open(self.files[name], lambda file, name=name: file.get_slice(name))
            if tuple(found.get_shape()) != shape:
                raise UserError(f"{folder}: {name} has shape {tuple(found.get_shape())}, config.json says {shape}")
            if found.get_dtype() not in SAFETENSORS_DTYPES.values():
                kinds = ", ".join(SAFETENSORS_DTYPES.values())
                raise UserError(f"{folder}: {name} is stored as {found.get_dtype()}; model.py reads {kinds}")

    def _open(self, name, read):
        path = os.path.join(self.folder, name)
        try:
            with safe_open(path, framework="pt") as file:
                return read(file)
        except FileNotFoundError:
            raise UserError(f"{path} is missing; train it first, or name another checkpoint folder") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged or no safetensors file ({error}); train or copy it again") from None

    @property
    def dtype(self):
        return self["model.norm.weight"].dtype

    def __getitem__(self, name):
        tensor = self._open(self.files[name], lambda file: file.get_tensor(name))
        if not tensor.isfinite().all():
            raise UserError(f"{self.folder}: {name} holds NaN or infinity; train or copy the checkpoint again")
        return tensor


def fingerprint(path, ends=2**20):
    """A hash of a file's size, its first MiB and its last: enough to tell two large files apart, and quick."""
    with open(path, "rb") as file:
        first = file.read(ends)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - ends))
        return hashlib.sha256(f"{size} ".encode() + first + file.read()).hexdigest()


def content_hash(path):
    """The sha256 of a whole file, which a single flipped bit changes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()
