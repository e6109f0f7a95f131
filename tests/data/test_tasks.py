"""The three tasks: a consistent world, nothing leaked, scores and baselines against counts by hand."""

import dataclasses
import itertools
import json
import math
import os
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from helpers import ROOT, must, read, read_json, run

from common.corpus import HELD_OUT, SPLITS, Corpus
from common.tokenizer import END_OF_TEXT, load_tokenizer
from data import code_task as lines
from data.encyclopedia import PEOPLE, PLACES, make_world, unasked_facts, wiki_documents, wiki_task
from data.math_problems import math_documents, math_task
from data.task import Task, edit_similarity, exact_match, mean_score, read_answer
from eval import EvalConfig, answer_marks
from model import ModelConfig, Transformer
from study.btm import NearestEnsemble


class World:
    """The encyclopedia's world, patterns to find its facts in a text without its templates, and its first 6,000
    documents, by split."""

    def __init__(self):
        self.entities, self.attributes = make_world()
        self.by_name = {entity.name: entity for entity in self.entities}
        self.full_names = {name.split()[-1]: name for name in self.by_name}  # by their last word, which is their own
        self.values = {  # (kind, value) -> attribute
            (kind, value): attribute.name
            for kind, known in self.attributes.items()
            for attribute in known
            for value in attribute.values
        }
        self.name_pattern = re.compile(rf"\b({'|'.join(self.by_name)})\b")
        self.value_pattern = {
            kind: re.compile(rf"(?<![\w,])({'|'.join(v for k, v in self.values if k == kind)})(?![\w,])")
            for kind in self.attributes
        }
        self.documents = {split: [] for split in SPLITS}
        for split, read_text in itertools.islice(wiki_documents(0), 6000):
            self.documents[split].append(read_text())

    def everything(self):
        return list(itertools.chain(*self.documents.values()))

    def stated(self, text):
        """[(full name, attribute, value)] of a document: every sentence names the entity that it is about, and has one
        value of its kind's closed lists."""
        if text.startswith("Question:"):
            for question, answer in re.findall(r"Question: (.*)\nAnswer: (.*)\n", text):
                (name,) = self.name_pattern.findall(question)
                yield name, self.values[self.by_name[name].kind, answer], answer
            return
        for sentence in text.strip().removesuffix(".").split(". "):
            named = {self.full_names[word] for word in re.findall(r"\w+", sentence) if word in self.full_names}
            people = {name for name in named if self.by_name[name].kind == "person"}  # a birthplace is a name too
            (name,) = people or named
            kind = self.by_name[name].kind
            small = sentence[:1].lower() + sentence[1:]  # a value that begins a sentence has a capital
            (value,) = self.value_pattern[kind].findall(sentence) or self.value_pattern[kind].findall(small)
            yield name, self.values[kind, value], value


class Phrasebook:
    """wiki.txt read anew, its wordings as patterns: who is named in a sentence or a question, and which attribute in
    which words."""

    def __init__(self):
        self.patterns = {}  # {(attribute, wording): (its longest piece, a pattern of the whole)}
        self.found = {}
        blocks = re.split(r"\n\[(\w+ [\w ]+)\]\n", read(os.path.join(ROOT, "data", "wiki.txt")).decode())[1:]
        for title, body in zip(blocks[::2], blocks[1::2], strict=True):
            (values,) = re.findall("^values (.*)", body, re.MULTILINE)
            for wording in re.findall("^[QS] .*", body, re.MULTILINE):
                self.patterns[title, wording] = self.pattern(title, wording[2].upper() + wording[3:], values)

    def pattern(self, title, wording, values):
        word = "[A-Z][a-z]+"
        full = f"{word} {word}" if title.startswith("person") else word
        known = {"name": full, "he": f"{full}|{word}", "value": "|".join(map(re.escape, values.split(", ")))}
        if values == "places":
            known["value"] = word
        pieces = re.split(r"\{(\w+)\}", wording.replace("{his}", "{he}'s"))
        pattern = ""
        for literal, slot in zip(pieces[::2], [*pieces[1::2], None], strict=True):
            pattern += re.escape(literal)
            if slot:
                pattern += f"(?P={slot})" if f"(?P<{slot}>" in pattern else f"(?P<{slot}>{known[slot]})"
        return max(pieces[::2], key=len), re.compile(pattern)

    def read(self, sentence):
        """(the name in it, the attribute, the wording)."""
        if sentence not in self.found:
            matches = []
            for (attribute, wording), (piece, pattern) in self.patterns.items():
                match = piece in sentence and pattern.fullmatch(sentence)
                if match:
                    names = match.groupdict()
                    matches.append((names.get("he") or names["name"], attribute, wording))
            (self.found[sentence],) = matches
        return self.found[sentence]

    def wordings_of_facts(self, texts):
        """{(the last word of a name, attribute, wording)} of documents."""
        read = {self.read(sentence) for text in texts for sentence in sentences_of(text)}
        return {(name.split()[-1], attribute, wording) for name, attribute, wording in read}


