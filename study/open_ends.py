"""Questions that the paper leaves open, each tried on the pipeline's own chains, with several random seeds.

    python -m study.open_ends --ends=grow,unequal     # uses the seeds and branches of bash run.sh if they exist

Each open end is a function below: it adds jobs to a chain, plain commands that you can also type yourself, and returns
the cases to compare. docs/open_ends.md has the results. Writes open_ends.json and open_ends.md into out_dir/report.
"""

import dataclasses
import os
import shutil
import statistics
import time
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from common.config import key, split_list
from common.corpus import Corpus
from common.errors import UserError, command, read_json, write_atomically, write_json
from common.hf import hidden_dim
from common.run import read_log, versions
from model import ModelConfig, Transformer
from study.chain import HELD, Job, StudyConfig, parse_study
from study.compare import chain_with
from study.draw import plot_experts_per_token
from study.tables import half_width, markdown_table

QUICK = ("--spliced_windows=0", "--task_problems=8")  # for ends that compare only bits per byte
REBUILT = "all mixed anew, everything finetuned"
WIDER = 4 / 3  # unequal branches: the middle one's width or steps, times 2 / 3, 1 and 4 / 3
TIMED = 5  # rounds of timing each k


@dataclasses.dataclass
class OpenConfig(StudyConfig):
    """Try what the paper leaves open."""

    ends: str = key("grow,unequal,top_k", "which open ends to try; see ENDS in study/open_ends.py")
    seeds: str = key("1,2,3", "the random seeds, with a chain each: 1 in out_dir, others in out_dir/seedN")


class Case(NamedTuple):
    """A model to score. label: its row, which is the mean over all cases with this label. shown: {column: (metric,
    domains)}, the mean of a metric in results.json over domains; or ("log", (folder, line)), bits per byte in a log."""

    label: str
    folder: str
    shown: dict


def bits(domains):
    return "bpb", tuple(domains)


def average_and_each(domains):
    """The columns of bits per byte of some domains."""
    return {"average": bits(domains)} | {domain: bits([domain]) for domain in domains}


def finetuned(chain):
    """The pipeline's own ({domain: its branch}, the mixture of all branches and the seed, the same finetuned)."""
    seed = chain.seed()
    experts = {domain: chain.branch(domain) for domain in chain.branched}
    mixed = chain.mix([*experts.values(), seed])
    return experts, mixed, chain.finetune(mixed)


# ---- experts that come and go ----


def change(chain, mixture, folder, *flags, needs=()):
    """Add a job that runs mix.py --add or --remove."""
    flags = f"--mixture={mixture}", f"--data_dir={chain.data}", *flags
    return chain.add(folder, "mix.py", "", *flags, needs=[mixture, *needs])


def tune(chain, mixture, folder, domains, steps, *flags):
    """Add `steps` steps of finetuning on some domains."""
    flags = f"--max_steps={steps}", f"--eval_interval={steps}", f"--warmup_steps={max(1, steps // 20)}", *flags
    return chain.train(folder, "finetune.py", "finetune", mixture, ",".join(domains), *flags)


def grow(chain):
    """Each domain in turn joins a finetuned mixture of the others, and leaves a mixture of all."""
    seed, steps = chain.seed(), chain.budget.finetuning.max_steps
    experts, mixed, whole = finetuned(chain)
    cases = []
    for new, expert in experts.items():
        others = [domain for domain in experts if domain != new]
        shown = {"the other domains": bits(others), "the domain itself": bits([new])}
        path = f"{chain.config.path('open/grow')}/{new}/{{}}".format
        two = chain.mix([*(experts[domain] for domain in others), seed], folder=path("mixed"))
        models = {"seed model": seed}
        share = round(steps * len(others) / len(experts))
        for words, suffix, flags in (("", "", ()), (", shared weights held", "-held", (HELD,))):
            before = tune(chain, two, path(f"before{suffix}"), others, share, *flags)
            joined = change(chain, before, path(f"joined{suffix}"), f"--add={expert}", needs=[expert])
            models[f"before it joins{words}"] = before
            models[f"joined{words}"] = joined
            for count in (20, 100):
                routers = tune(chain, joined, f"{joined}-{count}", experts, count, "--freeze=all-but-router")
                models[f"joined{words}, {count} steps of the routers"] = routers
        models["all mixed anew"] = mixed
        models[REBUILT] = whole
        models["the same, without it again"] = change(chain, whole, path("left"), f"--remove=expert-{new}")
        cases += [Case(label, folder, shown) for label, folder in models.items()]
    return cases


