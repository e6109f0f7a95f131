"""Reads the files with the wordings of generated text: math_templates.txt and wiki.txt."""

import os
from collections import defaultdict


def read_blocks(name):
    """The blocks of a file in this folder, with their lines grouped by first word: [(title, {word: [the rest of each
    such line]})]. A block begins with its [title]; the lines before any title are a block titled ""."""
    blocks = [("", defaultdict(list))]
    with open(os.path.join(os.path.dirname(__file__), name), encoding="utf-8") as file:
        for line in file.read().splitlines():
            if line.startswith("["):
                blocks.append((line[1:-1], defaultdict(list)))
            elif line and not line.startswith("#"):
                word, _, rest = line.partition(" ")
                blocks[-1][1][word].append(rest)
    return blocks
