"""The leaderboard: one seed model, one text, one budget of FLOPs; the lowest bits per byte on test text wins.

    bash exercises/leaderboard.sh exercises/entries/ours.py      # the rules are in exercises/README.md
    python -m exercises.leaderboard ENTRY --seeds=1,2,3

An entry is a config file with the keys of Entry. Its models are in out/leaderboard/seedN/entries/NAME, one for each
random seed N. All entries share the seed model of a random seed, so that they are compared within a random seed.
"""

import contextlib
import dataclasses
import os
import statistics
import sys

from common.config import key, parse, split_list
from common.corpus import HELD_OUT
from common.errors import UserError, command, read_json
from common.run import read_run, total_cost
from finetune import FinetuneConfig
from mix import MixConfig
from model import ROUTERS
from study import tables
from study.chain import StudyConfig, chain_of, flops_per_token, tokens_of
from train import TrainConfig

FIXED = (
    "out_dir",
    "init_from",
    "experts",
    "mixture",
    "data_dir",
    "domain",
    "seed",
    "overwrite",
    "method",
)  # no flags of entries
METHODS = ("btx", "dense", "upcycle")
ALPHA = 0.05  # a record needs a smaller p value,
LEAST_SEEDS = 3  # and so many random seeds


@dataclasses.dataclass
class Entry:
    """What to do after the seed model: flags for the scripts, on top of config/lesson's."""

    method: str = key("btx", "branches mixed and finetuned, dense training, or copies of the seed finetuned", METHODS)
    train_flags: str = key("", "flags for train.py: for the branches, or for dense training", free_text=True)
    mix_flags: str = key("", "flags for mix.py", free_text=True)
    finetune_flags: str = key("", "flags for finetune.py", free_text=True)

    def __post_init__(self):
        if self.train_flags and self.method == "upcycle":
            raise UserError("train_flags: sparse upcycling trains no branches; use finetune_flags")
        if self.method == "dense" and (self.mix_flags or self.finetune_flags):
            raise UserError("mix_flags, finetune_flags: dense training mixes nothing; use train_flags")
        for name, cls in {"train": TrainConfig, "mix": MixConfig, "finetune": FinetuneConfig}.items():
            flags = getattr(self, f"{name}_flags").split()
            if wrong := [flag for flag in flags if flag[:2] != "--" or flag[2:].partition("=")[0] in FIXED]:
                raise UserError(f"{name}_flags: an entry may not set {wrong[0]}; leave it out")
            parse(cls, flags)  # its errors name the flag


@dataclasses.dataclass
class BoardConfig(StudyConfig):
    """Run an entry with some random seeds, and compare it with the best one so far."""

    size: str = key("lesson", "the pipeline whose settings all entries share: the folder config/SIZE")
    out_dir: str = key("out/leaderboard", "the folder for all entries")
    seeds: str = key("1,2,3", "the random seeds, with a seed model each")
    split: str = key("test", "the text to score: val while you choose settings, test for the board", HELD_OUT)


def chain_for(config, entry, number):
    """The Chain for an entry and a random seed. A dense entry's flags must not reach the branches, from which the
    budget is computed."""
    flags = {"finetune_flags": entry.finetune_flags, "dense_flags": "", "upcycle_flags": ""}
    flags["dense_flags" if entry.method == "dense" else "expert_flags"] = entry.train_flags
    return chain_of(config, config.path(f"seed{number}"), number, **flags)


def planned_flops(chain, entry):
    """Training FLOPs after the seed model, from the configs."""
    budget = chain.budget
    if entry.method == "dense":
        return tokens_of(budget.dense) * budget.dense_flops
    settings = [] if entry.method == "upcycle" else [chain.config.stage("mix")]
    k = parse(MixConfig, [*settings, *entry.mix_flags.split()]).num_experts_per_tok
    router = budget.finetuning.router
    k = ROUTERS[router].experts_per_token(budget.finetuning.num_experts_per_tok or k, len(chain.branched) + 1)
    mixed = dataclasses.replace(budget.mixed_config, num_experts_per_tok=k, router=router)
    finetuning = budget.finetuning_tokens * flops_per_token(budget.finetuning, mixed, budget.finetuning.freeze)
    branches = budget.flops - budget.finetuning_tokens * budget.mixture_flops
    return finetuning if entry.method == "upcycle" else branches + finetuning


