"""Let any checkpoint continue a text.

python sample.py --model=out/cpu/btx --prompt="Question: Tom has 3 apples"
python sample.py --model=out/cpu/btx --prompt="def read(" --show_experts=page.html
"""

import dataclasses

import torch

from common import checkpoint
from common.config import UserError, command, key, parse
from common.device import device_key, dtype_key, pick_device, place, threads_key
from common.tokenizer import load_tokenizer
from model import generate
from study.token_view import check_mixture, show_experts


@dataclasses.dataclass
class SampleConfig:
    """Continue a prompt with a checkpoint, dense or mixed."""

    model: str = key("out/cpu/btx", "the checkpoint folder")
    prompt: str = key("Question:", "the text to continue")
    num_samples: int = key(1, "how many continuations")
    max_new_tokens: int = key(120, "tokens to add at most; a continuation also ends with its document")
    temperature: float = key(0.8, "0 always takes the likeliest token")
    top_k: int = key(50, "sample among the k likeliest tokens; 0 is all of them")
    seed: int = key(1, "random seed")
    show_experts: str = key("", "show each token's experts: a page to write, such as page.html, or - for the terminal")
    device: str = device_key()
    dtype: str = dtype_key()
    threads: int = threads_key()


def main():
    config = parse(SampleConfig)
    device = pick_device(config.device, config.threads)
    model = place(checkpoint.load_model(config.model), device, config.dtype)
    if config.show_experts:
        check_mixture(model.config, config.model)
    encoding = load_tokenizer(config.model)
    ids = encoding.encode_ordinary(config.prompt)
    if not ids:
        raise UserError("--prompt is empty; give the text to continue")
    room = model.max_length - len(ids)
    if room < 1:
        raise UserError(f"--prompt has {len(ids)} tokens, the model takes {model.max_length}; shorten it")
    generator = torch.Generator(device).manual_seed(config.seed)
    prompts = [ids] * config.num_samples
    new_tokens = min(room, config.max_new_tokens)
    stop = {encoding.eot_token}
    answers = generate(model, prompts, new_tokens, stop, config.temperature, config.top_k, generator)
    for answer in answers:
        print(config.prompt + encoding.decode(answer))
        if config.num_samples > 1:
            print("---")
    if config.show_experts:
        show_experts(config.show_experts, config.model, model, encoding, [ids + answer for answer in answers])


if __name__ == "__main__":
    command(main)
