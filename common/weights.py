"""Weights in Hugging Face's format: a folder that `from_pretrained` loads, Llama's names or Mixtral's.

    config.json         the model's shape; see common/shape.py
    model.safetensors   the weights; a mixture has one tensor per expert
    tiktoken.json       the tokenizer, copied from the data folder, and its ranks in tokenizer.tiktoken

Weights of more than SHARD_BYTES are several files, model-00001-of-00003.safetensors and so on, which an index lists. It
is written last, so weights without it are not complete.

Functions that take a `config` want a model.ModelConfig. Sizes: D hidden_size, F intermediate_size, V vocab_size,
H heads, G key-value heads, K head_dim, E experts.
"""

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from common.errors import UserError
from common.files import atomic_file, read_json, write_atomically, write_json
from common.shape import model_type
from common.tokenizer import has_tokenizer, tokenizer_hash

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # what one file holds at most, unless a single tensor is larger
TOKENIZER = r"(tiktoken|tokenizer|special_tokens|added_tokens|vocab|merges)[\w.]*\.(json|txt|model|tiktoken)"
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
FEED_FORWARD = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # Llama's name -> Mixtral's


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
    """{name: shape} of a checkpoint with this config, in the order of the file; a tied head is not stored."""
    D, F, V, K = config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim
    q, kv = config.num_attention_heads * K, config.num_key_value_heads * K
    feed_forward = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
    shapes = {"model.embed_tokens.weight": (V, D)}
    for i in range(config.num_hidden_layers):
        layer = {"input_layernorm": (D,), "self_attn.q_proj": (q, D), "self_attn.k_proj": (kv, D)}
        layer |= {"self_attn.v_proj": (kv, D), "self_attn.o_proj": (D, q), "post_attention_layernorm": (D,)}
        if config.qk_norm:
            layer |= {"self_attn.q_norm": (K,), "self_attn.k_norm": (K,)}
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


class Place(NamedTuple):
    """Where a tensor is stored: in which file, under which name, and which part of what is there (all of it or, of
    stacked experts, one's rows)."""

    file: str
    name: str
    part: tuple = ()


def places(stored, config):
    """{our name: Place} of the tensors {name: file} that a checkpoint stores.

    Of a mixture transformers has had three namings: `block_sparse_moe.experts.0.w1.weight` (Mixtral's on disk, ours),
    `mlp.experts.0.gate_proj.weight` (Qwen3-MoE's), and since version 5 in memory, which mergekit-moe writes, the stacks
    `mlp.experts.gate_up_proj` (E, 2 F, D) and `mlp.experts.down_proj` (E, D, F).
    """
    found, F = {}, config.intermediate_size
    for name, file in stored.items():
        if name.endswith("rotary_emb.inv_freq"):  # a constant that old files hold
            continue
        ours = name.replace(".mlp.", ".block_sparse_moe.") if config.num_local_experts else name
        prefix, _, matrix = ours.rpartition(".")
        for e in range(config.num_local_experts):
            if ours.endswith(".experts.gate_up_proj"):
                found[f"{prefix}.{e}.w1.weight"] = Place(file, name, (e, slice(0, F)))
                found[f"{prefix}.{e}.w3.weight"] = Place(file, name, (e, slice(F, 2 * F)))
            elif ours.endswith(".experts.down_proj"):
                found[f"{prefix}.{e}.w2.weight"] = Place(file, name, (e, slice(None)))
        if matrix in ("weight", "bias") or not config.num_local_experts:
            parts = [FEED_FORWARD.get(part, part) if ".experts." in ours else part for part in ours.split(".")]
            found[".".join(parts)] = Place(file, name)
    return found


# ---- writing ----


def name_on_disk(name, config):
    """The name under which a tensor is written: ours, which is Llama's or Mixtral's, or Qwen3-MoE's."""
    if model_type(config) != "qwen3_moe":
        return name
    dense = {mixtral: llama for llama, mixtral in FEED_FORWARD.items()}
    return ".".join(dense.get(part, part) for part in name.replace("block_sparse_moe", "mlp").split("."))