# ---- unequal branches (HDEE, arXiv 2502.19385) ----


@torch.no_grad()
def resized(folder, width, out_dir):
    """Write a dense model with feed-forwards of another width: drop the hidden units with the smallest output weights,
    or add ones whose output weights are zero, so that they change nothing until they are trained."""
    config, tensors = ModelConfig.from_pretrained(folder), load_file(os.path.join(folder, "model.safetensors"))
    random = torch.Generator().manual_seed(0)
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}.mlp.{{}}.weight".format
        order = tensors[name("down_proj")].norm(dim=0).argsort(descending=True)[:width]
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            old = tensors[name(matrix)]
            dim = hidden_dim(name(matrix))
            kept = old.index_select(dim, order)
            shape = list(kept.shape)
            shape[dim] = width - shape[dim]
            scale = 0.0 if matrix == "down_proj" else old.std().item()
            tensors[name(matrix)] = torch.cat((kept, scale * torch.randn(shape, generator=random)), dim).contiguous()
    shutil.copytree(folder, out_dir, dirs_exist_ok=True, ignore=shutil.ignore_patterns("state.pt", "*.safetensors"))
    settings = read_json(os.path.join(out_dir, "config.json"), "remove it") | {"intermediate_size": width}
    write_json(os.path.join(out_dir, "config.json"), settings, indent=2)
    save_file(tensors, os.path.join(out_dir, "model.safetensors"), {"format": "pt"})
    os.remove(os.path.join(out_dir, "run.json"))  # these are no longer that run's weights


def unequal(chain):
    """More steps or more hidden units for the hardest domain and fewer for the easiest, and the other way round. All
    with the compute of equal branches. --domains must be in order of the seed's bits per byte, hardest first."""
    seed, middle = chain.seed(), chain.budget.branch.max_steps
    width = chain.budget.dense_config.intermediate_size
    shown = average_and_each(chain.branched)
    shares = [WIDER - i * (WIDER - 2 / 3) / (len(chain.branched) - 1) for i in range(len(chain.branched))]
    cases = [Case("equal branches", finetuned(chain)[-1], shown)]
    for label, scale in {"hardest gets more": shares, "easiest gets more": shares[::-1]}.items():
        for what in ("steps", "hidden units"):
            path = chain.config.path(f"open/unequal/{label.split()[0]}-{what.split()[0]}")
            experts = []
            for domain, share in zip(chain.branched, scale, strict=True):
                flags, start = [], seed
                if what == "steps":
                    flags.append(f"--max_steps={round(share * middle)}")
                else:
                    start = chain.config.path(f"open/unequal/seed-{round(share * width)}")
                    if not os.path.exists(start):
                        resized(seed, round(share * width), start)
                folder = f"{path}/expert-{domain}"
                experts.append(chain.train(folder, "train.py", chain.stage_of(domain), start, domain, *flags))
            tuned = chain.finetune(chain.mix([*experts, seed], folder=f"{path}/mixed"), folder=f"{path}/btx")
            cases.append(Case(f"{label} {what}", tuned, shown))
    return cases


# ---- domains without labels (c-BTM, arXiv 2303.14177) ----


def unrecorded(chain):
    """A copy of the seed without a record of its training: mix.py then treats it as trained on the others' domains,
    whatever their names."""
    folder = chain.config.path("open/generalist")
    if not os.path.exists(folder):
        shutil.copytree(chain.seed_folder, f"{folder}.tmp", ignore=shutil.ignore_patterns("run.json", "state.pt"))
        os.rename(f"{folder}.tmp", folder)
    return folder


