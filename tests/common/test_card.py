"""The model card of every finished checkpoint: what the Hub reads of it, and that it says what was done."""

import os

import pytest
from helpers import SHAPE, SHORT, TOKENS, must, read, read_log, run

from common.hf import model_name
from model import Transformer


def parts(folder):
    """(head, body) of a card: what the Hub's own parser makes of the YAML, or a plain reading of it; and the text."""
    text = read(os.path.join(folder, "README.md")).decode()
    yaml = pytest.importorskip("yaml")
    start, head, body = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(head), body


def test_the_card_of_a_seed(seed):
    head, body = parts(seed)
    assert "base_model" not in head and head["library_name"] == "transformers"
    assert head["training_tokens"] == TOKENS and sorted(head["domains"]) == ["math", "rain"]
    assert "# seed" in body and "trained from scratch" in body and "A dense model: 2 layers, width 32" in body
    assert f"math {read_log(seed)[-1]['bpb']['math']:.3f}" in body and "math 50%, rain 50%" in body


def test_the_cards_of_branches_and_mixtures(experts, mixed, btx):
    head, body = parts(experts[0])
    assert head["base_model"] == ["seed"] and head["base_model_relation"] == "finetune" and head["domains"] == ["math"]
    assert head["training_tokens"] == 2 * TOKENS and "made from: seed" in body
    head, body = parts(mixed)
    assert head["base_model"] == ["expert-math", "expert-rain", "seed"] and head["base_model_relation"] == "merge"
    assert "moe" in head["tags"] and head["training_tokens"] == 3 * TOKENS and "bits per byte" not in body
    assert "A mixture of 3 experts, 2 for each token" in body and "expert-math, expert-rain, seed; router: topk" in body
    head, body = parts(btx)
    assert head["base_model"] == ["mixed"] and head["training_tokens"] == 4 * TOKENS and "bits per byte" in body


def test_the_hub_accepts_the_head(seed, mixed):
    hub = pytest.importorskip("huggingface_hub")
    for folder in (seed, mixed):
        card = hub.ModelCard.load(os.path.join(folder, "README.md"))
        assert card.data.pipeline_tag == "text-generation" and card.data.library_name == "transformers"


def test_a_router_that_transformers_does_not_have_is_said(data, mixed, tmp_path):
    flags = *SHORT, "--max_steps=1", f"--data_dir={data}", f"--init_from={mixed}", f"--out_dir={tmp_path}/switch"
    must(run("finetune.py", *flags, "--router=switch"))
    head, body = parts(tmp_path / "switch")
    assert "library_name" not in head and "load the folder with nanoBTX alone" in body
    Transformer.from_pretrained(f"{tmp_path}/switch")


def test_no_card_before_the_end(data, tmp_path):
    """A run that is made anew has no card until it is finished."""
    flags = *SHAPE, *SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/seed"
    must(run("train.py", *flags, "--max_steps=1"))
    assert os.path.exists(tmp_path / "seed" / "README.md")
    done = run(
        "train.py", *flags, "--overwrite=True", "--learning_rate=1e30", "--max_grad_norm=1e30", "--warmup_steps=0"
    )
    assert done.code == 2 and not os.path.exists(tmp_path / "seed" / "README.md")


def test_names():
    assert model_name("out/hf/some.one/a-seed@v1") == "some.one/a-seed"
    assert model_name("/data/out/hf/some.one/a-seed/") == "some.one/a-seed"
    assert model_name("out/cpu/expert-code/") == "expert-code"
