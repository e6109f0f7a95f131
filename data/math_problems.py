"""Generated grade-school word problems with worked solutions, made from math_templates.txt.

    Question: Mia has 3 boxes with 4 shells in each. How many shells does Mia have?
    Answer: There are 3 * 4 = 12 shells.
    #### 12

The solution computes itself while it is written, so its arithmetic is right by construction.
"""

import os
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from operator import add, floordiv, mul, sub

from common.corpus import split_of
from data.task import Task, choices_of, read_answer

TEMPLATE_FILE = os.path.join(os.path.dirname(__file__), "math_templates.txt")
MARKER = "####"  # the final answer follows it
SMALLEST = 2  # no value leaves this range, so plurals are always right
LARGEST = 999
OPERATORS = {"+": add, "-": sub, "*": mul, "/": floordiv}
EQUATION = re.compile(r"\[(\w+) = (\w+) ([-+*/]) (\w+)\]")
MAX_REPEATS = 10_000  # as many problems in a row that were there before: the templates are exhausted

GIRLS = ["Anna", "Bella", "Clara", "Dina", "Ella", "Fatima", "Grace", "Hana", "Ida", "Julia"]
GIRLS += ["Kim", "Lina", "Mia", "Nora", "Olga", "Priya", "Rosa", "Sara", "Tara", "Zoe"]
BOYS = ["Adam", "Ben", "Carl", "David", "Eli", "Felix", "George", "Hugo", "Ivan", "Jack"]
BOYS += ["Karim", "Leo", "Max", "Noah", "Oscar", "Paul", "Ravi", "Sam", "Tom", "Yusuf"]
THINGS = ["apple", "marble", "pencil", "sticker", "cookie", "coin", "card", "shell", "bead", "button"]
THINGS += ["stamp", "orange", "pear", "balloon", "candle", "cup", "flower", "stone", "ticket", "ring"]
THINGS += ["ribbon", "banana", "lemon", "muffin", "carrot", "egg", "plum", "bell", "pen", "toy"]
CONTAINERS = [("box", "boxes"), ("bag", "bags"), ("basket", "baskets"), ("jar", "jars"), ("crate", "crates")]
PLACES = ["market", "shop", "store", "fair", "bazaar"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
ANIMALS = ["cows", "goats", "sheep", "horses", "dogs", "pigs"]


@dataclass
class Template:
    """A kind of problem; see math_templates.txt for the notation."""

    name: str
    numbers: list = field(default_factory=list)  # of (name, low, high) or (name, left, operator, right)
    questions: list = field(default_factory=list)
    steps: list = field(default_factory=list)  # of lists of phrasings


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
    def text(self):
        """The problem as a training document."""
        return f"{self.prompt} {self.solution}\n{MARKER} {self.answer}\n"


def read_templates(path=TEMPLATE_FILE):
    """Parse the template file into a list of Template."""
    templates = []
    with open(path) as file:
        for line in file.read().splitlines():
            kind, _, rest = line.partition(" ")
            if kind.startswith("["):
                templates.append(Template(kind[1:-1]))
            elif kind == "let":
                for item in rest.split(", "):
                    name, value = item.split(" = ")
                    limits = [int(limit) for limit in value.split("..")] if ".." in value else value.split(" ")
                    templates[-1].numbers.append((name, *limits))
            elif kind == "Q":
                templates[-1].questions.append(rest)
            elif kind == "A":
                templates[-1].steps.append(rest.split(" | "))
    return templates


def _compute(values, left, operator, right):
    """Apply an operator to two names or literals. None unless the result is a whole number in range."""
    left, right = (int(side) if side.isdigit() else values[side] for side in (left, right))
    if operator == "/" and left % right:
        return None
    result = OPERATORS[operator](left, right)
    return result if SMALLEST <= result <= LARGEST else None


def _draw_numbers(template, equations, rng):
    """Values for all names of a template, drawn again until every step has a good result."""
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
    name = rng.choice(GIRLS + BOYS)
    he, his = ("she", "her") if name in GIRLS else ("he", "his")
    thing, other = rng.sample(THINGS, 2)
    box, boxes = rng.choice(CONTAINERS)
    day = rng.randrange(7)
    return {
        "name": name,
        "friend": rng.choice([friend for friend in GIRLS + BOYS if friend != name]),
        "he": he,
        "He": he.capitalize(),
        "his": his,
        "thing": thing,
        "things": thing + "s",
        "others": other + "s",
        "box": box,
        "boxes": boxes,
        "place": rng.choice(PLACES),
        "day": DAYS[day],
        "next": DAYS[(day + 1) % 7],
        "animals": rng.choice(ANIMALS),
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
    """(split, read) for problems, in practice without end; the question, numbers and all, decides the split."""
    rng = random.Random(f"math {seed}")
    templates = read_templates()
    seen = set()
    repeats = 0
    while repeats < MAX_REPEATS:
        problem = make_problem(rng.choice(templates), rng)
        if problem.question in seen:
            repeats += 1
            continue
        seen.add(problem.question)
        repeats = 0
        yield split_of(problem.question), lambda problem=problem: problem.text


def wrong_results(problem):
    """The worked solution, and three others whose last result is wrong by 1, 2 or 10: texts to choose from."""
    near = {problem.answer + off for off in (-10, -2, -1, 1, 2, 10)} - {problem.answer}
    results = choices_of(problem.answer, [number for number in near if number >= 0], problem.question)
    before, _, after = problem.solution.rpartition(f"= {problem.answer}")
    return [f" {before}= {result}{after}\n{MARKER} {result}\n" for result in results]


def math_task(texts, split, seed, count=500):
    """Problems of the split, evenly spread over the templates. Chance is any number an answer may be, majority the most
    frequent answer of the training text."""
    rng = random.Random(f"math task {seed}")
    templates = read_templates()
    rows = []
    seen = set()
    while len(rows) < count:
        template = templates[len(rows) % len(templates)]
        problem = make_problem(template, rng)
        if split_of(problem.question) == split and problem.question not in seen:
            seen.add(problem.question)
            row = {"prompt": problem.prompt, "answer": str(problem.answer), "choices": wrong_results(problem)}
            rows.append({**row, "template": problem.template, "steps": problem.steps})
    majority = Counter(read_answer(text, MARKER) for text in texts["train"]).most_common(1)[0][0]
    return Task(rows, chance=1 / (LARGEST - SMALLEST + 1), guesses={"majority": [majority] * count}, marker=MARKER)
