"""What the routers learned: where each domain's tokens go, and how much that says about the domain.

    python -m study.route --model=out/cpu/btx,out/cpu/btx-nobalance --data_dir=out/cpu/data --out_dir=out/cpu/report

Writes routing.json, the pictures routing.png (experts) and pairs.png (pairs of experts), and for the first model
tokens-<domain>.html, a page with each token's experts. Nothing is sampled: a second run gives the same numbers.
Sizes: L layers, S tokens, E experts.
"""

import dataclasses
import json
import math
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from common import checkpoint
from common.config import UserError, command, key, parse, write_atomically
from common.device import device_key, pick_device, place, threads_key
from common.loader import held_out_windows, list_domains, read_meta
from common.split import HELD_OUT
from common.tokenizer import load_tokenizer
from study.token_view import check_mixture, expert_names, show_experts

DEAD = 0.01  # an expert used by a smaller share of the tokens is dead
BATCH_SIZE = 16
PAGE_WINDOWS = 2  # windows on a domain's page of tokens


@dataclasses.dataclass
class RouteConfig:
    """Measure and draw the routing of one or several mixtures."""

    model: str = key("out/cpu/btx", "checkpoint folders of mixtures, separated by commas")
    out_dir: str = key("out/cpu/report", "where routing.json, the pictures and the pages go")
    data_dir: str = key("out/cpu/data", "the folder that data/prepare.py wrote")
    split: str = key("test", "held-out text to read: val for searching, test for reporting", HELD_OUT)
    sequence_length: int = key(256, "tokens a window")
    eval_windows: int = key(128, "windows per domain")
    device: str = device_key()
    dtype: str = key("float32", "precision of activations", ("float32", "bfloat16"))
    threads: int = threads_key()


@torch.no_grad()
def read_gates(model, windows):
    """The gates (L, S, E) with which a mixture reads windows (count, T); S = count * T."""
    batches = windows.to(model.cos.device).split(BATCH_SIZE)
    return torch.cat([model(batch).gates.flatten(1, 2).cpu() for batch in batches], dim=1)


# ---- statistics; gates are (L, S, E) and 0 where an expert was not used ----


def usage(gates):
    """(L, E): the share of a layer's tokens that used the expert; k experts a token make a layer sum to k."""
    return (gates > 0).double().mean(dim=1)


def weight(gates):
    """(L, E): the expert's share of the gate weight; a layer sums to 1."""
    total = gates.double().sum(dim=1)  # (L, E)
    return total / total.sum(dim=-1, keepdim=True)


def gate_entropy(gates):
    """(L,): mean over tokens of -sum_i g_i log2 g_i in bits: 0 when one expert has all weight, log2 k when k share it.

    Gates are scaled to sum to 1 first, which those of a switch router do not.
    """
    g = gates.double() / gates.double().sum(dim=-1, keepdim=True)  # (L, S, E)
    return torch.special.entr(g).sum(dim=-1).mean(dim=-1) / math.log(2)


def co_activation(gates, k):
    """(L, E, E): entry (i, j) is the share of tokens that have i and j among their two largest gates (k >= 2).

    The diagonal is the share that have i there. With k = 1 it is all there is.
    """
    top = gates.topk(min(2, k), dim=-1).indices  # (L, S, 1 or 2)
    picked = torch.zeros_like(gates, dtype=torch.float64).scatter(-1, top, 1.0)  # (L, S, E)
    return picked.transpose(1, 2) @ picked / gates.size(1)


def mutual_information(weights):
    """(L,): how many bits the expert tells about the domain, sum_de p(d, e) log2(p(d, e) / p(d) p(e)).

    weights: (domains, L, E), p(e | d) of each layer. Domains count equally, p(d) = 1 / domains, so the value lies
    between 0 (every domain spreads alike) and log2 of the smaller of the numbers of domains and of experts.
    """
    joint = weights / len(weights)  # (domains, L, E)
    independent = joint.sum(dim=0) / len(weights)  # (L, E): p(d) p(e)
    ratio = torch.where(joint > 0, joint / independent, 1.0)
    return (joint * ratio.log2()).sum(dim=(0, 2))


def statistics(gates, config):
    """A model's entry in routing.json. gates: {domain: (L, S, E)}; lists are [layer][expert]."""
    used = torch.stack([usage(g) for g in gates.values()])  # (domains, L, E)
    weights = torch.stack([weight(g) for g in gates.values()])  # (domains, L, E)
    dead = used.mean(dim=0) < DEAD  # (L, E)
    names = expert_names(config)
    return {
        "experts": names,
        "experts_per_token": config.num_experts_per_tok,
        "mutual_information": rounded(mutual_information(weights)),
        "dead": [[name for name, gone in zip(names, layer, strict=True) if gone] for layer in dead.tolist()],
        "domains": {
            domain: {
                "share": rounded(usage(g) / usage(g).sum(dim=-1, keepdim=True)),
                "weight": rounded(weight(g)),
                "gate_entropy": rounded(gate_entropy(g)),
                "co_activation": rounded(co_activation(g, config.num_experts_per_tok)),
            }
            for domain, g in gates.items()
        },
    }


