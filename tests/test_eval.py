"""eval.py: bits per byte from transformers and a plain sum, exact-match answers, and what results.json holds."""

import itertools
import json
import math
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    TOKENS,
    error_line,
    finish_process,
    meta_of,
    must,
    read,
    read_json,
    read_log,
    run,
    start_process,
    tokens_of,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import model as model_file
from common.corpus import Corpus
from common.hf import weights_hash
from common.tokenizer import load_tokenizer
from data.task import read_answer
from eval import choice_marks

FLAGS = (
    "--sequence_length=32",
    "--eval_windows=7",
    "--spliced_windows=9",
    "--task_problems=3",
    "--max_new_tokens=8",
    "--device=cpu",
    "--threads=1",
)


@pytest.fixture(scope="module")
def command(work, data, seed, experts, mixed, btx):
    models = f"--model={','.join([seed, *experts, mixed, btx])}"
    return ["eval.py", *FLAGS, models, f"--data_dir={data}", f"--out_dir={work}/scores"]


@pytest.fixture(scope="module")
def results(work, command, data, seed, experts):
    must(run(*command))
    ensembles = f"--experts={','.join([*experts, seed])}"
    must(run("study/btm.py", *FLAGS, ensembles, f"--data_dir={data}", f"--out_dir={work}/scores"))
    return read_json(os.path.join(work, "scores", "results.json"))


@pytest.fixture
def rows(results):
    return {row["name"]: row for row in results["rows"]}


def bits_per_byte(folder, data, domain, split, windows):
    """With transformers' model, one token at a time, over bytes of the text that the tokens spell."""
    model, encoding = AutoModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer(data)
    tokens = tokens_of(data, domain, split)
    bits, size = 0.0, 0
    for start in np.linspace(0, len(tokens) - 33, windows).astype(int):
        window = tokens[start : start + 33].tolist()
        with torch.no_grad():
            logits = model(torch.tensor([window[:-1]])).logits[0].double()
        for t, target in enumerate(window[1:]):
            bits -= (logits[t, target] - logits[t].logsumexp(dim=0)).item() / math.log(2)
        size += len(encoding.decode_bytes([token for token in window[1:] if token != encoding.eot_token]))
    return bits / size


def test_bits_per_byte_equal_an_independent_sum(rows, seed, btx, data):
    for name, folder in (("seed", seed), ("btx", btx)):
        for domain in ("math", "rain"):
            assert rows[name]["bpb"][domain] == pytest.approx(bits_per_byte(folder, data, domain, "test", 7), rel=1e-5)
    for row in rows.values():
        assert row["bpb"]["avg"] == pytest.approx((row["bpb"]["math"] + row["bpb"]["rain"]) / 2)


def test_results_hold_what_others_rely_on(results, rows, data):
    models = ["seed", "expert-math", "expert-rain", "mixed", "btx"]
    assert list(rows) == [*models, "btm-top1", "btm-top2", "btm-posterior", "btm-posterior-prefix", "btm-share"]
    assert len({row["id"] for row in rows.values()}) == 10
    for row in rows.values():
        assert set(row["bpb"]) == {"math", "rain", "avg"} and set(row["accuracy"]) == {"math"}
        assert row["seconds"] > 0 and row["train_flops"] > 0
    assert {name: row["settings"] for name, row in rows.items() if "settings" in row}.keys() == {"btm-share"}
    assert results["config"]["sequence_length"] == 32 and results["config"]["spliced_windows"] == 9
    for domain in ("math", "rain"):
        meta = read_json(os.path.join(data, domain, "meta.json"))
        assert results["data"][domain] == {name: meta[name] for name in ("content_hash", "tokenizer_hash")}
    assert results["versions"]["torch"] == torch.__version__


def test_experts_are_best_at_home(rows):
    assert rows["expert-math"]["bpb"]["math"] < rows["expert-rain"]["bpb"]["math"]
    assert rows["expert-rain"]["bpb"]["rain"] < rows["expert-math"]["bpb"]["rain"]