def sentences_of(text):
    """What a document states or, if it is a quiz, asks."""
    if text.startswith("Question: "):
        return re.findall("Question: (.*)", text)
    sentences = re.findall(r"[^.]+\.", text)
    assert " ".join(map(str.strip, sentences)) + "\n" == text
    return list(map(str.strip, sentences))


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with the three domains that have a task, at smoke size."""
    folder = str(tmp_path_factory.mktemp("tasks") / "data")
    flags = f"--out_dir={folder}", "--domains=code,math,wiki", "--vocab_size=512", "--max_bytes=200_000"
    must(run("data/prepare.py", *flags))
    return folder


@pytest.fixture(scope="module")
def book():
    return Phrasebook()


@pytest.fixture(scope="module")
def two_seeds(world):
    """The world's documents together with those of another seed, by split: a split has to hold across seeds."""
    documents = {split: [*texts] for split, texts in world.documents.items()}
    for split, read_text in itertools.islice(wiki_documents(7), 4000):
        documents[split].append(read_text())
    return documents


@pytest.fixture(scope="module", params=["two seeds", "prepared"])
def documents(request):
    """The encyclopedia's documents by split, from the generator or from the files of tokens."""
    if request.param == "two seeds":
        return request.getfixturevalue("two_seeds")
    folder = request.getfixturevalue("prepared")
    return {split: texts_of(folder, "wiki", split) for split in SPLITS}


def rows_of(folder, domain, split):
    return [json.loads(line) for line in read(os.path.join(folder, domain, f"task-{split}.jsonl")).splitlines()]


def texts_of(folder, domain, split):
    meta = read_json(os.path.join(folder, domain, "meta.json"))
    tokens = np.fromfile(os.path.join(folder, domain, f"{split}.bin"), dtype=meta["dtype"])
    text = load_tokenizer(folder).decode(tokens.tolist())
    return text.split(END_OF_TEXT)[:-1]


def test_a_world_can_be_checked_and_guessed(world):
    assert len(world.entities) == PEOPLE + PLACES == len(world.by_name)
    attributes = list(itertools.chain(*world.attributes.values()))
    assert len(world.values) == sum(len(attribute.values) for attribute in attributes)
    words = [word for name in world.by_name for word in name.split()[-1:]]
    assert len(set(words)) == len(words)
    for attribute in attributes:
        assert 8 <= len(attribute.values) <= 30
        assert len(attribute.questions) >= 3 and len(attribute.statements) >= 7
        assert all("{value}" in one and one.endswith(".") for one in attribute.statements)
        assert all("{name}" in one and one.endswith("?") for one in attribute.questions)


def test_every_document_states_the_same_facts(world):
    found = Counter()
    for text in world.documents["train"][:2000] + world.documents["val"] + world.documents["test"]:
        facts = [*world.stated(text)]
        assert text.startswith("Question:") or len({name for name, _, _ in facts}) == 1, text
        for name, attribute, value in facts:
            assert world.by_name[name].facts[attribute] == value, text
            found[name, attribute] += 1
    assert len(found) > 0.9 * sum(len(entity.facts) for entity in world.entities)


def test_articles_are_whole_and_worded_in_many_ways(world):
    texts = [text for text in world.documents["train"][:300] if "Question" not in text]
    articles = [facts for facts in ([fact[:2] for fact in world.stated(text)] for text in texts) if len(facts) > 3]
    assert articles and all(
        len(facts) == len(set(facts)) == len(world.by_name[facts[0][0]].facts) for facts in articles
    )
    orders = {tuple(attribute for _, attribute in facts) for facts in articles}
    possible = sum(math.factorial(len(known)) for known in world.attributes.values() if len(known) > 3)
    assert len(orders) > 0.6 * min(len(articles), possible)


