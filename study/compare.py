"""The paper's comparison: BTX against every other way to spend the same tokens, or the same training FLOPs.

    bash run.sh cpu compare       # or, when the chains are there:
    python -m study.compare config/cpu/compare.py --chains=out/cpu,out/cpu/seed2,out/cpu/seed3

A chain is the whole pipeline with one random seed: a folder with seed, expert-*, soup, mixed, btx and its report. To
each, this trains what the paper compares with, from the same seed model:

    dense-dm      the dense model goes on with the data that BTX saw: the experts' and the finetuning's (data-matched)
    dense-cm      the same for as many training FLOPs as BTX took (compute-matched): its tokens are cheaper, so more
    upcycle-dm    copies of the seed model as the experts, then finetuning, the same tokens as BTX
    upcycle-cm    the same for BTX's FLOPs: all its tokens go through the mixture, so fewer
    btx-sample    BTX with the sample top-1 router

(Sukhbaatar et al. 2024, section 4.1.2.) Each is one run with one cosine. Writes compare.json, compare.md and pictures.
--sweep=True trains on the first chain only, with all of --rates, and writes what validation data says of them.
"""

import dataclasses
import json
import os
import shutil

from common.checkpoint import read_run
from common.config import UserError, command, key, parse, read_json, write_atomically
from study.ablate import run
from study.btm import ENSEMBLES, training_mixture
from study.compare_report import in_order, write_report
from study.cost import bytes_sent, critical_seconds, lineage
from study.report import mean_and_std, read_log

BASELINES = "dense-dm", "dense-cm", "upcycle-dm", "upcycle-cm", "btx-sample"
COUNTS = "active_params", "total_params", "train_tokens", "train_flops", "seconds", "critical_seconds", "bytes_sent"


@dataclasses.dataclass
class CompareConfig:
    """Train the baselines beside one or more chains, evaluate them, and compare."""

    chains: str = key("out/cpu", "folders with a finished pipeline each, separated by commas")
    report: str = key("out/cpu/report", "where compare.json, compare.md and the pictures go")
    data_dir: str = key("out/cpu/data", "the folder that data/prepare.py wrote")
    expert: str = key("config/cpu/expert.py", "the config of train.py that dense runs start from")
    finetune: str = key("config/cpu/finetune.py", "the config of finetune.py that mixtures start from")
    eval: str = key("config/cpu/eval.py", "the config of eval.py")
    dense_learning_rate: float = key(6e-3, "peak learning rate of the dense runs")
    upcycle_learning_rate: float = key(6e-3, "peak learning rate of the upcycled runs")
    sweep: bool = key(False, "try --rates on the first chain instead, and stop")
    rates: str = key("3e-3,6e-3,1.2e-2", "the learning rates of --sweep, the same for every method")


class Chain:
    """A finished pipeline: its folder, its runs, and what BTX spent after the seed model."""

    def __init__(self, folder, data_dir):
        self.folder = folder
        before, self.btx = self.run("seed")["history"], self.run("btx")
        experts = self.run("mixed")["recipe"]["parents"]
        self.experts = [os.path.basename(expert) for expert in experts]
        self.branch = self.run(next(name for name in self.experts if name != "seed"))
        spent = {name: cost for name, cost in self.btx["history"].items() if name not in before}
        self.tokens = sum(cost["tokens"] for cost in spent.values())
        self.flops = sum(cost["flops"] for cost in spent.values())
        tokens = {}  # of each domain
        for name, cost in spent.items():
            for domain, share in training_mixture(name, data_dir).items():
                tokens[domain] = tokens.get(domain, 0) + share * cost["tokens"]
        self.mixture = ",".join(f"{domain}:{count:.0f}" for domain, count in tokens.items())
        self.seed = own(self.btx)[1]["seed"]  # the random one

    def path(self, name):
        return os.path.join(self.folder, name)

    def run(self, name):
        """run.json of one of the chain's folders; UserError unless it is finished."""
        found = read_run(self.path(name))
        if found is None or not found["finished"]:
            raise UserError(f"{self.path(name)} is not there or not finished; run the pipeline first: bash run.sh")
        return found


def own(run):
    """The tokens, FLOPs and settings of a run by itself, without those before it."""
    settings = run["recipe"]["config"]
    return run["history"][settings["out_dir"]], settings


# ---- training the baselines ----


def steps_for(model, tokens=None, flops=None):
    """How many steps of a run like `model` (a run.json) take so many tokens, or else so many training FLOPs."""
    cost, settings = own(model)
    tokens = tokens or flops / (cost["flops"] / cost["tokens"])
    return round(tokens / (settings["batch_size"] * settings["sequence_length"]))


def train_dense(config, chain, name, learning_rate, **budget):
    """Go on from the seed model, dense, with the data that BTX saw."""
    run(
        "train.py",
        config.expert,
        f"--init_from={chain.path('seed')}",
        f"--out_dir={chain.path(name)}",
        f"--domain={chain.mixture}",
        f"--max_steps={steps_for(chain.branch, **budget)}",
        f"--learning_rate={learning_rate}",
        f"--seed={chain.seed}",
    )


def train_upcycled(config, chain, name, learning_rate, **budget):
    """Go on from copies of the seed model as the experts, with the data that BTX saw."""
    copies = chain.path("compare/upcycled")
    run(
        "mix.py",
        "--method=upcycle",
        f"--experts={chain.path('seed')}",
        f"--num_experts={len(chain.experts)}",
        f"--num_experts_per_tok={own(chain.btx)[1]['num_experts_per_tok']}",
        f"--out_dir={copies}",
        f"--seed={chain.seed}",
    )
    run(
        "finetune.py",
        config.finetune,
        f"--init_from={copies}",
        f"--out_dir={chain.path(name)}",
        f"--domain={chain.mixture}",
        f"--max_steps={steps_for(chain.btx, **budget)}",
        f"--learning_rate={learning_rate}",
        f"--seed={chain.seed}",
    )


