"""Let any checkpoint continue a text.

    python sample.py --model=out/cpu/btx --prompt="Question: Tom has 3 apples"

(`python -m study.tokens` does the same and shows each token's experts.)
"""

import dataclasses

import torch

from common.config import key, parse
from common.device import DEVICES, DTYPES, pick_device, place
from common.errors import UserError, command
from common.hf import local_folder
from common.tokenizer import load_tokenizer
from model import Transformer, generate


@dataclasses.dataclass
class SampleConfig:
    """Continue a prompt with a checkpoint, dense or mixed."""

    model: str = key("out/cpu/btx", "the checkpoint, a folder or hf:OWNER/NAME")
    prompt: str = key("Question:", "the text to continue", free_text=True)
    num_samples: int = key(1, "how many continuations", within="[1, 10000]")
    max_new_tokens: int = key(
        120, "tokens to add at most; a continuation also ends with its document", within="[1, inf)"
    )
    temperature: float = key(0.8, "0 always takes the likeliest token", within="[0, inf)")
    top_k: int = key(50, "sample among the k likeliest tokens; 0 is all of them", within="[0, inf)")
    seed: int = key(1, "random seed", within="[0, inf)")
    device: str = key("auto", "where to compute; auto is cuda where there is one", DEVICES)
    dtype: str = key("auto", "precision of activations; auto is bfloat16 where it is faster", DTYPES)
    threads: int = key(0, "CPU threads; 0 leaves the choice to torch", within="[0, 1024]")


def continue_prompt(config):
    """(model, encoding, the prompt's token ids, the ids of each continuation)."""
    device = pick_device(config.device, config.threads)
    folder = local_folder(config.model)
    encoding = load_tokenizer(folder)
    model = place(Transformer.from_pretrained(folder), device, config.dtype)
    if encoding.n_vocab > model.config.vocab_size:
        raise UserError(f"{config.model} has a tokenizer of {encoding.n_vocab} entries, its model fewer; copy it again")
    ids = encoding.encode_ordinary(config.prompt)
    if not ids:
        raise UserError("--prompt is empty; give the text to continue")
    room = model.max_length - len(ids)
    if room < 1:
        raise UserError(f"--prompt has {len(ids)} tokens, the model takes {model.max_length}; shorten it")
    generator = torch.Generator(device).manual_seed(config.seed)
    new_tokens = min(room, config.max_new_tokens)
    stop = {encoding.eot_token}
    prompts = [ids] * config.num_samples
    answers = generate(model, prompts, new_tokens, stop, config.temperature, config.top_k, generator)
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