def test_splits_of_a_world_share_no_document(world):
    assert len(set(world.everything())) == len(world.everything())
    assert all(0.03 < len(world.documents[split]) / len(world.everything()) < 0.07 for split in HELD_OUT)


def test_a_sentence_names_its_entity(world, book):
    """The first one of a document in full, later ones sometimes by the surname; nobody is he, she or it."""
    full = defaultdict(set)
    shortened = 0
    for text in world.everything():
        names = [book.read(sentence)[0] for sentence in sentences_of(text)]
        for name in names if text.startswith("Question:") else names[:1]:
            full[name.split()[-1]].add(name)
        if not text.startswith("Question:"):
            assert {name.split()[-1] for name in names} == {names[0].split()[-1]}, text
            shortened += sum(name != names[0] for name in names)
            assert not re.search(r"\b(he|she|his|her|him|they|their)\b", text, re.IGNORECASE), text
    assert {last: {name} for last, name in world.full_names.items()} == full  # so that a surname alone is clear
    assert shortened > 1000


def test_no_sentence_of_one_split_stands_in_the_text_of_another(documents, book):
    """Not even as a part of a longer sentence, with or without its capital."""
    for split in SPLITS:
        others = defaultdict(list)  # the other splits' documents by the words with a capital in them
        for text in itertools.chain(*(documents[name] for name in SPLITS if name != split)):
            for word in set(re.findall("[A-Z][a-z]+", text)):
                others[word].append(text)
        copies = []
        sentences = {sentence for text in documents[split] for sentence in sentences_of(text)}
        for sentence in sentences:
            small = sentence[0].lower() + sentence[1:]
            about = others[book.read(sentence)[0].split()[-1]]  # no other document can hold it
            copies += [sentence for text in about if sentence in text or small in text]
        assert len(sentences) > 100 and copies == [], split


def test_a_fact_has_wordings_of_its_own_in_each_split(documents, book):
    """To state it as well as to ask for it: one in val, one in test, neither of them trained."""
    found = {split: book.wordings_of_facts(documents[split]) for split in SPLITS}
    for split, other in itertools.permutations(SPLITS, 2):
        assert not found[split] & found[other]
    for split in HELD_OUT:
        times = Counter((name, attribute, wording[0]) for name, attribute, wording in found[split])
        assert set(times.values()) == {1} and {way for _, _, way in times} == {"Q", "S"} and len(times) > 50


def test_training_text_has_every_wording_and_every_held_out_fact(two_seeds, book):
    """What is held out is known in other words, and its wordings from other facts."""
    found = {split: book.wordings_of_facts(two_seeds[split]) for split in SPLITS}
    used = {(attribute, wording) for _, attribute, wording in found["train"]}
    assert used == set(book.patterns) and len(used) > 100
    facts = {split: {(name, attribute, wording[0]) for name, attribute, wording in found[split]} for split in SPLITS}
    assert all(facts[split] <= facts["train"] and len(facts[split]) > 500 for split in HELD_OUT)


def test_no_question_of_the_task_was_ever_asked(world, two_seeds):
    """Neither verbatim nor in other words, nor by the other split, and for half of each entity's facts."""
    texts = list(itertools.chain(*two_seeds.values()))
    quizzed = {fact[:2] for text in texts if text.startswith("Question:") for fact in world.stated(text)}
    told, asked = "\n".join(texts), []
    for seed, split in ((0, "val"), (1, "test")):  # which facts a split has does not depend on the seed
        task = wiki_task(world.documents, split, seed)
        unasked = len(unasked_facts(split))
        assert len(task.rows) == len({row["prompt"] for row in task.rows}) == unasked > 240
        for row in task.rows:
            ((name, attribute, value),) = world.stated(f"{row['prompt']} {row['answer']}\n")
            assert row["prompt"] not in told
            assert world.by_name[name].facts[attribute] == value == row["answer"] and attribute == row["kind"]
            asked.append((name, attribute))
    assert not quizzed & {*asked}
    assert len({*asked}) == len(asked) == sum(len(entity.facts) - len(entity.asked) for entity in world.entities)
    val, test = (Counter(attribute.name for _, attribute in unasked_facts(split)) for split in HELD_OUT)
    assert val.keys() == test.keys() == {attribute for _, attribute in quizzed}
    assert all(abs(val[attribute] - test[attribute]) <= 1 for attribute in val)
    for entity in world.entities:
        assert len(entity.asked) == len(entity.facts) // 2


