"""Hugging Face's formats: config.json, safetensors, the Hub, and the model card of a mixture.

A checkpoint folder, ours or anybody's:

    config.json         the model's shape, under the names of the transformers library
    model.safetensors   the weights, under Llama's names or Mixtral's; a mixture has one tensor per expert and matrix
    tiktoken.json       our tokenizer, copied from the data folder; its ranks are in tokenizer.tiktoken;
                        a published model has tokenizer.json instead
    README.md           a mixture's model card, which the Hub shows

An expert's matrix can have four names:

    experts.w1                                   in memory: all experts stacked, (E, F, D)
    block_sparse_moe.experts.3.w1.weight         on disk: Mixtral's name, and ours
    mlp.experts.3.gate_proj.weight               Qwen3-MoE's
    mlp.experts.gate_up_proj                     transformers 5's in memory, which some tools write: (E, 2 F, D)

A `config` argument is a model.ModelConfig. Sizes: D hidden_size, F intermediate_size, V vocab_size,
H heads, G key-value heads, K head_dim, E experts.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from common.errors import UserError, atomic_file, plain_path, read_json, write_atomically, write_json
from common.tokenizer import has_tokenizer, tokenizer_hash

# ---- config.json ----
#
# Read: Llama, Mistral, Qwen3 (dense), Mixtral, Qwen3-MoE (mixtures), as written by transformers 4 and 5. Written: Llama
# and Mixtral, or Qwen3 and Qwen3-MoE if queries and keys are normed. A mixture with a router that transformers does not
# have is written as `nanobtx`, a model_type that only this repository reads, so that nobody loads it as a Mixtral,
# which would compute something else.

# transformers' defaults for keys that are not in the file
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
DEFAULTS = {
    "llama": {"rms_norm_eps": 1e-6, **ENDS},
    "mistral": {"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096, **ENDS},
    "qwen3": {"rms_norm_eps": 1e-6, "head_dim": 128},
    "mixtral": {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "router_aux_loss_coef": 0.001, **ENDS},
    "qwen3_moe": {"rms_norm_eps": 1e-6, "norm_topk_prob": False, "num_experts_per_tok": 8}
    | {"router_aux_loss_coef": 0.001},
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
# features that model.py lacks, as (key, the values that mean the feature is off); a missing key means off too
ONLY = (
    ("attention_bias", (False, None)),
    ("mlp_bias", (False, None)),
    ("hidden_act", ("silu",)),
    ("quantization_config", (None,)),
    ("norm_topk_prob", (True,)),
    ("decoder_sparse_step", (1,)),
    ("mlp_only_layers", ([], None)),
)
KINDS = {  # the types of values that are not positive numbers
    "tie_word_embeddings": (bool,),
    "num_experts_per_tok": (int,),
    "router_aux_loss_coef": (float, int),
    "router_z_loss_coef": (float, int),
    "expert_names": (list,),
    "bos_token_id": (int, type(None)),
    "eos_token_id": (int, list, type(None)),
}
ROPE_SCALINGS = {  # rope_type: the numbers it needs; model.py has a function for each
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
LIKE_MIXTRAL = ("topk", "soft")  # the routers that transformers computes as model.py does
MIXTURE_KEYS = ("num_local_experts", "num_experts_per_tok", "expert_names", "router", "balance")
MIXTURE_KEYS += ("router_aux_loss_coef", "router_z_loss_coef")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "max_position_embeddings", "head_dim")


def model_type(config):
    """The model_type of config.json for an architecture."""
    if not config.num_local_experts:
        return "qwen3" if config.qk_norm else "llama"
    if config.router not in LIKE_MIXTRAL:
        return "nanobtx"
    return "qwen3_moe" if config.qk_norm else "mixtral"


def write_config(folder, config, dtype=torch.float32):
    """Write config.json. Architectures differ in their defaults, so every value is written out. dtype: the weights'."""
    kind = model_type(config)
    left_out = () if config.num_local_experts else MIXTURE_KEYS
    left_out += () if config.qk_norm else ("qk_norm",)
    shape = {name: value for name, value in dataclasses.asdict(config).items() if name not in left_out}
    rope = {"rope_theta": config.rope_theta, **(config.rope_scaling or {"rope_type": "default"})}
    shape |= {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "rope_parameters": rope,  # transformers 5 reads only this; transformers 4 reads rope_theta and rope_scaling
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
    """The config.json of our own or a Hugging Face checkpoint, with the keys of ModelConfig and defaults filled in.
    UserError for anything that model.py does not compute."""
    path = os.path.join(folder, "config.json")
    found = read_json(path, "name a checkpoint folder, or a model of the Hugging Face Hub as hf:OWNER/NAME")
    kind = found.get("model_type") if isinstance(found, dict) else None
    if kind not in list(DEFAULTS):
        raise UserError(f"{path}: model.py does not read model_type {kind!r}; it reads {', '.join(DEFAULTS)}")
    written, found = found, {**DEFAULTS[kind], **found}
    found["qk_norm"] = kind.startswith("qwen3") or bool(found.get("qk_norm"))
    if kind == "qwen3_moe":
        found["intermediate_size"] = found.get("moe_intermediate_size")
        found["num_local_experts"] = found.get("num_experts", found.get("num_local_experts"))
    if found.get("num_key_value_heads") is None:
        found["num_key_value_heads"] = found.get("num_attention_heads")
    if kind not in MIXTURES:
        found["num_local_experts"] = 0
    for name in (*SIZES, "num_local_experts") if kind in MIXTURES else SIZES:
        if name == "head_dim" and found.get(name) is None:  # it follows from the sizes before it
            found[name] = found["hidden_size"] // found["num_attention_heads"]
        if type(found.get(name)) is not int or found[name] < 1:
            raise UserError(f"{path}: {name} must be a whole number of at least 1, not {found.get(name)!r}")
    check_supported(path, found)
    found["rope_scaling"] = read_rope(path, found)
    for name in ("rope_theta", "rms_norm_eps"):
        if not is_positive(found.get(name, 1.0)):
            raise UserError(f"{path}: {name} must be a positive number, not {found[name]!r}")
    check_agrees(path, written)
    if kind not in MIXTURES:
        found = {name: value for name, value in found.items() if name not in MIXTURE_KEYS[1:]}
    for name, kinds in KINDS.items():
        if name in found and type(found[name]) not in kinds:
            wanted = " or ".join(one.__name__ for one in kinds)
            raise UserError(f"{path}: {name} must be {wanted}, not {found[name]!r}")
    found["expert_names"] = tuple(found.get("expert_names", map(str, range(found["num_local_experts"]))))
    return found


def check_agrees(path, found):
    """UserError if config.json gives two different values for the same thing: versions of transformers differ in which
    one they use."""
    tables = {"": found, "rope_parameters.": found.get("rope_parameters"), "rope_scaling.": found.get("rope_scaling")}
    first = {}  # {key: (where it is, value)}
    for where, table in tables.items():
        for name, value in table.items() if isinstance(table, dict) else ():
            key = {"type": "rope_type", "num_local_experts": "num_experts"}.get(name, name)
            place, before = first.setdefault(key, (where + name, value))
            if value != before and None not in (value, before):
                both = f"{place} is {before!r}, {where}{name} is {value!r}"
                raise UserError(f"{path} contradicts itself: {both}; remove the wrong one")


def check_supported(path, found):
    """UserError, with key and value, for a feature in config.json that model.py does not compute."""
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
        raise UserError(f"{path}: rope_parameters must be a table, not {rope!r}")
    if found.get("rope_theta") is None:
        found["rope_theta"] = rope.get("rope_theta", 1e6 if found["model_type"] == "mixtral" else 1e4)
    if (share := rope.get("partial_rotary_factor", found.get("partial_rotary_factor"))) not in (None, 1):
        raise UserError(f"{path}: the checkpoint has partial_rotary_factor {share!r}, which model.py does not compute")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ROPE_SCALINGS:
        known = ", ".join(ROPE_SCALINGS)
        raise UserError(f"{path}: the checkpoint has rope_type {kind!r}; model.py computes only default, {known}")
    original = found.get("original_max_position_embeddings") or found["max_position_embeddings"]
    rope = {"original_max_position_embeddings": original, **rope}
    scaling = {"rope_type": kind, **{name: rope.get(name) for name in ROPE_SCALINGS[kind]}}
    for name in ROPE_SCALINGS[kind]:
        if not is_positive(scaling[name]):
            raise UserError(f"{path}: rope_type {kind} needs a positive {name}, not {scaling[name]!r}")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError(f"{path}: rope_type llama3 needs a low_freq_factor below high_freq_factor, not {rope!r}")
    return scaling


def is_positive(value):
    return type(value) in (int, float) and 0 < value < math.inf


WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FILE_BYTES = 5_000_000_000  # the most that one file holds, unless a single tensor is larger
TOKENIZER = r"(tiktoken|tokenizer|special_tokens|added_tokens|vocab|merges)[\w.]*\.(json|txt|model|tiktoken)"
TOKENIZER += r"|chat_template\.(jinja|json)|additional_chat_templates|generation_config\.json"  # for chatting
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
FEED_FORWARD = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # Llama's name -> Mixtral's


# ---- weights: names and shapes ----

# part of a tensor's name -> the group it belongs to; the first match decides
PARTS = {"embed_tokens": "embeddings", "lm_head": "head", "self_attn": "attention", "norm": "norms"}
PARTS |= {".gate.": "router", ".mlp.": "feed-forward", ".experts.": "feed-forward"}
GROUPS = tuple(dict.fromkeys(PARTS.values()))


def group_of(name):
    """Which part of a model a tensor belongs to, one of GROUPS."""
    return next(group for part, group in PARTS.items() if part in name)


def hidden_dim(name):
    """The dimension of a feed-forward matrix that runs over hidden units: columns in the down projection, else rows."""
    return 1 if name.endswith(("down_proj.weight", "w2.weight")) else 0


def expected_tensors(config):
    """{name: shape} for a checkpoint with this config, in the order of the file; a tied head is not stored."""
    D, F, V, E = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_local_experts
    K = config.head_dim
    q, kv = config.num_attention_heads * K, config.num_key_value_heads * K
    feed_forward = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
    shapes = {"model.embed_tokens.weight": (V, D)}
    for i in range(config.num_hidden_layers):
        layer = {"input_layernorm": (D,), "self_attn.q_proj": (q, D), "self_attn.k_proj": (kv, D)}
        layer |= {"self_attn.v_proj": (kv, D), "self_attn.o_proj": (D, q), "post_attention_layernorm": (D,)}
        if config.qk_norm:
            layer |= {"self_attn.q_norm": (K,), "self_attn.k_norm": (K,)}
        if E:
            layer["block_sparse_moe.gate"] = (E, D)
            for llama, mixtral in FEED_FORWARD.items():
                layer |= {f"block_sparse_moe.experts.{e}.{mixtral}": feed_forward[llama] for e in range(E)}
        else:
            layer |= {f"mlp.{llama}": shape for llama, shape in feed_forward.items()}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (D,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    return shapes


def to_disk(weights):
    """Split stacked experts into one tensor per expert: `...experts.w1` (E, F, D) -> `...experts.0.w1.weight` ..."""
    result = {}
    for name, tensor in weights.items():
        if ".experts." in name:
            prefix, matrix = name.rsplit(".", 1)
            result |= {f"{prefix}.{e}.{matrix}.weight": one for e, one in enumerate(tensor)}
        else:
            result[name] = tensor
    return result


def qwen_name(name):
    """Qwen3-MoE's name for one of our tensors."""
    llama = {mixtral: llama for llama, mixtral in FEED_FORWARD.items()}
    return ".".join(llama.get(part, part) for part in name.replace("block_sparse_moe", "mlp").split("."))


def places(name, shape, config):
    """Where a file may hold one of our tensors, under the names at the top: (its name, its shape, our slice of it)."""
    theirs = qwen_name(name)
    yield name, shape, ...
    yield theirs, shape, ...
    if ".experts." in name:
        path, e, matrix, _ = theirs.rsplit(".", 3)
        E, (rows, columns) = config.num_local_experts, shape
        if matrix == "down_proj":
            yield f"{path}.down_proj", (E, rows, columns), int(e)
        else:
            start = 0 if matrix == "gate_proj" else rows
            yield f"{path}.gate_up_proj", (E, 2 * rows, columns), (int(e), slice(start, start + rows))


# ---- weights: writing ----
#
# Weights of more than FILE_BYTES go into several files, model-00001-of-00003.safetensors and so on, listed in an index.
# The index is written last, so weights without it are incomplete.


def divide_into_files(sizes, limit):
    """Divide names, in order, into lists of at most `limit` bytes each, or of a single tensor. sizes: {name: bytes}."""
    lists, room = [], -1
    for name, size in sizes.items():
        if size > room:
            lists.append([])
            room = limit
        lists[-1].append(name)
        room -= size
    return lists


def write_weights(folder, config, tensors, dtype=torch.float32):
    """Write weights from an iterable of (name, tensor): those of expected_tensors(config), in its order, with one
    tensor in memory at a time. Returns their weights_hash, so that nobody has to read them again to get it."""
    on_disk = qwen_name if model_type(config) == "qwen3_moe" else str
    shapes = {on_disk(name): shape for name, shape in expected_tensors(config).items()}
    tensors = ((on_disk(name), tensor) for name, tensor in tensors)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    lists = divide_into_files(sizes, FILE_BYTES)
    files = [f"model-{i + 1:05d}-of-{len(lists):05d}.safetensors" for i in range(len(lists))]
    files = files if len(files) > 1 else [WEIGHTS]
    os.makedirs(folder, exist_ok=True)
    remove_weights(folder, keep=files[0])  # a file of this name is replaced once the new one is complete
    index, hashes = {}, []
    for file, names in zip(files, lists, strict=True):
        hashes.append(write_file(os.path.join(folder, file), {name: shapes[name] for name in names}, tensors, dtype))
        index |= dict.fromkeys(names, file)
    assert next(tensors, None) is None, "more tensors than the config has"
    if len(files) > 1:
        metadata = {"total_size": sum(sizes.values())}
        write_json(os.path.join(folder, INDEX), {"metadata": metadata, "weight_map": index}, indent=2)
    return joint_hash(index, hashes)


def write_file(path, shapes, tensors, dtype):
    """Write the next of `tensors`, an iterator of (name, tensor), as one safetensors file; returns its content_hash.
    shapes: the {name: shape} to expect, which gives the header before the first tensor is there.

    The format is 8 bytes of header length, a JSON header, and the tensors' bytes (see safetensors' documentation).
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    digest = hashlib.sha256(len(text).to_bytes(8, "little") + text)
    with atomic_file(path) as file, ThreadPoolExecutor(1) as beside:
        file.write(len(text).to_bytes(8, "little") + text)
        for expected in shapes.items():
            name, tensor = next(tensors)
            assert (name, tensor.shape) == expected, name
            part = tensor.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy()
            hashed = beside.submit(digest.update, part)  # takes about as long as writing
            file.write(part)
            hashed.result()
    return digest.hexdigest()


def remove_weights(folder, keep=None):
    """Remove a folder's weights except the file `keep`; the index goes first, so that a kill leaves nothing that looks
    complete."""
    pattern = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?(\.tmp)?"
    names = [name for name in os.listdir(folder) if re.fullmatch(pattern, name) and name != keep]
    for name in sorted(names, key=lambda name: name != INDEX):
        os.remove(os.path.join(folder, name))


def copy_tokenizer(source, folder):
    """Replace the tokenizer's files in `folder` by those in `source`, our own folder or a published checkpoint."""
    names, old = ({*filter(re.compile(TOKENIZER).fullmatch, os.listdir(where))} for where in (source, folder))
    for name in old - names:
        remove(os.path.join(folder, name))
    for name in sorted(names, key=lambda name: (name in ("tiktoken.json", "tokenizer.json"), name)):  # these last
        if os.path.isdir(os.path.join(source, name)):
            shutil.copytree(os.path.join(source, name), os.path.join(folder, name), dirs_exist_ok=True)
            continue
        with open(os.path.join(source, name), "rb") as file:
            write_atomically(os.path.join(folder, name), file.read())


def remove(path):
    shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


def same_tokenizer(folders, added=True):
    """Raise UserError unless all of these folders that have a tokenizer have the same one; without `added`, tokens that
    were added to its vocabulary may differ. Prints a line for each folder that has none."""
    hashes = {folder: tokenizer_hash(folder, added) for folder in folders if has_tokenizer(folder)}
    first = next(iter(hashes), None)
    for folder in folders:
        if hashes and folder not in hashes:
            print(f"{folder} has no tokenizer.json, so its ids cannot be compared with those of {first}")
    for folder, found in hashes.items():
        if found != hashes[first]:
            raise UserError(f"{folder} has another tokenizer than {first}; use checkpoints from the same data folder")


# ---- weights: reading ----


def free_memory():
    """How many bytes a process can still take, as Linux estimates it; infinite if the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return 1024 * int(re.search(r"MemAvailable: *(\d+) kB", file.read())[1])
    except (OSError, TypeError):
        return math.inf


def check_memory(folder, needed):
    """UserError if weights of `needed` bytes do not fit: the system would kill the process without a word."""
    if needed > (free := free_memory()):
        needs = f"{needed / 1e9:.1f} GB of memory in float32"
        raise UserError(f"{folder} needs {needs}, but only {free / 1e9:.1f} GB are free; use a larger machine")


def read_index(folder):
    """(the files of a folder's weights, {name on disk: file}); the second is empty if one file holds everything."""
    path = os.path.join(folder, INDEX)
    if os.path.exists(os.path.join(folder, WEIGHTS)) or not os.path.exists(path):
        return [WEIGHTS], {}
    found = read_json(path, "copy the checkpoint again")
    index = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise UserError(f"{path} lists no files (it has no weight_map); copy the checkpoint again")
    return sorted(set(index.values())), index


def is_pointer(path):
    """Whether a file is only the pointer that git has for a large file that Git LFS has not fetched."""
    with open(path, "rb") as file:
        return file.read(40).startswith(b"version https://git-lfs")


OTHER_WEIGHTS = {  # what a folder may hold instead, and what to do about it
    "adapter_model": "there is a LoRA adapter; merge it first: peft's merge_and_unload, then save_pretrained",
    ".bin": "there are pickles, which are never read; transformers' from_pretrained and save_pretrained convert them",
    ".pth": "there are pickles, which are never read; convert them to transformers' format",
    ".gguf": "there is a GGUF file; transformers' from_pretrained(..., gguf_file=...) and save_pretrained convert it",
    ".safetensors": f"there are other safetensors files; rename one to {WEIGHTS}, or restore {INDEX} for several",
}


def instead_of_weights(folder):
    """What to do about a folder without weights, depending on what it holds."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    for part, remedy in OTHER_WEIGHTS.items():
        if any(part in name for name in names):
            return remedy
    return "train it first, or name another checkpoint folder"


@contextlib.contextmanager
def opened(path):
    """A safetensors file to read from. Open it again for each tensor: everything read stays in memory until the file is
    closed."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {instead_of_weights(os.path.dirname(path))}") from None
    except (SafetensorError, OSError) as error:
        if is_pointer(path):
            raise UserError(f"{path} is a Git LFS pointer, not the file itself; run git lfs pull") from None
        raise UserError(f"{path} is damaged or not a safetensors file ({error}); train or copy it again") from None


def list_tensors(folder):
    """{name on disk: (path of its file, shape, dtype)} of a folder's weights."""
    found = {}
    for path in [os.path.join(folder, name) for name in read_index(folder)[0]]:
        with opened(path) as file:
            slices = {name: file.get_slice(name) for name in list(file.keys())}
            found |= {name: (path, tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}
    return found


def plain_names(stored):
    """{usual name: name on disk}, without the prefixes that tools add. torch.compile writes
    "_orig_mod.model.norm.weight", a model without a head "norm.weight"; the name of the embeddings tells which."""
    table = next((name for name in stored if name.endswith("embed_tokens.weight")), "model.")
    inner = table.removesuffix("embed_tokens.weight")  # before layers and embeddings: "_orig_mod.model.", ""
    outer = inner.removesuffix("model.")  # before the head: "_orig_mod.", ""
    names = {}
    for name in stored:
        if name.startswith(inner) and not name.startswith(f"{outer}lm_head."):
            names["model." + name.removeprefix(inner)] = name
        else:
            names[name.removeprefix(outer)] = name
    return names


class WeightFiles:
    """The tensors of a checkpoint folder by name, each read from disk on demand. UserError unless the files hold
    exactly what a model of this config needs; and on reading a tensor that contains NaN or infinity."""

    def __init__(self, folder, config):
        self.folder, self.config = folder, config
        if os.path.exists(os.path.join(folder, "adapter_config.json")):  # transformers would add it to the weights
            raise UserError(f"{folder} also holds a LoRA adapter; merge it first: peft's merge_and_unload")
        self.dtype = None  # the narrowest one that can hold all tensors
        self.places = {}  # {our name: (path, name on disk, slice)}
        stored, misfit = list_tensors(folder), f"{folder} does not fit its config.json: it"
        names = plain_names(stored)
        if config.tie_word_embeddings and "lm_head.weight" in names:  # a file may have either name of the one tensor
            names.setdefault("model.embed_tokens.weight", names["lm_head.weight"])
        used = {"lm_head.weight"} if config.tie_word_embeddings else set()  # some store the tied head anyway
        for ours, shape in expected_tensors(config).items():
            found = [place for place in places(ours, shape, config) if place[0] in names]
            if not found:
                raise UserError(f"{misfit} lacks {ours}; use the folder as it was written")
            name, whole, part = found[0]
            path, shape, dtype = stored[names[name]]
            if shape != whole:
                raise UserError(f"{folder}: {name} has shape {shape}, but config.json says {whole}")
            if dtype not in SAFETENSORS_DTYPES.values():
                kinds = ", ".join(SAFETENSORS_DTYPES.values())
                raise UserError(f"{folder}: {name} is stored as {dtype}; model.py reads only {kinds}")
            self.places[ours] = path, names[name], part
            used.add(name)
            kind = next(one for one, text in SAFETENSORS_DTYPES.items() if text == dtype)
            self.dtype = torch.promote_types(self.dtype or kind, kind)
        unknown = [name for name in names.keys() - used if not name.endswith("rotary_emb.inv_freq")]
        if unknown:
            raise UserError(f"{misfit} has an unknown tensor {min(unknown)}; use the folder as it was written")
        if config.tie_word_embeddings and (head := names.get("lm_head.weight")):
            self.places["lm_head.weight"] = stored[head][0], head, ...
            if not self["lm_head.weight"].float().equal(self["model.embed_tokens.weight"].float()):
                says = "config.json says tie_word_embeddings true, but lm_head.weight is not model.embed_tokens.weight"
                raise UserError(f"{folder}: {says}, and transformers would use it; set tie_word_embeddings to false")

    def __getitem__(self, name):
        path, stored, part = self.places[name]
        with opened(path) as file:
            tensor = file.get_slice(stored)[part]
        # the sum first: unless it overflows it is finite if every number is, and it takes less time and memory
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise UserError(f"{self.folder}: {name} contains NaN or infinity; train or copy the checkpoint again")
        return tensor

    def read(self, module):
        """{name: value} for a module's parameters, in float32, with experts stacked."""
        found = {}
        for name, parameter in module.named_parameters():
            found[name] = value = torch.empty(parameter.shape, device="cpu")
            if ".experts." in name:
                prefix, matrix = name.rsplit(".", 1)
                for e, expert in enumerate(value):
                    expert.copy_(self[f"{prefix}.{e}.{matrix}.weight"])
            else:
                value.copy_(self[name])
        return found


SAMPLED_ROWS = 4096  # of the embeddings, for comparing models


class Parent(NamedTuple):
    """One of the experts to mix: a dense checkpoint, or expert `number` of a mixture.

    files: its WeightFiles. mixture: those of the mixture that it belongs to or is added to, which provides everything
    but its feed-forwards.
    """

    name: str
    folder: str
    shape: object  # its ModelConfig
    files: WeightFiles
    mixture: WeightFiles | None = None
    number: int | None = None


class Padded:
    """An expert's tensors under a dense model's names, with feed-forwards padded to a width by hidden units of zeros,
    which compute nothing. So experts of different widths can be stacked, and fit grouped_mm's alignment."""

    def __init__(self, parent, width):
        self.parent, self.width = parent, width

    def __getitem__(self, name):
        parent = self.parent
        if ".mlp." not in name:
            return (parent.mixture or parent.files)[name]
        layer, matrix = name.removesuffix(".weight").split(".mlp.")
        moe = f"{layer}.block_sparse_moe.experts.{parent.number}.{FEED_FORWARD[matrix]}.weight"
        tensor = parent.files[name if parent.number is None else moe]
        dim = hidden_dim(name)
        missing = self.width - tensor.size(dim)
        return F.pad(tensor, (0, missing) if dim else (0, 0, 0, missing)) if missing else tensor


def left_behind(parent):
    """The names of tensors, except feed-forwards, in which an expert that joins a mixture differs from the mixture."""
    if parent.mixture in (None, parent.files):
        return []
    others = [name for name in expected_tensors(parent.shape) if ".mlp." not in name]
    return [name for name in others if not parent.files[name].float().equal(parent.mixture[name].float())]


def differing(configs):
    """{name: [each config's value]} for the fields in which configs differ."""
    found = {field.name: [getattr(one, field.name) for one in configs] for field in dataclasses.fields(configs[0])}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def likeness(parents):
    """[The cosine between each expert's embeddings and the first one's]: 0.97 to 1 for branches of one model, about 0
    for unrelated models, whose average is noise."""
    tables = [parent.files["model.embed_tokens.weight"] for parent in parents]
    rows = [table[:: max(1, len(table) // SAMPLED_ROWS)].double().flatten() for table in tables]
    return [F.cosine_similarity(row, rows[0], dim=0).item() for row in rows]


def fingerprint(path, ends=2**20):
    """A hash of a file's size, its first MiB and its last: quick, and enough to tell large files apart."""
    with open(path, "rb") as file:
        first = file.read(ends)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - ends))
        return hashlib.sha256(f"{size} ".encode() + first + file.read()).hexdigest()


def content_hash(path):
    """The sha256 of a whole file; a single flipped bit changes it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def joint_hash(index, hashes):
    """The hash of weights in several files, from the content_hash of each; for a single file, its own. index: {name on
    disk: file}."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(json.dumps([index, hashes]).encode()).hexdigest()


def weights_hash(folder):
    """The hash of a folder's weights, in one file or several; None if they are missing."""
    try:
        files, index = read_index(folder)
        hashes = [content_hash(os.path.join(folder, name)) for name in files]
    except (UserError, FileNotFoundError):
        return None
    return joint_hash(index, hashes)


# ---- the Hub: `hf:OWNER/NAME` wherever a checkpoint folder is asked for ----
#
# Needs the package huggingface_hub (requirements-extra.txt) and a network. Downloads stay in out/hf/OWNER/NAME, and are
# used without a network from then on.

DOWNLOADS = os.path.join("out", "hf")
DOWNLOADED = ["model*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt"]  # never code or pickles


def local_folder(name):
    """The folder that `name` means: itself, or the download of hf:OWNER/NAME or hf:OWNER/NAME@REVISION."""
    return download(name) if name.startswith("hf:") else plain_path(name)


def download(name):
    """Fetch a checkpoint from the Hub; returns its folder. UserError if that fails."""
    match = re.fullmatch(r"hf:([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?", name)
    if not match:
        raise UserError(f"{name} does not name a model on the Hub; write hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{name} needs huggingface_hub; pip install -r requirements-extra.txt") from None
    model, revision = match.groups()
    folder = os.path.join(DOWNLOADS, model + (f"@{revision.replace('/', '-')}" if revision else ""))
    try:
        # patterns apply to whole paths, and * also matches a slash
        patterns = {"allow_patterns": DOWNLOADED, "ignore_patterns": ["*/*"]}
        snapshot_download(model, revision=revision, local_dir=folder, **patterns)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        remedy = "check the name and the network, or give the folder of a copy"
        raise UserError(f"{name} could not be downloaded ({type(error).__name__}: {reason}); {remedy}") from None
    return folder


# ---- the model card of a mixture ----

CARD = "README.md"


def model_name(folder):
    """What to call a checkpoint: OWNER/NAME if it is a download from the Hub, else the folder's own name."""
    folder = os.path.abspath(folder)
    downloaded = folder.partition(DOWNLOADS + os.sep)[2]
    return downloaded.partition("@")[0] or os.path.basename(folder)


def write_card(folder, parents, tokens, domains, notes=()):
    """Write README.md: a YAML header for the Hub, and a description of the mixture. parents: the folders it was made
    from. tokens: how many are behind its weights, over all runs. domains: those of its finetuning, if any. notes: more
    lines."""
    config = read_json(os.path.join(folder, "config.json"), "make it again")
    names = [model_name(parent) for parent in parents]
    head = {"pipeline_tag": "text-generation", "tags": ["nanobtx", "moe", "branch-train-mix"], "base_model": names}
    head |= {"base_model_relation": "merge" if len(names) > 1 else "finetune", "training_tokens": tokens}
    text = [f"# {model_name(folder)}", "", f"A mixture of {config['num_local_experts']} experts"]
    text[-1] += f" ({', '.join(config['expert_names'])}), {config['num_experts_per_tok']} for each token."
    if domains:
        head["domains"] = domains
    if config["model_type"] == "nanobtx":
        text.append(f"transformers has no router {config['router']!r}: load this model with nanoBTX.")
    else:
        head["library_name"] = "transformers"
    text += [line for note in notes for line in ("", f"Note: {note}.")]
    text += ["", "Made by nanoBTX; run.json holds the whole recipe."]
    yaml = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in head.items()]  # JSON is YAML
    write_atomically(os.path.join(folder, CARD), "\n".join(["---", *yaml, "---", "", *text, ""]))
