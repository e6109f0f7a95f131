"""Chats and their answers: which tokens these are, what the loss and validation then count; talking with a model."""

import dataclasses
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from helpers import SHORT, error_line, must, published_tokenizer, read, read_json, read_log, run, run_process, tokens_of

import sample
from common.corpus import SPLITS, Batches, Corpus, split_of
from common.errors import UserError
from common.hf import copy_tokenizer
from common.tokenizer import load_tokenizer, spelled_bytes
from data.encyclopedia import make_world, wordings
from data.files import chat_renderer, document_ids, render_chat, text_ids
from data.math_problems import TEMPLATES, Problem, make_problem
from model import IGNORE, Transformer, generate

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 more?"},
    {"role": "assistant", "content": "That makes 7.\n#### 7"},
]
TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role + '\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}
{%- else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"""


def pieces(encoding, text):
    """[(whether it is an answer, text)] of a text's tokens."""
    ids, answers = text_ids(encoding, text)
    runs = itertools.groupby(zip(ids.tolist(), answers.tolist(), strict=True), key=lambda pair: pair[1])
    return [(is_answer, encoding.decode([token for token, _ in some])) for is_answer, some in runs]


@pytest.fixture(scope="module")
def chatty(data, tmp_path_factory):
    """A function from a template, or None, to a published tokenizer that has the markers of ChatML, and its folder."""
    pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")

    def make(template):
        folder = str(tmp_path_factory.mktemp("chatty"))
        return folder, published_tokenizer(data, folder, template, "<|endoftext|>", "<|im_start|>", "<|im_end|>")

    return make


@pytest.fixture(scope="module")
def chats(data, tmp_path_factory):
    """A data folder with the domains math-chat and wiki-chat, and the built-in math."""
    folder = tmp_path_factory.mktemp("chats")
    must(run("data/chats.py", f"--out_dir={folder}/chats", "--count=120"))
    domains = f"math-chat={folder}/chats/math.jsonl,wiki-chat={folder}/chats/wiki.jsonl,math"
    flags = f"--domains={domains}", f"--out_dir={folder}/data", f"--tokenizer={data}", "--max_bytes=60_000"
    must(run("data/prepare.py", *flags))
    return f"{folder}/data"


# ---- which tokens are answers ----


def test_questions_and_answers_by_hand(data):
    encoding = load_tokenizer(data)
    text = render_chat(chat_renderer(data)[0], CHAT)
    assert pieces(encoding, text) == [
        (0, "Be brief.\nQuestion: 2 + 2?\nAnswer:"),
        (1, " 4\n<|endoftext|>"),
        (0, "Question: And 3 more?\nAnswer:"),
        (1, " That makes 7.\n#### 7\n<|endoftext|>"),
    ]


def test_a_question_has_the_ids_of_a_tasks_prompt(data):
    """And so has the one that a model is asked in a chat."""
    encoding, render = load_tokenizer(data), chat_renderer(data)[0]
    for problem in [make_problem(template, random.Random(1)) for template in TEMPLATES]:
        chat = [{"role": "user", "content": problem.question}, {"role": "assistant", "content": "1"}]
        ids, answers = text_ids(encoding, render_chat(render, chat))
        prompt = encoding.encode_ordinary(problem.prompt)
        assert ids[answers == 0].tolist() == prompt
        assert text_ids(encoding, render_chat(render, chat[:1], add_generation_prompt=True))[0].tolist() == prompt


def test_chatml_by_hand(chatty):
    folder, _ = chatty(None)
    text = render_chat(chat_renderer(folder)[0], CHAT)
    start, end = "<|im_start|>", "<|im_end|>"
    before = f"{start}system\nBe brief.{end}\n{start}user\n2 + 2?{end}\n{start}assistant\n"
    assert pieces(load_tokenizer(folder), text) == [
        (0, before),
        (1, f"4{end}"),
        (0, f"\n{start}user\nAnd 3 more?{end}\n{start}assistant\n"),
        (1, f"That makes 7.\n#### 7{end}"),
        (0, "\n"),
    ]


def test_ids_and_answers_are_those_of_transformers(chatty, tmp_path):
    """Through data.prepare, with a template that tells transformers where answers are."""
    folder, theirs = chatty(TEMPLATE)
    some = [[*CHAT[:3], {"role": "user", "content": f"Number {n}?"}, CHAT[4]][n % 2 :] for n in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in some))
    flags = f"--domains=web={tmp_path}/a.jsonl", f"--out_dir={tmp_path}/out", f"--tokenizer={folder}"
    must(run("data/prepare.py", *flags))
    meta = read_json(tmp_path / "out" / "web" / "meta.json")
    found = set()
    for split in SPLITS:
        tokens = tokens_of(tmp_path / "out", "web", split)
        answers = np.fromfile(tmp_path / "out" / "web" / f"{split}.answers.bin", np.uint8)
        assert meta["answers"][split] == answers.sum() > 0 and len(answers) == len(tokens)
        ends = np.flatnonzero(tokens == theirs.eos_token_id)
        assert not answers[ends].any()  # <|im_end|> has ended the answer before
        documents = zip(np.split(tokens, ends + 1)[:-1], np.split(answers, ends + 1)[:-1], strict=True)
        found |= {(tuple(ids.tolist()), tuple(mask.tolist())) for ids, mask in documents}
    expected = set()
    for chat in some:
        both = theirs.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        expected.add(((*both["input_ids"], theirs.eos_token_id), (*both["assistant_masks"], 0)))
    assert found == expected and len(expected) == 60


