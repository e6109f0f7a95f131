"""Mix expert checkpoints into one: the MiX step of Branch-Train-MiX (Sukhbaatar et al. 2024, section 3.2).

    python mix.py --experts=out/cpu/expert-code,out/cpu/expert-math,out/cpu/seed --out_dir=out/cpu/mixed

Every tensor of the result is one of three things:

    stacked    the feed-forward weights of expert e become expert e of the layer's MoE, untouched
    averaged   attention, norms, embeddings and output head are the mean over all experts
    new        one router a layer, (E, D): the only parameters that nobody has trained

With --method=soup everything is averaged, and the result is a dense model ("model soup").

    --split=C       cuts each feed-forward network into C chunks of F / C hidden units: N C small experts
    --blend=True    cuts each into N chunks and makes expert n from chunk n of everyone: N experts of full size
    --method=upcycle        mixes --num_experts copies of one checkpoint (Komatsuzaki et al. 2022)
    --method=drop-upcycle   the same, with part of each copy's hidden units drawn anew (Nakamura et al. 2025)

A feed-forward network is a sum over its hidden units, so the chunks of a domain, each with gate 1, add up to that
domain's network. Gates that sum to 1 over k C chunks instead of k experts make that sum C times too small. Weights stay
as they are all the same, since the paper describes no correction; --rescale=True multiplies each chunk's output by C.

Tensors are streamed from the experts' files to the new one, so memory stays at a few of them, at most one of each
expert. Only --router_init=domain and contrast hold a model in memory (router_start.py).
"""

import dataclasses
import math
import os
import zlib
from collections import Counter
from typing import NamedTuple

import torch

from common import checkpoint
from common.config import UserError, command, key, parse
from common.loader import read_meta
from common.router_start import FROM_TEXT, STARTS, domain_routers, normal_routers
from study.btm import training_mixture

FEED_FORWARD = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # Llama's name -> Mixtral's
METHODS = ("btx", "upcycle", "drop-upcycle", "soup")


@dataclasses.dataclass
class MixConfig:
    """Mix N dense checkpoints of one shape into a mixture of N experts, or average them."""

    experts: str = key("", "the checkpoint folders, separated by commas; their order is the experts' order")
    out_dir: str = key("out/mixed", "where the mixed checkpoint goes")
    method: str = key("btx", "btx stacks feed-forwards, soup averages them, both upcyclings copy one model", METHODS)
    num_experts_per_tok: int = key(2, "experts that each token is sent to")
    weights: str = key("", "weights of the experts in the averages, such as 1,2,1; empty is equal weights")
    split: int = key(1, "chunks that each feed-forward network is cut into, each an expert of its own")
    rescale: bool = key(False, "with --split: multiply the chunks' output by their number")
    blend: bool = key(False, "make expert n from chunk n of every feed-forward network")
    num_experts: int = key(4, "upcycling: how many copies")
    noise: float = key(0.0, "upcycle: noise on each copied matrix, as a fraction of its standard deviation")
    drop: float = key(0.5, "drop-upcycle: fraction of each copy's hidden units to draw anew")
    router_init: str = key(
        "normal", "how routers start: at random, at zero, or in two ways from each one's text", STARTS
    )
    router_std: float = key(0.02, "standard deviation of the new routers' weights")
    data_dir: str = key("out/cpu/data", "where --router_init=domain and contrast find the training text")
    seed: int = key(1, "random seed of routers, noise and redrawn units")
    overwrite: bool = key(False, "discard another checkpoint that --out_dir holds")


# ---- the plan: where each tensor of the result comes from ----


class Piece(NamedTuple):
    """A chunk of one expert's tensor: its hidden units if the plan splits it, else (chunk 0) the whole."""

    expert: int
    name: str
    chunk: int = 0


class Origin(NamedTuple):
    """What a tensor of the result is made of: pieces to average, or pieces to join along the hidden units."""

    kind: str  # "stacked", "averaged" or "new"
    pieces: tuple = ()


def plan(names, n, method, split=1, blend=False):
    """Decide where each tensor of the result comes from.

    names: the tensors of a dense checkpoint. n: the number of experts. split: chunks of each feed-forward network,
    n of them when blending. Returns {name in the result: Origin}.
    """
    origins = {}
    for name in names:
        if method == "soup" or ".mlp." not in name:
            origins[name] = Origin("averaged", tuple(Piece(e, name) for e in range(n)))
            continue
        layer, matrix = name.removesuffix(".weight").split(".mlp.")
        origins[f"{layer}.block_sparse_moe.gate.weight"] = Origin("new")
        if blend:
            experts = [tuple(Piece(e, name, chunk) for e in range(n)) for chunk in range(split)]
        else:
            experts = [(Piece(e, name, chunk),) for e in range(n) for chunk in range(split)]
        for i, pieces in enumerate(experts):
            target = f"{layer}.block_sparse_moe.experts.{i}.{FEED_FORWARD[matrix]}.weight"
            origins[target] = Origin("stacked", pieces)
    return origins