def test_costs(rows):
    """The seed's training counts once, however many experts carry it."""
    tokens = {name: row["train_tokens"] / TOKENS for name, row in rows.items()}
    experts = {"expert-math": 2, "expert-rain": 2}
    # experts a token
    running = {"btm-top1": 1, "btm-top2": 2, "btm-posterior": 3, "btm-posterior-prefix": 3, "btm-share": 3}
    assert tokens == {"seed": 1, **experts, "mixed": 3, "btx": 4, **dict.fromkeys(running, 3)}
    one = rows["seed"]["total_params"]
    assert {name: rows[name]["active_params"] / one for name in running} == running
    assert {rows[name]["total_params"] / one for name in running} == {3}
    ff, routers = 2 * 3 * 32 * 48, 2 * 3 * 32  # 2 layers
    assert rows["btx"]["total_params"] == one + 2 * ff + routers
    assert rows["btx"]["active_params"] == one + ff + routers


def test_loads(rows):
    assert {name for name, row in rows.items() if "load" in row} == {"mixed", "btx"}
    for layers in rows["btx"]["load"].values():
        assert len(layers) == 2
        for shares in layers:
            assert len(shares) == 3 and sum(shares) == pytest.approx(1, abs=2e-4)


def test_loads_are_the_routers_choices(rows, btx, data):
    """Counted again from the logits that transformers' routers give."""
    model = AutoModelForCausalLM.from_pretrained(btx).eval()
    tokens = tokens_of(data, "math", "test")
    counts = np.zeros((2, 3))
    for start in np.linspace(0, len(tokens) - 33, 7).astype(int):
        with torch.no_grad():
            routers = model(torch.from_numpy(tokens[None, start : start + 32]), output_router_logits=True).router_logits
        for layer, logits in enumerate(routers):
            for chosen in logits.argsort(dim=1, descending=True)[:, :2].tolist():
                counts[layer, chosen] += 1
    expected = counts / counts.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(rows["btx"]["load"]["math"], expected, atol=1e-4)


def test_again_does_nothing_and_other_settings_are_refused(results, command, work):
    path = os.path.join(work, "scores", "results.json")
    before = read(path), os.stat(path).st_mtime_ns
    must(run(*command))
    message = error_line(run(*command, "--eval_windows=6"))
    assert path in message and "--overwrite" in message
    assert (read(path), os.stat(path).st_mtime_ns) == before


def test_overwriting_keeps_the_old_rows_until_there_is_a_new_one(results, seed, data, tmp_path):
    """A model that cannot be scored costs nobody the rows that are there; the first new row replaces all of them."""
    out = tmp_path / "scores"
    out.mkdir()
    (out / "results.json").write_text(json.dumps(results))
    command = "eval.py", *FLAGS, f"--model={seed}", f"--data_dir={data}", f"--out_dir={out}", "--overwrite=True"
    assert "longer than seed takes" in error_line(run(*command, "--sequence_length=256"))
    assert read_json(out / "results.json") == results
    must(run(*command, "--eval_windows=6"))
    found = read_json(out / "results.json")
    assert [row["name"] for row in found["rows"]] == ["seed"] and found["config"]["eval_windows"] == 6


def test_val_and_test_are_scored_apart(results, rows, seed, data, tmp_path, monkeypatch):
    """Other windows, other problems, other baselines, and not in one results.json; training looks at val."""
    asked, encoding = [], load_tokenizer(data)

    def answer(model, prompts, max_new_tokens, stop, unknown):
        asked.extend(encoding.decode(prompt) for prompt in prompts)
        return [[]] * len(prompts)

    monkeypatch.setattr(model_file, "generate", answer)
    flags = *FLAGS, f"--model={seed}", f"--data_dir={data}"
    baselines = read_json(os.path.join(data, "math", "meta.json"))["task"]["baselines"]
    for split in ("val", "test"):
        asked.clear()
        must(run("eval.py", *flags, f"--split={split}", f"--out_dir={tmp_path}/{split}"))
        found = read_json(tmp_path / split / "results.json")
        bpb = found["rows"][0]["bpb"]["math"]
        assert bpb == pytest.approx(bits_per_byte(seed, data, "math", split, 7), rel=1e-5)
        assert found["baselines"] == {"math": baselines[split]} and found["config"]["split"] == split
        lines = read(os.path.join(data, "math", f"task-{split}.jsonl")).splitlines()
        prompts = [json.loads(line)["prompt"] for line in lines[:3]]
        assert asked == sorted(prompts, key=lambda prompt: len(encoding.encode_ordinary(prompt)))
        assert (bpb == rows["seed"]["bpb"]["math"]) == (split == "test")  # what eval.py reports unless told
    message = error_line(run("eval.py", *flags, "--split=test", f"--out_dir={tmp_path}/val"))
    assert "other settings" in message and "--overwrite=True" in message
    in_training = read_log(seed)[-1]["bpb"]["math"]
    assert in_training == pytest.approx(bits_per_byte(seed, data, "math", "val", 4), rel=1e-4)