def shards(sizes, limit):
    """Lists of names, in order, of at most `limit` bytes each or of a single tensor. sizes: {name: bytes}."""
    lists, room = [], -1
    for name, size in sizes.items():
        if size > room:
            lists.append([])
            room = limit
        lists[-1].append(name)
        room -= size
    return lists


def write_weights(folder, config, tensors, dtype=torch.float32):
    """Write the weights from an iterable of (name, tensor): those of expected_tensors(config), in its order, one
    tensor in memory at a time. Returns their weights_hash, so that nobody has to read them again for it."""
    shapes = expected_tensors(config)
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()}
    lists, tensors = shards(sizes, SHARD_BYTES), iter(tensors)
    files = [f"model-{i + 1:05d}-of-{len(lists):05d}.safetensors" for i in range(len(lists))]
    files = files if len(files) > 1 else [WEIGHTS]
    os.makedirs(folder, exist_ok=True)
    if len(files) > 1:
        remove_weights(folder)
    index, hashes = {}, []
    for file, names in zip(files, lists, strict=True):
        on_disk = {name_on_disk(name, config): shapes[name] for name in names}
        index |= dict.fromkeys(on_disk, file)
        hashes.append(write_file(os.path.join(folder, file), on_disk, checked(names, tensors, shapes), dtype))
    assert next(tensors, None) is None, "more tensors than the config has"
    if len(files) > 1:
        metadata = {"total_size": sum(sizes.values())}
        write_json(os.path.join(folder, INDEX), {"metadata": metadata, "weight_map": index}, indent=2)
    else:
        remove_weights(folder, keep=WEIGHTS)  # shards of larger weights that were here before
    return joint_hash(index, hashes)


def checked(names, tensors, shapes):
    """The next tensors of an iterator of (name, tensor), which have to be these."""
    for expected, (name, tensor) in zip(names, islice(tensors, len(names)), strict=True):
        assert name == expected and tuple(tensor.shape) == tuple(shapes[name]), name
        yield tensor


def write_file(path, shapes, tensors, dtype):
    """Write one safetensors file and return its content_hash. shapes: {name: shape}, which fixes the header before the
    first tensor is there.

    The format is 8 bytes of header length, a JSON header, and the tensors' bytes (safetensors' own documentation).
    """
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    arrays = (tensor.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy() for tensor in tensors)
    digest = hashlib.sha256()
    with atomic_file(path) as file, ThreadPoolExecutor(1) as beside:
        for part in chain([len(text).to_bytes(8, "little") + text], arrays):
            hashed = beside.submit(digest.update, part)  # takes about as long as the writing
            file.write(part)
            hashed.result()
    return digest.hexdigest()


def remove_weights(folder, keep=None):
    """Remove a folder's weights but for the file `keep`; the index first, so that a kill leaves nothing that looks
    complete."""
    pattern = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?(\.tmp)?"
    names = [name for name in os.listdir(folder) if re.fullmatch(pattern, name) and name != keep]
    for name in sorted(names, key=lambda name: name != INDEX):
        os.remove(os.path.join(folder, name))


def copy_tokenizer(source, folder):
    """Replace the tokenizer's files in `folder` by those of `source`, ours or those of a published checkpoint."""
    names, old = ({*filter(re.compile(TOKENIZER).fullmatch, os.listdir(where))} for where in (source, folder))
    for name in old - names:
        os.remove(os.path.join(folder, name))
    for name in sorted(names, key=lambda name: (name in ("tiktoken.json", "tokenizer.json"), name)):  # these last
        with open(os.path.join(source, name), "rb") as file:
            write_atomically(os.path.join(folder, name), file.read())


