"""The paper's comparison: BTX against every other way to spend the same tokens, or the same training FLOPs.

    bash run.sh cpu compare       # or, when the data is there:
    python -m study.compare --size=cpu --seeds=1,2,3

To the chain of each random seed (study.chain: seed model, branches, mixture, dense-cm, upcycle-cm) this adds, from the
same seed model:

    dense-dm      the dense model goes on with the data that BTX saw: the experts' and the finetuning's (data-matched)
    dense-cm      the same for as many training FLOPs as BTX took (compute-matched): its tokens are cheaper, so more
    upcycle-dm    copies of the seed model as the experts, then finetuning, the same tokens as BTX
    upcycle-cm    the same for BTX's FLOPs: all its tokens go through the mixture, so fewer
    dense-tm, upcycle-tm    the same for the seconds that BTX took, by the speeds in run.json (time-matched)
    btm-*-cm      Branch-Train-Merge of branches that also get the FLOPs which BTX spends on finetuning, nothing frozen
    btx-paper     BTX as printed: nothing frozen in the branches, random routers, everything but the experts averaged
    btx-sample    BTX with the sample top-1 router
    btx-even      BTX for the same FLOPs, with as many tokens in its finetuning as in its branches together

(Sukhbaatar et al. 2024, section 4.1.2.) Each is one run with one cosine, with the stage's config (expert.py for what is
dense, finetune.py for what is mixed) and this row's own flags: each method has the settings that are best for it.
Writes compare.json, compare.md and a picture. --sweep=dense-cm,btx trains these rows of the first chain with all of
--rates instead, and writes what validation text says of them.
"""

import dataclasses
import functools
import os
import shlex

from common.config import key, split_list
from common.errors import UserError, command, read_json, write_atomically, write_json
from common.run import read_log, read_run
from study import tables
from study.chain import StudyConfig, chain_of, parse_study, pipeline, tokens_of
from study.draw import plot_differences


@dataclasses.dataclass
class CompareConfig(StudyConfig):
    """Train the chains of some random seeds and all baselines beside them, evaluate them, and compare."""

    seeds: str = key("1,2,3", "the random seeds, a chain each: 1 in out_dir, others in out_dir/seedN")
    branch_flags: str = key("", "flags of branches in which all tensors train, on top of expert.py", free_text=True)
    paper_flags: str = key("", "flags of btx-paper's finetuning, on top of finetune.py", free_text=True)
    even_flags: str = key("", "flags of btx-even's finetuning, on top of finetune.py", free_text=True)
    sweep: str = key("", "rows to train with all of --rates instead, from dense-cm, upcycle-cm, btx-paper, btx")
    rates: str = key("1e-3,3e-3,6e-3", "the learning rates of --sweep, the same for every row")

    def __post_init__(self):
        super().__post_init__()
        if not split_list(self.seeds) or not all(number.isdigit() for number in split_list(self.seeds)):
            raise UserError(f"--seeds={self.seeds}: write whole numbers separated by commas, such as 1,2,3")


def chain_with(config, number):
    """The Chain of one random seed, where run.sh has it: the first in out_dir, others in out_dir/seedN."""
    folder = config.out_dir if number == "1" else config.path(f"seed{number}")
    return chain_of(config, folder, number)


# ---- the baselines: each adds the jobs of its rows ----


def branches(chain, group, *flags):
    """Branches of the comparison's own, in compare/<group>; returns all experts' folders, the seed's last."""
    folder = chain.config.path(f"compare/{group}")
    made = [chain.branch(domain, *flags, folder=f"{folder}/expert-{domain}") for domain in chain.branched]
    return [*made, chain.seed_folder]


def whole_branches(config, chain, group, steps):
    """The same, all tensors trained."""
    return branches(chain, group, f"--max_steps={steps}", "--freeze=none", *shlex.split(config.branch_flags))


