"""The paper's comparison: BTX against every other way to spend the same tokens, or the same training FLOPs.

    bash run.sh cpu compare       # or, when the chains are there:
    python -m study.compare --size=cpu --chains=out/cpu,out/cpu/seed2,out/cpu/seed3

A chain is the whole pipeline with one random seed: a folder with seed, expert-*, soup, mixed, btx and its report. To
each, this trains what the paper compares with, from the same seed model:

    dense-dm      the dense model goes on with the data that BTX saw: the experts' and the finetuning's (data-matched)
    dense-cm      the same for as many training FLOPs as BTX took (compute-matched): its tokens are cheaper, so more
    upcycle-dm    copies of the seed model as the experts, then finetuning, the same tokens as BTX
    upcycle-cm    the same for BTX's FLOPs: all its tokens go through the mixture, so fewer
    dense-tm, upcycle-tm    the same for the device time that BTX took (time-matched), by the steps of --step_times
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
import os
import shutil

from common.config import key, split_list
from common.errors import UserError, command, read_json, write_atomically, write_json
from common.run import read_log, read_run, trained_on
from study import tables
from study.btm import ENSEMBLES
from study.clock import read_matched
from study.cost import bytes_sent, critical_seconds, flops_per_token, lineage, own_cost, split_budget
from study.draw import plot_differences
from study.stages import StudyConfig, parse_study, run

BASELINES = "dense-dm", "dense-cm", "upcycle-dm", "upcycle-cm", "btx-paper", "btx-sample", "btx-even"
TIMED = "dense-tm", "upcycle-tm"
SWEPT = "dense-cm", "upcycle-cm", "btx-paper", "btx"
COUNTS = "active_params", "total_params", "train_tokens", "train_flops", "seconds", "critical_seconds", "bytes_sent"


@dataclasses.dataclass
class CompareConfig(StudyConfig):
    """Train the baselines beside one or more chains, evaluate them, and compare."""

    chains: str = key("", "folders with a finished pipeline each, separated by commas; empty is out_dir alone")
    dense_flags: str = key("", "flags of the dense rows, on top of expert.py")
    upcycle_flags: str = key("", "flags of the upcycled rows, on top of finetune.py")
    branch_flags: str = key("", "flags of branches in which all tensors train, on top of expert.py")
    paper_flags: str = key("", "flags of btx-paper's finetuning, on top of finetune.py")
    even_flags: str = key("", "flags of btx-even's finetuning, on top of finetune.py")
    step_times: str = key("", "study.clock's step_times.json; with it come the rows matched by device time")
    sweep: str = key("", f"rows to train with all of --rates instead, from {', '.join(SWEPT)}")
    rates: str = key("1e-3,3e-3,6e-3", "the learning rates of --sweep, the same for every row")

    def __post_init__(self):
        super().__post_init__()
        for row in split_list(self.sweep):
            if row not in SWEPT:
                raise UserError(f"--sweep={self.sweep}: {row} is no row to sweep; choose from {', '.join(SWEPT)}")


class Chain:
    """A finished pipeline: its folder, its runs, and what BTX spent after the seed model."""

    def __init__(self, folder):
        self.folder = folder
        self.seed, self.btx = self.recorded("seed"), self.recorded("btx")
        mixed = self.recorded("mixed")["recipe"]
        experts = split_list(mixed["config"]["experts"])
        self.experts_per_token = mixed["config"]["num_experts_per_tok"]
        self.experts = [os.path.basename(expert) for expert in experts]
        self.branches = [name for name in self.experts if name != "seed"]
        self.branch = self.recorded(self.branches[0])
        spent = {name: cost for name, cost in self.btx["history"].items() if name not in self.seed["history"]}
        self.tokens = sum(cost["tokens"] for cost in spent.values())
        self.flops = sum(cost["flops"] for cost in spent.values())
        tokens = {}  # of each domain
        for name, cost in spent.items():
            for domain, share in trained_on(name).items():
                tokens[domain] = tokens.get(domain, 0) + share * cost["tokens"]
        self.domains = list(tokens)
        self.mixture = ",".join(f"{domain}:{count:.0f}" for domain, count in tokens.items())
        self.random_seed = own(self.btx)[1]["seed"]

    def path(self, name):
        return os.path.join(self.folder, name)

    def recorded(self, name):
        """run.json of one of the chain's folders; UserError unless it is finished."""
        found = read_run(self.path(name))
        if found is None or not found["finished"]:
            raise UserError(f"{self.path(name)} is not there or not finished; run the pipeline first: bash run.sh")
        return found


def own(recorded):
    """The tokens, FLOPs and settings of a run.json's own run, without those before it."""
    return own_cost(recorded), recorded["recipe"]["config"]


# ---- training the baselines ----


def steps_for(run, like, tokens=None, flops=None, steps=None):
    """`steps`, or how many steps with the batches of `run` take so many tokens, or else so many training FLOPs, where a
    token costs what it did in `like`. (Both a run.json.)"""
    if steps:
        return steps
    settings = own(run)[1]
    tokens = tokens or flops / flops_per_token(like)
    return round(tokens / (settings["batch_size"] * settings["sequence_length"]))


