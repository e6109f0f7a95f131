"""The paper's comparison: BTX against every other way to spend the same tokens, or the same training FLOPs.

    bash run.sh cpu compare       # or, with the data prepared:
    python -m study.compare --size=cpu --seeds=1,2,3

Each random seed has a chain (study.chain: seed model, branches, mixture, dense-cm, upcycle-cm). This adds, from the
same seed model:

    dense-dm      the dense model trained on the data that BTX saw, in branches and finetuning (data-matched)
    dense-cm      the same for BTX's training FLOPs (compute-matched): its tokens are cheaper, so there are more
    upcycle-dm    copies of the seed model as the experts, then finetuning on as many tokens as BTX saw
    upcycle-cm    the same for BTX's FLOPs: all tokens go through the mixture, so there are fewer
    dense-tm, upcycle-tm    the same for as many seconds as BTX takes, from the times of single steps (time-matched)
    btm-*-cm      Branch-Train-Merge with nothing frozen; its branches also get the FLOPs of BTX's finetuning
    btx-paper     BTX as printed: nothing frozen in the branches, random routers, everything but the experts averaged
    btx-even      BTX with as many tokens in its finetuning as in all of its branches
    btx-sample    BTX with the sample top-1 router

btx-paper and btx-even also have BTX's FLOPs; btx-sample has its tokens. Models that read all domains read as many
tokens in windows that switch domain as BTX's finetuning does; the branches of Branch-Train-Merge cannot read any.
(Sukhbaatar et al. 2024, section 4.1.2.) Each row is one run with one cosine, with its stage's config (expert.py for
dense models, finetune.py for mixtures) and its own flags: each method has the settings that are best for it. Writes
compare.json, compare.md and two pictures. With --sweep=dense-cm,btx it instead trains these rows of the first chain
with each of --settings, and writes their scores on validation text.
"""

import dataclasses
import functools
import itertools
import os
import re
import shlex
import statistics
import time

import torch

from common.config import key, split_list
from common.corpus import Batches, Corpus
from common.device import pick_device, pick_dtype
from common.errors import UserError, command, read_json, write_atomically, write_json
from common.parallel import Processes
from common.run import read_log, versions
from model import Transformer
from study import tables
from study.chain import StudyConfig, chain_of, parse_study, pipeline, tokens_of
from study.draw import plot_differences, plot_efficiency
from train import freeze, make_optimizer, train_step


@dataclasses.dataclass
class CompareConfig(StudyConfig):
    """Train the chains of some random seeds and all baselines, evaluate them, and compare."""

    seeds: str = key("1,2,3", "the random seeds, with a chain each: 1 in out_dir, others in out_dir/seedN")
    rows: str = key("", "which rows to add to the chains' own, such as btx-paper,dense-dm; empty: all of them")
    contrasts: str = key("", "the primary contrasts OURS:THEIRS of average bits per byte, decided before the run")
    branch_flags: str = key("", "flags for btx-paper's branches, on top of expert.py", free_text=True)
    merge_flags: str = key("", "flags for the branches of btm-*-cm, on top of expert.py", free_text=True)
    paper_flags: str = key("", "flags for btx-paper's finetuning, on top of finetune.py", free_text=True)
    paper_share: float = key(0.15, "the share of btx-paper's tokens that its finetuning reads", within="(0, 1)")
    even_flags: str = key("", "flags for btx-even's finetuning, on top of finetune.py", free_text=True)
    sweep: str = key("", "rows to train with each of --settings instead: dense-cm, upcycle-cm, btx-paper, btx")
    settings: str = key("", "alternatives for the last stage's flags, for each row of --sweep; use |", free_text=True)
    branch_settings: str = key("", "the same for its branches; each combines with each of --settings", free_text=True)
    shares: str = key("", "shares of tokens in the finetuning to sweep; empty: as configured")

    def __post_init__(self):
        super().__post_init__()
        if not split_list(self.seeds) or not all(number.isdigit() for number in split_list(self.seeds)):
            raise UserError(f"--seeds={self.seeds}: write whole numbers separated by commas, such as 1,2,3")
        self.primary = [tuple(pair.split(":")) for pair in split_list(self.contrasts)]
        if wrong := [pair for pair in self.primary if len(pair) != 2 or not {*pair} <= tables.WORDS.keys()]:
            raise UserError(f"--contrasts: {':'.join(wrong[0])!r} is not a pair of rows; write pairs like btx:dense-cm")