def paper(config, chain, *flags, folder):
    """BTX as printed: branches in which all tensors train, random routers, everything but the experts averaged."""
    experts = whole_branches(config, chain, "paper", chain.budget.branch.max_steps)
    mixed = chain.mix(experts, folder=chain.config.path("compare/paper/mixed"), stage="")
    return chain.finetune(mixed, *shlex.split(config.paper_flags), *flags, folder=folder)


def even(config, chain, folder):
    """BTX for the same FLOPs, half of its tokens in the branches and half in the finetuning."""
    budget = chain.budget
    half = budget.flops / (budget.branch_flops + budget.mixture_flops)  # tokens of the branches, and of the finetuning
    steps = round(half / len(chain.branched) / tokens_of(budget.branch, 1))
    experts = branches(chain, "even", f"--max_steps={steps}")
    mixed = chain.mix(experts, folder=chain.config.path("compare/even/mixed"))
    steps = round(half / tokens_of(budget.finetuning, 1))
    return chain.finetune(mixed, f"--max_steps={steps}", *shlex.split(config.even_flags), folder=folder)


def baselines(config, chain):
    """Add every row that needs no clock; returns their folders."""
    budget = chain.budget
    path = chain.config.path
    dense_steps = round(budget.tokens / tokens_of(budget.dense, 1))
    upcycle_steps = round(budget.tokens / tokens_of(budget.upcycling, 1))
    return [
        chain.dense(dense_steps, folder=path("compare/dense-dm")),
        chain.upcycle(upcycle_steps, folder=path("compare/upcycle-dm")),
        paper(config, chain, folder=path("compare/btx-paper")),
        chain.finetune(path("mixed"), "--router=sample", folder=path("compare/btx-sample")),
        even(config, chain, path("compare/btx-even")),
    ]


def time_matched(chain):
    """Add the rows that get the seconds which BTX took after the seed; returns their folders."""
    spent = read_run(chain.config.path("btx"))["history"]
    before = read_run(chain.seed_folder)["history"]
    seconds = sum(cost["seconds"] for name, cost in spent.items() if name not in before)
    made = []
    for name, start in {"dense": chain.dense, "upcycle": chain.upcycle}.items():
        rival = chain.config.path(f"compare/{name}-cm")
        record = read_run(rival)
        steps = max(1, round(seconds / record["history"][rival]["seconds"] * record["step"]))
        made.append(start(steps, folder=chain.config.path(f"compare/{name}-tm")))
    return made


# ---- the comparison ----


def train_and_score(config, number):
    """Train and score all rows of one random seed; returns its results.json, rows in the paper's order."""
    chain = chain_with(config, number)
    pipeline(chain)
    folders = baselines(config, chain)
    steps = chain.budget.whole_branch_steps(chain.budget.flops / len(chain.branched))  # branches for all of BTX's FLOPs
    chain.score_ensembles(whole_branches(config, chain, "longer", steps), "-cm")
    for folder in folders:
        chain.score(folder)
    chain.run()
    chain.jobs.clear()  # the rest has to know how long those took
    for folder in time_matched(chain):
        chain.score(folder)
    chain.run()
    results = read_json(chain.config.path("report/results.json"), "run again")
    names = {*tables.WORDS, *(f"expert-{domain}" for domain in chain.branched)}  # the folder may hold others
    results["rows"] = tables.in_order([row for row in results["rows"] if row["name"] in names])
    for row in results["rows"]:
        tables.add_average(row)
        tables.mark_stale(row)
    return results


