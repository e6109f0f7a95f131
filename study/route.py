"""What the routers learned: where each domain's tokens go, and how much that reveals about the domain.

    python -m study.route --model=out/cpu/btx,out/cpu/btx-balanced --data_dir=out/cpu/data --out_dir=out/cpu/report

Writes routing.json, the picture routing.png and, for the first model, tokens-<domain>.html, pages that show each
token's experts. Nothing is sampled: a second run gives the same numbers.
Sizes: L layers, S tokens, E experts.
"""

import dataclasses
import math
import os

import torch

from common.config import key, parse, split_list
from common.corpus import Corpus
from common.device import pick_device, place
from common.errors import UserError, command, read_json, write_json
from common.hf import same_tokenizer
from common.run import parent_of, source
from eval import ReadingConfig
from model import Transformer
from study.draw import plot_routing
from study.tables import dead_experts
from study.tokens import check_mixture, expert_names, write_page

SETTINGS = ("data_dir", "split", "sequence_length", "eval_windows", "dtype")
BATCH_SIZE = 16
PAGE_WINDOWS = 2  # windows on a domain's page of tokens


@dataclasses.dataclass
class RouteConfig(ReadingConfig):
    """Measure and draw the routing of one or more mixtures."""

    model: str = key("out/cpu/btx", "checkpoint folders of mixtures, separated by commas")
    out_dir: str = key("out/cpu/report", "where routing.json, the pictures and the pages go")


@torch.no_grad()
def read_gates(model, windows):
    """A mixture's gates (L, S, E) on windows (count, T); S = count * T."""
    batches = windows.to(model.cos.device).split(BATCH_SIZE)
    return torch.cat([model(batch).gates.flatten(1, 2).cpu() for batch in batches], dim=1)


# ---- statistics; gates are (L, S, E) and 0 where an expert was not used ----


def share(gates):
    """(L, E): each expert's share of the sum of a layer's gates; given gates > 0, of its (token, expert) choices."""
    total = gates.double().sum(dim=1)  # (L, E)
    return total / total.sum(dim=-1, keepdim=True)


def entropy(p):
    """The entropy in bits of distributions along the last axis: 0 if one entry has everything, log2 k if k share it."""
    return torch.special.entr(p).sum(dim=-1) / math.log(2)


def gate_entropy(gates):
    """(L,): the entropy of a token's gates, averaged over tokens. Gates are first scaled to sum to 1, as those of a
    switch router do not."""
    gates = gates.double()
    return entropy(gates / gates.sum(dim=-1, keepdim=True)).mean(dim=-1)


def mutual_information(weights):
    """(L,): how many bits the expert reveals about the domain, H(expert) - H(expert given domain).

    weights: (domains, L, E), p(expert | domain) in each layer. Domains count equally, so the value is between 0 (all
    domains are spread alike) and log2 of the number of domains or experts, whichever is smaller.
    """
    return entropy(weights.mean(dim=0)) - entropy(weights).mean(dim=0)


def routing_of(gates, config):
    """A model's entry in routing.json. gates: {domain: (L, S, E)}; lists are [layer][expert]."""
    shares = {domain: share(g > 0) for domain, g in gates.items()}  # (L, E) each
    weights = {domain: share(g) for domain, g in gates.items()}
    names = expert_names(config)
    return {
        "experts": names,
        "experts_per_token": config.num_experts_per_tok,
        "mutual_information": rounded(mutual_information(torch.stack(list(weights.values())))),
        "dead": [[names[e] for e in layer] for layer in dead_experts({d: s.tolist() for d, s in shares.items()})],
        "domains": {
            domain: {
                "share": rounded(shares[domain]),
                "weight": rounded(weights[domain]),
                "gate_entropy": rounded(gate_entropy(g)),
            }
            for domain, g in gates.items()
        },
    }


def rounded(tensor):
    """Nested lists of a tensor's values to 5 places."""
    return tensor.double().mul(1e5).round().div(1e5).tolist()


# ---- the script ----


def read_routing(config, corpus, folders, ids):
    """The entries of routing.json, one per model; also writes the pages of the first model's tokens."""
    device = pick_device(config.device, config.threads)
    size = config.split, config.sequence_length, config.eval_windows
    windows = {domain: corpus.windows(domain, *size)[0] for domain in corpus.domains}
    entries = []
    for folder, identity in zip(folders, ids, strict=True):
        model = place(Transformer.from_pretrained(folder), device, config.dtype)
        name = os.path.basename(os.path.normpath(folder))
        corpus.check_vocabulary(name, model.config.vocab_size)
        if config.sequence_length > model.max_length:
            length = f"--sequence_length={config.sequence_length}"
            raise UserError(f"{length} is longer than {name} takes, {model.max_length} tokens")
        gates = {domain: read_gates(model, rows) for domain, rows in windows.items()}
        entries.append({"name": name, "id": identity, **routing_of(gates, model.config)})
        bits = ", ".join(f"{value:.3f}" for value in entries[-1]["mutual_information"])
        print(f"{name}: the expert reveals {bits} bits about the domain, layer by layer")
        if folder == folders[0]:
            os.makedirs(config.out_dir, exist_ok=True)
            for domain, rows in windows.items():
                page = os.path.join(config.out_dir, f"tokens-{domain}.html")
                texts = rows[:PAGE_WINDOWS].tolist()
                write_page(page, f"{name} reading {domain}", model, corpus.encoding, texts)
    return entries


def main():
    config = parse(RouteConfig)
    folders = split_list(config.model)
    if not folders:
        raise UserError("nothing to measure; give --model=DIR or --model=DIR,DIR")
    for folder in folders:
        check_mixture(folder)
    corpus = Corpus(config.data_dir, config.domains)
    same_tokenizer([config.data_dir, *folders])
    ids = [parent_of(folder)[0] for folder in folders]
    settings = {name: getattr(config, name) for name in SETTINGS}
    made_of = {"config": settings, "data": corpus.hashes(), "source": source()}
    path = os.path.join(config.out_dir, "routing.json")
    if os.path.exists(path):
        found = read_json(path, "delete it and run again")
        if [entry["id"] for entry in found["models"]] == ids and {**found, **made_of} == found:
            print(f"{path} is up to date; nothing to do")
            return
    entries = read_routing(config, corpus, folders, ids)
    plot_routing(entries, os.path.join(config.out_dir, "routing.png"))
    write_json(path, {"models": entries, **made_of}, indent=None)  # last, once everything that it names is there


if __name__ == "__main__":
    command(main)