def test_the_same_seed_gives_the_same_text(world):
    again = [read_text() for _, read_text in itertools.islice(wiki_documents(0), 200)]
    other = [read_text() for _, read_text in itertools.islice(wiki_documents(1), 200)]
    assert set(again) <= set(world.everything()) and not set(again) & set(other)
    same, once_more, new = (wiki_task({}, "val", seed).rows for seed in (0, 0, 1))
    assert same == once_more != new


def test_baselines_of_a_world_by_counting(world):
    task = wiki_task({}, "test", 0, count=200)
    assert len(task.rows) == 200
    right = chance = 0
    for row in task.rows:
        kind = next(kind for kind in world.attributes if any(a.name == row["kind"] for a in world.attributes[kind]))
        values = Counter(entity.facts[row["kind"]] for entity in world.entities if entity.kind == kind)
        best = [value for value in values if values[value] == max(values.values())]
        right += best[0] == row["answer"]
        chance += 1 / next(len(a.values) for a in world.attributes[kind] if a.name == row["kind"])
    assert task.baselines()["accuracy"] == {"chance": round(chance / 200, 4), "majority": round(right / 200, 4)}


def test_lines_worth_asking():
    good = ["    return self.values[0]", "if x is None and y:", 'raise ValueError("a text")', "for n in range(10):"]
    bad = ["", "    )", "else:", "# a comment that is long", '"a long string in a list",', "x = 1234567890", "a" * 61]
    assert all(map(lines.is_worth_asking, good)) and not any(map(lines.is_worth_asking, bad))
    assert lines.lines_of_strings("a = 1\nb = \"\"\"c\nd = 2\n\"\"\"\ne = '''f'''\ng = 3\n") == {1, 2, 3, 4}


@pytest.mark.parametrize("split", HELD_OUT)
def test_code_rows_are_the_next_line_of_held_out_files(split, prepared):
    rows, files = rows_of(prepared, "code", split), texts_of(prepared, "code", split)
    elsewhere = "\0".join(text for name in SPLITS if name != split for text in texts_of(prepared, "code", name))
    assert len(rows) == len({row["prompt"] for row in rows}) > 100
    for row in rows:
        asked = row["prompt"] + row["answer"]
        assert any(asked + "\n" in text for text in files) and asked not in elsewhere
        assert len(row["prompt"].encode()) >= 200 and len(row["prompt"].rstrip(" ").encode()) <= 400
        assert row["answer"] == row["answer"].strip() and not row["answer"].startswith("#")
    first = rows[: len(files)]  # spread over the files: no file comes twice while another has not come at all
    origins = [sum(row["prompt"] + row["answer"] in text for row in first) for text in files]
    assert max(origins) <= 2 + origins.count(0)


def test_code_prompts_fill_their_context():
    """By hand: with lines of 21 bytes, 19 of them fit 400 bytes, and at least 200 bytes are needed."""
    text = "".join(f"    value_{n:03} = call()\n" for n in range(40))
    rows = sorted(lines.completions(text), key=lambda row: row["answer"])
    assert len(text.split("\n")[0]) + 1 == 23 and rows[0]["answer"] == "value_009 = call()"
    last = rows[-1]
    assert last["answer"] == "value_039 = call()" and last["prompt"].startswith("    value_022") and len(rows) == 31
    assert last["prompt"].endswith("value_038 = call()\n    ") and len(last["prompt"]) == 17 * 23 + 4


def test_no_row_is_in_both_splits(prepared):
    for domain in ("code", "math", "wiki"):
        val, test = ({(row["prompt"], row["answer"]) for row in rows_of(prepared, domain, split)} for split in HELD_OUT)
        assert min(len(val), len(test)) > 100 and not val & test


