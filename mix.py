"""Mix expert checkpoints into one: the MiX step of Branch-Train-MiX (Sukhbaatar et al. 2024, section 3.2).

    python mix.py --experts=out/cpu/expert-code,out/cpu/expert-math,out/cpu/seed --out_dir=out/cpu/mixed

Every tensor of the result is one of three things:

    stacked    the feed-forward weights of expert e become expert e of the layer's MoE, untouched
    averaged   attention, norms, embeddings and output head are the plain mean over all experts
    new        one router a layer, (E, D), drawn at random: the only parameters that nobody has trained

With --method=soup everything is averaged, and the result is a dense model ("model soup").
Tensors are streamed from the experts' files to the new one, so memory stays at about two of them.
"""

import dataclasses
import os
from collections import Counter
from typing import NamedTuple

import torch

import checkpoint
from configurator import UserError, command, key, parse

FEED_FORWARD = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # Llama's name -> Mixtral's


@dataclasses.dataclass
class MixConfig:
    """Mix N dense checkpoints of one shape into a mixture of N experts, or average them."""

    experts: str = key("", "the checkpoint folders, separated by commas; their order is the experts' order")
    out_dir: str = key("out/mixed", "where the mixed checkpoint goes")
    method: str = key("btx", "btx stacks the feed-forward sublayers, soup averages them too", ("btx", "soup"))
    num_experts_per_tok: int = key(2, "experts that each token is sent to")
    router_std: float = key(0.02, "standard deviation of the new routers' weights")
    seed: int = key(1, "random seed of the new routers")
    overwrite: bool = key(False, "discard another checkpoint that --out_dir holds")


class Origin(NamedTuple):
    """Where a tensor of the result comes from. `name` is its name in the experts; `expert` is set when stacked."""

    kind: str  # "stacked", "averaged" or "new"
    name: str | None = None
    expert: int | None = None


def plan(names, n, method):
    """Decide where each tensor of the result comes from.

    names: the tensors of a dense checkpoint. n: the number of experts. Returns {name in the result: Origin}.
    """
    origins = {}
    for name in names:
        if method == "btx" and ".mlp." in name:
            layer, matrix = name.removesuffix(".weight").split(".mlp.")
            origins[f"{layer}.block_sparse_moe.gate.weight"] = Origin("new")
            for e in range(n):
                stacked = f"{layer}.block_sparse_moe.experts.{e}.{FEED_FORWARD[matrix]}.weight"
                origins[stacked] = Origin("stacked", name, e)
        else:
            origins[name] = Origin("averaged", name)
    return origins


def check_used_once(origins, names, n):
    """Assert that each of the n experts' tensors goes to exactly one place."""
    used = Counter()
    for origin in origins.values():
        if origin.kind != "new":
            used.update((e, origin.name) for e in (range(n) if origin.kind == "averaged" else [origin.expert]))
    assert used == Counter((e, name) for e in range(n) for name in names), "a tensor was left out or used twice"


def mix(origins, shapes, experts, router_std, generator):
    """Yield (name, tensor) for each of `shapes`, in order, made from `experts`: a list of {name: tensor}."""
    for name, shape in shapes.items():
        origin = origins[name]
        if origin.kind == "stacked":
            yield name, experts[origin.expert][origin.name]
        elif origin.kind == "averaged":
            total = torch.zeros(shape)  # summed in fp32, whatever the experts' precision
            for expert in experts:
                total += expert[origin.name]
            yield name, total / len(experts)
        else:
            yield name, torch.normal(0.0, router_std, shape, generator=generator)


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
    if not folders:
        raise UserError("nothing to mix; give --experts=DIR,DIR,...")
    parents = [checkpoint.parent(folder) for folder in folders]
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "overwrite"}
    recipe = {"config": settings, "parents": {f: identity for f, (identity, _) in zip(folders, parents, strict=True)}}
    run, _ = checkpoint.find_run(config.out_dir, recipe, config.overwrite)
    if run["finished"]:
        print(f"{config.out_dir} is finished, nothing to do")
        return

    experts = [checkpoint.WeightFiles(folder) for folder in folders]
    check_same(folders, [expert.config for expert in experts])
    checkpoint.same_tokenizer(folders)
    n = len(experts)
    result = experts[0].config
    if config.method == "btx":
        if config.num_experts_per_tok > n:
            raise UserError(f"--num_experts_per_tok={config.num_experts_per_tok}, but there are only {n} experts")
        names = tuple(os.path.basename(os.path.normpath(folder)) for folder in folders)
        k = config.num_experts_per_tok
        result = dataclasses.replace(result, num_local_experts=n, num_experts_per_tok=k, expert_names=names)
    names, shapes = checkpoint.expected_tensors(experts[0].config), checkpoint.expected_tensors(result)
    origins = plan(names, n, config.method)
    check_used_once(origins, names, n)
    assert origins.keys() == shapes.keys(), "the plan does not fit the mixed model"

    checkpoint.start_run(config.out_dir, run)
    generator = torch.Generator().manual_seed(config.seed)
    tensors = mix(origins, shapes, experts, config.router_std, generator)
    checkpoint.write_weights(config.out_dir, shapes, tensors, dtype=experts[0].dtype)
    checkpoint.write_model_config(config.out_dir, result)
    checkpoint.copy_tokenizer(folders[0], config.out_dir)
    history = {name: cost for _, one in parents for name, cost in one.items()}
    checkpoint.write_run(config.out_dir, {**run, "finished": True, "history": history})
    report(origins, shapes)
    print(f"{config.out_dir}: {n} experts mixed ({config.method})")


if __name__ == "__main__":
    command(main)