def check_used_once(origins, names, n, split=1):
    """Assert that each of the n experts' tensors, or each chunk of it, goes to exactly one place."""
    used = Counter(piece for origin in origins.values() for piece in origin.pieces)
    chunks = {name: range(split if ".mlp." in name else 1) for name in names}
    expected = Counter(Piece(e, name, chunk) for e in range(n) for name in names for chunk in chunks[name])
    assert used == expected, "a tensor was left out or used twice"


# ---- the mixture: carrying out the plan ----


def hidden_dim(name):
    """The dimension of a feed-forward matrix that counts hidden units: columns of the down projection, else rows."""
    return 1 if name.endswith(("down_proj.weight", "w2.weight")) else 0


def mix(origins, shapes, experts, weights, split, new, finish):
    """Yield (name, tensor) for each of `shapes`, in order, made from `experts`: a list of {name: tensor}.

    weights: each expert's weight in the averages, summing to 1. new: {name: tensor} of the routers.
    finish: function(name, stacked tensor) -> tensor, what happens to a feed-forward matrix last.
    """
    for name, shape in shapes.items():
        origin = origins[name]
        if origin.kind == "stacked":
            dim = hidden_dim(name)
            parts = [experts[piece.expert][piece.name].chunk(split, dim)[piece.chunk] for piece in origin.pieces]
            yield name, finish(name, torch.cat(parts, dim))
        elif origin.kind == "averaged":
            total = torch.zeros(shape, dtype=torch.float64)  # so exact that copies average to themselves
            for piece in origin.pieces:
                total += weights[piece.expert] * experts[piece.expert][piece.name].double()
            yield name, total
        else:
            yield name, new[name]


def generator(seed, name):
    """Random numbers that depend on a seed and a tensor's name alone, not on what was drawn before."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def add_noise(name, tensor, noise, seed):
    """Normal noise whose standard deviation is `noise` times the matrix's own."""
    drawn = torch.randn(tensor.shape, generator=generator(seed, name))
    return (tensor + noise * tensor.float().std() * drawn).to(tensor.dtype)


def redraw(name, tensor, share, seed):
    """Draw a share of an expert's hidden units anew, from a normal with the mean and std of the weights they had.

    A unit is a row of w1 and w3 and the same column of w2 (Drop-Upcycling, section 3). name: "...experts.3.w1.weight".
    """
    dim, expert = hidden_dim(name), name.rsplit(".", 2)[0]
    units = tensor.size(dim)
    order = torch.randperm(units, generator=generator(seed, expert))  # the same for the expert's three matrices
    dropped = order[: max(1, round(share * units))]
    old = tensor.index_select(dim, dropped).float()
    new = torch.normal(old.mean().item(), old.std().item(), old.shape, generator=generator(seed, name))
    return tensor.index_copy(dim, dropped, new.to(tensor.dtype))


def touch_up(config, name, tensor):
    """What the options change in a stacked tensor; with none of them, nothing."""
    if config.rescale and hidden_dim(name) == 1:
        tensor = tensor * config.split
    if config.method == "upcycle" and config.noise:
        return add_noise(name, tensor, config.noise, config.seed)
    if config.method == "drop-upcycle":
        return redraw(name, tensor, config.drop, config.seed)
    return tensor


def new_routers(config, shapes, folders, experts, weights):
    """{name: (E, D)} of the routers, which no expert has. shapes: {name: (E, D)}."""
    if config.router_init == "zero":
        return {name: torch.zeros(shape) for name, shape in shapes.items()}
    if config.router_init == "normal":
        return normal_routers(shapes, config.router_std, config.seed)
    dense = checkpoint.expected_tensors(experts[0].config)
    soup = mix(plan(dense, len(experts), "soup"), dense, experts, weights, 1, {}, None)
    mixtures = [training_mixture(folder, config.data_dir) for folder in folders]
    return domain_routers(
        config.router_init, shapes, config.router_std, experts[0].config, soup, mixtures, config.data_dir
    )


# ---- the script ----


def read_weights(text, n):
    """'1,2,1' -> [0.25, 0.5, 0.25]; empty is equal weights."""
    try:
        weights = [float(part) for part in text.split(",")] if text else [1.0] * n
    except ValueError:
        raise UserError(f"--weights={text} must be numbers, such as 1,2,1") from None
    if len(weights) != n or not all(0 <= weight < math.inf for weight in weights) or sum(weights) == 0:
        raise UserError(f"--weights={text} must be {n} numbers, one for each expert, none of them negative")
    return [weight / sum(weights) for weight in weights]


