"""A model's vocabulary and a tokenizer's need not be of one size, and more than one token may end a text."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from helpers import SHORT, error_line, must, read_json, run, same_bits
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.tokenizer import load_tokenizer, tokenizer_hash
from model import ModelConfig, Transformer
from sample import SampleConfig, continue_prompt, unknown_ids

PROMPT = "--prompt=Question: Tom", "--device=cpu", "--temperature=0"
EVAL = "--sequence_length=32", "--eval_windows=2", "--task_problems=4", "--spliced_windows=2", "--max_new_tokens=6"
EMBEDDINGS = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def padded(seed, tmp_path):
    """The seed with 64 more rows, one or another of which has the largest logit everywhere."""
    old = Transformer.from_pretrained(seed)
    model = Transformer(dataclasses.replace(old.config, vocab_size=384))
    rows = old.model.embed_tokens.weight
    more = 100 * torch.randn(32, rows.size(1))
    state = {name: value for name, value in old.state_dict().items() if name not in EMBEDDINGS}
    model.load_state_dict(state | dict.fromkeys(EMBEDDINGS, torch.cat((rows, more, -more)).detach()))
    folder = shutil.copytree(seed, tmp_path / "padded", ignore=shutil.ignore_patterns("state.pt"))
    model.save_pretrained(folder)
    return folder


def test_rows_that_no_token_has_are_never_written(padded, seed, data, tmp_path):
    """The greedy text of the model without them, which ends as it does; sampled text; answers; ensembles."""
    expected = must(run("sample.py", f"--model={seed}", *PROMPT, "--max_new_tokens=60"))
    assert must(run("sample.py", f"--model={padded}", *PROMPT, "--max_new_tokens=60")) == expected
    must(run("sample.py", f"--model={padded}", *PROMPT, "--temperature=3.0", "--top_k=0", "--num_samples=8"))
    flags = *EVAL, f"--data_dir={data}", f"--out_dir={tmp_path}/report"
    must(run("eval.py", *flags, f"--model={padded}"))
    must(run("study/btm.py", *flags, f"--experts={padded},{padded}"))
    shape = ModelConfig.from_pretrained(seed)
    message = error_line(run("study/btm.py", *flags, f"--experts={padded},{seed}"))
    assert "384" in message and str(shape.vocab_size) in message


def test_all_ids_of_our_own_models_are_known(seed):
    assert unknown_ids(load_tokenizer(seed), 320) == []


@pytest.fixture
def with_token():
    """Function(folder, copy, number): a copy whose tokenizer is Hugging Face's alone and has one more token."""

    def change(folder, copy, number):
        shutil.copytree(folder, copy)
        (copy / "tiktoken.json").unlink()
        (copy / "tokenizer.tiktoken").unlink()
        found = read_json(copy / "tokenizer.json")
        found["added_tokens"].append({**found["added_tokens"][0], "id": number, "content": "<|im_start|>"})
        (copy / "tokenizer.json").write_text(json.dumps(found))
        for meta in copy.glob("*/meta.json"):  # of a data folder
            meta.write_text(json.dumps({**read_json(meta), "tokenizer_hash": tokenizer_hash(str(copy))}))
        return copy

    return change


