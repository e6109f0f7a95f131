"""eval.py: bits per byte from transformers and a plain sum, exact-match answers, and what results.json holds."""

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from helpers import (
    TOKENS,
    error_line,
    finish_process,
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

FLAGS = (
    "--sequence_length=32",
    "--eval_windows=7",
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
    assert list(rows) == [*models, "btm-top1", "btm-top2", "btm-posterior", "btm-posterior-prefix"]
    assert len({row["id"] for row in rows.values()}) == 9
    for row in rows.values():
        assert set(row["bpb"]) == {"math", "rain", "avg"} and set(row["accuracy"]) == {"math"}
        assert row["seconds"] > 0 and row["train_flops"] > 0
    assert results["config"]["sequence_length"] == 32
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
    running = {"btm-top1": 1, "btm-top2": 2, "btm-posterior": 3, "btm-posterior-prefix": 3}  # experts a token
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

    def answer(model, prompts, max_new_tokens, stop):
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


def test_spliced_windows_change_domain_in_the_middle(data):
    corpus = Corpus(data)
    found = corpus.spliced("test", 32, 10)
    assert set(found) == {("math", "rain"), ("rain", "math")}
    for (first, second), (inputs, targets) in found.items():
        assert inputs.shape == targets.shape == (5, 32)
        assert inputs[:, 1:].equal(targets[:, :-1])
        for row, last in zip(inputs.tolist(), targets[:, -1].tolist(), strict=True):
            texts = {name: tokens_of(data, name, "test").astype("<i4").tobytes() for name in (first, second)}
            assert np.array(row[:16], "<i4").tobytes() in texts[first]
            assert np.array([*row[16:], last], "<i4").tobytes() in texts[second]


def test_spliced_scores_equal_an_independent_sum(rows, seed, data):
    model, encoding = AutoModelForCausalLM.from_pretrained(seed).eval(), load_tokenizer(data)
    scores = []
    for inputs, targets in Corpus(data).spliced("test", 32, 7).values():
        with torch.no_grad():
            log_p = model(inputs).logits.double().log_softmax(dim=-1)
        bits = -log_p.gather(-1, targets[..., None]).sum().item() / math.log(2)
        ids = [token for token in targets.flatten().tolist() if token != encoding.eot_token]
        scores.append(bits / len(encoding.decode_bytes(ids)))
    expected = sum(scores) / 2
    assert rows["seed"]["spliced"] == {"math + rain": pytest.approx(expected, rel=1e-5), "avg": pytest.approx(expected)}


@pytest.mark.parametrize(("metric", "passage"), [("choice", 0), ("switched", 64)])
def test_choices_are_ranked_by_likelihood_per_byte(metric, passage, rows, seed, btx, data):
    """Again, one continuation at a time, with transformers' model; alone, and after text of the other domain."""
    encoding = load_tokenizer(data)
    other = np.fromfile(os.path.join(data, "rain", "test.bin"), dtype=np.uint16).tolist()
    places = [0, (len(other) - passage - 1) // 2, len(other) - passage - 1]  # spread evenly
    problems = [json.loads(line) for line in read(os.path.join(data, "math", "task-test.jsonl")).splitlines()]
    for name, folder in (("seed", seed), ("btx", btx)):
        model, right = AutoModelForCausalLM.from_pretrained(folder).eval(), 0
        for place, problem in zip(places, problems[:3], strict=True):
            per_byte = []
            for choice in problem["choices"]:
                prompt, ids = encoding.encode_ordinary(problem["prompt"]), encoding.encode_ordinary(choice)
                row = other[place : place + passage] + prompt + ids
                row = torch.tensor([row])[:, -min(passage + 128, model.config.max_position_embeddings) - 1 :]
                with torch.no_grad():
                    log_p = model(row[:, :-1]).logits[0].double().log_softmax(dim=-1)
                log_p = log_p.gather(1, row[0, 1:, None])[-len(ids) :]
                per_byte.append(log_p.sum().item() / len(choice.encode()))
            right += max(per_byte) == per_byte[0]
        assert rows[name][metric] == {"math": right / 3, "avg": right / 3}


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

    def answer(model, prompts, max_new_tokens, stop):
        asked.extend(encoding.decode(prompt) for prompt in prompts)
        assert max_new_tokens == 8 and stop == {encoding.eot_token}
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
    must(run("eval.py", *flags, f"--model=base={seed}", "--unread=rain", "--spliced=False"))
    [row] = read_json(tmp_path / "results.json")["rows"]
    before = rows["seed"]["bpb"]
    assert row["name"] == "base" and row["spliced"] == {}
    assert row["unread"] == {"rain": before["rain"], "avg": before["rain"]}
    read = {domain: before[domain] for domain in ("math", *(before.keys() - {"avg", "math", "rain"}))}
    assert row["bpb"] == pytest.approx({**read, "avg": sum(read.values()) / len(read)})
    for domain, score in before.items():
        if domain != "avg":
            assert sum(row["bits"][domain]) / sum(row["bytes"][domain]) == pytest.approx(score, rel=1e-4)
            assert len(row["bits"][domain]) == 7
    assert "'hail' is not among the domains" in error_line(run("eval.py", *flags, f"--model={seed}", "--unread=hail"))
    everything = ",".join(name for name in before if name != "avg")
    assert "leaves no domain" in error_line(run("eval.py", *flags, f"--model={seed}", f"--unread={everything}"))


def test_a_folder_may_have_an_equals_sign(rows, seed, data, tmp_path):
    shutil.copytree(seed, tmp_path / "rate=1")
    must(run("eval.py", *FLAGS, f"--data_dir={data}", f"--out_dir={tmp_path}/report", f"--model={tmp_path}/rate=1"))
    [row] = read_json(tmp_path / "report" / "results.json")["rows"]
    assert row["name"] == "rate=1" and row["bpb"] == rows["seed"]["bpb"]


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
    line = f"{path}: seed was scored before model.py changed; --overwrite=True scores all rows anew"
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
