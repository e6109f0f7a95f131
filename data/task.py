"""Tasks: questions with one right answer each, how answers are scored, and what an ignorant model would score.

A domain with a task has task-val.jsonl and task-test.jsonl, with a row per question: {"prompt", "answer", "choices",
and keys that the domain adds}. The key "task" of its meta.json says how to read answers and what chance would score:

    {"marker": "####", "baselines": {"val": {"accuracy": {"chance": 0.001, "majority": 0.026}, ...}, "test": ...}}

A question is asked in two ways. Written: the answer is what follows the marker on its line, or without a marker what
completes the prompt's last line. Multiple choice: the model picks the likeliest per byte of four continuations, the
first of which is right. Small models learn to choose long before they learn to write.
"""

import difflib
import random
from dataclasses import dataclass


def exact_match(answer, right):
    """1.0 or 0.0."""
    return float(answer == right)


def edit_similarity(answer, right):
    """2 M / T, where M counts the characters in common blocks and T those of both strings together; from 0 to 1.

    This is difflib's ratio (Ratcliff and Obershelp). CodeXGLUE uses fuzzywuzzy's, 100 times the same, which with its
    optional fast backend finds a longest common subsequence instead of blocks and gives the same or a little more.
    """
    return difflib.SequenceMatcher(None, answer, right, autojunk=False).ratio()


METRICS = {"accuracy": exact_match, "edit_similarity": edit_similarity}  # for written answers
CHOICES = 4


def choices_of(right, pool, key):
    """[right, and three others from `pool`], texts to choose from; which others depends only on `key`. None if the pool
    has too few."""
    others = sorted(set(pool) - {right})
    if len(others) < CHOICES - 1:
        return None
    return [right, *random.Random(f"choices {key}").sample(others, CHOICES - 1)]


def read_answer(text, marker):
    """The answer in what a model wrote: 'so 3 + 4 = 7.\\n#### 7\\n' with '####' -> '7'; '' if there is none."""
    _, found, rest = text.partition(marker) if marker else ("", True, text)
    return rest.partition("\n")[0].strip() if found else ""


def mean_score(metric, answers, rows):
    """The mean of a metric over the rows, given one answer for each."""
    return sum(METRICS[metric](answer, row["answer"]) for answer, row in zip(answers, rows, strict=True)) / len(rows)


@dataclass
class Task:
    """Questions, and guesses to compare with; see the top of this file for the two ways to ask."""

    rows: list  # of {"prompt", "answer", ...}, in an order such that the first rows are a fair sample
    chance: float  # the accuracy of a random answer among all possible ones
    guesses: dict  # {baseline: its answer to each row}
    marker: str = ""
    metrics: tuple = ("accuracy",)

    def baselines(self):
        """{metric: {baseline: its mean score over the rows}}; accuracy also has "chance"."""
        scores = {
            metric: {name: round(mean_score(metric, guess, self.rows), 4) for name, guess in self.guesses.items()}
            for metric in self.metrics
        }
        scores["accuracy"] = {"chance": round(self.chance, 4), **scores["accuracy"]}
        scores["choice"] = {"chance": 1 / CHOICES}
        return scores