def test_the_end_of_text_ends_an_answer_that_nothing_else_ends(chatty):
    ending = "{% if add_generation_prompt %}a:{% endif %}"
    folder, _ = chatty("{% for m in messages %}{{ m.role[0] + ':' + m.content }}{% endfor %}" + ending)
    encoding = load_tokenizer(folder)
    text = render_chat(chat_renderer(folder)[0], CHAT[1:3])
    ids, lost, answers = document_ids(encoding, text, False, spelled_bytes(encoding))
    assert encoding.decode(ids) == "u:2 + 2?a:4<|endoftext|>" and lost == 0
    assert encoding.decode(ids[answers == 1]) == "4<|endoftext|>"


OTHERWISE = {
    "closed": "{% for m in messages %}{{ m.content }}|{% endfor %}<|im_end|>",
    "counted": "{{ messages|length }}{% for m in messages %}{{ m.content }}|{% endfor %}",
    "refused": "{% if messages|length < 2 %}{{ raise_exception('more') }}{% endif %}{{ messages[0].content }}",
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_template_whose_beginnings_differ_has_no_answers(name, chatty, tmp_path):
    """One line says so; the text is there."""
    folder, _ = chatty(OTHERWISE[name])
    rows = [{"messages": [{**CHAT[1], "content": f"{n}?"}, CHAT[2]]} for n in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = f"--domains=web={tmp_path}/a.jsonl", f"--out_dir={tmp_path}/out", f"--tokenizer={folder}"
    out = must(run("data/prepare.py", *flags)).out
    assert len(re.findall("web: 20 chats have no answers that --loss_on=answers could count: the chat temp", out)) == 1
    assert "answers" not in read_json(tmp_path / "out" / "web" / "meta.json")


def test_pieces_of_a_sentencepiece_text_have_no_spaces_of_their_own(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    letters = dict.fromkeys(["<unk>", "</s>", "<|im_start|>", "<|im_end|>", "<0x0A>", "▁", *"QAnswer:uestionab3?"])
    model = tokenizers.models.BPE(
        {letter: i for i, letter in enumerate(letters)}, [], unk_token="<unk>", byte_fallback=True
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    steps = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    tokenizer.decoder = tokenizers.decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    chat = [{"role": "user", "content": "a b?"}, {"role": "assistant", "content": "3"}] * 2
    text = render_chat(chat_renderer(str(tmp_path))[0], chat)
    question = (0, "Question: a b?\nAnswer:"), (1, " 3\n</s>")
    found = pieces(load_tokenizer(tmp_path), text)
    assert [(is_answer, part.removeprefix(" " * (not is_answer))) for is_answer, part in found] == [*question * 2]


# ---- what the loss and validation count ----


def where_answers_are(folder, domain, split):
    """(tokens, whether each is an answer's), found in the text: behind "Answer:", up to the end-of-text token."""
    encoding, tokens = load_tokenizer(folder), tokens_of(folder, domain, split)
    inside, before, found = False, "", []
    for token in tokens.tolist():
        found.append(inside)
        piece = encoding.decode([token])
        before = (before + piece)[-20:]
        inside = (inside or before.endswith("\nAnswer:")) and token != encoding.eot_token
    return tokens, np.array(found)


def test_answers_are_marked_through_the_whole_text(chats):
    for domain, split in itertools.product(("math-chat", "wiki-chat"), SPLITS):
        _, expected = where_answers_are(chats, domain, split)
        assert Corpus(chats).counts(domain, split, "answers").tolist() == expected.tolist()
    assert "answers" not in Corpus(chats).metas["math"]


def losses(model, rows):
    """-log p of each target of rows (N, T + 1): (N, T), from the logits."""
    log_probs = model(rows[:, :-1]).logits.log_softmax(dim=-1)
    return -log_probs.gather(-1, rows[:, 1:, None])[..., 0]


def test_training_counts_answers_alone(chats, seed, tmp_path):
    """The logged loss, the step of the first gradient and the logged bits per byte, all by hand."""
    flags = "--loss_on=answers", "--domain=math-chat", "--max_steps=1", "--warmup_steps=0", "--max_grad_norm=0.1"
    flags = *SHORT, *flags, f"--data_dir={chats}", f"--init_from={seed}", f"--out_dir={tmp_path}/run"
    must(run("train.py", *flags))
    corpus, model = Corpus(chats), Transformer.from_pretrained(seed)
    tokens, answers = where_answers_are(chats, "math-chat", "train")
    inputs, targets = Batches(corpus, {"math-chat": 1.0}, 32, 8, seed=1, stage=1)(0, 0, 8)
    rows = torch.cat((inputs, targets[:, -1:]), dim=1)  # (8, 33)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, 33)
    starts = [np.flatnonzero((windows == row).all(axis=1))[0] for row in rows.numpy()]
    counted = torch.from_numpy(np.stack([answers[start + 1 : start + 33] for start in starts]))
    assert 0.1 < counted.float().mean() < 0.9
    found = losses(model, rows)
    loss = sum(found[part][counted[part]].mean() for part in (slice(0, 4), slice(4, 8))) / 2  # of each micro-batch
    first, last = read_log(tmp_path / "run")
    assert last["loss"] == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    norm = math.sqrt(sum(parameter.grad.double().pow(2).sum() for parameter in model.parameters()))
    assert last["grad_norm"] == pytest.approx(norm, rel=1e-4)

    assert first["bpb"].keys() == {"math-chat", "wiki-chat", "avg"}  # math has no answers
    encoding = load_tokenizer(chats)
    for domain in ("math-chat", "wiki-chat"):
        tokens, answers = where_answers_are(chats, domain, "val")
        bits = size = 0
        for start in np.linspace(0, len(tokens) - 33, 4).astype(int):
            row, counts = tokens[start : start + 33], answers[start + 1 : start + 33]
            with torch.no_grad():
                bits += losses(Transformer.from_pretrained(seed), torch.from_numpy(row[None]))[0].numpy()[counts].sum()
            text = [token for token in row[1:][counts] if token != encoding.eot_token]
            size += sum(len(encoding.decode_single_token_bytes(token)) for token in text)
        assert first["bpb"][domain] == pytest.approx(bits / math.log(2) / size, rel=1e-5)
    assert read_json(tmp_path / "run" / "run.json")["recipe"]["config"]["loss_on"] == "answers"
    assert "loss_on" not in read_json(os.path.join(seed, "run.json"))["recipe"]["config"]


def test_without_any_answer_the_loss_is_zero(seed):
    model = Transformer.from_pretrained(seed)
    ids = torch.arange(12).view(2, 6)
    output = model(ids, torch.full_like(ids, IGNORE))
    output.loss.backward()
    assert output.loss == 0 and all(parameter.grad.abs().max() == 0 for parameter in model.parameters())


def test_what_is_wrong_is_one_line(chats, seed, btx, tmp_path):
    flags = *SHORT, "--loss_on=answers", f"--data_dir={chats}", f"--out_dir={tmp_path}/run"
    message = error_line(run("train.py", *flags, f"--init_from={seed}", "--domain=math,wiki-chat"))
    assert f"--loss_on=answers: math in {chats} has no answers" in message and "--loss_on=text" in message
    must(run("finetune.py", *flags, f"--init_from={btx}", "--domain=math-chat,wiki-chat", "--splice=0.5"))
    folder = shutil.copytree(chats, tmp_path / "data")
    (folder / "math-chat" / "train.answers.bin").write_bytes(b"1")
    flags = *SHORT, "--loss_on=answers", f"--data_dir={folder}", f"--init_from={seed}", f"--out_dir={tmp_path}/other"
    assert "train.answers.bin is missing or does not match train.bin in size" in error_line(
        run("train.py", *flags, "--domain=math-chat")
    )


# ---- chats from the built-in generators ----


def rows_of(folder, name):
    return [json.loads(line)["messages"] for line in read(f"{folder}/../chats/{name}.jsonl").decode().splitlines()]


def test_no_held_out_problem_is_in_a_chat(chats):
    rows = rows_of(chats, "math")
    assert len(rows) == 120
    for question, answer in rows:
        assert (question["role"], answer["role"]) == ("user", "assistant")
        problem = Problem("", question["content"], answer["content"], 0, 0)
        assert split_of(problem.chain) == "train"
        assert answer["content"].endswith(f"\n#### {problem.chain.rpartition('= ')[2]}")


def test_quizzes_ask_what_may_be_asked_in_words_of_training(chats):
    entities, attributes = make_world()
    facts = {}  # {question in a wording of training: the answer}
    for entity in entities:
        for attribute in attributes[entity.kind]:
            if attribute.name in entity.asked:
                for wording in wordings(entity, attribute, attribute.questions, "train"):
                    facts[wording.format(name=entity.name)] = entity.facts[attribute.name]
    rows = rows_of(chats, "wiki")
    assert len(rows) == 120 and {len(chat) for chat in rows} == {2, 4, 6}
    for chat in rows:
        for question, answer in zip(chat[::2], chat[1::2], strict=True):
            assert facts[question["content"]] == answer["content"]


def test_chats_are_made_once(tmp_path):
    flags = f"--out_dir={tmp_path}", "--count=3"
    must(run("data/chats.py", *flags))
    before = read(tmp_path / "math.jsonl")
    must(run("data/chats.py", *flags))
    assert "holds other chats" in error_line(run("data/chats.py", *flags, "--seed=2"))
    assert read(tmp_path / "math.jsonl") == before


# ---- talking ----

LINES = ["What is 2 + 2?", "And 3 + 4?"]
TALK = "--chat", "--temperature=0", "--max_new_tokens=8", "--device=cpu", "--dtype=float32"


def asked(encoding, line):
    return encoding.encode_ordinary(f"Question: {line}\nAnswer:")


def answered(encoding, answer):
    return [*encoding.encode_ordinary(f" {answer}\n"), encoding.eot_token]


def test_two_turns_in_a_process(seed):
    """The second answer is to the whole conversation; blank lines are none."""
    encoding, model = load_tokenizer(seed), Transformer.from_pretrained(seed)
    ids, expected = [], []
    for line in LINES:
        ids += asked(encoding, line)
        expected.append(encoding.decode(generate(model, [ids], 8, {encoding.eot_token})[0]).strip())
        ids += answered(encoding, expected[-1])
    hook = f"import io, sys; sys.stdin = io.StringIO({LINES[0] + chr(10) * 3 + LINES[1]!r})"
    result = must(run_process("sample.py", *TALK, f"--model={seed}", hook=hook))
    assert result.out == "".join(f"{answer}\n" for answer in expected) and result.err == ""


@pytest.fixture
def talk(monkeypatch):
    """A function that talks with a model that always answers "So": (the prompts it got, the ids that stop it)."""

    def talk_with(folder, lines, answer="So"):
        calls = []

        def answer_so(model, prompts, new_tokens, stop, **_):
            calls.append((*prompts, stop))
            assert len(prompts[0]) + new_tokens <= model.max_length
            return [load_tokenizer(folder).encode_ordinary(answer)]

        monkeypatch.setattr(sample, "generate", answer_so)
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        sample.chat(sample.ChatConfig(model=str(folder), device="cpu", max_new_tokens=8))
        return [prompt for prompt, _ in calls], calls[-1][1]

    return talk_with


def test_a_long_conversation_loses_its_oldest_turns(seed, talk, capsys):
    """As few as fit 120 tokens of 128; one line says so, once."""
    encoding = load_tokenizer(seed)
    lines = [f"How many shells does number {n} have left in the box, and how many in the other?" for n in range(9)]
    prompts, _ = talk(seed, lines)
    parts = [asked(encoding, line) + answered(encoding, "So") for line in lines]
    for last, prompt in enumerate(prompts):
        whole = [[*itertools.chain(*parts[first:last]), *asked(encoding, lines[last])] for first in range(last + 1)]
        assert prompt == next(ids for ids in whole if len(ids) <= 120)
    assert len(prompts) == 9 and prompts[8][: len(parts[0])] != parts[0]
    captured = capsys.readouterr()
    assert captured.out == "So\n" * 9 and captured.err.count("the oldest turns are forgotten") == 1
    with pytest.raises(UserError, match=r"this message has .* there is room for 120; shorten it"):
        talk(seed, ["x y " * 100])


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_chat_with_markers(template, chatty, talk, seed, tmp_path):
    """The prompts that transformers would make, and the marker that ends a turn stops an answer."""
    tokenizer, theirs = chatty(template)
    config = dataclasses.replace(Transformer.from_pretrained(seed).config, vocab_size=len(theirs))
    Transformer(config).save_pretrained(str(tmp_path))
    copy_tokenizer(tokenizer, tmp_path)
    prompts, stop = talk(tmp_path, LINES)
    theirs.chat_template = TEMPLATE
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": role, "content": text} for role, text in zip(roles, (LINES[0], "So", LINES[1]), strict=False)]
    for prompt, count in zip(prompts, (1, 3), strict=True):
        assert prompt == theirs.apply_chat_template(messages[:count], add_generation_prompt=True, return_dict=False)
    assert stop == {theirs.eos_token_id, theirs.convert_tokens_to_ids("<|im_end|>")} and len(stop) == 2
