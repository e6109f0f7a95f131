"""How far apart two mixtures of one shape are, by part of the model; see docs/crosscheck.md.

python -m study.crosscheck OURS THEIRS
"""

import sys

from common.errors import UserError, command
from common.hf import WeightFiles, expected_tensors, group_of, local_folder
from model import ModelConfig


def distance(a, b):
    """|a - b| / |a|, in the Euclidean norm."""
    return ((a.double() - b.double()).norm() / a.double().norm()).item()


def main():
    if len(sys.argv) != 3:
        raise UserError("give two folders: python -m study.crosscheck OURS THEIRS")
    folders = [local_folder(name) for name in sys.argv[1:]]
    configs = [ModelConfig.from_pretrained(folder) for folder in folders]
    shapes = [expected_tensors(config) for config in configs]
    if shapes[0] != shapes[1] or not configs[0].num_local_experts:
        raise UserError(f"{sys.argv[1]} and {sys.argv[2]} are not two mixtures of one shape; mix as many experts")
    ours, theirs = (WeightFiles(folder, config) for folder, config in zip(folders, configs, strict=True))
    apart = {}
    for name in shapes[0]:
        group = group_of(name)
        apart[group] = max(apart.get(group, 0.0), distance(ours[name], theirs[name]))
    for group, value in apart.items():
        print(f"{group:12s}  {value:.1e}")
    experts = range(configs[0].num_local_experts)
    names = [f"model.layers.0.block_sparse_moe.experts.{e}.w1.weight" for e in experts]
    nearest = [min(experts, key=lambda e, name=name: distance(ours[names[e]], theirs[name])) for name in names]
    print("their experts are nearest to ours:", *nearest)


if __name__ == "__main__":
    command(main)