def test_a_tokenizer_may_have_a_token_that_no_text_needs(seed, data, with_token, tmp_path):
    """Everything works and gives the same; a text that holds the token, or a prompt, is refused."""
    folder, text = with_token(seed, tmp_path / "seed", 320), with_token(data, tmp_path / "data", 320)
    assert unknown_ids(load_tokenizer(folder), 320) == []
    flags = *SHORT, "--max_steps=2", "--domain=math,rain"
    for start, where, name in ((folder, text, "run"), (seed, data, "plain")):
        out = f"--out_dir={tmp_path}/{name}"
        must(run("train.py", *flags, f"--init_from={start}", f"--data_dir={where}", out))
        must(run("eval.py", *EVAL, f"--model=row={start}", f"--data_dir={where}", f"{out}-report"))
    same_bits(tmp_path / "run", tmp_path / "plain")
    rows = [read_json(tmp_path / f"{name}-report" / "results.json")["rows"][0] for name in ("run", "plain")]
    assert rows[0]["bpb"] == rows[1]["bpb"] and rows[0]["marks"] == rows[1]["marks"]
    samples = [must(run("sample.py", f"--model={one}", *PROMPT)).out for one in (folder, seed)]
    assert samples[0] == samples[1]

    tokens = np.memmap(text / "rain" / "test.bin", dtype=np.uint16, mode="r+")
    tokens[5] = 320
    tokens.flush()
    out = f"--data_dir={text}", f"--out_dir={tmp_path}/no"
    message = error_line(run("eval.py", *EVAL, f"--model={folder}", *out))
    assert "rain" in message and "holds token 320" in message and "320 entries" in message
    assert "holds token 320" in error_line(run("train.py", *flags, f"--init_from={folder}", *out))
    assert "holds token 320" in error_line(run("study/btm.py", *EVAL, f"--experts={folder},{folder}", *out))


def test_gaps_in_a_vocabulary_are_unknown(seed, with_token, tmp_path):
    folder = with_token(seed, tmp_path / "gap", 320)
    found = read_json(folder / "tokenizer.json")
    last = max(found["model"]["vocab"], key=found["model"]["vocab"].get)
    before, found["model"]["vocab"][last] = found["model"]["vocab"][last], 330
    (folder / "tokenizer.json").write_text(json.dumps(found))
    assert unknown_ids(load_tokenizer(folder), 340) == [before, *range(321, 330), *range(331, 340)]


def generated(folder, prompt, steps):
    """The ids that transformers adds to some, its own end tokens included."""
    ids = torch.tensor([prompt])
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
    return theirs.generate(ids, **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_text_ends_where_that_of_transformers_does(file, seed, tmp_path):
    """At any of the end tokens that either file names; the tokenizer knows only one."""
    folder = shutil.copytree(seed, tmp_path / "copy")
    torch.manual_seed(2)
    model = Transformer(ModelConfig.from_pretrained(seed))  # with more to say than the seed
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    encoding = load_tokenizer(folder)
    prompt = encoding.encode_ordinary("Question: Tom")
    whole = generated(folder, prompt, 30)
    end = next(token for place, token in enumerate(whole) if place >= 3 and token not in whole[:place])
    found = read_json(folder / file) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps({**found, "eos_token_id": [encoding.eot_token, end]}))
    (*text, last) = generated(folder, prompt, 30)
    assert last == end and len(text) < len(whole) - 1
    said = must(run("sample.py", f"--model={folder}", *PROMPT, "--max_new_tokens=30"))
    assert said.out == f"Question: Tom{encoding.decode(text)}\n" and said.err == ""


def test_text_that_is_cut_at_the_models_length_says_so(seed, btx, tmp_path):
    """In one line; and nothing where there was room."""
    length, asked = len(load_tokenizer(seed).encode_ordinary("Question: Tom")), "--max_new_tokens=500"
    line = f"cut after {128 - length} of {asked}: the model takes 128 tokens and the prompt has {length}\n"
    flags = "--prompt=Question: Tom", "--device=cpu", "--temperature=0", "--num_samples=3"
    for script, folder, more in (("sample.py", seed, ()), ("study/tokens.py", btx, (f"--page={tmp_path}/page.html",))):
        assert must(run(script, f"--model={folder}", *flags, *more, asked)).err == line
        assert must(run(script, f"--model={folder}", *flags, *more, "--max_new_tokens=20")).err == ""


def test_a_prompt_has_special_tokens_where_the_user_says_so(seed):
    """Their ids are transformers', which always reads them; as a rule they are text."""
    prompt = "<|endoftext|>Question: Tom"
    ids = [
        continue_prompt(SampleConfig(seed, prompt, special_tokens=special, max_new_tokens=1, device="cpu"))[2]
        for special in (True, False)
    ]
    theirs = AutoTokenizer.from_pretrained(seed)
    assert ids[0] == theirs(prompt)["input_ids"] and ids[0][0] == theirs.eos_token_id
    assert theirs.eos_token_id not in ids[1] and theirs.decode(ids[1]) == prompt