def same_tokenizer(folders):
    """Raise UserError unless all of these folders that hold a tokenizer hold the same one."""
    hashes = {}
    for folder in folders:
        if has_tokenizer(folder):
            hashes[folder] = tokenizer_hash(folder)
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
        self.folder, self.config = folder, config
        index = os.path.join(folder, INDEX)
        if os.path.exists(index) and not os.path.exists(os.path.join(folder, WEIGHTS)):
            stored = read_json(index, "copy the checkpoint again")
            stored = stored.get("weight_map") if isinstance(stored, dict) else None
            if not isinstance(stored, dict):
                raise UserError(f"{index} lists no files (it has no weight_map); copy the checkpoint again")
        else:
            stored = dict.fromkeys(self._open(WEIGHTS, lambda file: list(file.keys())), WEIGHTS)
        self.places = places(stored, config)
        expected = expected_tensors(config)
        if config.tie_word_embeddings:
            self.places.pop("lm_head.weight", None)  # some checkpoints store the tied head all the same
        missing, foreign = expected.keys() - self.places.keys(), self.places.keys() - expected.keys()
        if missing or foreign:
            what = f"lacks {min(missing)}" if missing else f"has an unknown tensor {min(foreign)}"
            raise UserError(f"{folder} does not fit its config.json: it {what}; use the folder as it was written")
        stored_as = {}  # {file: {name: (shape, dtype)}}, each file opened once
        for file in {place.file for place in self.places.values()}:
            names = [place.name for place in self.places.values() if place.file == file]
            stored_as[file] = self._open(file, lambda opened, names=names: describe(opened, names))
        for name, shape in expected.items():
            place = self.places[name]
            if place.part:
                rows = shape[0] * (2 if place.name.endswith("gate_up_proj") else 1)
                shape = config.num_local_experts, rows, shape[1]
            found, dtype = stored_as[place.file][place.name]
            if found != shape:
                raise UserError(f"{folder}: {place.name} has shape {found}, config.json says {shape}")
            if dtype not in SAFETENSORS_DTYPES.values():
                kinds = ", ".join(SAFETENSORS_DTYPES.values())
                raise UserError(f"{folder}: {place.name} is stored as {dtype}; model.py reads {kinds}")

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
        file, stored, part = self.places[name]
        tensor = self._open(file, lambda file: file.get_slice(stored)[part] if part else file.get_tensor(stored))
        # a sum is finite where all is, but for an overflow: looking at each number takes longer, and memory
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise UserError(f"{self.folder}: {name} holds NaN or infinity; train or copy the checkpoint again")
        return tensor

    def read(self, module, prefix=""):
        """{name: value} for a module's parameters, in float32, experts stacked. prefix: of a part's names on disk."""
        found = {}
        for name, parameter in module.named_parameters():
            found[name] = value = torch.empty(parameter.shape, device="cpu")
            if ".experts." in name:
                path, matrix = (prefix + name).rsplit(".", 1)
                for e, expert in enumerate(value):
                    expert.copy_(self[f"{path}.{e}.{matrix}.weight"])
            else:
                value.copy_(self[prefix + name])
        return found


def describe(file, names):
    """{name: (shape, dtype)} of some tensors of an open safetensors file."""
    slices = {name: file.get_slice(name) for name in names}
    return {name: (tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}


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


def weights_hash(folder):
    """The hash of a folder's weights, whole or in shards; None where they are missing."""
    if os.path.exists(path := os.path.join(folder, WEIGHTS)):
        return content_hash(path)
    try:
        stored = read_json(os.path.join(folder, INDEX), "")["weight_map"]
        hashes = [content_hash(os.path.join(folder, name)) for name in sorted(set(stored.values()))]
    except (UserError, FileNotFoundError):
        return None
    return joint_hash(stored, hashes)


def joint_hash(stored, hashes):
    """The hash of weights from those of their files, in order. stored: {name on disk: file}."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(json.dumps([stored, hashes]).encode()).hexdigest()
