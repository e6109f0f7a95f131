"""Questions that need two experts at once, combining what math, encyclopedia and code teach separately.

    math + wiki   Question: Chidor Chikas won a prize at the age of 12. In which year was that?
                  Answer: Chidor Chikas was born in 1803. 1803 + 12 = 1815
    code + math   # Mia has 3 boxes with 4 shells in each. How many shells does Mia have?
                  def answer():
                      return 3 * 4
    code + wiki   birthplace["Chidor Chikas"] = "Haden"

No training text has anything like them. Each has four choices, the right one first; in math + wiki the other three have
a wrong fact, a wrong sum, or both, so that neither expert alone can pick the right one.
"""

import random

from common.corpus import split_of
from data.encyclopedia import make_world
from data.math_problems import MARKER, OPERATORS, TEMPLATES, WRITTEN, make_problem
from data.task import choices_of


def fact_and_sum(rng):
    """A sum whose first number is a birth year of the encyclopedia."""
    entities, attributes = make_world()
    [years] = [attribute.values for attribute in attributes["person"] if attribute.name == "birth year"]
    while True:
        person = rng.choice([entity for entity in entities if entity.kind == "person"])
        born, age = int(person.facts["birth year"]), rng.randint(8, 40)
        other = int(rng.choice([year for year in years if int(year) != born]))
        off = rng.choice([-10, -1, 1, 10])
        sums = [(born, born + age), (other, other + age), (born, born + age + off), (other, other + age + off)]
        steps = [f" {person.name} was born in {year}. {year} + {age} = {total}" for year, total in sums]
        yield {
            "prompt": f"Question: {person.name} won a prize at the age of {age}. In which year was that?\nAnswer:",
            "answer": str(born + age),
            "choices": [f"{step}\n{MARKER} {total}\n" for step, (_, total) in zip(steps, sums, strict=True)],
        }


def operation_in_python(rng):
    """A held-out one-step problem, to be written as a Python expression: which of four operators?"""
    single = [template for template in TEMPLATES if len(template.steps) == 1]
    while True:
        problem = make_problem(rng.choice(single), rng)
        if split_of(problem.chain) != "test":
            continue
        left, operator, right = WRITTEN.search(problem.solution).groups()[:3]
        others = [other for other in OPERATORS if other != operator]
        yield {
            "prompt": f"# {problem.question}\ndef answer():\n    return",
            "answer": f"{left} {operator} {right}",
            "choices": [f" {left} {sign} {right}\n" for sign in (operator, *others)],
        }


def fact_in_python(rng):
    """A fact of the encyclopedia, to be written into a Python dictionary."""
    entities, attributes = make_world()
    while True:
        entity = rng.choice(entities)
        attribute = rng.choice(attributes[entity.kind])
        name, value = attribute.name.replace(" ", "_"), entity.facts[attribute.name]
        prompt = f'{name} = {{}}\n{name}["{entity.name}"] = "'
        choices = choices_of(value, attribute.values, prompt)
        yield {"prompt": prompt, "answer": f'{value}"', "choices": [f'{choice}"\n' for choice in choices]}


KINDS = {"math + wiki": fact_and_sum, "code + math": operation_in_python, "code + wiki": fact_in_python}


def two_expert_questions(count, domains):
    """{kind: `count` different questions}, always the same ones, for the kinds whose two domains are in `domains`."""
    found = {}
    for kind, make in KINDS.items():
        if not domains >= {*kind.split(" + ")}:
            continue
        rows = {}
        for row in make(random.Random(f"two experts {kind}")):
            rows[row["prompt"]] = row
            if len(rows) == count:
                break
        found[kind] = list(rows.values())
    return found
