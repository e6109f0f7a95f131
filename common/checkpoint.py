"""Checkpoints: folders that Hugging Face's `from_pretrained` loads, written so that a crash loses nothing.

    model.safetensors   weights under Hugging Face's names (Llama, or Mixtral with one tensor per expert)
    config.json         the model's shape, in Hugging Face's words
    tiktoken.json       the tokenizer, copied from the data folder, and its ranks in tokenizer.tiktoken
    run.json            how the weights came to be: recipe, progress, and the cost of every run behind them
    state.pt            weights, optimizer and position, to resume training from
    log.jsonl           one line per evaluation

A recipe is a run's config with the hashes of its data and the recipes of its parents. A folder that holds
a run of another recipe is refused, so nothing is overwritten and nothing stale is taken for fresh.
"""

import dataclasses
import hashlib
import json
import os
import pickle

import torch
from safetensors import SafetensorError, safe_open

from common.config import UserError, atomic_file, read_json, write_atomically
from common.tokenizer import TOKENIZER_FILES, tokenizer_hash
from model import ModelConfig, Transformer

WEIGHTS = "model.safetensors"
STATE = "state.pt"
LOG = "log.jsonl"
INDEX = "model.safetensors.index.json"  # how large Hugging Face checkpoints list their several files
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


# ---- the model's shape: config.json ----


def write_model_config(folder, config, dtype=torch.float32):
    """Write config.json. Both architectures' defaults differ, so every value is written out. dtype: the weights'."""
    mixed = config.num_local_experts > 0
    shape = dataclasses.asdict(config)
    if not mixed:
        experts_only = "num_local_experts", "num_experts_per_tok", "expert_names", "router", "balance"
        for name in (*experts_only, "router_aux_loss_coef", "router_z_loss_coef"):
            del shape[name]
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
    write_atomically(os.path.join(folder, "config.json"), json.dumps(shape, indent=2) + "\n")


def read_model_config(folder):
    """Read config.json of our own or of a Llama- or Mixtral-shaped Hugging Face checkpoint."""
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
    found.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
    found.setdefault("num_key_value_heads", found.get("num_attention_heads"))
    found["expert_names"] = tuple(found.get("expert_names", map(str, range(found.get("num_local_experts", 0)))))
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    try:
        config = ModelConfig(**{name: found[name] for name in names if name in found})
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    if (found.get("head_dim") or config.head_dim) != config.head_dim:
        raise UserError(f"{path}: head_dim {found['head_dim']} is not hidden_size over num_attention_heads")
    return config


# ---- weights: model.safetensors ----


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


def expected_tensors(config):
    """{name on disk: shape} of a checkpoint of this shape; a tied head is not stored twice."""
    with torch.device("meta"):
        tensors = to_disk(Transformer(config).state_dict())
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


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

    with atomic_file(os.path.join(folder, WEIGHTS)) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for expected, (name, tensor) in zip(shapes, tensors, strict=True):
            assert name == expected and tuple(tensor.shape) == tuple(shapes[name]), name
            file.write(tensor.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy())


def save_model(folder, model, data_dir):
    """Write a model's weights, shape and tokenizer into `folder`."""
    os.makedirs(folder, exist_ok=True)
    tensors = to_disk(model.state_dict())
    shapes = expected_tensors(model.config)
    write_weights(folder, shapes, ((name, tensors[name]) for name in shapes))
    copy_tokenizer(data_dir, folder)
    write_model_config(folder, model.config)


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
            hashes[folder] = _fingerprint(foreign)
    for folder, found in hashes.items():
        if found != next(iter(hashes.values())):
            raise UserError(
                f"{folder} has another tokenizer than {next(iter(hashes))}; use checkpoints of one data folder"
            )


class WeightFiles:
    """The tensors of a checkpoint folder by name, each read from disk when asked for."""

    def __init__(self, folder):
        self.folder = folder
        self.config = read_model_config(folder)
        if os.path.exists(os.path.join(folder, INDEX)):
            self.files = read_json(os.path.join(folder, INDEX), "copy the checkpoint again")["weight_map"]
        else:
            self.files = dict.fromkeys(self._open(WEIGHTS, lambda file: list(file.keys())), WEIGHTS)
        expected = expected_tensors(self.config)
        if self.config.tie_word_embeddings:
            self.files.pop("lm_head.weight", None)  # some checkpoints store the tied head all the same
        missing, foreign = expected.keys() - self.files.keys(), self.files.keys() - expected.keys()
        if missing or foreign:
            what = f"lacks {min(missing)}" if missing else f"has an unknown tensor {min(foreign)}"
            raise UserError(f"{folder} does not fit its config.json: it {what}; use the folder as it was written")
        for name, shape in expected.items():
            found = tuple(self._open(self.files[name], lambda file, name=name: file.get_slice(name).get_shape()))
            if found != shape:
                raise UserError(f"{folder}: {name} has shape {found}, config.json says {shape}")

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
        return self._open(self.files[name], lambda file: file.get_tensor(name))