def chain_with(config, number):
    """The Chain of one random seed, in run.sh's folders: 1 in out_dir, others in out_dir/seedN."""
    folder = config.out_dir if number == "1" else config.path(f"seed{number}")
    return chain_of(config, folder, number)


# ---- the baselines: each adds the jobs of its rows ----


def branches(chain, group, *flags):
    """Add separate branches for the comparison, in compare/<group>; returns all experts' folders, the seed's last."""
    folder = chain.config.path(f"compare/{group}")
    made = [chain.branch(domain, *flags, folder=f"{folder}/expert-{domain}") for domain in chain.branched]
    return [*made, chain.seed_folder]


def whole_branches(chain, group, steps, given, *flags):
    """The same, training all tensors. given: flags in one string."""
    return branches(chain, group, f"--max_steps={steps}", "--freeze=none", *shlex.split(given), *flags)


def divided(config, chain, group, share, whole, finetuning, branching=(), folder=""):
    """Add BTX at the same FLOPs, with `share` of its tokens in the finetuning; returns its folder.

    whole: as printed, so its branches train all tensors and its routers start at random. finetuning, branching: more
    flags. It reads as many windows that switch domain for any share.
    """
    budget = chain.budget
    of_branch = budget.whole_branch_flops if whole else budget.branch_flops
    tokens = budget.flops / ((1 - share) * of_branch + share * budget.mixture_flops)
    steps = round((1 - share) * tokens / len(chain.branched) / tokens_of(budget.branch, 1))
    if whole:
        experts = whole_branches(chain, group, steps, config.branch_flags, *branching)
    else:
        experts = branches(chain, group, f"--max_steps={steps}", *branching)
    mixed = chain.mix(experts, folder=chain.config.path(f"compare/{group}/mixed"), stage="" if whole else "mix")
    steps = round(share * tokens / tokens_of(budget.finetuning, 1))
    flags = f"--max_steps={steps}", f"--splice={budget.splice_of(budget.finetuning, steps)}", *finetuning
    return chain.finetune(mixed, *flags, folder=folder or chain.config.path(f"compare/btx-{group}"))


def paper(config, chain, group="paper", share=0, finetuning=(), **more):
    """BTX as printed."""
    finetuning = *shlex.split(config.paper_flags), *finetuning
    return divided(config, chain, group, share or config.paper_share, True, finetuning, **more)


def baselines(config, chain):
    """Add every row that is not an ensemble, or those of --rows; returns their folders."""
    budget = chain.budget
    path = chain.config.path
    dense_steps = round(budget.tokens / tokens_of(budget.dense, 1))
    upcycle_steps = round(budget.tokens / tokens_of(budget.upcycling, 1))
    makers = {
        "dense-dm": lambda: chain.dense(dense_steps, folder=path("compare/dense-dm")),
        "upcycle-dm": lambda: chain.upcycle(upcycle_steps, folder=path("compare/upcycle-dm")),
        "btx-paper": lambda: paper(config, chain),
        "btx-sample": lambda: chain.finetune(path("mixed"), "--router=sample", folder=path("compare/btx-sample")),
        "btx-even": lambda: divided(config, chain, "even", 0.5, False, shlex.split(config.even_flags)),
        "dense-tm": lambda: chain.dense(steps_in_time(config, chain, "dense"), folder=path("compare/dense-tm")),
        "upcycle-tm": lambda: chain.upcycle(
            steps_in_time(config, chain, "upcycling"), folder=path("compare/upcycle-tm")
        ),
    }
    chosen = split_list(config.rows) or list(makers)
    if unknown := [name for name in chosen if name not in makers]:
        raise UserError(f"--rows={config.rows}: there is no row {unknown[0]}; choose from {', '.join(makers)}")
    return [makers[name]() for name in chosen]


def steps_in_time(config, chain, rival):
    """How many steps of dense training or upcycling take as many seconds as BTX takes after the seed."""
    budget = chain.budget
    seconds = times_of(config, chain)
    branches = sum(settings.max_steps for settings in budget.branches.values())
    spent = branches * seconds["branch"] + budget.finetuning.max_steps * seconds["finetuning"]
    return max(1, round(spent / seconds[rival]))


