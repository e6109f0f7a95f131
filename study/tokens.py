"""Show which experts each token of a text went to, as one self-contained HTML page.

    python -m study.tokens --model=out/cpu/btx --prompt="Question: Tom has 3 apples" --page=tokens.html

A token is coloured by its *pair*: the two experts with the largest gates, in either order; with one expert per token,
that expert alone. The page also shows each token's gates, and how well the mixture and each expert alone predicted it.
Sizes: L layers, T tokens, E experts, V vocabulary.
"""

import dataclasses
import html
import itertools
import json
import math
import pathlib
import re

import torch
from torch.nn import functional

from common.config import key, parse
from common.errors import UserError, command, printable, write_atomically
from common.hf import FEED_FORWARD
from model import ModelConfig, Transformer
from sample import SampleConfig, continue_prompt


def check_mixture(folder):
    """Raise UserError for a dense checkpoint."""
    if not ModelConfig.from_pretrained(folder).num_local_experts:
        raise UserError(f"{folder} is a dense model, without experts to show; mix some first (mix.py, finetune.py)")


def extract_expert(model, e):
    """The dense Transformer made of a mixture's shared weights and expert e's feed-forward sublayers."""
    dense = Transformer(dataclasses.replace(model.config, num_local_experts=0, expert_names=()))
    names = {mixed: name for name, mixed in FEED_FORWARD.items()}  # w1 -> gate_proj, ...
    weights = {}
    for name, weight in model.state_dict().items():
        layer, in_moe, inner = name.partition(".block_sparse_moe.")
        if not in_moe:
            weights[name] = weight
        elif inner.startswith("experts."):  # everything else in there is the router's
            weights[f"{layer}.mlp.{names[inner.removeprefix('experts.')]}.weight"] = weight[e]
    dense.load_state_dict(weights)
    dense.compute_dtype = model.compute_dtype
    return dense.to(model.cos.device)


def list_pairs(config):
    """[(0, 1), (0, 2), ...], the possible pairs of a token, or [(0,), (1,), ...] with one expert per token."""
    return list(itertools.combinations(range(config.num_local_experts), min(2, config.num_experts_per_tok)))


def top_pairs(gates, pairs):
    """Which of `pairs` has each token's largest gates. gates: (..., E) -> integers (...)."""
    together = gates.double()[..., torch.tensor(pairs)].sum(dim=-1)  # (..., pairs): no other two have a larger sum
    return together.argmax(dim=-1)


@torch.no_grad()
def token_bits(model, ids):
    """(bits (T,), Output) of a forward pass over a list of T ids; bits are as in `trace`."""
    row = torch.tensor([ids], device=model.cos.device)  # (1, T)
    output = model(row)
    nats = functional.cross_entropy(output.logits[0, :-1].float(), row[0, 1:], reduction="none")  # (T - 1,)
    return functional.pad(nats / math.log(2), (1, 0), value=math.nan).cpu(), output


def trace(model, texts):
    """What a mixture does with the T tokens of some texts, lists of ids: (gates (L, T, E), bits (1 + E, T)).

    gates: those used on reading the token. bits: -log2 of the token's probability given those before it in its text, by
    the mixture, then by each expert alone; nan for a text's first token.
    """
    results = [token_bits(model, ids) for ids in texts]
    gates = [output.gates[:, 0].cpu() for _, output in results]  # (L, T, E) each
    bits = [torch.cat([mixture for mixture, _ in results])]
    for e in range(model.config.num_local_experts):
        expert = extract_expert(model, e)  # one at a time: each is as large as a dense model
        bits.append(torch.cat([token_bits(expert, ids)[0] for ids in texts]))
    return torch.cat(gates, dim=1), torch.stack(bits)


def visible(encoding, token):
    """A token's text, with line breaks and tabs marked; bytes that are not text, or would not show, as \\x1b."""
    text = encoding.decode_single_token_bytes(token).decode("utf-8", errors="backslashreplace")
    marks = {"\n": "↵\n", "\t": "→\t"}
    return "".join(marks.get(c) or printable(c) for c in text)


def expert_names(config):
    """['A code', 'B seed']: each expert's letter and the checkpoint it came from."""
    return [f"{chr(ord('A') + e)} {name.removeprefix('expert-')}" for e, name in enumerate(config.expert_names)]


def write_page(path, title, model, encoding, texts):
    """Write a page for some texts (lists of ids): tokens.html, filled in with the tokens and their numbers."""
    gates, bits = trace(model, texts)
    pairs = list_pairs(model.config)
    data = {
        "experts": expert_names(model.config),
        "pairs": pairs,
        "pair": top_pairs(gates, pairs).tolist(),  # [layer][token]
        "gates": (100 * gates).round().int().transpose(0, 1).tolist(),  # [token][layer][expert], percent
        "bits": [[None if math.isnan(b) else round(b, 2) for b in token] for token in bits.T.tolist()],
    }
    shown = []
    for ids in texts:
        spans = [f"<span data-t>{html.escape(visible(encoding, token))}</span>" for token in ids]
        shown.append(f'<div class="text">{"".join(spans)}</div>')
    fields = {
        "title": html.escape(title),
        "last_layer": str(model.config.num_hidden_layers - 1),
        "texts": "\n".join(shown),
        # inside <script>, only "<" could end the data early
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    template = pathlib.Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    write_atomically(path, re.sub(r"\{\{(\w+)\}\}", lambda found: fields[found[1]], template))
    print(f"{path} shows each token's experts; open it in a browser")


@dataclasses.dataclass
class TokensConfig(SampleConfig):
    """Continue a prompt with a mixture, and show which experts each token went to. All keys of sample.py, and:"""

    page: str = key("tokens.html", "the HTML page to write")


def main():
    config = parse(TokensConfig)
    check_mixture(config.model)
    model, encoding, ids, answers = continue_prompt(config)
    write_page(config.page, config.prompt, model, encoding, [ids + answer for answer in answers])


if __name__ == "__main__":
    command(main)