def rounded(tensor):
    """Nested lists of a tensor's values to 5 places."""
    return tensor.double().mul(1e5).round().div(1e5).tolist()


# ---- pictures: a panel per domain and model; layers run to the right ----


def expert_rows(entry, domain):
    """(names, R x L values) for routing.png: each expert's share of a layer's (token, expert) choices."""
    return entry["experts"], list(zip(*entry["domains"][domain]["share"], strict=True))


def pair_rows(entry, domain):
    """(names, R x L values) for pairs.png: the share of tokens whose two largest gates are the pair's."""
    names, layers = entry["experts"], entry["domains"][domain]["co_activation"]
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    return [f"{names[i]} + {names[j]}" for i, j in pairs], [[layer[i][j] for layer in layers] for i, j in pairs]


def plot_heatmaps(models, rows_of, title, path):
    """models: entries of routing.json, one line of panels each; rows_of(entry, domain) gives a panel's rows.

    The middle tone is an even share, the darkest twice that or more.
    """
    domains = list(models[0]["domains"])
    panels = [[rows_of(entry, domain) for domain in domains] for entry in models]
    layers = len(panels[0][0][1][0])
    heights = [0.26 * len(line[0][0]) + 0.45 for line in panels]
    width = max(0.36 * layers, 2.2)
    label = 0.085 * max(len(name) for line in panels for name in line[0][0])
    size = label + width * len(domains) + 0.4, sum(heights) + 0.6
    shape = {"figsize": size, "squeeze": False, "layout": "constrained", "height_ratios": heights}
    figure, axes = plt.subplots(len(models), len(domains), **shape)
    for entry, panel_line, axis_line in zip(models, panels, axes, strict=True):
        for domain, (names, rows), axis in zip(domains, panel_line, axis_line, strict=True):
            darkest = 2 / len(rows)
            axis.imshow(rows, cmap="Blues", vmin=0, vmax=darkest, aspect="auto")
            for y, row in enumerate(rows):
                for x, value in enumerate(row):
                    ink = "white" if value > 0.7 * darkest else "black"
                    axis.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=ink)
            axis.set_title(f"{entry['name']} reading {domain}", fontsize=9)
            axis.set_xticks(range(layers), labels=range(layers) if entry is models[-1] else [], fontsize=8)
            axis.set_yticks(range(len(names)), labels=names if axis is axis_line[0] else [], fontsize=8)
            axis.tick_params(length=0)
    figure.supxlabel("layer", fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main():
    config = parse(RouteConfig)
    device = pick_device(config.device, config.threads)
    folders = list(filter(None, config.model.split(",")))
    if not folders:
        raise UserError("nothing to measure; give --model=DIR or --model=DIR,DIR")
    for folder in folders:
        check_mixture(checkpoint.read_model_config(folder), folder)
    checkpoint.same_tokenizer([config.data_dir, *folders])
    domains = list_domains(config.data_dir)
    size = config.split, config.sequence_length, config.eval_windows
    windows = {domain: held_out_windows(config.data_dir, domain, *size)[0] for domain in domains}
    os.makedirs(config.out_dir, exist_ok=True)

    entries = []
    for folder in folders:
        identity, _ = checkpoint.parent(folder)
        model = place(checkpoint.load_model(folder), device, config.dtype)
        name = os.path.basename(os.path.normpath(folder))
        if config.sequence_length > model.max_length:
            raise UserError(
                f"--sequence_length={config.sequence_length} is longer than {name} takes: {model.max_length}"
            )
        gates = {domain: read_gates(model, rows) for domain, rows in windows.items()}
        entries.append({"name": name, "id": identity, **statistics(gates, model.config)})
        bits = ", ".join(f"{value:.3f}" for value in entries[-1]["mutual_information"])
        print(f"{name}: the expert tells {bits} bits about the domain, layer by layer")
        if folder == folders[0]:
            for domain, rows in windows.items():
                page = os.path.join(config.out_dir, f"tokens-{domain}.html")
                title = f"{name} reading {domain}"
                show_experts(page, title, model, load_tokenizer(folder), rows[:PAGE_WINDOWS].tolist())

    settings = {
        name: getattr(config, name) for name in ("data_dir", "split", "sequence_length", "eval_windows", "dtype")
    }
    hashes = {domain: read_meta(config.data_dir, domain)["content_hash"] for domain in domains}
    results = {"models": entries, "config": settings, "data": hashes}
    write_atomically(os.path.join(config.out_dir, "routing.json"), json.dumps(results) + "\n")
    picture = os.path.join(config.out_dir, "routing.png")
    plot_heatmaps(entries, expert_rows, "share of the routers' choices (%)", picture)
    paired = [entry for entry in entries if entry["experts_per_token"] > 1]
    if paired:
        picture = os.path.join(config.out_dir, "pairs.png")
        plot_heatmaps(paired, pair_rows, "share of tokens (%) by their pair of experts", picture)


if __name__ == "__main__":
    command(main)