def test_code_that_both_splits_have_is_asked_in_neither():
    """Two files that begin alike: only the lines after that are asked."""
    shared = "".join(f"value_{n:03} = call()\n" for n in range(20))
    own = {split: "".join(f"{split}_{n:03} = call()\n" for n in range(20)) for split in SPLITS}
    texts = {"train": [own["train"]], **{split: [shared + own[split]] for split in HELD_OUT}}
    for split in HELD_OUT:
        answers = {row["answer"] for row in lines.code_task(texts, split, 0).rows}
        assert answers == set(own[split].splitlines())


@pytest.mark.parametrize("split", HELD_OUT)
def test_code_baselines_by_counting(split, prepared):
    rows, meta = rows_of(prepared, "code", split), read_json(f"{prepared}/code/meta.json")
    baselines = meta["task"]["baselines"][split]
    above = [next(line.strip() for line in row["prompt"].split("\n")[-2::-1] if line.strip()) for row in rows]
    counts = Counter()
    for text in texts_of(prepared, "code", "train"):
        counts.update(line.strip() for line in text.split("\n") if lines.is_worth_asking(line))
    frequent = max(counts, key=counts.get)
    answers = [row["answer"] for row in rows]
    assert baselines["accuracy"]["copy"] == round(sum(map(str.__eq__, above, answers)) / len(rows), 4)
    assert baselines["accuracy"]["majority"] == round(answers.count(frequent) / len(rows), 4)
    assert baselines["accuracy"]["chance"] == round(1 / len(counts), 4)
    expected = sum(map(edit_similarity, above, answers)) / len(rows)
    assert baselines["edit_similarity"]["copy"] == pytest.approx(expected, abs=1e-4)


def test_math_baselines_by_counting():
    stream = itertools.islice(math_documents(0), 2000)
    texts = {"train": [read_text() for split, read_text in stream if split == "train"]}
    task = math_task(texts, "test", 0, count=100)
    counts = Counter(text.rsplit("#### ")[-1].strip() for text in texts["train"])
    best = max(counts, key=counts.get)
    right = sum(row["answer"] == best for row in task.rows) / 100
    assert task.baselines()["accuracy"] == {"chance": 0.001, "majority": right} and task.marker == "####"


def test_scores_by_hand():
    assert exact_match("return x", "return x") == 1 and exact_match("return x", "return  x") == 0
    assert edit_similarity("abcd", "abcd") == 1 and edit_similarity("", "abc") == 0
    assert edit_similarity("abcd", "bcde") == 2 * 3 / 8  # bcd in common
    assert edit_similarity("return a", "return ab") == 2 * 8 / 17
    assert edit_similarity("xayb", "ab") == 2 * 2 / 6  # blocks a and b
    rows = [{"answer": "ab"}, {"answer": "abcd"}]
    assert mean_score("accuracy", ["ab", "bcde"], rows) == 0.5
    assert mean_score("edit_similarity", ["ab", "bcde"], rows) == (1 + 0.75) / 2
    task = Task(rows, chance=0.25, guesses={"x": ["abcd", "abcd"]}, metrics=("accuracy", "edit_similarity"))
    expected = {"accuracy": {"chance": 0.25, "x": 0.5}, "edit_similarity": {"x": 0.8333}, "choice": {"chance": 0.25}}
    assert task.baselines() == expected


@pytest.mark.parametrize(
    ("text", "marker", "answer"),
    [
        (" Bramoden\nQuestion: Where", "", "Bramoden"),
        (" Bramoden", "", "Bramoden"),
        ("return x  ", "", "return x"),
        ("\nreturn x", "", ""),
        ("so 3 + 4 = 7.\n#### 7\n", "####", "7"),
        ("7", "####", ""),
    ],
)
def test_reading_an_answer(text, marker, answer):
    assert read_answer(text, marker) == answer


def test_choices_are_four_and_the_right_one_is_first(prepared):
    for domain in ("code", "math", "wiki"):
        for row in rows_of(prepared, domain, "test"):
            assert len(set(row["choices"])) == 4
            assert row["answer"] in row["choices"][0] and not any(
                choice.strip().endswith(f" {row['answer']}") for choice in row["choices"][1:]
            )


def tiny(num_local_experts):
    return ModelConfig(512, 16, 24, 2, 2, 1, 256, num_local_experts=num_local_experts)


