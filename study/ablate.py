"""Repeat the paper's ablations: one row per variant of mixing, routing and finetuning, from the same experts.

    bash run.sh cpu ablate        # or, after the main pipeline: python -m study.ablate --size=cpu

Each row is a mix.py and a finetune.py command with the pipeline's configs and the row's own flags, run for several
random seeds and evaluated like the main table. The experts are those behind out_dir/mixed. You can stop and continue it
like every other stage. Writes ablations.json, ablations.md and ablations.png.
"""

import dataclasses
import os
import statistics
from typing import NamedTuple

from common.config import key, split_list
from common.errors import UserError, command, read_json, write_atomically, write_json
from common.run import read_run
from study.chain import Job, StudyConfig, chain_of, parse_study
from study.draw import plot_ablations
from study.tables import BASE, ablation_table, dead_experts, mark_stale, mean_and_std, stale_together, tie_width


@dataclasses.dataclass
class AblateConfig(StudyConfig):
    """Run and compare all variants of mixing, routing and finetuning."""

    steps: int = key(300, "finetuning steps of every row", within="[1, inf)")
    long_steps: int = key(1200, "finetuning steps of the routing rows with a larger budget", within="[1, inf)")
    seeds: int = key(2, "how many random seeds to run each row with", within="[1, inf)")


class Variant(NamedTuple):
    """A row: what it changes, and the paper's score for it, if any (the average over five tasks, tables 4 and 5)."""

    name: str
    mix: str = ""
    finetune: str = ""
    paper: float | None = None
    long: bool = False  # the larger budget
    leave_out_seed: bool = False
    from_seed: bool = False  # copies of the seed instead of the trained experts


BALANCED = "--router_aux_loss_coef=0.01"

VARIANTS = [
    # the paper's routing table: two budgets
    Variant(BASE, paper=34.6),
    Variant("switch", finetune=f"--router=switch {BALANCED}", paper=24.7),
    Variant("sample top-1", finetune="--router=sample", paper=33.0),
    Variant("soft", finetune="--router=soft", paper=35.8),
    Variant("top-2, longer", paper=35.9, long=True),
    Variant("switch, longer", finetune=f"--router=switch {BALANCED}", long=True),
    Variant("sample top-1, longer", finetune="--router=sample", paper=35.3, long=True),
    Variant("soft, longer", finetune="--router=soft", paper=37.3, long=True),
    # the paper's strategy table
    Variant("balancing", finetune=BALANCED, paper=34.6),
    Variant("experts frozen", finetune="--router_aux_loss_coef=0.0 --freeze=experts", paper=34.7),
    Variant("blend", mix="--blend=True --router_init=normal", paper=22.2),
    Variant("split, top-2 of 2N", mix="--split=2", paper=28.0),
    Variant("split, top-4 of 2N", mix="--split=2", finetune="--num_experts_per_tok=4", paper=34.5),
    # variants that are not in the paper
    Variant("split, top-4 of 2N, rescaled", mix="--split=2 --rescale=True", finetune="--num_experts_per_tok=4"),
    Variant("router starts at random", mix="--router_init=normal"),
    Variant("router starts at zero", mix="--router_init=zero"),
    Variant("router starts at contrasts", mix="--router_init=contrast"),
    Variant("balancing counts tokens", finetune=f"{BALANCED} --balance=tokens"),
    Variant("attention frozen", finetune="--freeze=attention"),
    Variant("only routers trained", finetune="--freeze=all-but-router"),
    Variant("seed left out", leave_out_seed=True),
    Variant("sparse upcycling", mix="--router_init=normal", from_seed=True),
    Variant("Drop-Upcycling, r = 0.5", mix="--router_init=normal --drop=0.5", from_seed=True),
]


def slug(text):
    return "-".join("".join(c if c.isalnum() else " " for c in text).split())


