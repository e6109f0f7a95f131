"""Let a checkpoint continue a text, or chat with it.

    python sample.py --model=out/cpu/btx --prompt="Question: Tom has 3 apples"
    python sample.py --model=out/cpu/btx-chat --chat

(`python -m study.tokens` does the same and shows each token's experts.)
"""

import contextlib
import dataclasses
import os
import sys

import torch

from common.config import key, parse
from common.device import DEVICES, DTYPES, pick_device, place
from common.errors import UserError, command, read_json
from common.hf import local_folder
from common.tokenizer import encode, load_tokenizer
from data.files import chat_renderer, render_chat, text_ids
from model import Transformer, generate


@dataclasses.dataclass
class SampleConfig:
    """Continue a prompt with a checkpoint, dense or mixed."""

    model: str = key("out/cpu/btx", "the checkpoint, a folder or hf:OWNER/NAME")
    prompt: str = key("Question:", "the text to continue", free_text=True)
    special_tokens: bool = key(False, "read special tokens in the prompt as such, for example <|im_start|> in a chat")
    num_samples: int = key(1, "how many continuations", within="[1, 10000]")
    max_new_tokens: int = key(
        120, "the most tokens to add; a continuation also ends where its document ends", within="[1, inf)"
    )
    temperature: float = key(0.8, "0 always takes the likeliest token", within="[0, inf)")
    top_k: int = key(50, "sample from the k likeliest tokens; 0 means all of them", within="[0, inf)")
    seed: int = key(1, "random seed", within="[0, inf)")
    device: str = key("auto", "where to compute; auto picks cuda or mps if available", DEVICES)
    dtype: str = key("auto", "precision of activations; auto picks bfloat16 where it is faster", DTYPES)
    threads: int = key(0, "CPU threads; 0 lets torch choose", within="[0, 1024]")


@dataclasses.dataclass
class ChatConfig(SampleConfig):
    """Continue a prompt with a checkpoint, dense or mixed, or chat with it."""

    chat: bool = key(False, "answer each line of standard input, as a conversation, instead of continuing --prompt")


def end_tokens(encoding, *settings):
    """The ids that end a text: the tokenizer's own, and those in `settings`, each an eos_token_id as in config.json: a
    number, a list or None."""
    ids = [one for found in settings for one in (found if isinstance(found, list) else [found])]
    return {encoding.eot_token, *(one for one in ids if isinstance(one, int))}


def unknown_ids(encoding, vocab_size):
    """The list of the model's ids that the tokenizer cannot decode: padded rows, gaps in a vocabulary."""
    known = {token for token in range(encoding.n_vocab) if encoding.decode_single_token_bytes(token)}
    return [token for token in range(vocab_size) if token not in known]


def read_generation_config(folder):
    """The contents of a folder's generation_config.json, Hugging Face's settings for generation; {} without one."""
    path = os.path.join(folder, "generation_config.json")
    return read_json(path, "copy it again or delete it") if os.path.exists(path) else {}


def open_model(config):
    """(model, encoding, options for generate: what ends a text, how to draw tokens)."""
    device = pick_device(config.device, config.threads)
    folder = local_folder(config.model)
    encoding = load_tokenizer(folder)
    model = place(Transformer.from_pretrained(folder), device, config.dtype)
    ends = model.config.eos_token_id, read_generation_config(folder).get("eos_token_id")
    options = {"stop": end_tokens(encoding, *ends), "temperature": config.temperature, "top_k": config.top_k}
    options["generator"] = torch.Generator(device).manual_seed(config.seed)
    options["unknown"] = unknown_ids(encoding, model.config.vocab_size)
    return model, encoding, options


def check_known(model, encoding, ids, what):
    """Raise UserError if the model lacks one of a text's ids: a tokenizer may have extra ones that few texts use."""
    if max(ids) >= model.config.vocab_size:
        piece = encoding.decode([max(ids)])
        raise UserError(f"{what} contains {piece!r}, token {max(ids)}, which the model lacks; leave it out")


def continue_prompt(config):
    """(model, encoding, the prompt's token ids, the ids of each continuation)."""
    model, encoding, options = open_model(config)
    ids = encode(encoding, config.prompt, config.special_tokens).tolist()
    if not ids:
        raise UserError("--prompt is empty; give the text to continue")
    check_known(model, encoding, ids, "--prompt")
    room = model.max_length - len(ids)
    if room < 1:
        raise UserError(f"--prompt has {len(ids)} tokens, but the model takes only {model.max_length}; shorten it")
    new_tokens = min(room, config.max_new_tokens)
    answers = generate(model, [ids] * config.num_samples, new_tokens, **options)
    if new_tokens < config.max_new_tokens and any(len(answer) == new_tokens for answer in answers):
        cut = f"cut after {new_tokens} of --max_new_tokens={config.max_new_tokens}"
        print(f"{cut}: the model takes {model.max_length} tokens and the prompt has {len(ids)}", file=sys.stderr)
    return model, encoding, ids, answers


def read_line():
    """The next nonblank line of standard input, or "" at its end; with a prompt if a person is typing."""
    line = ""
    with contextlib.suppress(EOFError):
        while not line:
            line = input("> " if sys.stdin.isatty() else "").strip()
    return line


def chat(config):
    """Answer the lines of standard input as one conversation, in the form that chats have in training. When it gets too
    long for the model, it loses its oldest turns."""
    model, encoding, options = open_model(config)
    render, _ = chat_renderer(local_folder(config.model))
    example = [{"role": role, "content": "a"} for role in ("user", "assistant")]
    ids, answers = text_ids(encoding, render_chat(render, example))
    last = ids[answers == 1][-1:].tolist()  # what ends an answer, if that is a special token
    options["stop"].update(filter(encoding.is_special_token, last))
    room = model.max_length - min(config.max_new_tokens, model.max_length // 2)  # for the conversation
    messages, told = [], False
    while line := read_line():
        messages.append({"role": "user", "content": line})
        while len(ids := text_ids(encoding, render_chat(render, messages, add_generation_prompt=True))[0]) > room:
            if len(messages) == 1:
                raise UserError(f"this message has {len(ids)} tokens, but there is room for {room}; shorten it")
            del messages[:2]
            if not told:
                print(f"the model takes {model.max_length} tokens: the oldest turns are forgotten", file=sys.stderr)
            told = True
        check_known(model, encoding, ids.tolist(), "this message")
        new_tokens = min(config.max_new_tokens, model.max_length - len(ids))
        (answer,) = generate(model, [ids.tolist()], new_tokens, **options)
        messages.append({"role": "assistant", "content": encoding.decode(answer).strip()})
        print(messages[-1]["content"], flush=True)


def main():
    config = parse(ChatConfig)
    if config.chat:
        return chat(config)
    _, encoding, _, answers = continue_prompt(config)
    for answer in answers:
        print(config.prompt + encoding.decode(answer))
        if config.num_samples > 1:
            print("---")


if __name__ == "__main__":
    command(main)
