"""Instruction data from the built-in generators: chats as JSON lines, for data.prepare to read.

    python -m data.chats --out_dir=out/cpu/chats
    chats=math-chat=out/cpu/chats/math.jsonl,wiki-chat=out/cpu/chats/wiki.jsonl
    python -m data.prepare config/cpu/data.py --domains=$chats

A row of math.jsonl is a word problem and its worked solution; a row of wiki.jsonl is one to three quiz questions and
their answers. All of it is training text: no problem shares its equations with a held-out one, and no question asks
for a fact that quizzes never ask, or uses a wording reserved for held-out text.
"""

import dataclasses
import json
import os
import random
from itertools import islice

from common.config import key, parse
from common.errors import UserError, command, write_atomically
from data.encyclopedia import QUIZ_LENGTH, make_quiz, make_world
from data.math_problems import math_documents


@dataclasses.dataclass
class ChatsConfig:
    """Write chats about word problems and the generated encyclopedia."""

    out_dir: str = key("out/cpu/chats", "folder for math.jsonl and wiki.jsonl")
    count: int = key(4000, "chats of each kind", within="[1, inf)")
    seed: int = key(1, "random seed of problems and questions; 0 gives the ones in data.prepare's default text")


def as_chat(text):
    """The messages in a text of questions and answers, in the form of the built-in domains."""
    pairs = [part.split("\nAnswer: ") for part in text.split("Question: ")[1:]]
    roles = "user", "assistant"
    return [{"role": role, "content": part.strip()} for pair in pairs for role, part in zip(roles, pair, strict=True)]


def math_chats(seed):
    """Chats of one question each, practically without end."""
    for split, read in math_documents(seed):
        if split == "train":
            yield as_chat(read())


def wiki_chats(seed):
    """Chats of one to QUIZ_LENGTH questions, without end."""
    rng = random.Random(f"wiki chats {seed}")
    entities, attributes = make_world()
    while True:
        chat = as_chat(make_quiz(entities, attributes, "train", rng))
        yield chat[: 2 * rng.randint(1, QUIZ_LENGTH)]


def main():
    config = parse(ChatsConfig)
    os.makedirs(config.out_dir, exist_ok=True)
    for name, chats in (("math", math_chats(config.seed)), ("wiki", wiki_chats(config.seed))):
        path = os.path.join(config.out_dir, f"{name}.jsonl")
        lines = "".join(json.dumps({"messages": chat}) + "\n" for chat in islice(chats, config.count)).encode()
        if os.path.exists(path):
            with open(path, "rb") as file:
                if file.read() != lines:
                    raise UserError(f"{path} already holds other chats; choose another --out_dir or move it away")
        write_atomically(path, lines)
        print(f"{path}: {config.count:,} chats")


if __name__ == "__main__":
    command(main)
