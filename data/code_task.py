"""Line completion (CodeXGLUE, Lu et al. 2021): the next line of held-out source, given the lines before it."""

import hashlib
import re
from collections import Counter
from itertools import chain, zip_longest

from data.task import Task, choices_of

CONTEXT_BYTES = 400  # about 160 tokens
MIN_CONTEXT_BYTES = 200
MIN_CHARACTERS = 8  # of a line to complete: a shorter one is too easy to guess
MAX_BYTES = 60  # of a line to complete: a longer one is too hard
CONSTANT = re.compile(r"""(["']).*?\1|\d+""")  # nobody can predict the contents of a string or number
TRIPLE_QUOTED = re.compile(r"(\"{3}|'{3}).*?\1", re.DOTALL)


def is_worth_asking(line):
    """True for a line of code, neither trivial nor mostly constants."""
    line = line.strip()
    if line.startswith("#") or len(line.encode()) > MAX_BYTES:
        return False
    return len(re.sub(r"\s", "", CONSTANT.sub("", line))) >= MIN_CHARACTERS


def lines_of_strings(text):
    """The numbers, from 0, of all lines touched by a triple-quoted string."""
    strings = [match.span() for match in TRIPLE_QUOTED.finditer(text)]
    return {n for start, end in strings for n in range(text.count("\n", 0, start), text.count("\n", 0, end) + 1)}


def completions(text):
    """A row for each line of a file that is worth asking, in hash order. The prompt is as many whole lines before it as
    fit in CONTEXT_BYTES, plus its indentation, so that it is tokenized as in training text."""
    rows = []
    lines = text.split("\n")
    strings = lines_of_strings(text)
    for number, line in enumerate(lines):
        if number in strings or not is_worth_asking(line):
            continue
        first = number
        size = 0
        while first > 0 and size + len(lines[first - 1].encode()) + 1 <= CONTEXT_BYTES:
            first -= 1
            size += len(lines[first].encode()) + 1
        context = "\n".join(lines[first:number]).lstrip("\n")
        if len(context.encode()) >= MIN_CONTEXT_BYTES:
            indentation = line[: len(line) - len(line.lstrip())]
            rows.append({"prompt": f"{context}\n{indentation}", "answer": line.strip()})
    return sorted(rows, key=lambda row: hashlib.sha256(f"{row['prompt']}{row['answer']}".encode()).digest())


def code_task(texts, split, seed, count=500):
    """Lines of the split's files, one from each file, then a second one, and so on; none that another split's text has
    after the same prompt. Baselines: chance picks any line of training text that is worth asking, majority the most
    frequent one, copy the line above. The task is the same for every seed; None if no line is worth asking."""
    elsewhere = "\0".join(text for name in texts if name != split for text in texts[name])
    rows = {}  # by their prompt
    for row in chain.from_iterable(zip_longest(*map(completions, texts[split]))):
        if row and row["prompt"] not in rows and row["prompt"] + row["answer"] not in elsewhere:
            rows[row["prompt"]] = row
        if len(rows) == count:
            break
    rows = list(rows.values())
    pool = [row["answer"] for row in rows]
    for row in rows:
        row["choices"] = choices_of(row["answer"], pool, row["prompt"])
    rows = [{**row, "choices": [f"{line}\n" for line in row["choices"]]} for row in rows if row["choices"]]
    lines = Counter(line.strip() for text in texts["train"] for line in text.split("\n") if is_worth_asking(line))
    if not rows or not lines:
        return None
    guesses = {
        "majority": [lines.most_common(1)[0][0]] * len(rows),
        "copy": [row["prompt"].rstrip().rpartition("\n")[2].strip() for row in rows],
    }
    return Task(rows, chance=1 / len(lines), guesses=guesses, metrics=("accuracy", "edit_similarity"))
