"""Show which experts each token of a text went to: as one self-contained HTML page, or in the terminal.

    python -m study.tokens --model=out/cpu/btx --prompt="Question: Tom has 3 apples" --page=tokens.html

A token is coloured by its *pair*: the two experts with the largest gates, in no order; with one expert per token,
that expert alone. The page also has each token's gates, and how well the mixture and every expert alone foresaw it.
Sizes: L layers, T tokens, E experts, V vocabulary.
"""

import dataclasses
import html
import itertools
import json
import math
import os
import re
import sys
from typing import NamedTuple

import torch

from common.config import key, parse
from common.errors import UserError, command, write_atomically
from common.hf import FEED_FORWARD
from model import ModelConfig, Transformer
from sample import SampleConfig, continue_prompt

# For each pair a colour, and a line under the text as a second cue. 7 and 5 have no common factor, so the first 35
# pairs differ. The colours are Okabe and Ito's; the terminal has the nearest light ones of its 256.
COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#0072B2", "#D55E00"]
LINES = ["solid", "dotted", "double", "dashed", "wavy"]
TERMINAL_COLOURS = [215, 117, 79, 182, 228, 75, 209]
TERMINAL_LINES = ["", ";4", ";1", ";3", ";1;4"]  # plain, underlined, bold, italic, bold and underlined

PAGE_START = "<!DOCTYPE html>"
PAGE_NUMBERS = 160_000  # a page with this many numbers stays below 1 MB


def check_mixture(config, folder):
    """Raise UserError for a dense checkpoint."""
    if not config.num_local_experts:
        raise UserError(f"{folder} is a dense model without experts to show; mix some first (mix.py, finetune.py)")


def extract_expert(model, e):
    """The dense Transformer made of a mixture's shared weights and expert e's feed-forward sublayers."""
    dense = Transformer(dataclasses.replace(model.config, num_local_experts=0, expert_names=()))
    names = {mixed: name for name, mixed in FEED_FORWARD.items()}  # w1 -> gate_proj, ...
    weights = {}
    for name, weight in model.state_dict().items():
        layer, in_moe, inner = name.partition(".block_sparse_moe.")
        if not in_moe:
            weights[name] = weight
        elif inner.startswith("experts."):  # all else in there is the router's
            weights[f"{layer}.mlp.{names[inner.removeprefix('experts.')]}.weight"] = weight[e]
    dense.load_state_dict(weights)
    dense.compute_dtype = model.compute_dtype
    return dense.to(model.cos.device)


def list_pairs(config):
    """[(0, 1), (0, 2), ...], the pairs that a token can have, or [(0,), (1,), ...] with one expert per token."""
    return list(itertools.combinations(range(config.num_local_experts), min(2, config.num_experts_per_tok)))


def top_pairs(gates, pairs):
    """Which of `pairs` each token's largest gates are. gates: (..., E) -> integers (...)."""
    experts = gates.topk(len(pairs[0]), dim=-1).indices.sort(dim=-1).values  # (..., 1 or 2)
    number = torch.zeros([gates.size(-1)] * len(pairs[0]), dtype=torch.long)
    for i, pair in enumerate(pairs):
        number[pair] = i
    return number[experts.cpu().unbind(dim=-1)]


class Trace(NamedTuple):
    """What a mixture did with one text.

    ids: its T tokens.
    gates: (L, T, E), with which the token was read.
    bits: (1 + E, T), -log2 of the probability of the token after those before it: by the mixture, then by each
        expert alone. The first token has none: nan.
    """

    ids: list
    gates: torch.Tensor
    bits: torch.Tensor


@torch.no_grad()
def token_bits(model, ids):
    """(bits (T,), Output) of a forward pass over a list of T ids; see Trace for bits."""
    row = torch.tensor([ids], device=model.cos.device)  # (1, T)
    output = model(row)
    log_p = output.logits[0, :-1].float().log_softmax(dim=-1)  # (T - 1, V)
    bits = -log_p.gather(1, row[0, 1:, None])[:, 0] / math.log(2)  # (T - 1,)
    return torch.cat((bits.new_tensor([math.nan]), bits)).cpu(), output


def trace(model, texts):
    """A Trace of each text (a list of ids), read by a mixture and by each of its experts alone."""
    results = [token_bits(model, ids) for ids in texts]
    bits = [[mixture] for mixture, _ in results]
    for e in range(model.config.num_local_experts):
        expert = extract_expert(model, e)  # one at a time: each is as large as a dense model
        for row, ids in zip(bits, texts, strict=True):
            row.append(token_bits(expert, ids)[0])
    gates = [output.gates[:, 0].cpu() for _, output in results]  # (L, T, E) each
    return [Trace(*found) for found in zip(texts, gates, map(torch.stack, bits), strict=True)]


