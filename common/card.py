"""The model card of a checkpoint: README.md, as the Hugging Face Hub shows it.

Its head is YAML that the Hub reads (base_model, tags), its body says what run.json and log.jsonl know: what the weights
were made from, on which data, with how many tokens, and how they score.
"""

import json
import os

from common.files import write_atomically
from common.hub import FOLDER

CARD = "README.md"
SHOWN = ("learning_rate", "batch_size", "sequence_length", "max_steps", "method", "router", "router_init", "seed")


def model_name(folder):
    """What to call a checkpoint: OWNER/NAME of a download from the Hub, else the folder's own name."""
    parts = os.path.normpath(folder).split(os.sep)
    hub = FOLDER.split(os.sep)
    name = "/".join(parts[-2:]) if parts[-4:-2] == hub else parts[-1]
    return name.partition("@")[0]


def last_scores(folder):
    """{domain: bits per byte} of the last line of log.jsonl, or nothing."""
    try:
        with open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as file:
            return json.loads(file.readlines()[-1])["bpb"]
    except (FileNotFoundError, IndexError):
        return {}


def yaml(value):
    """A value in YAML, of which JSON is a part."""
    return json.dumps(value, ensure_ascii=False)


def card(folder, run, shape):
    """The text of the card. run: a finished run.json. shape: the checkpoint's config.json."""
    recipe, history = run["recipe"], run["history"]
    config, parents = recipe["config"], [model_name(parent) for parent in recipe["parents"]]
    mixture, scores = recipe.get("mixture", {}), last_scores(folder)
    tokens = sum(cost["tokens"] for cost in history.values())
    experts = shape.get("num_local_experts", 0)
    loads = shape["model_type"] != "nanobtx"
    head = {"library_name": "transformers"} if loads else {}
    head |= {"pipeline_tag": "text-generation", "tags": ["nanobtx", *(["moe", "branch-train-mix"] if experts else [])]}
    if parents:
        head |= {"base_model": parents, "base_model_relation": "merge" if len(parents) > 1 else "finetune"}
    head |= {"domains": list(mixture), "training_tokens": tokens}
    lines = [
        "---",
        *(f"{name}: {yaml(value)}" for name, value in head.items()),
        "---",
        "",
        f"# {model_name(folder)}",
        "",
    ]

    size = f"{shape['num_hidden_layers']} layers, width {shape['hidden_size']}, vocabulary {shape['vocab_size']:,}"
    kind = (
        f"A mixture of {experts} experts, {shape['num_experts_per_tok']} for each token" if experts else "A dense model"
    )
    lines += [f"{kind}: {size}, {shape['max_position_embeddings']:,} positions.", ""]
    lines += [f"- made from: {', '.join(parents)}"] if parents else ["- trained from scratch"]
    if experts:
        lines += [f"- experts: {', '.join(shape['expert_names'])}; router: {shape['router']}"]
    if mixture:
        shares = ", ".join(f"{domain} {share:.0%}" for domain, share in mixture.items())
        lines += [f"- data of this run: {shares} (content hashes in run.json)"]
    lines += [f"- tokens behind these weights: {tokens:,} in {len(history)} run(s)"]
    settings = [f"{name} {config[name]}" for name in SHOWN if name in config]
    lines += [f"- settings: {', '.join(settings)}"]
    if scores:
        table = ", ".join(f"{domain} {value:.3f}" for domain, value in scores.items())
        lines += [f"- validation bits per byte: {table}"]
    if not loads:
        lines += [f"- transformers has no router {shape['router']!r}: load the folder with nanoBTX alone"]
    return "\n".join([*lines, "", "Made by nanoBTX; run.json holds the whole recipe.", ""])


def write_card(folder, run, shape):
    write_atomically(os.path.join(folder, CARD), card(folder, run, shape))