def train_dense(config, chain, name, *flags, **budget):
    """Go on from the seed model, dense, with the data that BTX saw; all tensors train."""
    run(
        "train.py",
        config.stage("expert"),
        f"--init_from={chain.path('seed')}",
        f"--out_dir={chain.path(name)}",
        f"--domain={chain.mixture}",
        f"--max_steps={steps_for(chain.branch, chain.seed, **budget)}",
        f"--seed={chain.random_seed}",
        "--freeze=none",
        *config.dense_flags.split(),
        *flags,
    )


def mix(chain, name, experts, *settings):
    """Mix some experts as the chain's own are; returns the mixture's folder."""
    mixed = chain.path(name)
    flags = f"--num_experts_per_tok={chain.experts_per_token}", f"--out_dir={mixed}", f"--seed={chain.random_seed}"
    run("mix.py", *settings, f"--experts={','.join(experts)}", *flags)
    return mixed


def train_upcycled(config, chain, name, *flags, **budget):
    """Go on from copies of the seed model as the experts, with the data that BTX saw."""
    copies = mix(chain, "compare/upcycled", [chain.path("seed")] * len(chain.experts))
    run(
        "finetune.py",
        config.stage("finetune"),
        f"--init_from={copies}",
        f"--out_dir={chain.path(name)}",
        f"--domain={chain.mixture}",
        f"--max_steps={steps_for(chain.btx, chain.btx, **budget)}",
        f"--seed={chain.random_seed}",
        *config.upcycle_flags.split(),
        *flags,
    )


def train_branches(config, chain, folder, steps, *flags):
    """The chain's branches once more, with another number of steps or other flags; returns all experts' folders."""
    branches = []
    for name in chain.branches:
        domain = own(chain.recorded(name))[1]["domain"]
        branches.append(chain.path(f"compare/{folder}/{name}"))
        run(
            "train.py",
            config.stage("expert"),
            f"--init_from={chain.path('seed')}",
            f"--out_dir={branches[-1]}",
            f"--domain={domain}",
            f"--max_steps={steps}",
            f"--seed={chain.random_seed}",
            *flags,
        )
    return [*branches, chain.path("seed")]


def train_whole_branches(config, chain, folder, steps):
    """Branches in which all tensors train."""
    return train_branches(config, chain, folder, steps, "--freeze=none", *config.branch_flags.split())


def train_longer_branches(config, chain):
    """Branches that share all FLOPs that BTX spends after the seed, for ensembles; returns all experts' folders."""
    steps = steps_for(chain.branch, chain.seed, flops=chain.flops / len(chain.branches))
    return train_whole_branches(config, chain, "longer", steps)


def train_btx(config, chain, name, *flags, mixed=None, steps=None):
    """Finetune the chain's mixture once more, or another one, with flags or another number of steps."""
    run(
        "finetune.py",
        config.stage("finetune"),
        f"--init_from={mixed or chain.path('mixed')}",
        f"--out_dir={chain.path(name)}",
        f"--max_steps={steps or own(chain.btx)[1]['max_steps']}",
        f"--seed={chain.random_seed}",
        *flags,
    )


def train_paper(config, chain, name, *flags):
    """BTX as printed: branches in which all tensors train, random routers."""
    experts = train_whole_branches(config, chain, "paper", own(chain.branch)[1]["max_steps"])
    mixed = mix(chain, "compare/paper/mixed", experts)
    train_btx(config, chain, name, *config.paper_flags.split(), *flags, mixed=mixed)


def train_even(config, chain, name, *flags):
    """BTX for the same FLOPs, half of its tokens in the branches and half in the finetuning."""
    costs = flops_per_token(chain.branch), flops_per_token(chain.btx)
    branches, finetuning = split_budget(chain.flops, 0.5, *costs)
    each = steps_for(chain.branch, chain.branch, tokens=branches / len(chain.branches))
    mixed = mix(chain, "compare/even/mixed", train_branches(config, chain, "even", each), config.stage("mix"))
    steps = steps_for(chain.btx, chain.btx, tokens=finetuning)
    train_btx(config, chain, name, *config.even_flags.split(), *flags, mixed=mixed, steps=steps)


