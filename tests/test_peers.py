"""What others make of our folders, and we of theirs: transformers.generate, mergekit-moe, lm-eval."""

import json

import numpy as np
import pytest
import torch
from helpers import must, run
from transformers import AutoModelForCausalLM

from common.tokenizer import load_tokenizer
from model import Transformer, generate

TEXTS = ["The rain", "Question: Tom has 3 apples and buys", "river sea falls sings over", "9"]


@pytest.mark.parametrize("kind", ["seed", "mixed", "btx"])
def test_greedy_text_is_that_of_transformers(kind, request):
    folder = request.getfixturevalue(kind)
    prompts = [load_tokenizer(folder).encode_ordinary(text) for text in TEXTS]
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        row = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        expected.append(row[0, len(prompt) :].tolist())
    stop = theirs.config.eos_token_id
    expected = [row[: row.index(stop)] if stop in row else row for row in expected]
    assert generate(Transformer.from_pretrained(folder), prompts, 40, {stop}) == expected
    assert max(map(len, expected)) == 40
    if kind != "mixed":  # which says one thing whatever you ask: nothing was finetuned after the averaging
        assert len({tuple(row) for row in expected}) > 1


def test_mergekit_moe_makes_the_same_experts(seed, experts, tmp_path):
    """Attention differs by design: mergekit takes one model's. Its output is read as one of ours."""
    pytest.importorskip("mergekit")
    from mergekit.moe.config import MoEMergeConfig
    from mergekit.options import MergeOptions
    from mergekit.scripts.moe import build

    theirs = str(tmp_path / "theirs")
    sources = [{"source_model": folder, "positive_prompts": [""]} for folder in experts]
    recipe = {"base_model": seed, "experts": sources, "gate_mode": "random", "dtype": "float32"}
    build(MoEMergeConfig.model_validate(recipe), theirs, MergeOptions())
    must(run("mix.py", f"--experts={','.join(experts)}", f"--out_dir={tmp_path}/ours"))
    ours, theirs = Transformer.from_pretrained(f"{tmp_path}/ours"), Transformer.from_pretrained(theirs)
    assert theirs.config.num_local_experts == 2 and theirs.config.router == "topk"
    found, base, kinds = dict(theirs.named_parameters()), Transformer.from_pretrained(seed).state_dict(), set()
    for name, parameter in ours.named_parameters():
        if ".experts." in name:
            assert parameter.equal(found[name])
            kinds.add("experts")
        elif ".gate." not in name:
            assert found[name].equal(base[name]) and not parameter.equal(base[name])
            kinds.add("the rest")
    assert kinds == {"experts", "the rest"}


def test_lm_eval_scores_a_mixture_offline(btx, tmp_path, monkeypatch):
    """A local task: which of two words comes next. Its answers are those of our own log-likelihoods."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    words = ["rain", "river", "sea", "never", "apples", "falls", "grey", "under"]
    rows = [
        {"text": text, "choices": [f" {a}", f" {b}"], "label": i % 2}
        for i, (text, a, b) in enumerate(
            (text, a, b) for text in TEXTS[:3] for a, b in zip(words, words[::-1], strict=True)
        )
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "next_word",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "next_word.yaml").write_text(json.dumps(task))  # JSON is YAML
    model_args = f"pretrained={btx},dtype=float32"
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = simple_evaluate(
        model="hf", model_args=model_args, tasks=["next_word"], task_manager=manager, device="cpu", batch_size=1
    )
    model, encoding = Transformer.from_pretrained(btx), load_tokenizer(btx)

    def score(text, choice):
        start, ids = len(encoding.encode_ordinary(text)), encoding.encode_ordinary(text + choice)
        logits = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(dim=-1)
        return sum(logits[i - 1, ids[i]].item() for i in range(start, len(ids)))

    with torch.no_grad():
        right = [np.argmax([score(row["text"], choice) for choice in row["choices"]]) == row["label"] for row in rows]
    assert 0 < np.mean(right) < 1
    assert found["results"]["next_word"]["acc,none"] == pytest.approx(np.mean(right))