def check_options(config, folders):
    """Raise UserError for options that make no sense together."""
    if not folders:
        raise UserError("nothing to mix; give --experts=DIR,DIR,...")
    if "upcycle" in config.method and (len(folders) > 1 or config.num_experts < 1):
        raise UserError(f"--method={config.method} copies one checkpoint: give --experts=DIR --num_experts=N")
    if config.method != "btx" and (config.split != 1 or config.blend or config.router_init in FROM_TEXT):
        raise UserError(
            f"--split, --blend and --router_init={config.router_init} are for --method=btx, not {config.method}"
        )
    if config.blend and (config.split != 1 or config.router_init in FROM_TEXT):
        raise UserError("--blend cuts into as many chunks as there are experts and leaves none of them a domain")
    if config.split < 1 or not 0 < config.drop <= 1 or config.noise < 0:
        raise UserError("--split must be at least 1, --drop above 0 and at most 1, --noise not negative")


def check_same(folders, configs):
    """Raise UserError unless all experts are dense and of one shape."""
    for folder, config in zip(folders, configs, strict=True):
        if config.num_local_experts:
            raise UserError(f"{folder} is a mixture already; mix.py takes dense checkpoints")
        for field in dataclasses.fields(config):
            ours, first = getattr(config, field.name), getattr(configs[0], field.name)
            if ours != first:
                raise UserError(
                    f"{folder} has {field.name} {ours}, but {folders[0]} has {first}; experts are branches of one seed"
                )


def mixed_config(config, dense, folders, split):
    """The shape of the result, from that of the experts."""
    if config.method == "soup":
        return dense
    if dense.intermediate_size % split:
        raise UserError(f"{split} chunks do not divide the experts' intermediate_size {dense.intermediate_size}")
    names = [os.path.basename(os.path.normpath(folder)) for folder in folders]
    size = dense.intermediate_size
    if config.blend:
        names = [f"blend.{i}" for i in range(split)]
    elif split > 1:
        names, size = [f"{name}.{chunk}" for name in names for chunk in range(split)], size // split
    elif config.method != "btx":
        names = [f"{name}.{copy}" for copy, name in enumerate(names)]
    if not 1 <= config.num_experts_per_tok <= len(names):
        raise UserError(f"--num_experts_per_tok={config.num_experts_per_tok}, but there are only {len(names)} experts")
    counts = {"num_local_experts": len(names), "num_experts_per_tok": config.num_experts_per_tok}
    try:
        return dataclasses.replace(dense, intermediate_size=size, expert_names=tuple(names), **counts)
    except ValueError as error:
        raise UserError(f"--split={split}: {error}") from None


def report(origins, shapes):
    """Print what was averaged, stacked and newly made."""
    for kind in ("averaged", "stacked", "new"):
        names = [name for name, origin in origins.items() if origin.kind == kind]
        if names:
            size = sum(torch.Size(shapes[name]).numel() for name in names)
            print(f"{kind:9s} {len(names):4d} tensors, {size:13,d} parameters, such as {names[-1]}")


def main():
    config = parse(MixConfig)
    folders = [folder for folder in config.experts.split(",") if folder]
    check_options(config, folders)
    parents = {folder: checkpoint.parent(folder) for folder in folders}  # (id, history) of each
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "overwrite"}
    recipe = {"config": settings, "parents": {folder: identity for folder, (identity, _) in parents.items()}}
    if config.router_init in FROM_TEXT:
        domains = sorted({domain for folder in folders for domain in training_mixture(folder, config.data_dir)})
        recipe["data"] = {domain: read_meta(config.data_dir, domain)["content_hash"] for domain in domains}
        checkpoint.same_tokenizer([*folders, config.data_dir])
    run, _ = checkpoint.find_run(config.out_dir, recipe, config.overwrite)
    if run["finished"]:
        print(f"{config.out_dir} is finished, nothing to do")
        return

    if config.method in ("upcycle", "drop-upcycle"):
        folders = folders * config.num_experts
    experts = [checkpoint.WeightFiles(folder) for folder in folders]
    check_same(folders, [expert.config for expert in experts])
    checkpoint.same_tokenizer(folders)
    n = len(experts)
    split = n if config.blend else config.split
    weights = read_weights(config.weights, n)
    result = mixed_config(config, experts[0].config, folders, split)
    names, shapes = checkpoint.expected_tensors(experts[0].config), checkpoint.expected_tensors(result)
    origins = plan(names, n, config.method, split, config.blend)
    check_used_once(origins, names, n, split)
    assert origins.keys() == shapes.keys(), "the plan does not fit the mixed model"
    routers = {name: shapes[name] for name, origin in origins.items() if origin.kind == "new"}
    new = new_routers(config, routers, folders, experts, weights)

    checkpoint.start_run(config.out_dir, run)
    tensors = mix(origins, shapes, experts, weights, split, new, lambda *stacked: touch_up(config, *stacked))
    checkpoint.write_weights(config.out_dir, shapes, tensors, dtype=experts[0].dtype)
    checkpoint.write_model_config(config.out_dir, result, experts[0].dtype)
    checkpoint.copy_tokenizer(folders[0], config.out_dir)
    history = checkpoint.joint_history(one for _, one in parents.values())
    checkpoint.write_run(config.out_dir, {**run, "finished": True, "history": history})
    report(origins, shapes)
    print(f"{config.out_dir}: {n} experts mixed ({config.method})")


if __name__ == "__main__":
    command(main)