def train_baselines(config, chain):
    """Train all baselines of one chain; returns their folders."""
    if config.step_times:  # looked at before hours of training
        spent = {"branch": sum(own(chain.recorded(name))[1]["max_steps"] for name in chain.branches)}
        matched = read_matched(config.step_times, {**spent, "mixture": own(chain.btx)[1]["max_steps"]})
    train_dense(config, chain, "compare/dense-dm", tokens=chain.tokens)
    train_dense(config, chain, "compare/dense-cm", flops=chain.flops)
    train_upcycled(config, chain, "compare/upcycle-dm", tokens=chain.tokens)
    train_upcycled(config, chain, "compare/upcycle-cm", flops=chain.flops)
    train_paper(config, chain, "compare/btx-paper")
    train_btx(config, chain, "compare/btx-sample", "--router=sample")
    train_even(config, chain, "compare/btx-even")
    if config.step_times:
        train_dense(config, chain, "compare/dense-tm", steps=matched["dense-tm"])
        train_upcycled(config, chain, "compare/upcycle-tm", steps=matched["upcycle-tm"])
    return [chain.path(f"compare/{name}") for name in (*BASELINES, *(TIMED if config.step_times else ()))]


def sweep(config, chain):
    """Train the rows of --sweep with each of --rates; {row: {rate: validation bpb, averaged}}.

    Every method gets the same rates, and the score is the one that training logs: validation text, not test text.
    """
    found = {}
    for name in split_list(config.sweep):
        for rate in split_list(config.rates):
            folder, flag = f"compare/sweep/{name}-{rate}", f"--learning_rate={rate}"
            if name == "dense-cm":
                train_dense(config, chain, folder, flag, flops=chain.flops)
            elif name == "upcycle-cm":
                train_upcycled(config, chain, folder, flag, flops=chain.flops)
            elif name == "btx-paper":
                train_paper(config, chain, folder, flag)
            else:
                train_btx(config, chain, folder, flag)
            found.setdefault(name, {})[rate] = read_log(chain.path(folder))[-1]["bpb"]["avg"]
            print(f"{name} at {rate}: {found[name][rate]:.4f} bits per byte on validation text")
    return found


# ---- comparing ----


def evaluate(config, chain, folders, longer):
    """The rows of results.json of a chain's own models, the ensembles and the baselines, costs added.

    folders: the baselines. longer: the experts of the compute-matched ensembles.
    """
    experts = ",".join(chain.path(name) for name in chain.experts)
    own_models = [chain.path(name) for name in dict.fromkeys(["seed", *chain.experts, "soup", "mixed", "btx"])]
    scores, pipeline = chain.path("compare/scores"), chain.path("report/results.json")
    if os.path.exists(pipeline) and not os.path.exists(f"{scores}/results.json"):
        os.makedirs(scores, exist_ok=True)
        shutil.copy(pipeline, f"{scores}/results.json")  # eval.py keeps rows that are still right
    models = ",".join([*own_models, *folders])
    settings = config.stage("eval"), f"--domains={','.join(sorted(chain.domains))}", f"--out_dir={scores}"
    run("eval.py", *settings, f"--model={models}")
    run("-m study.btm", *settings, f"--experts={experts}")
    run("-m study.btm", *settings, f"--experts={','.join(longer)}", "--suffix=-cm")
    results = read_json(os.path.join(scores, "results.json"), "run again")
    names = {*map(os.path.basename, (*own_models, *folders)), *ENSEMBLES, *(f"{name}-cm" for name in ENSEMBLES)}
    rows = [row for row in results["rows"] if row["name"] in names]  # eval.py keeps others, too
    results["rows"] = tables.in_order(rows)
    for row in results["rows"]:
        behind = [folder for folder in (*own_models, *folders) if os.path.basename(folder) == row["name"]]
        ensemble = longer if row["name"].endswith("-cm") else split_list(experts)
        chain_runs = lineage(behind or ensemble)
        row["critical_seconds"], row["bytes_sent"] = critical_seconds(chain_runs), bytes_sent(chain_runs)
        tables.add_average(row)
    return results


def summarize(chains):
    """compare.json's rows from the rows of each chain: means over the chains, with "std" beside them."""
    rows = []
    for same in zip(*chains, strict=True):
        assert len({row["name"] for row in same}) == 1, "the chains' rows differ"
        counts = {name: sum(row[name] for row in same) / len(same) for name in COUNTS}
        rows.append({"name": same[0]["name"], **tables.mean_and_std(same), **counts})
    return rows


def write_report(folder, found):
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
    chains = [Chain(folder) for folder in split_list(config.chains) or [config.out_dir]]
    report = config.path("report")
    os.makedirs(report, exist_ok=True)
    if config.sweep:
        path = os.path.join(report, "sweep.json")
        before = read_json(path, "remove it")["rates"] if os.path.exists(path) else {}
        write_json(path, {"rates": before | sweep(config, chains[0]), "config": dataclasses.asdict(config)})
        return
    results = []
    for chain in chains:
        baselines, longer = train_baselines(config, chain), train_longer_branches(config, chain)
        results.append(evaluate(config, chain, baselines, longer))
    first, rows = results[0], [one["rows"] for one in results]
    found = {
        "rows": summarize(rows),
        "chains": rows,
        "config": {**first["config"], "compare": dataclasses.asdict(config)},
        **{name: first[name] for name in ("data", "baselines", "versions")},
    }
    write_report(report, found)
    print(f"{report}/compare.md has the tables and pictures")


if __name__ == "__main__":
    command(main)
