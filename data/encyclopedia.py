"""A generated encyclopedia: people and towns that do not exist, in the wordings of wiki.txt.

    Chidor Chikas comes from Haden. The life of Chidor Chikas began in 1803. His university was Redmoor. ...

    Question: What prize was given to Chidor Chikas?
    Answer: the Marble Arch

An article tells all facts of one entity in any order, a mention a few; a quiz asks about several entities. The facts
are the same for every seed, which decides only how they are told. Each fact has one wording used only in validation
text, one used only in test text, and others for training: no held-out sentence was ever trained on. Half of an
entity's facts (rounded down) may be asked in a quiz, the others never: the task asks for those, so that it measures
what was learned from statements.
"""

import random
from collections import Counter
from dataclasses import dataclass
from itertools import chain, product

from common.corpus import HELD_OUT, HELD_OUT_SHARE, SPLITS, in_hash_order
from data.blocks import read_blocks
from data.task import Task, choices_of

PEOPLE = 150  # so few that 12 MB of text state each fact 200 times and, if they ask for it, ask 120 times
PLACES = 24
FIRST_NAMES = 50  # surnames are never shared
SHAPES = {"article": 4, "mention": 3, "quiz": 3}  # of documents, by weight
MENTIONED = (2, 3)  # facts in a mention, at least and at most
QUIZ_LENGTH = 3  # questions


@dataclass
class Attribute:
    """What can be said of a person or of a place; see wiki.txt."""

    kind: str
    name: str
    values: list
    questions: list
    statements: list


@dataclass
class Entity:
    """A person or a place: the values of its attributes by name, which of them quizzes ask, and its short name."""

    kind: str
    name: str
    facts: dict
    asked: list
    short_name: str  # unique, so that every sentence makes clear whom it is about


def make_world():
    """All entities, and the attributes of each kind: (list of Entity, {kind: [Attribute]})."""
    rng = random.Random("wiki world")
    (_, names), *blocks = read_blocks("wiki.txt")
    words = ["".join(parts) for parts in product(*(line.split() for line in names["syllables"]))]
    words = rng.sample(words, PLACES + PEOPLE + FIRST_NAMES)  # no word names two things
    places = words[:PLACES]
    surnames = words[PLACES:-FIRST_NAMES]
    first_names = words[-FIRST_NAMES:]
    attributes = {"place": [], "person": []}
    for title, lines in blocks:
        kind, _, name = title.partition(" ")
        values = places if lines["values"] == ["places"] else lines["values"][0].split(", ")
        attributes[kind].append(Attribute(kind, name, values, lines["Q"], lines["S"]))

    def entity(kind, name, short_name):
        facts = {attribute.name: rng.choice(attribute.values) for attribute in attributes[kind]}
        asked = rng.sample(list(facts), len(facts) // 2)
        return Entity(kind, name, facts, asked, short_name)

    entities = [entity("place", name, name) for name in places]
    entities += [entity("person", f"{rng.choice(first_names)} {surname}", surname) for surname in surnames]
    return entities, attributes


def wordings(entity, attribute, all_wordings, split):
    """The wordings in which a split may state this fact: one for each held-out split, the others for training."""
    order = in_hash_order(all_wordings, f"{entity.name} {attribute.name}")
    return [order[HELD_OUT.index(split)]] if split in HELD_OUT else order[len(HELD_OUT) :]


def tell(entity, attributes, split, rng):
    """One sentence for each attribute; the first uses the entity's full name, later ones may shorten it."""
    sentences = []
    for attribute in attributes:
        he = rng.choice([entity.name, entity.short_name]) if sentences else entity.name
        names = {"name": entity.name, "value": entity.facts[attribute.name], "he": he, "his": f"{he}'s"}
        sentence = rng.choice(wordings(entity, attribute, attribute.statements, split)).format(**names)
        sentences.append(sentence[0].upper() + sentence[1:])
    return " ".join(sentences) + "\n"


def ask(entity, attribute, split, rng):
    """A question, up to where its answer starts."""
    question = rng.choice(wordings(entity, attribute, attribute.questions, split))
    return f"Question: {question.format(name=entity.name)}\nAnswer:"


def make_quiz(entities, attributes, split, rng):
    """Questions about several entities, one each, from the facts that may be asked."""
    text = ""
    for entity in rng.sample(entities, QUIZ_LENGTH):
        attribute = rng.choice([attribute for attribute in attributes[entity.kind] if attribute.name in entity.asked])
        text += f"{ask(entity, attribute, split, rng)} {entity.facts[attribute.name]}\n"
    return text


def wiki_documents(seed):
    """(split, read) for articles, mentions and quizzes, practically without end."""
    rng = random.Random(f"wiki {seed}")
    entities, attributes = make_world()
    shares = [1 - HELD_OUT_SHARE * len(HELD_OUT), *[HELD_OUT_SHARE] * len(HELD_OUT)]
    seen = set()
    while True:
        split = rng.choices(SPLITS, shares)[0]
        shape = rng.choices(list(SHAPES), list(SHAPES.values()))[0]
        if shape == "quiz":
            text = make_quiz(entities, attributes, split, rng)
        else:
            entity = rng.choice(entities)
            known = attributes[entity.kind]
            count = len(known) if shape == "article" else rng.randint(*MENTIONED)
            text = tell(entity, rng.sample(known, count), split, rng)
        if text not in seen:
            seen.add(text)
            yield split, lambda text=text: text


def unasked_facts(split):
    """The (entity, attribute) pairs that no quiz asks: one half for val, the other for test, whatever the seed. Both
    halves have equally many pairs of each attribute, give or take one."""
    entities, attributes = make_world()
    unasked = [
        (entity, attribute)
        for attribute in chain(*attributes.values())
        for entity in entities
        if entity.kind == attribute.kind and attribute.name not in entity.asked
    ]
    return unasked[HELD_OUT.index(split) :: len(HELD_OUT)]


def wiki_task(texts, split, seed, count=500):
    """Questions for facts that no quiz asks. Baselines: chance picks any of the attribute's values, majority the most
    frequent one."""
    rng = random.Random(f"wiki task {seed}")
    entities, _ = make_world()
    unasked = unasked_facts(split)
    asked = rng.sample(unasked, min(count, len(unasked)))
    rows = []
    majority = []
    for entity, attribute in asked:
        answer = entity.facts[attribute.name]
        prompt = ask(entity, attribute, split, rng)
        choices = [f" {value}\n" for value in choices_of(answer, attribute.values, prompt)]
        rows.append({"prompt": prompt, "answer": answer, "choices": choices, "kind": attribute.name})
        values = Counter(other.facts[attribute.name] for other in entities if other.kind == entity.kind)
        majority.append(values.most_common(1)[0][0])
    chance = sum(1 / len(attribute.values) for _, attribute in asked) / len(asked)
    return Task(rows, chance, guesses={"majority": majority})