def load_model(folder, **changes):
    """Read a checkpoint folder, ours or Hugging Face's, into a Transformer in fp32 on the CPU.

    changes: values of ModelConfig to use instead of the folder's own, such as another router.
    """
    files = WeightFiles(folder)
    try:
        model = Transformer(dataclasses.replace(files.config, **changes))
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None
    for name, parameter in model.named_parameters():
        prefix, matrix = name.rsplit(".", 1)
        if ".experts." in name:
            value = torch.stack([files[f"{prefix}.{e}.{matrix}.weight"] for e in range(len(parameter))])
        else:
            value = files[name]
        parameter.data.copy_(value)
    return model


# ---- how a run stands: run.json and state.pt ----


def recipe_id(recipe):
    """A hash that is equal for equal recipes, and so stands for the weights that a recipe leads to."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def read_run(folder):
    """run.json of a folder, or None. A foreign checkpoint has none."""
    path = os.path.join(folder, "run.json")
    return read_json(path, "delete the folder and run again") if os.path.exists(path) else None


def parent(folder):
    """(id, history) of a finished checkpoint; a foreign one is known by its config and its weights."""
    run = read_run(folder)
    if run is None:
        shape = dataclasses.asdict(read_model_config(folder))
        files = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
        return recipe_id([shape, *(_fingerprint(os.path.join(folder, name)) for name in files)]), {}
    if not run["finished"]:
        raise UserError(f"{folder} is not finished (step {run['step']}); run its command again, it resumes")
    return run["id"], run["history"]


def _fingerprint(path, ends=2**20):
    """A hash of a file's size, its first MiB and its last: enough to tell two large files apart, and quick."""
    with open(path, "rb") as file:
        first = file.read(ends)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - ends))
        return hashlib.sha256(f"{size} ".encode() + first + file.read()).hexdigest()


def find_run(folder, recipe, overwrite):
    """(run.json of a folder that holds a run of this recipe, True), or (a fresh one, not written yet, False).

    Refuses a folder that holds another run (unless `overwrite`) or files that are not of a run.
    """
    fresh = {"id": recipe_id(recipe), "recipe": recipe, "step": 0, "finished": False, "history": {}}
    run = read_run(folder)
    if run is None:
        if os.path.isdir(folder) and set(os.listdir(folder)) - {"run.json.tmp"}:  # left by a kill in write_run
            raise UserError(f"{folder} holds files that are not of a run; choose another --out_dir or empty it")
        return fresh, False
    if run["id"] == fresh["id"]:
        return run, True
    if overwrite:
        return fresh, False
    old, new = _flatten(run["recipe"]), _flatten(recipe)
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    differences = ", ".join(f"{name} {old.get(name)!r} -> {new.get(name)!r}" for name in changed[:3])
    raise UserError(f"{folder} holds another run ({differences}); use --overwrite=True or another --out_dir")


def start_run(folder, run):
    """Begin a fresh run: claim the folder, and clear what an overwritten one left.

    A kill in between leaves the old run without state.pt, or the new one without it: both can be started again.
    """
    os.makedirs(folder, exist_ok=True)
    _remove(os.path.join(folder, STATE))
    write_run(folder, run)
    for name in (LOG, WEIGHTS):
        _remove(os.path.join(folder, name))


def _remove(path):
    if os.path.exists(path):
        os.remove(path)


def _flatten(recipe):
    """{"a": {"b": 1}} -> {"a.b": 1}, to name what differs between two recipes."""
    flat = {}
    for name, value in recipe.items():
        inner = _flatten(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{name}.{key}".strip("."): one for key, one in inner.items()}
    return flat


def write_run(folder, run):
    write_atomically(os.path.join(folder, "run.json"), json.dumps(run, indent=2) + "\n")


def joint_history(histories):
    """The runs behind several checkpoints together; one that is behind several of them counts once."""
    return {name: cost for history in histories for name, cost in history.items()}


def total_cost(history):
    """Sum {"tokens", "flops", "seconds"} over every training run behind some weights."""
    return {name: sum(run[name] for run in history.values()) for name in ("tokens", "flops", "seconds")}


def load_state(path, model, optimizer, device):
    """Put a saved training state into model and optimizer; returns the rest of it (step, seconds, ...)."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state.pop("model"))
        optimizer.load_state_dict(state.pop("optimizer"))
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged ({reason}); delete it to start the run anew") from None
    return state
