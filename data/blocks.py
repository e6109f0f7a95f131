"""Reads the files that generated text is worded by: math_templates.txt and wiki.txt."""

import os
from collections import defaultdict


def read_blocks(name):
    """The blocks of a file in this folder, each with its lines by their first word: [(title, {word: [the rest of each
    such line]})]. A block begins with its [title]; the first one, before any title, has the title ""."""
    blocks = [("", defaultdict(list))]
    with open(os.path.join(os.path.dirname(__file__), name), encoding="utf-8") as file:
        for line in file.read().splitlines():
            if line.startswith("["):
                blocks.append((line[1:-1], defaultdict(list)))
            elif line and not line.startswith("#"):
                word, _, rest = line.partition(" ")
                blocks[-1][1][word].append(rest)
    return blocks
