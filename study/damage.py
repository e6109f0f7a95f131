"""Where averaging hurts: scores experts on their own domains with a group of tensors replaced by the models' average.

    python -m study.damage --experts=out/cpu/expert-code,out/cpu/expert-math,out/cpu/expert-wiki,out/cpu/seed

The last of --experts is the seed model. A mixture averages everything but the feed-forward networks, so what an expert
loses on its own domain when its attention, norms and embeddings are averaged is what mixing breaks and finetuning has
to repair. The same with the seed's tensors instead of the average shows how much an expert learned in a group; the
drift shows how far the experts moved it. Nothing is trained. Writes damage.json, damage.md and damage.png.
"""

import dataclasses
import os

import torch

from common.config import key, parse, split_list
from common.corpus import HELD_OUT, Corpus
from common.device import pick_device, place
from common.errors import UserError, command, write_atomically, write_json
from common.hf import group_of, same_tokenizer
from common.run import parent_of, trained_on, versions
from eval import ReadingConfig, averaged
from model import ModelConfig, Transformer
from study.draw import plot_damage
from study.tables import markdown_table
from train import bits_per_byte


@dataclasses.dataclass
class DamageConfig(ReadingConfig):
    """Measure what averaging each group of tensors costs the experts on their own domains."""

    experts: str = key("", "the branches of one seed, and last the seed itself, separated by commas")
    out_dir: str = key("out/cpu/report", "where damage.json, damage.md and damage.png go")
    split: str = key("val", "held-out text to score", HELD_OUT)
    eval_windows: int = key(32, "windows per domain", within="[1, inf)")
    kinds: bool = key(True, "also replace the tensors kind by kind")
    layers: bool = key(True, "also replace the tensors layer by layer")


MIXING = "all but feed-forward (mixing)"
SOUP = "everything (soup)"


def groups_of(names, num_layers, kinds=True):
    """{label: the set of names of tensors to replace together}: by kind, then by layer (all but feed-forwards)."""
    groups = {"nothing": set()}
    for name in names if kinds else ():
        groups.setdefault(group_of(name), set()).add(name)
    shared = {name for name in names if group_of(name) != "feed-forward"}
    groups |= {MIXING: shared, SOUP: set(names)}
    for layer in range(num_layers):
        groups[f"layer {layer}, all but feed-forward"] = {n for n in shared if f".layers.{layer}." in n}
    return groups


def relative_drift(names, expert, seed):
    """|expert - seed| / |seed| over some tensors, in the Euclidean norm; 0 for none."""
    moved = sum((expert[name] - seed[name]).square().sum().item() for name in names)
    return (moved / sum(seed[name].square().sum().item() for name in names)) ** 0.5 if names else 0.0


@torch.no_grad()
def replace_groups(config, corpus, folders):
    """{label: {"averaged": {domain: bits per byte, "avg"}, "seed": the same, "drift": mean over the experts}}."""
    device = pick_device(config.device, config.threads)
    models = [dict(Transformer.from_pretrained(folder).named_parameters()) for folder in folders]
    *branches, seed = models
    mean = {name: sum(one[name].double() for one in models) / len(models) for name in seed}
    homes = [max(mixture, key=mixture.get) for mixture in map(trained_on, folders[:-1])]
    experts = {domain: one for domain, one in zip(homes, branches, strict=True) if domain in corpus.domains}
    if not experts:
        raise UserError(f"--domains={config.domains}: the branches are for {', '.join(homes)}; name some of these")
    size = config.split, config.sequence_length, config.eval_windows
    windows = {domain: corpus.windows(domain, *size) for domain in experts}
    model = place(Transformer.from_pretrained(folders[-1]), device, config.dtype)

    def at_home(names, replacement):
        """{domain: its expert's bits per byte with tensors `names` from `replacement`, "avg": their mean}."""
        scores = {}
        for domain, expert in experts.items():
            for name, parameter in model.named_parameters():
                parameter.copy_(replacement[name] if name in names else expert[name])
            scores[domain] = bits_per_byte(model, *windows[domain], corpus.token_bytes)
        return averaged(scores)

    found = {}
    layers = model.config.num_hidden_layers if config.layers else 0
    for label, names in groups_of(list(seed), layers, config.kinds).items():
        drifts = [relative_drift(names, expert, seed) for expert in experts.values()]
        scores = {"averaged": at_home(names, mean)}
        scores["seed"] = at_home(names, seed) if names else scores["averaged"]
        found[label] = {**scores, "drift": sum(drifts) / len(drifts)}
        print(f"{label:40s} averaged {scores['averaged']['avg']:.3f}   the seed's {scores['seed']['avg']:.3f}")
    return found


def damage_table(found):
    """A Markdown table of the groups: bits per byte on the experts' domains, and how far they moved the group."""
    domains = list(found["nothing"]["averaged"])
    header = ["replaced by the average", *domains, "avg with the seed's instead", "drift"]
    body = []
    for label, row in found.items():
        scores = [f"{row['averaged'][domain]:.3f}" for domain in domains]
        body.append([label, *scores, f"{row['seed']['avg']:.3f}", f"{row['drift']:.1%}"])
    return markdown_table(header, body)


def main():
    config = parse(DamageConfig)
    folders = split_list(config.experts)
    if len(folders) < 3:
        raise UserError("--experts must name at least two branches and, last, their seed: --experts=DIR,DIR,SEED")
    models = [ModelConfig.from_pretrained(folder) for folder in folders]
    for folder, model in zip(folders, models, strict=True):
        if model.num_local_experts or model != models[0]:
            raise UserError(f"{folder} is not a dense model shaped like {folders[0]}; name branches of one seed")
    corpus = Corpus(config.data_dir, config.domains)
    same_tokenizer([config.data_dir, *folders])
    corpus.check_vocabulary(folders[0], models[0].vocab_size)
    found = replace_groups(config, corpus, folders)
    os.makedirs(config.out_dir, exist_ok=True)
    ids = {folder: parent_of(folder)[0] for folder in folders}
    settings = {"config": dataclasses.asdict(config), "models": ids, "data": corpus.hashes()}
    write_json(os.path.join(config.out_dir, "damage.json"), {"groups": found, **settings, "versions": versions()})
    write_atomically(os.path.join(config.out_dir, "damage.md"), f"# Where averaging hurts\n\n{damage_table(found)}\n")
    plot_damage(found, os.path.join(config.out_dir, "damage.png"))


if __name__ == "__main__":
    command(main)