def train_btx(config, chain, name, *changes):
    """Finetune the chain's mixture once more, with changes."""
    run(
        "finetune.py",
        config.finetune,
        f"--init_from={chain.path('mixed')}",
        f"--out_dir={chain.path(name)}",
        f"--max_steps={own(chain.btx)[1]['max_steps']}",
        f"--seed={chain.seed}",
        *changes,
    )


def train_baselines(config, chain):
    """Train all baselines of one chain; returns their folders."""
    dense, upcycle = config.dense_learning_rate, config.upcycle_learning_rate
    train_dense(config, chain, "compare/dense-dm", dense, tokens=chain.tokens)
    train_dense(config, chain, "compare/dense-cm", dense, flops=chain.flops)
    train_upcycled(config, chain, "compare/upcycle-dm", upcycle, tokens=chain.tokens)
    train_upcycled(config, chain, "compare/upcycle-cm", upcycle, flops=chain.flops)
    train_btx(config, chain, "compare/btx-sample", "--router=sample")
    return [chain.path(f"compare/{name}") for name in BASELINES]


def sweep(config, chain):
    """Train the data-matched rows and BTX's finetuning with each of --rates; {row: {rate: validation bpb, averaged}}.

    Every method gets the same rates, and the score is the one that training logs: validation text, not test text. The
    run with the rate that is configured now is the comparison's own.
    """
    now = {"dense-dm": config.dense_learning_rate, "upcycle-dm": config.upcycle_learning_rate}
    now["btx"] = own(chain.btx)[1]["learning_rate"]
    found = {name: {} for name in now}
    for rate in config.rates.split(","):
        for name in found:
            final = "btx" if name == "btx" else f"compare/{name}"
            folder = final if float(rate) == now[name] else f"compare/sweep/{name}-{rate}"
            if name == "dense-dm":
                train_dense(config, chain, folder, rate, tokens=chain.tokens)
            elif name == "upcycle-dm":
                train_upcycled(config, chain, folder, rate, tokens=chain.tokens)
            else:
                train_btx(config, chain, folder, f"--learning_rate={rate}")
            found[name][rate] = read_log(chain.path(folder))[-1]["bpb"]["avg"]
            print(f"{name} at {rate}: {found[name][rate]:.4f} bits per byte on validation text")
    return found


# ---- comparing ----


def evaluate(config, chain, folders):
    """The rows of results.json of a chain's own models, the ensembles and the baselines, costs added."""
    experts = ",".join(chain.path(name) for name in chain.experts)
    own_models = [chain.path(name) for name in dict.fromkeys(["seed", *chain.experts, "soup", "mixed", "btx"])]
    scores, pipeline = chain.path("compare/scores"), chain.path("report/results.json")
    if os.path.exists(pipeline) and not os.path.exists(f"{scores}/results.json"):
        os.makedirs(scores, exist_ok=True)
        shutil.copy(pipeline, f"{scores}/results.json")  # eval.py keeps rows that are still right
    models = ",".join([*own_models, *folders])
    run("eval.py", config.eval, f"--model={models}", f"--experts={experts}", f"--out_dir={scores}")
    results = read_json(os.path.join(scores, "results.json"), "run again")
    names = {*map(os.path.basename, (*own_models, *folders)), *ENSEMBLES}
    results["rows"] = [row for row in results["rows"] if row["name"] in names]  # eval.py keeps others, too
    for row in results["rows"]:
        behind = [folder for folder in (*own_models, *folders) if os.path.basename(folder) == row["name"]]
        runs = lineage(behind or experts.split(","))
        row["critical_seconds"], row["bytes_sent"] = critical_seconds(runs), bytes_sent(runs)
        row["accuracy"]["avg"] = sum(row["accuracy"].values()) / max(1, len(row["accuracy"]))
    return results


def summarize(chains):
    """compare.json's rows from the rows of each chain: means over the chains, with "std" beside them."""
    rows = []
    for same in zip(*chains, strict=True):
        assert len({row["name"] for row in same}) == 1, "the chains' rows differ"
        counts = {name: sum(row[name] for row in same) / len(same) for name in COUNTS}
        rows.append({"name": same[0]["name"], **mean_and_std(same), **counts})
    return in_order(rows)


def main():
    config = parse(CompareConfig)
    chains = [Chain(folder, config.data_dir) for folder in config.chains.split(",")]
    os.makedirs(config.report, exist_ok=True)
    if config.sweep:
        found = {"rates": sweep(config, chains[0]), "config": dataclasses.asdict(config)}
        write_atomically(os.path.join(config.report, "sweep.json"), json.dumps(found, indent=1) + "\n")
        return
    results = [evaluate(config, chain, train_baselines(config, chain)) for chain in chains]
    first = results[0]
    chains = [one["rows"] for one in results]
    found = {
        "rows": summarize(chains),
        "chains": chains,
        "config": {**first["config"], "compare": dataclasses.asdict(config)},
        **{name: first[name] for name in ("data", "baselines", "versions")},
    }
    write_report(config.report, found)
    print(f"{config.report}/compare.md has the tables and pictures")


if __name__ == "__main__":
    command(main)