def test_a_model_that_changed_is_evaluated_again(results, seed, data, tmp_path):
    """Rows stay as long as their model does; others are kept."""
    flags = *FLAGS, f"--data_dir={data}", f"--out_dir={tmp_path}/report"
    must(run("mix.py", f"--experts={seed}", f"--out_dir={tmp_path}/m", "--num_experts_per_tok=1"))
    must(run("eval.py", *flags, f"--model={seed},{tmp_path}/m"))
    first = read_json(tmp_path / "report" / "results.json")["rows"]
    assert first[0]["bpb"] == pytest.approx(first[1]["bpb"], rel=1e-4)  # a mixture of one
    must(run("mix.py", f"--experts={seed},{seed}", f"--out_dir={tmp_path}/m", "--overwrite=True"))
    must(run("eval.py", *flags, f"--model={tmp_path}/m"))
    second = read_json(tmp_path / "report" / "results.json")["rows"]
    assert second[0] == first[0] and second[1]["total_params"] > first[1]["total_params"]


def test_spliced_windows_are_of_held_out_text(data):
    found = Corpus(data).spliced("test", 32, 10)
    [(inputs, targets)] = found.values()
    assert list(found) == ["math + rain"] and inputs.shape == targets.shape == (10, 32)
    texts = {name: tokens_of(data, name, "test").astype("<i4").tobytes() for name in ("math", "rain")}
    orders = []
    for row, last in zip(inputs.tolist(), targets[:, -1].tolist(), strict=True):
        first, second = (np.array(half, "<i4").tobytes() for half in (row[:16], [*row[16:], last]))
        orders += [(a, b) for a, b in itertools.permutations(texts) if first in texts[a] and second in texts[b]]
    assert sorted(orders) == [("math", "rain")] * 5 + [("rain", "math")] * 5


TEXTS = {"high": 20_000, "low": 0, "mid": 10_000}  # the first token of each domain of `counting`


@pytest.fixture
def counting(tmp_path):
    """Function: sizes -> a Corpus of domains that count upwards, each from a number of its own: a token is a place."""

    def make(**sizes):
        for name, size in sizes.items():
            folder = tmp_path / name
            folder.mkdir()
            np.arange(TEXTS[name], TEXTS[name] + size, dtype="uint16").tofile(folder / "test.bin")
            (folder / "meta.json").write_text(json.dumps(meta_of(size)))
        return Corpus(str(tmp_path))

    return make