def clusters(chain):
    """Branches for domains discovered in the labelled domains' text, with as many tokens in total; a random split is
    the control. The finetuning is that of the labelled domains: it reads the same text."""
    seed, shown = chain.seed(), average_and_each(chain.domains)
    steps = chain.budget.branch.max_steps * len(chain.branched)
    cases = [Case("a branch for each label", finetuned(chain)[-1], shown)]
    for method, k in (("tfidf", 2), ("tfidf", 4), ("tfidf", 8), ("random", 4)):
        path = chain.config.path(f"open/clusters/{method}-{k}")
        data = f"{path}/data"
        flags = f"--data_dir={chain.data}", f"--domains={','.join(chain.domains)}", f"--out_dir={data}"
        # eight clusters may leave one without held-out text; with seed 1 they do not
        flags += (f"--clusters={k}", f"--method={method}", f"--seed={chain.config.seed if k < 8 else 1}")
        chain.jobs.append(Job(f"open/clusters/{method}-{k}/data", ("-m", "data.discover", *flags)))
        experts = []
        for i in range(k):
            flags = f"--data_dir={data}", f"--max_steps={round(steps / k)}"
            folder = f"{path}/expert-c{i}"
            experts.append(chain.train(folder, "train.py", "expert", seed, f"c{i}", *flags, needs=[data]))
        mixed = chain.mix([*experts, unrecorded(chain)], f"--data_dir={data}", folder=f"{path}/mixed")
        tuned = chain.finetune(mixed, folder=f"{path}/btx")
        cases.append(Case(f"{k} {'clusters' if method == 'tfidf' else 'random parts'}", tuned, shown))
    return cases


# ---- instruction finetuning ----

CHATS = {"math": "math-chat", "wiki": "wiki-chat"}  # {domain: the domain of its chats}
INSTRUCT = ("--loss_on=answers", "--splice=0", "--learning_rate=3e-4", "--eval_interval=1000")  # LOG.md
INSTRUCT_STEPS = 150  # for a dense model; a mixture gets the same FLOPs
ROUTERS_ALONE = 0.05  # of the chats, as in BAR


def instruct(chain, script, start, name, steps, *flags, domains=()):
    """Add `steps` steps of training on the answers in chats. script: train.py (dense) or finetune.py (mixtures)."""
    stage = "finetune" if script == "finetune.py" else "expert"
    flags = (f"--max_steps={steps}", f"--warmup_steps={max(1, steps // 10)}", *INSTRUCT, *flags)
    folder, text = chain.config.path(f"open/chats/{name}"), chain.config.path("open/chats/data")
    return chain.train(folder, script, stage, start, ",".join(domains or CHATS.values()), *flags, needs=[text])


