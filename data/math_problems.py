"""Generated grade-school word problems with worked solutions, from the templates in math_templates.txt.

    Question: Mia has 3 boxes with 4 shells in each. How many shells does Mia have?
    Answer: There are 3 * 4 = 12 shells.
    #### 12

Solutions are computed as they are written, so their arithmetic is right by construction.
"""

import random
import re
from collections import Counter
from dataclasses import dataclass
from operator import add, floordiv, mul, sub

from common.corpus import split_of
from data.blocks import read_blocks
from data.task import Task, choices_of, read_answer

MARKER = "####"  # the final answer follows it
SMALLEST = 2  # no value is outside this range, so plurals are always right
LARGEST = 999
OPERATORS = {"+": add, "-": sub, "*": mul, "/": floordiv}
WRITTEN = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")  # an equation in a text
EQUATION = re.compile(r"\[(\w+) = (\w+) ([-+*/]) (\w+)\]")


@dataclass
class Template:
    """A kind of problem; see math_templates.txt for the notation."""

    name: str
    numbers: list  # of (name, low, high) or (name, left, operator, right)
    questions: list
    steps: list  # of lists of phrasings


def _numbers(text):
    """The rules of a `let` line: 'n = 2..9, t = n * k' -> [('n', 2, 9), ('t', 'n', '*', 'k')]."""
    for item in text.split(", "):
        name, value = item.split(" = ")
        yield name, *(map(int, value.split("..")) if ".." in value else value.split(" "))


def read_templates():
    """Parse the template file: ({kind of word: list of words}, list of Template)."""
    (_, words), *blocks = read_blocks("math_templates.txt")
    templates = [
        Template(name, list(_numbers(*lines["let"])), lines["Q"], [step.split(" | ") for step in lines["A"]])
        for name, lines in blocks
    ]
    return {kind: line.split() for kind, (line,) in words.items()}, templates


WORDS, TEMPLATES = read_templates()


@dataclass
class Problem:
    """A question, its solution in sentences, and the number that solves it."""

    template: str
    question: str
    solution: str
    answer: int
    steps: int

    @property
    def prompt(self):
        """What a model is asked: up to where its own answer starts."""
        return f"Question: {self.question}\nAnswer:"

    @property
    def chain(self):
        """Its equations in order: problems that share them are one calculation in other words. 3 + 4 and 4 + 3 count as
        the same, and so with products."""
        equations = []
        for left, operator, right, result in WRITTEN.findall(self.solution):
            if operator in "+*":
                left, right = sorted((left, right), key=int)
            equations.append(f"{left} {operator} {right} = {result}")
        return ", ".join(equations)

    @property
    def text(self):
        """The problem as a training document."""
        return f"{self.prompt} {self.solution}\n{MARKER} {self.answer}\n"


def _compute(values, left, operator, right):
    """Apply an operator to two names or literals. None unless the result is a whole number in range."""
    left, right = (int(side) if side.isdigit() else values[side] for side in (left, right))
    if operator == "/" and left % right:
        return None
    result = OPERATORS[operator](left, right)
    return result if SMALLEST <= result <= LARGEST else None


def _draw_numbers(template, equations, rng):
    """Values for all names of a template, drawn again until every step has a valid result."""
    while True:
        values = {}
        for name, *rule in [*template.numbers, *equations]:
            values[name] = rng.randint(*rule) if len(rule) == 2 else _compute(values, *rule)
            if values[name] is None:
                break
        else:
            return values


def _draw_words(rng):
    """One value for each word slot."""
    people = WORDS["girls"] + WORDS["boys"]
    name = rng.choice(people)
    he, his = ("she", "her") if name in WORDS["girls"] else ("he", "his")
    thing, other = rng.sample(WORDS["things"], 2)
    box, boxes = rng.choice(WORDS["containers"]).split("/")
    day = rng.randrange(7)
    return {
        "name": name,
        "friend": rng.choice([friend for friend in people if friend != name]),
        "he": he,
        "He": he.capitalize(),
        "his": his,
        "thing": thing,
        "things": thing + "s",
        "others": other + "s",
        "box": box,
        "boxes": boxes,
        "place": rng.choice(WORDS["places"]),
        "day": WORDS["days"][day],
        "next": WORDS["days"][(day + 1) % 7],
        "animals": rng.choice(WORDS["animals"]),
    }


def make_problem(template, rng):
    """Draw words, numbers and phrasings from `rng` (random.Random) and return the Problem."""
    words = _draw_words(rng)
    steps = [rng.choice(phrasings) for phrasings in template.steps]
    equations = [EQUATION.search(step).groups() for step in steps]
    values = _draw_numbers(template, equations, rng)

    def written(match):
        result, left, operator, right = match.groups()
        return f"{values.get(left, left)} {operator} {values.get(right, right)} = {values[result]}"

    solution = " ".join(EQUATION.sub(written, step) for step in steps).format(**words, **values)
    question = rng.choice(template.questions).format(**words, **values)
    return Problem(template.name, question, solution, values[equations[-1][0]], len(steps))


def math_documents(seed):
    """(split, read) for problems, practically without end. The chain of equations decides the split, so that no
    held-out problem has a chain that was trained on."""
    rng = random.Random(f"math {seed}")
    seen = set()
    while True:
        problem = make_problem(rng.choice(TEMPLATES), rng)
        if problem.question not in seen:
            seen.add(problem.question)
            yield split_of(problem.chain), lambda problem=problem: problem.text


def wrong_results(problem):
    """Four texts to choose from: the worked solution, and three whose last result is off by 1, 2 or 10."""
    near = {problem.answer + off for off in (-10, -2, -1, 1, 2, 10)} - {problem.answer}
    results = choices_of(problem.answer, [number for number in near if number >= 0], problem.question)
    before, _, after = problem.solution.rpartition(f"= {problem.answer}")
    return [f" {before}= {result}{after}\n{MARKER} {result}\n" for result in results]


def math_task(texts, split, seed, count=500):
    """Problems of the split, evenly spread over the templates. Baselines: chance picks any number that an answer may
    be, majority the most frequent answer in training text."""
    rng = random.Random(f"math task {seed}")
    rows = {}  # by their question
    while len(rows) < count:
        problem = make_problem(TEMPLATES[len(rows) % len(TEMPLATES)], rng)
        if split_of(problem.chain) == split and problem.question not in rows:
            row = {"prompt": problem.prompt, "answer": str(problem.answer), "choices": wrong_results(problem)}
            rows[problem.question] = {**row, "template": problem.template, "steps": problem.steps}
    majority = Counter(read_answer(text, MARKER) for text in texts["train"]).most_common(1)[0][0]
    return Task(
        list(rows.values()),
        chance=1 / (LARGEST - SMALLEST + 1),
        guesses={"majority": [majority] * count},
        marker=MARKER,
    )