def check(name, flops, most):
    """UserError for an entry that takes more than the budget."""
    if flops > most:
        raise UserError(f"{name} takes {flops:.4g} FLOPs after the seed; the budget is {most:.4g}; train fewer steps")


def report_of(split):
    """The folder of all entries' scores on some held-out text."""
    return "report" if split == "test" else f"report-{split}"


def add(chain, name, entry):
    """Add the jobs that train the entry; returns its model's folder."""
    start, budget = chain.seed(), chain.budget
    folder, parts = chain.config.path(f"entries/{name}"), chain.config.path(f"parts/{name}")
    mixed, mix_flags = f"{parts}/mixed", entry.mix_flags.split()
    if entry.method == "dense":
        chain.dense(budget.dense.max_steps, folder=folder)
    elif entry.method == "upcycle":
        chain.upcycle(budget.upcycling.max_steps, folder=folder, copies=chain.copies(*mix_flags, folder=mixed))
    else:
        experts = [chain.branch(domain, folder=f"{parts}/expert-{domain}") for domain in chain.branched]
        chain.finetune(chain.mix([*experts, start], *mix_flags, folder=mixed), folder=folder)
    return folder


def score(chain, name, model, split):
    """The rows of all entries with this chain's random seed, when the entry has been scored on held-out text."""
    report = chain.config.path(report_of(split))
    flags = f"--model={model}", f"--split={split}", f"--out_dir={report}"
    chain.jobs = []  # those that trained are done
    chain.add_score(f"scores/{name}-{split}", ("eval.py",), *flags, needs=())
    chain.run()
    return read_json(os.path.join(report, "results.json"), "run again")["rows"]


def verdict(name, chains, split="test"):
    """The lines about an entry, from the rows of each random seed: its score, and a paired test against the best other
    entry with the same random seeds. p is two-sided; see tables.lead."""
    rows = [{row["name"]: row["bpb"]["avg"] for row in rows} for rows in chains]
    scores = {one: [row[one] for row in rows] for one in rows[0] if all(one in row for row in rows)}
    each = ", ".join(f"{score:.4f}" for score in scores[name])
    line = f"{name}: {statistics.mean(scores[name]):.4f} bits per byte ({each})"
    others = {one: statistics.mean(found) for one, found in scores.items() if one != name}
    if not others:
        return f"{line}\nno other entry has these random seeds"
    best = min(others, key=others.get)
    if len(chains) < 2:
        return f"{line}\n{best} has {others[best]:.4f}; a test needs two random seeds"
    [found] = tables.primary_contrasts(chains, [(name, best)])
    words = "a new record" if found["lead"] > 0 and found["p"] < ALPHA else "not a record"
    words = words if len(chains) >= LEAST_SEEDS else f"a record needs {LEAST_SEEDS} random seeds"
    words = words if split == "test" else "validation text sets no record"
    against = f"{found['lead']:+.4f} ± {found['half']:.4f} saved against {best} ({others[best]:.4f})"
    return f"{line}\n{against}, p = {found['p']:.4f}: {words}"


def main():
    if {"-h", "--help"} & {*sys.argv[1:]}:
        with contextlib.suppress(SystemExit):
            parse(Entry, ["--help"])
        parse(BoardConfig, ["--help"])
    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        raise UserError("name an entry first, such as exercises/entries/ours.py")
    name = os.path.basename(sys.argv[1]).removesuffix(".py")
    entry, config = parse(Entry, sys.argv[1:2]), parse(BoardConfig, sys.argv[2:])
    numbers = split_list(config.seeds)
    if not numbers or len({*numbers}) < len(numbers):
        raise UserError(f"--seeds={config.seeds}: name random seeds, each once, such as 1,2,3")
    chains = [chain_for(config, entry, number) for number in numbers]
    most = chain_for(config, Entry(), chains[0].config.seed).budget.flops
    check(name, planned_flops(chains[0], entry), most)
    found = []
    for chain in chains:
        model = add(chain, name, entry)
        chain.run()
        behind = {run: cost for run, cost in read_run(model)["history"].items() if run != chain.seed_folder}
        check(name, total_cost(behind)["flops"], most)  # from the logs: flags may have changed the plan
        found.append(score(chain, name, model, config.split))
    print(verdict(name, found, config.split))


if __name__ == "__main__":
    command(main)