def step_seconds(budget, corpus, rounds=15):
    """{stage: seconds per optimizer step}, the median over some rounds. Each round makes a step of every stage, so that
    other load on the machine slows all of them alike; on a CPU with one thread, as when stages run side by side. The
    models have random weights."""
    stages = {
        "branch": (budget.branch, budget.dense_config, budget.branch.freeze),
        "finetuning": (budget.finetuning, budget.mixed_config, budget.finetuning.freeze),
        "dense": (budget.dense, budget.dense_config, "none"),
        "upcycling": (budget.upcycling, budget.mixed_config, budget.upcycling.freeze),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    steps = {name: timed_step(corpus, *stage) for name, stage in stages.items()}
    found = {name: [] for name in steps}
    for number in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step(number)
            found[name].append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return {name: statistics.median(some[1:]) for name, some in found.items()}  # the first allocates


def timed_step(corpus, settings, model_config, frozen):
    """A function(step number) that trains a model with random weights for one step, and waits until it is done."""
    processes = Processes(pick_device(settings.device))
    model = Transformer(model_config).to(processes.device)
    model.compute_dtype = pick_dtype(settings.dtype, processes.device, model_config)
    freeze(model, frozen)
    optimizer = make_optimizer(settings, model)
    mixture = corpus.mixture("all")
    batches = Batches(corpus, mixture, settings.sequence_length, settings.batch_size, settings.seed)
    return lambda number: float(train_step(settings, number, model, optimizer, batches, processes)["loss"])


# ---- the comparison ----


def train_and_score(config, number):
    """Train and score all rows of one random seed; returns its results.json, rows in the paper's order."""
    chain = chain_with(config, number)
    pipeline(chain)
    folders = baselines(config, chain)
    steps = chain.budget.whole_branch_steps(chain.budget.flops / len(chain.branched))  # branches for all of BTX's FLOPs
    chain.score_ensembles(whole_branches(chain, "longer", steps, config.merge_flags), "-cm")
    for folder in folders:
        chain.score(folder)
    chain.run()
    results = read_json(chain.config.path("report/results.json"), "run again")
    names = {*tables.WORDS, *(f"expert-{domain}" for domain in chain.branched)}  # the folder may hold others
    results["rows"] = tables.in_order([row for row in results["rows"] if row["name"] in names])
    for row in results["rows"]:
        tables.add_average(row)
        tables.mark_stale(row)
    return results


def times_of(config, chain):
    """The step_seconds of this machine, measured once for all chains and kept in report/step_times.json."""
    path = config.path("report/step_times.json")
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        found = step_seconds(chain.budget, Corpus(chain.data, ",".join(chain.domains)))
        write_json(path, {"seconds": found, "versions": versions()})
    return read_json(path, "remove it")["seconds"]


def sweep(config):
    """Train the rows of --sweep with each of --settings and, if they have branches, with each of --branch_settings and
    --shares; {row: {its settings: validation bpb, averaged}}.

    Every method gets the same settings. The score is the one in the training log: on validation text, not test text.
    """
    chain = chain_with(config, split_list(config.seeds)[0])
    chain.seed()
    budget = chain.budget
    dense = functools.partial(chain.dense, budget.dense_steps())
    plain = {"dense-cm": dense, "upcycle-cm": functools.partial(chain.upcycle, budget.upcycle_steps())}
    own_share = budget.finetuning_tokens / budget.tokens
    mixed = {
        "btx-paper": (config.paper_share, functools.partial(paper, config, chain)),
        "btx": (own_share, functools.partial(divided, config, chain, whole=False)),
    }
    found = {name: {} for name in split_list(config.sweep)}
    settings, of_branches = (text.split("|") for text in (config.settings, config.branch_settings))
    for name, folders in found.items():
        if name not in {**plain, **mixed}:
            known = ", ".join([*plain, *mixed])
            raise UserError(f"--sweep={config.sweep}: {name} cannot be swept; choose from {known}")
        for text in map(str.strip, settings):
            flags = shlex.split(text)
            if name in plain:
                folders[text] = plain[name](*flags, folder=chain.config.path(f"compare/sweep/{name}/{slug(text)}"))
                continue
            usual, start = mixed[name]
            shares = split_list(config.shares) or [usual]
            for branching, share in itertools.product(map(str.strip, of_branches), shares):
                label = f"share {float(share):.3g}; branches {branching or 'as configured'}; {text}"
                group = f"sweep/{name}/{slug(f'{float(share):.3g} {branching}')}"
                folder = chain.config.path(f"compare/{group}/{slug(text)}")
                options = {"finetuning": flags, "branching": shlex.split(branching), "folder": folder}
                folders[label] = start(group=group, share=float(share), **options)
    chain.run()
    return {
        name: {label: read_log(folder)[-1]["bpb"]["avg"] for label, folder in folders.items()}
        for name, folders in found.items()
    }


def slug(text):
    """A text as part of a folder's name: "--learning_rate=3e-3" -> "learning_rate-3e-3"."""
    return re.sub(r"[^\w.]+", "-", text).strip("-") or "as-configured"


def mean_rows(chains):
    """compare.json's rows, from the rows of each chain: means over the chains, plus "std"."""
    rows = []
    for same in zip(*chains, strict=True):
        assert len({row["name"] for row in same}) == 1, "the chains' rows differ"
        counts = {name: sum(row[name] for row in same) / len(same) for name in (*tables.COUNTS, "seconds")}
        stale = tables.stale_together(same)
        rows.append({"name": same[0]["name"], **tables.mean_and_std(same), **counts, "stale": stale})
    return rows


def write_comparison(folder, found, contrasts):
    """Write compare.json, compare.md and its pictures. contrasts: [(ours, theirs)], the primary ones. Leaves out those,
    and tables of who is ahead, for which --rows left out a row."""
    rows, chains = found["rows"], found["chains"]
    names = {row["name"] for row in rows}
    missing = [pair for pair in contrasts if not names >= {*pair}]
    if len(chains) > 1:
        found["primary"] = tables.primary_contrasts(chains, [pair for pair in contrasts if pair not in missing])
    write_json(os.path.join(folder, "compare.json"), found, indent=None)  # on one line: it has a number for each window
    pictured = {"avg": ("bpb", "spliced", "choice"), "wiki": ("accuracy",)}
    main = [(metric, name) for metric, name in tables.main_columns(rows) if metric in pictured.get(name, ())]
    shown = {f"{tables.METRICS[metric]}, {name.replace('avg', 'average')}": (metric, name) for metric, name in main}
    plot_differences(chains, shown, os.path.join(folder, "compare.png"))
    plot_efficiency(rows, os.path.join(folder, "efficiency.png"))
    text = ["# BTX and other ways to spend the same compute\n"]
    text += ["![scores against parameters per token](efficiency.png)\n", tables.comparison_table(rows), ""]
    if "primary" in found:
        text += ["## Decided before the run\n", tables.primary_table(found["primary"])]
        text += [f"\nAverage bits per byte over {len(chains)} random seeds. ± is half of the 95 % interval, which"]
        text += ["knows of the random seeds and of the text (two-way bootstrap). All that follows is exploratory.\n"]
        text += [f"Decided, too, but left out by --rows: {ours} against {theirs}.\n" for ours, theirs in missing]
    text += ["## Scores\n", tables.score_table(rows, ("active_params",))]
    text += [f"\nMean ± standard deviation over {len(chains)} random seed(s) of the whole chain, on test text.", ""]
    text += ["What guessing scores:\n", *tables.baseline_lines(found["baselines"])]
    text += ["\n![how far each row is behind BTX](compare.png)\n"]
    ours = [name for name in ("btx", "btx-paper", "btx-even") if name in names]
    verdicts = [tables.verdict_table(rows, chains, name) for name in ours]
    cells = sum(line.count(" | ") - 1 for table in verdicts for line in table.splitlines()[2:])
    text += ["## Who is ahead, exploratory\n", "\n\n".join(verdicts), ""]
    text += [
        "Mean difference within a chain ± half of its 95 % interval, over random seeds and text; a tie is an interval"
    ]
    text += [f"that holds zero. These are {cells} cells: by chance alone, one in twenty would not be a tie.\n"]
    text += tables.home_lines(rows)
    text += ["\n## What it cost\n", tables.cost_table(rows), tables.versions_line(found, "compare.json")]
    write_atomically(os.path.join(folder, "compare.md"), "\n".join(text) + "\n")


def main():
    config = parse_study(CompareConfig, "compare")
    report = config.path("report")
    os.makedirs(report, exist_ok=True)
    if config.sweep:
        path = os.path.join(report, "sweep.json")
        found = read_json(path, "remove it")["rows"] if os.path.exists(path) else {}
        for name, scores in sweep(config).items():
            found[name] = found.get(name, {}) | scores
        write_json(path, {"rows": found, "config": dataclasses.asdict(config)})
        return
    results = [train_and_score(config, number) for number in split_list(config.seeds)]
    first, rows = results[0], [one["rows"] for one in results]
    found = {
        "rows": mean_rows(rows),
        "chains": rows,
        "config": {**first["config"], "compare": dataclasses.asdict(config)},
        **{name: first[name] for name in ("data", "baselines", "versions")},
    }
    write_comparison(report, found, config.primary)
    print(f"{report}/compare.md has the tables and pictures")


if __name__ == "__main__":
    command(main)