def visible(encoding, token):
    """A token's text with line breaks and tabs marked; bytes that are no text, or would not show, as \\x1b."""
    text = encoding.decode_single_token_bytes(token).decode("utf-8", errors="backslashreplace")
    text = "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    return text.replace("\n", "↵\n").replace("\t", "→\t")


def expert_names(config):
    """['A code', 'B seed']: each expert's letter and the checkpoint it came from."""
    return [f"{chr(ord('A') + e)} {name.removeprefix('expert-')}" for e, name in enumerate(config.expert_names)]


def write_page(path, title, config, encoding, traces):
    """Write the page of one or several Traces: tokens.html with the tokens and their numbers filled in."""
    room = PAGE_NUMBERS // (config.num_hidden_layers * config.num_local_experts + config.num_local_experts + 12)
    spans, gates, bits = [], [], []
    for one in traces:
        shown = one.ids[: room - len(gates)]
        texts = [html.escape(visible(encoding, token)) for token in shown]
        spans.append("".join(f"<span data-t>{text}</span>" for text in texts))
        gates += (100 * one.gates[:, : len(shown)]).round().int().transpose(0, 1).tolist()  # T of (L, E), in percent
        bits += [[round(b, 2) if b == b else None for b in token] for token in one.bits.T[: len(shown)].tolist()]
    pairs = list_pairs(config)
    chosen = torch.cat([top_pairs(one.gates, pairs) for one in traces], dim=1)[:, : len(gates)]  # (L, T)
    data = {
        "experts": expert_names(config),
        "pairs": pairs,
        "colours": COLOURS,
        "lines": LINES,
        "pair": chosen.tolist(),  # [layer][token]
        "gates": gates,  # [token][layer][expert], percent
        "bits": bits,  # [token][mixture, experts]
    }
    fields = {
        "title": html.escape(title),
        "last_layer": str(config.num_hidden_layers - 1),
        "texts": "\n".join(f'<div class="text">{text}</div>' for text in spans if text),
        # inside <script> only "<" could end the data early
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "tokens.html")) as file:
        template = file.read()
    write_atomically(path, re.sub(r"\{\{(\w+)\}\}", lambda found: fields[found[1]], template))


def terminal_text(config, encoding, traces, colour):
    """The same for a terminal, layer by layer. Without colour each token is followed by its pair's letters: the[AB]."""
    pairs, names = list_pairs(config), expert_names(config)

    def paint(text, p):
        if not colour:
            return text + "[" + "".join(names[e][0] for e in pairs[p]) + "]"
        n = p % len(TERMINAL_COLOURS)
        start = f"\033[38;5;16;48;5;{TERMINAL_COLOURS[n]}{TERMINAL_LINES[p % len(TERMINAL_LINES)]}m"
        # a colour left on at a line's end would run to the terminal's edge
        return "\n".join(f"{start}{line}\033[0m" if line else "" for line in text.split("\n"))

    lines = []
    for layer in range(config.num_hidden_layers):
        chosen = [top_pairs(one.gates[layer], pairs).tolist() for one in traces]
        flat = list(itertools.chain(*chosen))
        shares = sorted(((flat.count(p) / len(flat), p) for p in set(flat)), reverse=True)
        legend = [paint(" + ".join(names[e] for e in pairs[p]), p) + f" {share:.0%}" for share, p in shares]
        lines += ["", f"layer {layer}: " + ", ".join(legend)]
        for one, row in zip(traces, chosen, strict=True):
            lines.append("".join(paint(visible(encoding, token), p) for token, p in zip(one.ids, row, strict=True)))
    return "\n".join(lines[1:])


def show_experts(page, title, model, encoding, texts):
    """Show the texts (lists of ids) as a page at the path `page`, or in the terminal when that is empty."""
    traces = trace(model, texts)
    if page:
        write_page(page, title, model.config, encoding, traces)
        print(f"{page} shows each token's experts; open it in a browser")
    else:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print(terminal_text(model.config, encoding, traces, colour))


@dataclasses.dataclass
class TokensConfig(SampleConfig):
    """Continue a prompt with a mixture, and show which experts each token went to. All keys of sample.py, and:"""

    page: str = key("", "the HTML page to write; empty shows the tokens in the terminal")


def check_page(path):
    """Raise UserError for a file that is there and no page of ours."""
    if path and os.path.exists(path):
        with open(path, "rb") as file:
            if file.read(len(PAGE_START)) != PAGE_START.encode():
                raise UserError(f"--page={path} is a file that this script has not written; choose another name")


def main():
    config = parse(TokensConfig)
    check_page(config.page)
    check_mixture(ModelConfig.from_pretrained(config.model), config.model)
    model, encoding, ids, answers = continue_prompt(config)
    show_experts(config.page, config.prompt, model, encoding, [ids + answer for answer in answers])


if __name__ == "__main__":
    command(main)