def sweep(config):
    """Train the rows of --sweep with each of --rates; {row: {rate: validation bpb, averaged}}.

    Every method gets the same rates, and the score is the one that training logs: validation text, not test text.
    """
    chain = chain_with(config, split_list(config.seeds)[0])
    chain.config.report = False
    pipeline(chain)
    starts = {
        "dense-cm": functools.partial(chain.dense, chain.budget.dense_steps()),
        "upcycle-cm": functools.partial(chain.upcycle, chain.budget.upcycle_steps()),
        "btx-paper": functools.partial(paper, config, chain),
        "btx": functools.partial(chain.finetune, chain.config.path("mixed")),
    }
    found = {name: {} for name in split_list(config.sweep)}
    for name, folders in found.items():
        if name not in starts:
            raise UserError(f"--sweep={config.sweep}: {name} is no row to sweep; choose from {', '.join(starts)}")
        for rate in split_list(config.rates):
            folder = chain.config.path(f"compare/sweep/{name}-{rate}")
            folders[rate] = starts[name](f"--learning_rate={rate}", folder=folder)
    chain.run()
    return {
        name: {rate: read_log(folder)[-1]["bpb"]["avg"] for rate, folder in folders.items()}
        for name, folders in found.items()
    }


def mean_rows(chains):
    """compare.json's rows from the rows of each chain: means over the chains, with "std" beside them."""
    rows = []
    for same in zip(*chains, strict=True):
        assert len({row["name"] for row in same}) == 1, "the chains' rows differ"
        counts = {name: sum(row[name] for row in same) / len(same) for name in (*tables.COUNTS, "seconds")}
        stale = tables.stale_together(same)
        rows.append({"name": same[0]["name"], **tables.mean_and_std(same), **counts, "stale": stale})
    return rows


def write_comparison(folder, found):
    """Write compare.json, compare.md and compare.png."""
    rows, chains = found["rows"], found["chains"]
    write_json(os.path.join(folder, "compare.json"), found)
    pictured = {"avg": ("bpb", "spliced", "choice"), "wiki": ("accuracy",)}
    main = [(metric, name) for metric, name in tables.main_columns(rows) if metric in pictured.get(name, ())]
    shown = {f"{tables.METRICS[metric]}, {name.replace('avg', 'average')}": (metric, name) for metric, name in main}
    plot_differences(chains, shown, os.path.join(folder, "compare.png"))
    text = ["# BTX and other ways to spend the same compute\n", tables.score_table(rows)]
    text += [f"\nMean ± standard deviation over {len(chains)} random seed(s) of the whole chain, on test text.", ""]
    text += ["What guessing scores:\n", *tables.baseline_lines(found["baselines"])]
    text += ["\n![how far each row is behind BTX](compare.png)\n"]
    verdicts = [tables.verdict_table(rows, chains, ours) for ours in ("btx", "btx-even")]
    cells = sum(line.count(" | ") - 1 for table in verdicts for line in table.splitlines()[2:])
    text += ["## Who wins\n", "\n\n".join(verdicts), ""]
    text += ["Mean difference within a chain ± half of its 95 % interval (paired, Student's t); a tie is an interval"]
    text += [f"that holds zero. These are {cells} cells: by chance alone, one in twenty would not be a tie.\n"]
    text += ["If a share of all windows changes its subject:\n", *tables.crossing_lines(rows), ""]
    text += tables.home_lines(rows)
    text += ["\n## What it cost\n", tables.cost_table(rows), tables.versions_line(found, "compare.json")]
    write_atomically(os.path.join(folder, "compare.md"), "\n".join(text) + "\n")


def main():
    config = parse_study(CompareConfig, "compare")
    report = config.path("report")
    os.makedirs(report, exist_ok=True)
    if config.sweep:
        path = os.path.join(report, "sweep.json")
        before = read_json(path, "remove it")["rates"] if os.path.exists(path) else {}
        write_json(path, {"rates": before | sweep(config), "config": dataclasses.asdict(config)})
        return
    results = [train_and_score(config, number) for number in split_list(config.seeds)]
    first, rows = results[0], [one["rows"] for one in results]
    found = {
        "rows": mean_rows(rows),
        "chains": rows,
        "config": {**first["config"], "compare": dataclasses.asdict(config)},
        **{name: first[name] for name in ("data", "baselines", "versions")},
    }
    write_comparison(report, found)
    print(f"{report}/compare.md has the tables and pictures")


if __name__ == "__main__":
    command(main)
