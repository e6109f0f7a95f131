"""Generated worlds: people and things that do not exist, worded by a file of data/worlds. `wiki` is an encyclopedia.

    Chidor Chikas comes from Haden. The life of Chidor Chikas began in 1803. His university was Redmoor. ...

    Question: What prize was given to Chidor Chikas?
    Answer: the Marble Arch

An article tells all facts of one entity in any order, a mention a few; a quiz asks about several entities. A
world is the same for every seed, which decides how it is told. Half of an entity's facts (rounded down) may come in
a quiz, the others never do: the task asks those, so that it measures what was learned from statements.

The other worlds (fleet, opera, league, court, orbit) have names, facts and wordings of their own: domains of which one
says nothing about another, for studies of their number.
"""

import os
import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import product

from common.corpus import HELD_OUT, split_of
from data.task import Task, choices_of

FOLDER = os.path.join(os.path.dirname(__file__), "worlds")
WORLDS = "wiki", "fleet", "opera", "league", "court", "orbit"
PEOPLE, THINGS = 150, 24  # few: 12 MB of text tell a fact 200 times and, if at all, ask it 120 times
FIRST_NAMES = 50  # surnames are never shared
SHAPES = {"article": 4, "mention": 3, "quiz": 3}  # of documents, by weight
MENTIONED, QUIZ_LENGTH = (2, 3), 3  # facts in a mention, at least and at most; questions in a quiz


@dataclass
class Attribute:
    """What can be said of an entity of some kind; see data/worlds/wiki.txt."""

    kind: str
    name: str
    values: list = field(default_factory=list)
    questions: list = field(default_factory=list)
    statements: list = field(default_factory=list)


@dataclass
class Entity:
    """A person or a thing: its attributes' values by name, the attributes asked in quizzes, its short names."""

    kind: str
    name: str
    facts: dict
    asked: list
    subjects: list  # ways to call it once its name was given
    possessives: list


def read_world(world):
    """Parse a world's file: ({setting: [its value on each line]}, list of Attribute)."""
    settings, attributes = {}, []
    with open(os.path.join(FOLDER, f"{world}.txt")) as file:
        lines = [line for line in file.read().splitlines() if not line.startswith("#")]
    for line in lines:
        first, _, rest = line.partition(" ")
        if first == "values":
            attributes[-1].values = rest.split(", ")
        elif first == "Q":
            attributes[-1].questions.append(rest)
        elif first == "S":
            attributes[-1].statements.append(rest)
        elif first.startswith("[") and rest:
            attributes.append(Attribute(first[1:], rest[:-1]))
        elif rest:
            settings.setdefault(first, []).append(rest)
    return settings, attributes


def make_world(world="wiki"):
    """All entities, and the attributes that each kind has: (list of Entity, {kind: [Attribute]})."""
    rng, (settings, known) = random.Random(f"{world} world"), read_world(world)
    words = ["".join(parts) for parts in product(*map(str.split, settings["syllables"]))]
    words = rng.sample(words, THINGS + PEOPLE + FIRST_NAMES)  # no word names two things
    things, surnames, first_names = words[:THINGS], words[THINGS:-FIRST_NAMES], words[-FIRST_NAMES:]
    (person,), (thing,) = settings["people"], settings["things"]
    thing, short = thing.split(", ")
    attributes = {thing: [], person: []}
    for attribute in known:
        if attribute.values == ["things"]:
            attribute.values = things
        attributes[attribute.kind].append(attribute)

    def entity(kind, name, subjects, possessives):
        facts = {attribute.name: rng.choice(attribute.values) for attribute in attributes[kind]}
        asked = rng.sample(list(facts), len(facts) // 2)
        return Entity(kind, name, facts, asked, [name, *subjects], [f"{name}'s", *possessives])

    entities = [entity(thing, name, [short, "it"], [f"{short}'s", "its"]) for name in things]
    for surname in surnames:
        he, his = rng.choice([("he", "his"), ("she", "her")])
        entities.append(entity(person, f"{rng.choice(first_names)} {surname}", [surname, he], [f"{surname}'s", his]))
    return entities, attributes


def tell(entity, attributes, rng):
    """One sentence for each attribute; the first one has the entity's full name, later ones may shorten it."""
    sentences, choices = [], 1
    for attribute in attributes:
        names = {"name": entity.name, "value": entity.facts[attribute.name]}
        names["he"] = rng.choice(entity.subjects[:choices])
        names["his"] = rng.choice(entity.possessives[:choices])
        sentence = rng.choice(attribute.statements).format(**names)
        sentences.append(sentence[0].upper() + sentence[1:])
        choices = len(entity.subjects)
    return " ".join(sentences) + "\n"


def ask(entity, attribute, rng):
    """A question up to where the answer starts."""
    return f"Question: {rng.choice(attribute.questions).format(name=entity.name)}\nAnswer:"


def make_quiz(entities, attributes, rng):
    """Questions about several entities, one each, among the facts that may be asked."""
    text = ""
    for entity in rng.sample(entities, QUIZ_LENGTH):
        attribute = rng.choice([attribute for attribute in attributes[entity.kind] if attribute.name in entity.asked])
        text += f"{ask(entity, attribute, rng)} {entity.facts[attribute.name]}\n"
    return text


def world_documents(seed, world="wiki"):
    """(split, read) for articles, mentions and quizzes, in practice without end; the text decides the split, so
    val and test have the facts of training in other words."""
    rng, (entities, attributes) = random.Random(f"{world} {seed}"), make_world(world)
    shapes, weights = list(SHAPES), list(SHAPES.values())
    seen = set()
    while True:
        shape = rng.choices(shapes, weights)[0]
        if shape == "quiz":
            text = make_quiz(entities, attributes, rng)
        else:
            entity = rng.choice(entities)
            known = attributes[entity.kind]
            count = len(known) if shape == "article" else rng.randint(*MENTIONED)
            text = tell(entity, rng.sample(known, count), rng)
        if text not in seen:
            seen.add(text)
            yield split_of(text), lambda text=text: text


def unasked_facts(split, world="wiki"):
    """The (entity, attribute) pairs that no quiz asks: one half for val, the other for test, whatever the seed; of each
    attribute both halves have as many, or one more."""
    entities, attributes = make_world(world)
    unasked = [(e, a) for kind in attributes for a in attributes[kind] for e in entities if e.kind == kind]
    unasked = [(e, a) for e, a in unasked if a.name not in e.asked]
    return unasked[HELD_OUT.index(split) :: len(HELD_OUT)]


def world_task(texts, split, seed, world="wiki", count=500):
    """Questions for facts that no quiz asks. Chance is one of the attribute's values, majority its most frequent."""
    rng, (entities, attributes) = random.Random(f"{world} task {seed}"), make_world(world)
    rows, majority, chance = [], [], []
    frequency = {
        (kind, attribute.name): Counter(entity.facts[attribute.name] for entity in entities if entity.kind == kind)
        for kind in attributes
        for attribute in attributes[kind]
    }
    unasked = unasked_facts(split, world)
    for entity, attribute in rng.sample(unasked, min(count, len(unasked))):
        answer = entity.facts[attribute.name]
        prompt = ask(entity, attribute, rng)
        choices = [f" {value}\n" for value in choices_of(answer, attribute.values, prompt)]
        rows.append({"prompt": prompt, "answer": answer, "choices": choices, "kind": attribute.name})
        majority.append(frequency[entity.kind, attribute.name].most_common(1)[0][0])
        chance.append(1 / len(attribute.values))
    return Task(rows, chance=sum(chance) / len(chance), guesses={"majority": majority})