def chats(chain):
    """Dense training and Branch-Train-MiX, each instruction-tuned afterwards with the same FLOPs; the same with only
    routers trained; and branches instruction-tuned before mixing, then only routers, on 5 % of the chats (BAR)."""
    budget, path = chain.budget, chain.config.path
    written = ",".join(f"{chat}={path('open/chats/text')}/{domain}.jsonl" for domain, chat in CHATS.items())
    prepare = chain.config.stage("data"), f"--domains={written}", f"--out_dir={chain.data}"
    chain.jobs.append(Job("open/chats/text", ("-m", "data.chats", f"--out_dir={path('open/chats/text')}")))
    chain.jobs.append(Job("open/chats/data", ("-m", "data.prepare", *prepare), ("open/chats/text",)))
    experts, _, whole = finetuned(chain)
    dense = chain.dense(budget.dense_steps())
    steps = round(INSTRUCT_STEPS * budget.dense_flops / budget.mixture_flops)
    few, alone = max(1, round(ROUTERS_ALONE * steps)), "--freeze=all-but-router"
    told = instruct(chain, "train.py", dense, "dense", INSTRUCT_STEPS, "--freeze=none")
    # label: (the model, the run whose log scores its answers, the line of that log)
    models = {"dense training": (dense, told, 0), "dense training, instructed": (told, told, -1)}
    told = instruct(chain, "finetune.py", whole, "btx", steps)
    models |= {"Branch-Train-MiX": (whole, told, 0), "Branch-Train-MiX, instructed": (told, told, -1)}
    told = instruct(chain, "finetune.py", whole, "routers", steps, alone)
    models["Branch-Train-MiX, routers instructed alone"] = told, told, -1
    for domain in filter(experts.get, CHATS):
        flags = {"domains": [CHATS[domain]]}
        experts[domain] = instruct(chain, "train.py", experts[domain], f"expert-{domain}", INSTRUCT_STEPS // 2, **flags)
    mixed = chain.mix([*experts.values(), unrecorded(chain)], folder=path("open/chats/mixed"))
    told = instruct(chain, "finetune.py", mixed, "bar", few, alone)
    models["branches instructed, then mixed"] = mixed, told, 0
    models["branches instructed, then mixed, routers on 5 % of the chats"] = told, told, -1
    shown = {"text": bits(chain.domains)}
    shown |= {f"{domain}, written": ("accuracy", (domain,)) for domain in CHATS}
    shown |= {f"{domain}, chosen": ("choice", (domain,)) for domain in CHATS}
    return [Case(label, model, {"answers": ("log", log), **shown}) for label, (model, *log) in models.items()]


# ---- how many experts, and which ----


def top_k(chain):
    """The finetuned mixture with 1 to N experts per token; and, for each domain, with only its own expert and the seed.
    Changing k needs no training: eval.py sets it."""
    experts, _, whole = finetuned(chain)
    shown = average_and_each(chain.branched)
    cases = [Case(f"top-{k}", whole, shown) for k in range(1, len(experts) + 2)]
    for domain in experts:
        others = ",".join(f"expert-{name}" for name in experts if name != domain)
        own = change(chain, whole, chain.config.path(f"open/top_k/{domain}"), f"--remove={others}")
        cases.append(Case("its own expert and the seed", own, {"average": bits([domain]), domain: bits([domain])}))
    return cases


def speeds(folder, chain, windows=32):
    """{k: thousands of tokens per second in a mixture's forward pass with k experts per token}, on one thread: the
    median of rounds in which all k take turns."""
    torch.set_num_threads(1)
    ids = Corpus(chain.data).windows(chain.domains[0], "test", chain.scoring().sequence_length, windows)[0]
    models = {}
    for k in range(1, ModelConfig.from_pretrained(folder).num_local_experts + 1):
        models[k] = Transformer.from_pretrained(folder, num_experts_per_tok=k)
    seconds = {k: [] for k in models}
    with torch.inference_mode():
        for _ in range(TIMED):
            for k, model in models.items():
                start = time.perf_counter()
                model(ids, ids)
                seconds[k].append(time.perf_counter() - start)
    return {k: ids.numel() / statistics.median(some) / 1000 for k, some in seconds.items()}


# ---- all of them ----


class End(NamedTuple):
    """make: function(chain) -> [Case]. base: the label to compare the others with. flags: for eval.py."""

    make: object
    base: str
    flags: tuple = QUICK


ENDS = {
    "grow": End(grow, REBUILT),
    "unequal": End(unequal, "equal branches"),
    "top_k": End(top_k, "top-2"),
    "clusters": End(clusters, "a branch for each label"),
    "chats": End(chats, "Branch-Train-MiX, instructed", ("--spliced_windows=0",)),
}


def score(chain, name, cases):
    """Add the jobs that score the cases of an open end; returns the path of their results.json."""
    folder = chain.config.path(f"open/{name}/scores")
    for label, model in dict.fromkeys((case.label, case.folder) for case in cases):
        row = row_name(label, model, chain)
        flags = [f"--model={row}={model}", f"--out_dir={folder}", *ENDS[name].flags]
        if label.startswith("top-"):
            flags.append(f"--num_experts_per_tok={label.removeprefix('top-')}")
        chain.add_score(f"open/{name}/score-{row}", ("eval.py",), *flags, needs=[model])
    return os.path.join(folder, "results.json")


def row_name(label, model, chain):
    """The name of a case's row in results.json."""
    place = os.path.relpath(model, chain.config.path("open")) if "open" in model else os.path.basename(model)
    return "-".join([place.replace(os.sep, "-"), *([label] if label.startswith("top-") else [])])


def values_of(cases, rows, chain):
    """{label: {column: the mean over a chain's cases}}. rows: {name: row of results.json}."""
    found = {}
    for case in cases:
        row = rows[row_name(case.label, case.folder, chain)]
        for column, (metric, domains) in case.shown.items():
            if metric == "log":
                folder, line = domains
                one = read_log(folder)[line]["bpb"]["avg"]
            else:
                one = statistics.mean(row[metric][domain] for domain in domains)
            found.setdefault(case.label, {}).setdefault(column, []).append(one)
    return {label: {column: statistics.mean(some) for column, some in one.items()} for label, one in found.items()}


def summary(chains, base):
    """{label: {column: {"mean", "lead", "half"}}} over the random seeds. lead: the mean of base minus the row, within
    each chain; half: half of its 95 % interval, by Student's t. chains: a list of results of values_of."""
    found = {}
    for label, columns in chains[0].items():
        for column in columns:
            values = [chain[label][column] for chain in chains]
            one = {"mean": statistics.mean(values)}
            if column in chains[0][base] and label != base:
                leads = [chain[base][column] - chain[label][column] for chain in chains]
                error = statistics.stdev(leads) / len(leads) ** 0.5 if len(leads) > 1 else 0.0
                one |= {"lead": statistics.mean(leads), "half": half_width(error, len(leads))}
            found.setdefault(label, {})[column] = one
    return found


def table(found):
    """A table of `summary`: in each cell the mean and, in some columns, how far it is above or below the base's."""
    columns = list(dict.fromkeys(column for one in found.values() for column in one))
    rows = []
    for label, one in found.items():
        cells = []
        for column in columns:
            cell = one.get(column)
            text = f"{cell['mean']:{'.1%' if column.endswith(('written', 'chosen')) else '.3f'}}" if cell else ""
            if cell and "lead" in cell and (len(columns) < 3 or column == columns[0]):
                text += f" ({-cell['lead']:+.3f} ± {cell['half']:.3f})"
            cells.append(text)
        rows.append([label, *cells])
    return markdown_table(["", *columns], rows)


def main():
    config = parse_study(OpenConfig, "open_ends")
    names = split_list(config.ends)
    if unknown := [name for name in names if name not in ENDS]:
        raise UserError(f"--ends={config.ends}: there is no {unknown[0]}; choose from {', '.join(ENDS)}")
    chains = []
    for number in split_list(config.seeds):
        chain = chain_with(config, number)
        finetuned(chain)
        chain.run(quiet=True)  # what the ends start from
        chain.jobs.clear()
        cases = {name: ENDS[name].make(chain) for name in names}
        paths = {name: score(chain, name, some) for name, some in cases.items()}
        chain.run(quiet=True)
        chains.append((chain, cases, paths))
    report = config.path("report")
    os.makedirs(report, exist_ok=True)
    path = os.path.join(report, "open_ends.json")
    found = read_json(path, "remove it") if os.path.exists(path) else {}
    for name in names:
        values = []
        for chain, cases, paths in chains:
            rows = {row["name"]: row for row in read_json(paths[name], "run again")["rows"]}
            values.append(values_of(cases[name], rows, chain))
        found[name] = {"chains": values, "rows": summary(values, ENDS[name].base), "base": ENDS[name].base}
        found[name] |= {"seeds": config.seeds, "versions": versions()}
    if "top_k" in names:
        chain, cases, _ = chains[0]
        found["top_k"]["speed"] = speeds(cases["top_k"][0].folder, chain)
        plot_experts_per_token(found["top_k"], os.path.join(report, "top_k.png"))
    write_json(path, found)
    text = [f"## {name}\n\n{table(one['rows'])}\n" for name, one in found.items()]
    write_atomically(os.path.join(report, "open_ends.md"), "# What the paper leaves open\n\n" + "\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    command(main)