@pytest.mark.parametrize(("length", "count"), [(10, 60), (11, 60), (10, 50)])
def test_spliced_windows_change_domain_in_the_middle_and_use_no_text_twice(length, count, counting):
    """Three domains, six orders of two, as many windows of each."""
    corpus = counting(low=4000, mid=3000, high=5000)
    found = corpus.spliced("test", length, count)
    assert list(found) == ["high + low", "high + mid", "low + mid"]
    orders = []
    for pair, (inputs, targets) in found.items():
        assert inputs[:, 1:].equal(targets[:, :-1])
        jumps = targets - inputs != 1
        assert (jumps.sum(dim=1) == 1).all() and jumps[:, length // 2 - 1].all()
        for row in inputs[:, [0, -1]].tolist():
            names = [max(TEXTS, key=lambda name: (TEXTS[name] <= token, TEXTS[name])) for token in row]
            assert sorted(names) == pair.split(" + ")
            orders.append(tuple(names))
    each = math.ceil(count / 6)
    assert sorted(orders) == sorted([*itertools.permutations(TEXTS, 2)] * each)
    tokens = torch.cat([inputs for inputs, _ in found.values()])
    assert len(tokens.unique()) == tokens.numel() == 6 * each * length
    for first, size in (("low", 4000), ("mid", 3000), ("high", 5000)):  # from all over the text
        own = tokens[(tokens >= TEXTS[first]) & (tokens < TEXTS[first] + 10_000)] - TEXTS[first]
        assert own.min() == 0 and size - 3 <= own.max() <= size - 2  # what stands last can only be a target


def test_short_text_gives_fewer_spliced_windows_and_one_domain_none(counting):
    """No half is taken twice to make up for it, and a pair without windows is left out instead of scored as 0 / 0."""
    corpus = counting(low=200, mid=20, high=200)
    sizes = {}
    for length in (10, 20):
        found = corpus.spliced("test", length, 600)
        sizes[length] = {pair: len(inputs) for pair, (inputs, _) in found.items()}
        tokens = torch.cat([inputs for inputs, _ in found.values()])
        assert len(tokens.unique()) == tokens.numel()
    assert sizes[10]["high + low"] > sizes[10]["low + mid"] > 0
    assert sizes[20].keys() == {"high + low", "high + mid"} and min(sizes[20].values()) > 0
    assert Corpus(corpus.folder, "low").spliced("test", 10, 60) == {}


def test_spliced_scores_equal_an_independent_sum(rows, seed, btx, data):
    """With transformers' model; and the bits and bytes of each window, which tables resample, add up to the score."""
    encoding = load_tokenizer(data)
    [(inputs, targets)] = Corpus(data).spliced("test", 32, 9).values()
    sizes = [len(encoding.decode_bytes([t for t in row if t != encoding.eot_token])) for row in targets.tolist()]
    for name, folder in (("seed", seed), ("btx", btx)):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            log_p = torch.cat([model(row[None]).logits.double().log_softmax(dim=-1) for row in inputs])
        bits = -log_p.gather(-1, targets[..., None]).sum(dim=(1, 2)) / math.log(2)
        expected = pytest.approx(bits.sum().item() / sum(sizes), rel=1e-5)
        assert rows[name]["spliced"] == {"math + rain": expected, "avg": expected}
        assert rows[name]["bits"]["math + rain"] == pytest.approx(bits.tolist(), abs=0.01)
    for row in rows.values():
        assert row["bytes"]["math + rain"] == sizes and len(sizes) == 10
        assert sum(row["bits"]["math + rain"]) / sum(sizes) == pytest.approx(row["spliced"]["avg"], rel=1e-4)


@pytest.mark.parametrize("metric", ["choice", "switched"])
def test_choices_are_ranked_by_likelihood_per_byte(metric, rows, seed, btx, data):
    """Again, one continuation at a time, with transformers' model; alone, and after text of the other domain. Both ways
    a question has lost what does not fit when 32 tokens, a quarter of what the model takes, stand before it."""
    encoding = load_tokenizer(data)
    other = tokens_of(data, "rain", "test").tolist()
    places = [0, (len(other) - 33) // 2, len(other) - 33]  # spread evenly
    problems = [json.loads(line) for line in read(os.path.join(data, "math", "task-test.jsonl")).splitlines()]
    for name, folder in (("seed", seed), ("btx", btx)):
        model, right = AutoModelForCausalLM.from_pretrained(folder).eval(), []
        for place, problem in zip(places, problems[:3], strict=True):
            prompt, per_byte = encoding.encode_ordinary(problem["prompt"]), []
            choices = [encoding.encode_ordinary(choice) for choice in problem["choices"]]
            while 32 + len(prompt) + max(map(len, choices)) > 128 + 1:  # the last token is a target alone
                prompt.pop(0)
            for choice, ids in zip(problem["choices"], choices, strict=True):
                before = other[place : place + 32] if metric == "switched" else []
                row = torch.tensor([before + prompt + ids])
                with torch.no_grad():
                    log_p = model(row[:, :-1]).logits[0].double().log_softmax(dim=-1)
                log_p = log_p.gather(1, row[0, 1:, None])[-len(ids) :]
                per_byte.append(log_p.sum().item() / len(choice.encode()))
            right.append(int(max(per_byte) == per_byte[0]))
        assert rows[name][metric] == {"math": sum(right) / 3, "avg": sum(right) / 3}
        assert rows[name]["marks"][metric] == {"math": right}


class Listener:
    """A model that takes 48 tokens, keeps the rows that it reads, and finds a token as improbable as its number."""

    max_length = 48

    def __init__(self):
        self.rows = []

    def parameters(self):
        yield torch.zeros(1)

    def __call__(self, inputs, targets):
        for row in torch.cat((inputs, targets[:, -1:]), dim=1).tolist():
            while row[-1] == 0:  # padding
                row.pop()
            self.rows.append(row)
        return SimpleNamespace(losses=targets.float())


def test_a_long_question_loses_its_beginning_and_the_text_before_it_nothing(data, tmp_path):
    """Four choices see the same question, and they see the same of it with and without another text before it."""
    copy = shutil.copytree(data, tmp_path / "data")
    long = "".join(f"Tom has {n} apples, eats {n + 1} and buys {n + 7} more. " for n in range(11, 19))
    questions = [("What is left?\n", ["9\n", "13\n", "twenty and two\n", "0\n"])]
    questions += [(long + "How many?\n", ["It is 12, or nearly so\n", "7\n", "18\n", "x\n"])]
    questions += [(long.upper() + "WHAT?\n", ["!\n", "4\n", "5\n", "nobody ever knew\n"])]
    questions *= 3  # more rows than are read at once
    lines = [json.dumps({"prompt": prompt, "answer": "", "choices": choices}) for prompt, choices in questions]
    (copy / "math" / "task-test.jsonl").write_text("\n".join(lines))
    corpus, encoding = Corpus(str(copy)), load_tokenizer(data)
    other = f",{','.join(map(str, tokens_of(data, 'rain', 'test')))},"
    models, marks = [Listener(), Listener()], []
    for model, after_text in zip(models, (False, True), strict=True):
        config = SimpleNamespace(split="test", task_problems=10)
        marks.append(choice_marks(model, corpus, config, after_text))
    alone, after = (iter(model.rows) for model in models)
    lost = []
    for prompt, choices in questions:
        prompt, seen, longest, passages = encoding.encode_ordinary(prompt), set(), 0, set()
        for choice in map(encoding.encode_ordinary, choices):
            row, switched = next(alone), next(after)
            assert row[-len(choice) :] == choice and switched[-len(row) :] == row
            seen.add(tuple(row[: -len(choice)]))
            passages.add(tuple(switched[: -len(row)]))
            longest = max(longest, len(switched))
        [kept], [passage] = seen, passages
        assert kept and tuple(prompt[-len(kept) :]) == kept
        assert len(passage) == 12 and f",{','.join(map(str, passage))}," in other  # a quarter of what the model takes
        assert longest == 49 or (len(kept) == len(prompt) and longest < 49)  # 48 inputs, and the last one's target
        lost.append(len(prompt) - len(kept))
    assert next(alone, None) is next(after, None) is None
    assert lost[0] == 0 and min(lost[1:3]) > 50
    per_byte = [[sum(encoding.encode_ordinary(c)) / len(c.encode()) for c in choices] for _, choices in questions]
    expected = [int(min(scores) == scores[0]) for scores in per_byte]
    assert marks == [{"math": expected}] * 2 and set(expected) == {0, 1}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = 7\n#### 7", "7"),
        ("#### -12\nQuestion: more", "-12"),
        ("#### 1\n#### 2", "1"),
        ("####7", "7"),
        ("####  3.50 ", "3.50"),
        ("The answer is 7", ""),
        ("### 7", ""),
        ("", ""),
    ],
)
def test_the_answer_behind_a_marker(text, answer):
    assert read_answer(text, "####") == answer


