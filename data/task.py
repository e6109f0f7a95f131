"""Tasks: questions with one right answer each, what counts as right, and what an ignorant model would score.

A domain with a task has task-val.jsonl and task-test.jsonl, a row per question: {"prompt", "answer", "choices", and
what the domain adds}. Its meta.json says under "task" how to read an answer and what to compare a score with:

    {"marker": "####", "baselines": {"val": {"accuracy": {"chance": 0.001, "majority": 0.026}, ...}, "test": ...}}

A question is asked in two ways. To write: the answer is the line that follows the marker, or without a marker what
continues the prompt's last line. To choose: of four continuations, the first being right, the likeliest per byte.
Small models learn to choose long before they learn to write.
"""

import difflib
import random
from dataclasses import dataclass


def exact_match(answer, right):
    """1.0 or 0.0."""
    return float(answer == right)


def edit_similarity(answer, right):
    """2 M / T, with M the characters in common blocks and T those of both strings together, from 0 to 1.

    This is difflib's ratio (Ratcliff and Obershelp). CodeXGLUE takes fuzzywuzzy's, 100 times the same, which
    with its optional fast backend finds a longest common subsequence instead of blocks: a little more or equal.
    """
    return difflib.SequenceMatcher(None, answer, right, autojunk=False).ratio()


METRICS = {"accuracy": exact_match, "edit_similarity": edit_similarity}  # of what a model writes
CHOICES = 4


def choices_of(right, pool, key):
    """[right, and three others of `pool`], texts to choose from; which others depends on `key` alone. None where the
    pool has too few."""
    others = sorted(set(pool) - {right})
    if len(others) < CHOICES - 1:
        return None
    return [right, *random.Random(f"choices {key}").sample(others, CHOICES - 1)]


def read_answer(text, marker):
    """The answer in what a model wrote: 'so 3 + 4 = 7.\\n#### 7\\n' with '####' -> '7'; '' where there is none."""
    _, found, rest = text.partition(marker) if marker else ("", True, text)
    return rest.partition("\n")[0].strip() if found else ""


def mean_score(metric, answers, rows):
    """The mean of a metric over the rows, for one answer each."""
    return sum(METRICS[metric](answer, row["answer"]) for answer, row in zip(answers, rows, strict=True)) / len(rows)


@dataclass
class Task:
    """Questions, and what it takes to guess them; see the top of this file for the two ways to ask."""

    rows: list  # of {"prompt", "answer", ...}, in an order whose beginning is a fair sample
    chance: float  # the accuracy of a random answer among all possible ones
    guesses: dict  # {baseline: its answer to each row}
    marker: str = ""
    metrics: tuple = ("accuracy",)

    def baselines(self):
        """{metric: {baseline: its mean score over the rows}}; accuracy has "chance" too."""
        scores = {
            metric: {name: round(mean_score(metric, guess, self.rows), 4) for name, guess in self.guesses.items()}
            for metric in self.metrics
        }
        scores["accuracy"] = {"chance": round(self.chance, 4), **scores["accuracy"]}
        scores["choice"] = {"chance": 1 / CHOICES}
        return scores