def test_scores_of_equal_models_are_equal(prepared):
    """A dense model, a mixture of two copies of it and an ensemble of two copies give the same answers."""
    torch.manual_seed(3)
    dense, mixed = Transformer(tiny(0)), Transformer(tiny(2))
    weights = {name: weight * 5 for name, weight in dense.state_dict().items()}  # far from ties
    dense.load_state_dict(weights)
    for ours, theirs in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        for layer in "01":
            weight = weights.pop(f"model.layers.{layer}.mlp.{theirs}.weight")
            weights[f"model.layers.{layer}.block_sparse_moe.experts.{ours}"] = torch.stack([weight, weight])
    assert not mixed.load_state_dict(weights, strict=False).unexpected_keys
    ensemble = NearestEnsemble([dense, dense], torch.zeros(512, 2), k=2)
    corpus, config = Corpus(prepared), EvalConfig(task_problems=30, max_new_tokens=12)
    marks = answer_marks(dense, corpus, config)
    assert set(marks["accuracy"]) == {"code", "math", "wiki"} and set(marks["edit_similarity"]) == {"code"}
    assert len(marks["edit_similarity"]["code"]) == 30 and sum(marks["edit_similarity"]["code"]) > 0
    assert answer_marks(mixed, corpus, config) == marks == answer_marks(ensemble, corpus, config)


def test_every_answer_belongs_to_its_problem(prepared, monkeypatch):
    """Prompts are sorted by length and answered seven at a time; each gets its own answer, and no other one."""
    encoding, batches = load_tokenizer(prepared), []
    rows = itertools.chain(*(rows_of(prepared, domain, "test") for domain in ("code", "math", "wiki")))
    right = {row["prompt"]: row["answer"] for row in rows}

    def write(model, prompts, max_new_tokens, stop, **options):
        batches.append([len(prompt) for prompt in prompts])
        answers = [right[encoding.decode(prompt)] for prompt in prompts]
        return [encoding.encode_ordinary(f"#### {one}" if len(stop) == 1 else f" {one}") for one in answers]

    monkeypatch.setattr("eval.generate", write)
    monkeypatch.setattr("eval.GENERATED_ROWS", 7)
    model = Transformer(dataclasses.replace(tiny(0), max_position_embeddings=1024))
    marks = answer_marks(model, Corpus(prepared), EvalConfig(task_problems=40, max_new_tokens=20))
    assert marks["accuracy"] == dict.fromkeys(("code", "math", "wiki"), 40 * [1.0])
    assert [len(batch) for batch in batches] == 3 * [7, 7, 7, 7, 7, 5]
    for domain in (batches[:6], batches[6:12], batches[12:]):
        lengths = list(itertools.chain(*domain))
        assert lengths == sorted(lengths)


def test_a_right_line_scores_one(prepared, monkeypatch):
    """Half of the answers are right; a line task stops at the end of the line, math at the end of the document."""
    encoding, stops = load_tokenizer(prepared), []
    rows = itertools.chain(*(rows_of(prepared, domain, "test") for domain in ("code", "math", "wiki")))
    right = {row["prompt"]: row["answer"] for row in rows}

    def write(model, prompts, max_new_tokens, stop, **options):
        stops.append(stop)
        answers = [right[encoding.decode(prompt)] for prompt in prompts]
        texts = [f"#### {answer}" if answer.isdigit() and len(stop) == 1 else f" {answer}" for answer in answers]
        return [encoding.encode_ordinary(text if n % 2 else "none") for n, text in enumerate(texts)]

    monkeypatch.setattr("eval.generate", write)
    model = Transformer(dataclasses.replace(tiny(0), max_position_embeddings=1024))
    marks = answer_marks(model, Corpus(prepared), EvalConfig(task_problems=40, max_new_tokens=20))
    assert set(marks["accuracy"]) == {"code", "math", "wiki"}
    assert all(sorted(some) == 20 * [0.0] + 20 * [1.0] for some in marks["accuracy"].values())
    code, math, wiki = stops
    assert math == {encoding.eot_token} and code == wiki > math
    assert {encoding.decode([token]).strip(" ") != "" for token in code} == {True}
    assert {token for token in range(512) if "\n" in encoding.decode([token])} == code - math
