"""Questions that need two experts: right by the test's own arithmetic, facts and Python."""

import re

import pytest

from data.encyclopedia import make_world, wiki_documents
from data.math_problems import math_documents
from data.two_experts import two_expert_questions

DOMAINS = {"code", "math", "wiki"}


@pytest.fixture(scope="module")
def questions():
    return two_expert_questions(60, DOMAINS)


def test_they_are_fixed_different_and_have_four_different_choices(questions):
    assert two_expert_questions(60, DOMAINS) == questions and list(questions) == [
        "math + wiki",
        "code + math",
        "code + wiki",
    ]
    assert two_expert_questions(20, DOMAINS)["code + math"] == questions["code + math"][:20]
    assert list(two_expert_questions(2, {"math", "wiki"})) == ["math + wiki"] and not two_expert_questions(2, {"code"})
    for rows in questions.values():
        assert len({row["prompt"] for row in rows}) == len(rows) == 60
        assert all(len(set(row["choices"])) == 4 for row in rows)


def test_a_sum_needs_the_fact_and_the_addition(questions):
    born = {entity.name: entity.facts.get("birth year") for entity in make_world()[0]}
    for row in questions["math + wiki"]:
        name, age = re.search(r"Question: (\w+ \w+) won a prize at the age of (\d+)\.", row["prompt"]).groups()
        judged = []
        for choice in row["choices"]:
            parts = re.fullmatch(rf" {name} was born in (\d+)\. (\d+) \+ (\d+) = (\d+)\n#### (\d+)\n", choice)
            year, left, right, total, answer = map(int, parts.groups())
            assert year == left and right == int(age) and total == answer
            judged.append((str(year) == born[name], left + right == total))
        assert judged == [(True, True), (False, True), (True, False), (False, False)]
        assert row["answer"] == row["choices"][0].split()[-1]


def test_an_operation_is_the_one_that_solves_a_held_out_problem(questions):
    trained = set()
    for _, (split, read) in zip(range(4000), math_documents(0), strict=False):
        if split == "train":
            trained.add(tuple(re.findall(r"\d+ [-+*/] \d+", read())))
    for row in questions["code + math"]:
        assert row["prompt"].startswith("# ") and row["prompt"].endswith("?\ndef answer():\n    return")
        compile(row["prompt"] + row["choices"][0], "answer", "exec")
        assert row["choices"][0] == f" {row['answer']}\n"
        numbers = set(re.findall(r"\d+", row["prompt"]))
        assert set(re.findall(r"\d+", row["answer"])) <= numbers
        assert (row["answer"],) not in trained


def test_a_fact_in_python_is_the_worlds(questions):
    facts = {}
    for entity in make_world()[0]:
        facts |= {(entity.name, name.replace(" ", "_")): value for name, value in entity.facts.items()}
    for row in questions["code + wiki"]:
        space = {}
        exec(row["prompt"] + row["choices"][0], space)
        [(attribute, filled)] = [(name, value) for name, value in space.items() if name != "__builtins__"]
        [(name, value)] = filled.items()
        assert facts[name, attribute] == value and row["answer"] == f'{value}"'


def test_no_training_text_has_the_like():
    texts = []
    for documents in (wiki_documents(0), math_documents(0)):
        texts += [read() for _, (_, read) in zip(range(2000), documents, strict=False)]
    assert not any("won a prize at the age" in text or "def answer" in text or '"] = "' in text for text in texts)