def test_accuracy_counts_exact_answers(seed, data, tmp_path, monkeypatch):
    """Of four problems: right; right but for a digit more; right with other words around it; no answer."""
    copy = shutil.copytree(data, tmp_path / "data")
    choices = ["12\n", "13\n", "14\n", "15\n"]
    lines = [{"prompt": f"Question: {n}?\n", "answer": "12", "choices": choices} for n in range(4)]
    (copy / "math" / "task-test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    encoding = load_tokenizer(data)
    texts = ["6 + 6 = 12\n#### 12", "#### 121", "It is a dozen.\n#### 12\n\nQuestion: what", "12"]
    asked = []

    def answer(model, prompts, max_new_tokens, stop, unknown):
        asked.extend(encoding.decode(prompt) for prompt in prompts)
        assert max_new_tokens == 8 and stop == {encoding.eot_token} and unknown == []
        return [encoding.encode_ordinary(text) for text in texts]

    monkeypatch.setattr(model_file, "generate", answer)
    flags = *FLAGS, "--task_problems=4", f"--data_dir={copy}", f"--out_dir={tmp_path}/report"
    must(run("eval.py", *flags, f"--model={seed}"))
    assert read_json(tmp_path / "report" / "results.json")["rows"][0]["accuracy"] == {"math": 0.5}
    assert asked == [line["prompt"] for line in lines]


def test_a_domain_added_later_locks_nobody_out(seed, data, tmp_path):
    """Rows stay as long as the domains that they score do."""
    copy = shutil.copytree(data, tmp_path / "data")
    flags = *FLAGS, f"--model={seed}", f"--data_dir={copy}", f"--out_dir={tmp_path}/report"
    must(run("eval.py", *flags, "--domains=math,rain"))
    before = read(tmp_path / "report" / "results.json")
    shutil.copytree(copy / "rain", copy / "snow")
    must(run("eval.py", *flags, "--domains=math,rain"))
    assert read(tmp_path / "report" / "results.json") == before
    assert "other settings or data" in error_line(run("eval.py", *flags))
    assert "no domain 'hail'" in error_line(run("eval.py", *flags, "--domains=hail"))


def test_unread_text_is_scored_apart_and_a_row_may_have_another_name(rows, seed, data, tmp_path):
    flags = *FLAGS, f"--data_dir={data}", f"--out_dir={tmp_path}"
    must(run("eval.py", *flags, f"--model=base={seed}", "--unread=rain"))
    [row] = read_json(tmp_path / "results.json")["rows"]
    before = rows["seed"]["bpb"]
    assert row["name"] == "base" and "spliced" not in row  # one domain is left: there is nothing to splice
    assert row["unread"] == {"rain": before["rain"], "avg": before["rain"]}
    read = {domain: before[domain] for domain in ("math", *(before.keys() - {"avg", "math", "rain"}))}
    assert row["bpb"] == pytest.approx({**read, "avg": sum(read.values()) / len(read)})
    for domain, score in before.items():
        if domain != "avg":
            assert sum(row["bits"][domain]) / sum(row["bytes"][domain]) == pytest.approx(score, rel=1e-4)
            assert len(row["bits"][domain]) == 7
    assert "'hail' is not among the domains" in error_line(run("eval.py", *flags, f"--model={seed}", "--unread=hail"))
    everything = ",".join(name for name in before if name != "avg")
    assert "names all domains" in error_line(run("eval.py", *flags, f"--model={seed}", f"--unread={everything}"))


def test_a_folder_may_have_an_equals_sign(rows, seed, data, tmp_path):
    shutil.copytree(seed, tmp_path / "rate=1")
    flags = *FLAGS, f"--data_dir={data}", f"--out_dir={tmp_path}/report", "--spliced_windows=0"
    must(run("eval.py", *flags, f"--model={tmp_path}/rate=1"))
    [row] = read_json(tmp_path / "report" / "results.json")["rows"]
    assert row["name"] == "rate=1" and row["bpb"] == rows["seed"]["bpb"]
    assert "spliced" not in row and row["bits"].keys() == {"math", "rain"}


def test_nothing_to_evaluate(seed, data, mixed, tmp_path):
    flags = *FLAGS, f"--data_dir={data}", f"--out_dir={tmp_path}/report"
    assert "nothing to evaluate" in error_line(run("eval.py", *flags))
    assert "top-2 needs at least 2" in error_line(run("study/btm.py", *flags, f"--experts={seed}"))
    message = error_line(run("study/btm.py", *flags, f"--experts={mixed},{seed}"))
    assert mixed in message and "does not say what it was trained on" in message


# ---- several processes, and source that has changed ----

# This process stands before its writing, with the rows that it has found, until another file is there
WAIT = """
import contextlib, os, time
import common.run
locked = common.run.locked
@contextlib.contextmanager
def waiting(folder, wait=False):
    open({mine!r}, "w").close()
    while not os.path.exists({other!r}):
        time.sleep(0.01)
    with locked(folder, wait) as entered:
        yield entered
common.run.locked = waiting
"""


def test_two_processes_keep_both_rows(seed, experts, data, tmp_path):
    """Both find no results.json; the first one has written its row before the second one writes."""
    flags = *FLAGS, f"--data_dir={data}", f"--out_dir={tmp_path}/report"
    mine, written = f"{tmp_path}/a", f"{tmp_path}/report/results.json"
    late = start_process("eval.py", *flags, f"--model={seed}", hook=WAIT.format(mine=mine, other=written))
    hook = WAIT.format(mine=f"{tmp_path}/b", other=mine)
    early = start_process("eval.py", *flags, f"--model={experts[0]},{experts[1]}", hook=hook)
    must(finish_process(*early))
    must(finish_process(*late))
    rows = {row["name"]: row for row in read_json(written)["rows"]}
    assert rows.keys() == {"seed", "expert-math", "expert-rain"}
    must(run("eval.py", *FLAGS, f"--data_dir={data}", f"--out_dir={tmp_path}/alone", f"--model={seed}"))
    (alone,) = read_json(tmp_path / "alone" / "results.json")["rows"]
    assert {**alone, "source": 0} == {**rows["seed"], "source": 0}


def test_a_row_of_other_source_is_kept_and_said(seed, experts, data, tmp_path):
    flags = *FLAGS, f"--data_dir={data}", f"--out_dir={tmp_path}/report"
    must(run("eval.py", *flags, f"--model={seed},{experts[0]}"))
    path = tmp_path / "report" / "results.json"
    found = read_json(path)
    assert {"eval.py", "model.py", "data/task.py"} <= found["rows"][0]["source"].keys()
    found["rows"][0]["source"]["model.py"] = "another hash"
    path.write_text(json.dumps(found))
    said = must(run("eval.py", *flags, f"--model={seed},{experts[0]}")).out.splitlines()
    line = f"{path}: seed was scored before model.py changed; --overwrite=True scores all rows again"
    assert [one for one in said if "changed" in one] == [line]
    assert read_json(path) == found
    again = must(run("eval.py", *flags, f"--model={seed},{experts[0]}", "--overwrite=True"))
    assert "changed" not in again.out and read_json(path)["rows"][0]["source"]["model.py"] != "another hash"


def test_a_model_of_other_weights_is_another_row(seed, data, tmp_path):
    """Of the same recipe, as when the source has changed in between."""
    copy = shutil.copytree(seed, tmp_path / "copy")
    flags = *FLAGS, f"--data_dir={data}", f"--out_dir={tmp_path}/report", f"--model={copy}"
    must(run("eval.py", *flags))
    (before,) = read_json(tmp_path / "report" / "results.json")["rows"]
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    record = read_json(copy / "run.json")
    (copy / "run.json").write_text(json.dumps({**record, "weights": weights_hash(copy)}))
    must(run("eval.py", *flags))
    (after,) = read_json(tmp_path / "report" / "results.json")["rows"]
    assert after["id"] != before["id"] and after["bpb"] != before["bpb"]
