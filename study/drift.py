"""How far may branches move before averaging hurts? Trains branches of several lengths and rates, and averages them.

    python -m study.drift --size=cpu --steps=25,100,400 --rates=1e-3,3e-3
    python -m study.drift --size=smollm --published=FOLDER --domains=code,law --tokens=4e4 --steps=20,80 --rates=3e-4

Branches train all of their tensors. study.damage then replaces those that mixing averages, and scores each branch on
its own domain. A point is the share of the branches' gain over the seed that this loses, against how far they moved
those tensors. Writes drift.json and drift.md; with --draw=FOLDER,FOLDER it only draws drift.png from several folders'
drift.json, with a colour for each model size.
"""

import dataclasses
import os

from common.config import key, split_list
from common.errors import UserError, command, read_json, write_atomically, write_json
from common.run import versions
from model import ModelConfig, Transformer, on_meta
from study.chain import Job, StudyConfig, chain_of, parse_study
from study.damage import MIXING, SOUP
from study.draw import plot_drift
from study.tables import markdown_table, short


@dataclasses.dataclass
class DriftConfig(StudyConfig):
    """Measure what averaging costs branches of several lengths and learning rates."""

    published: str = key("", "a checkpoint to use as the seed; empty: the seed in out_dir")
    seed: int = key(1, "the random seed of the branches", within="[0, inf)")
    tokens: float = key(0, "sets batches and windows, as in study.chain; 0: as configured", within="[0, inf)")
    steps: str = key("25,100,400", "lengths of the branches in steps, separated by commas")
    rates: str = key("1e-3,3e-3", "learning rates of the branches, separated by commas")
    eval_windows: int = key(32, "validation windows per domain", within="[1, inf)")
    draw: str = key("", "train nothing; draw out_dir/drift.png from drift.json in these folders")


def read_points(config):
    """The lengths and the rates, two lists."""
    try:
        steps = [int(count) for count in split_list(config.steps)]
        rates = [float(rate) for rate in split_list(config.rates)]
    except ValueError:
        steps, rates = [], []
    if not (steps and rates) or min(steps) < 1 or min(rates) <= 0:
        raise UserError("--steps must be whole numbers and --rates numbers above 0, separated by commas")
    return steps, rates


def add_point(chain, folder, steps, rate, windows):
    """Add the jobs of one length and rate: a branch for each domain, and study.damage."""
    flags = f"--freeze=none --max_steps={steps} --warmup_steps={max(1, steps // 20)} --eval_interval={steps}"
    flags = *flags.split(), f"--learning_rate={rate:g}"
    branches = [chain.branch(name, *flags, folder=os.path.join(folder, name)) for name in chain.branched]
    arguments = f"--experts={','.join([*branches, chain.seed_folder])}", f"--out_dir={folder}"
    arguments += f"--data_dir={chain.data}", f"--sequence_length={chain.scoring().sequence_length}"
    arguments += f"--eval_windows={windows}", f"--domains={','.join(sorted(chain.branched))}"
    arguments += "--kinds=False", "--layers=False"
    name = f"damage/{chain.names([folder])[0]}"
    chain.jobs.append(Job(name, ("-m", "study.damage", *arguments), chain.names(branches)))


def point_of(folder, steps, rate):
    """A point of drift.json, from the damage.json for a length and rate."""
    groups = read_json(os.path.join(folder, "damage.json"), "delete it and run again")["groups"]
    seed, own = groups[SOUP]["seed"]["avg"], groups["nothing"]["averaged"]["avg"]
    mixed = groups[MIXING]["averaged"]["avg"]
    lost = (mixed - own) / (seed - own) if own < seed else None  # without a gain there is no share
    found = {"steps": steps, "rate": rate, "seed": seed, "branch": own, "averaged": mixed}
    return {**found, "lost": lost, "drift": groups[MIXING]["drift"], "groups": groups}


def drift_table(points):
    """A table with a row for each length and rate; bits per byte on the branches' own domains."""
    header = ["learning rate", "steps", "drift", "seed", "branch", "with averages", "of the gain lost"]
    rows = []
    for p in points:
        scores = [f"{p[name]:.3f}" for name in ("seed", "branch", "averaged")]
        lost = "no gain" if p["lost"] is None else f"{p['lost']:.0%}"
        rows.append([f"{p['rate']:g}", str(p["steps"]), f"{p['drift']:.1%}", *scores, lost])
    return markdown_table(header, rows)


def main():
    config = parse_study(DriftConfig, "drift")
    out = config.path("drift")
    if config.draw:
        found = {}
        for folder in split_list(config.draw):
            one = read_json(os.path.join(folder, "drift.json"), "make it first, without --draw")
            found.setdefault(one["size"], []).extend(one["points"])
        os.makedirs(out, exist_ok=True)
        plot_drift(found, os.path.join(out, "drift.png"))
        print(f"{out}/drift.png")
        return
    steps, rates = read_points(config)
    chain = chain_of(config, config.out_dir, config.seed, published=config.published, tokens=config.tokens)
    points = [(os.path.join(out, f"{rate:g}-{count}"), count, rate) for rate in rates for count in steps]
    for folder, count, rate in points:
        add_point(chain, folder, count, rate, config.eval_windows)
    chain.run()
    with on_meta():
        size = Transformer(ModelConfig.from_pretrained(chain.seed_folder)).num_parameters()[1]
    found = {"size": f"{short(size)} parameters", "points": [point_of(*point) for point in points]}
    write_json(os.path.join(out, "drift.json"), {**found, "config": dataclasses.asdict(config), "versions": versions()})
    write_atomically(os.path.join(out, "drift.md"), f"# When averaging hurts\n\n{drift_table(found['points'])}\n")
    print(drift_table(found["points"]))


if __name__ == "__main__":
    command(main)