def add_variant(config, chain, experts, variant, number):
    """Add the jobs of one row with one random seed: mix, finetune, evaluate. Returns the finetuned folder."""
    chosen, copies = experts, ""
    if variant.from_seed:
        chosen, copies = experts[-1:] * len(experts), "copies"
    elif variant.leave_out_seed:
        chosen = experts[:-1]
    mixed = config.path("ablate/" + slug(f"mixed {variant.mix} {len(chosen)} {copies} seed{number}"))
    name = slug(f"{variant.name} seed{number}")
    steps = config.long_steps if variant.long else config.steps
    chain.config.seed = number
    chain.mix(chosen, *variant.mix.split(), folder=mixed)
    flags = f"--max_steps={steps}", f"--eval_interval={steps}", *variant.finetune.split()
    finetuned = chain.finetune(mixed, *flags, folder=config.path(f"ablate/{name}"))
    scores = "eval.py", config.stage("eval"), f"--model={finetuned}", f"--data_dir={chain.data}"
    scores += (f"--out_dir={config.path('ablate/scores')}",)
    chain.jobs.append(Job(f"ablate/scores-{name}", scores, chain.names([finetuned])))
    return finetuned


def row_of(variant, folders, scored):
    """One row of ablations.json. folders: a finetuned mixture for each random seed. scored: {name: row of
    results.json}."""
    rows = [scored[os.path.basename(folder)] for folder in folders]
    for row in rows:
        mark_stale(row)
    costs = [read_run(folder)["history"][folder] for folder in folders]  # of the finetuning alone
    return {
        "name": variant.name,
        **mean_and_std(rows),
        "active_params": rows[0]["active_params"],
        "total_params": rows[0]["total_params"],
        "train_tokens": costs[0]["tokens"],
        "train_flops": costs[0]["flops"],
        "seconds": statistics.mean(cost["seconds"] for cost in costs),
        "tokens_per_second": statistics.median(cost["tokens"] / cost["seconds"] for cost in costs),
        "dead_experts": [sum(map(len, dead_experts(row["load"]))) for row in rows],
        "stale": stale_together(rows),
        "paper": variant.paper,
        "long": variant.long,
    }


def write_ablations(folder, found):
    """Write ablations.json, ablations.md and ablations.png."""
    rows, seeds = found["rows"], found["config"]["ablate"]["seeds"]
    os.makedirs(folder, exist_ok=True)
    write_json(os.path.join(folder, "ablations.json"), found)
    plot_ablations(rows, os.path.join(folder, "ablations.png"))
    text = (
        f"# Ablations\n\n{ablation_table(rows)}\n\n"
        f"Mean ± standard deviation over {seeds} random seeds of router, batches and noise; the experts are the same "
        "throughout. Dead experts: (layer, expert) pairs that get under 1 % of the choices, by random seed. Paper: its "
        "average over five tasks; the order is that against top-2 at the same budget, and differences up to "
        f"{tie_width(rows):.3f} count as ties (twice the pooled deviation).\n\n![ablations](ablations.png)\n"
    )
    write_atomically(os.path.join(folder, "ablations.md"), text)


def main():
    config = parse_study(AblateConfig, "ablate")
    mixed = read_run(config.path("mixed"))
    if mixed is None:
        raise UserError(f"{config.path('mixed')} is missing; run the pipeline first: bash run.sh {config.size}")
    experts = split_list(mixed["recipe"]["config"]["experts"])  # the seed is the last
    chain = chain_of(config, config.out_dir, 1)
    numbers = range(1, config.seeds + 1)
    made = {v: [add_variant(config, chain, experts, v, number) for number in numbers] for v in VARIANTS}
    chain.run()
    results = read_json(config.path("ablate/scores/results.json"), "run again")
    scored = {row["name"]: row for row in results["rows"]}
    rows = [row_of(variant, folders, scored) for variant, folders in made.items()]
    settings = {**results["config"], "ablate": dataclasses.asdict(config)}
    found = {"rows": rows, "config": settings, "data": results["data"], "versions": results["versions"]}
    write_ablations(config.path("report"), found)
    print(ablation_table(rows))


if __name__ == "__main__":
    command(main)
