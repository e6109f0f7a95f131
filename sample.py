"""Let any checkpoint continue a text.

    python sample.py --model=out/cpu/btx --prompt="Question: Tom has 3 apples"

(`python -m study.tokens` does the same and shows each token's experts.)
"""

import dataclasses
import os
import sys

import torch

from common.config import key, parse
from common.device import DEVICES, DTYPES, pick_device, place
from common.errors import UserError, command, read_json
from common.hf import local_folder
from common.tokenizer import encode, load_tokenizer
from model import Transformer, generate


@dataclasses.dataclass
class SampleConfig:
    """Continue a prompt with a checkpoint, dense or mixed."""

    model: str = key("out/cpu/btx", "the checkpoint, a folder or hf:OWNER/NAME")
    prompt: str = key("Question:", "the text to continue", free_text=True)
    special_tokens: bool = key(False, "the prompt has special tokens, such as <|im_start|> of a chat")
    num_samples: int = key(1, "how many continuations", within="[1, 10000]")
    max_new_tokens: int = key(
        120, "tokens to add at most; a continuation also ends with its document", within="[1, inf)"
    )
    temperature: float = key(0.8, "0 always takes the likeliest token", within="[0, inf)")
    top_k: int = key(50, "sample among the k likeliest tokens; 0 is all of them", within="[0, inf)")
    seed: int = key(1, "random seed", within="[0, inf)")
    device: str = key("auto", "where to compute; auto is cuda or mps where there is one", DEVICES)
    dtype: str = key("auto", "precision of activations; auto is bfloat16 where it is faster", DTYPES)
    threads: int = key(0, "CPU threads; 0 leaves the choice to torch", within="[0, 1024]")


def end_tokens(encoding, *settings):
    """The ids that end a text: the tokenizer's, and those of `settings`, each an eos_token_id as config.json has it: a
    number, a list or None."""
    ids = [one for found in settings for one in (found if isinstance(found, list) else [found])]
    return {encoding.eot_token, *(one for one in ids if isinstance(one, int))}


def unknown_ids(encoding, vocab_size):
    """The model's ids that the tokenizer cannot spell, a list: padded rows, gaps in a vocabulary."""
    known = {token for token in range(encoding.n_vocab) if encoding.decode_single_token_bytes(token)}
    return [token for token in range(vocab_size) if token not in known]


def read_generation_config(folder):
    """What a folder's generation_config.json says, Hugging Face's settings for writing text; {} without one."""
    path = os.path.join(folder, "generation_config.json")
    return read_json(path, "copy it again or delete it") if os.path.exists(path) else {}


def continue_prompt(config):
    """(model, encoding, the prompt's token ids, the ids of each continuation)."""
    device = pick_device(config.device, config.threads)
    folder = local_folder(config.model)
    encoding = load_tokenizer(folder)
    model = place(Transformer.from_pretrained(folder), device, config.dtype)
    ids = encode(encoding, config.prompt, config.special_tokens).tolist()
    if not ids:
        raise UserError("--prompt is empty; give the text to continue")
    if max(ids) >= model.config.vocab_size:  # a tokenizer may have more entries than the model, if no text needs them
        piece = encoding.decode([max(ids)])
        raise UserError(f"--prompt holds {piece!r}, token {max(ids)}, which the model lacks; leave it out")
    room = model.max_length - len(ids)
    if room < 1:
        raise UserError(f"--prompt has {len(ids)} tokens, the model takes {model.max_length}; shorten it")
    generator = torch.Generator(device).manual_seed(config.seed)
    new_tokens = min(room, config.max_new_tokens)
    stop = end_tokens(encoding, model.config.eos_token_id, read_generation_config(folder).get("eos_token_id"))
    unknown = unknown_ids(encoding, model.config.vocab_size)
    prompts = [ids] * config.num_samples
    answers = generate(model, prompts, new_tokens, stop, config.temperature, config.top_k, generator, unknown)
    if new_tokens < config.max_new_tokens and any(len(answer) == new_tokens for answer in answers):
        cut = f"cut after {new_tokens} of --max_new_tokens={config.max_new_tokens}"
        print(f"{cut}: the model takes {model.max_length} tokens, the prompt has {len(ids)}", file=sys.stderr)
    return model, encoding, ids, answers


def main():
    config = parse(SampleConfig)
    _, encoding, _, answers = continue_prompt(config)
    for answer in answers:
        print(config.prompt + encoding.decode(answer))
        if config.num_samples > 1:
            print("---")


if __name__ == "__main__":
    command(main)
