"""hf:OWNER/NAME: what is asked of the hub, what becomes of it, and what is said where there is none."""

import os
import shutil
import sys
import types

import pytest
from helpers import SHORT, error_line, must, read_json, run

from common.hf import local_folder


@pytest.fixture
def hub(monkeypatch, tmp_path, seed):
    """Stands in for the network: the seed is someone's published model. The working folder is an empty one."""
    asked = []

    def snapshot_download(name, revision, allow_patterns, ignore_patterns, local_dir):
        asked.append((name, revision, allow_patterns, ignore_patterns))
        os.makedirs(local_dir, exist_ok=True)
        for file in ("config.json", "model.safetensors", "tiktoken.json", "tokenizer.tiktoken"):
            shutil.copy(os.path.join(seed, file), local_dir)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    monkeypatch.chdir(tmp_path)
    return asked


def test_a_folder_is_itself(hub):
    assert local_folder("") == "" and local_folder("out/seed") == "out/seed" and not hub


def test_a_published_model_is_branched_mixed_and_sampled(hub, data):
    train = "train.py", *SHORT, "--max_steps=1", f"--data_dir={data}", "--init_from=hf:some.one/a-seed"
    must(run(*train, "--out_dir=branch"))
    assert hub[0][:2] == ("some.one/a-seed", None) and hub[0][3] == ["*/*"]
    assert "config.json" in hub[0][2] and not [name for name in hub[0][2] if name.endswith((".py", ".bin", "*"))]
    assert "nothing to do" in must(run(*train, "--out_dir=branch")).out
    must(run("mix.py", "--experts=branch,hf:some.one/a-seed", "--out_dir=mixed"))
    assert read_json("mixed/config.json")["expert_names"] == ["branch", "a-seed"]
    assert (
        "Rain" in must(run("sample.py", "--model=hf:some.one/a-seed@v1/x", "--prompt=Rain", "--max_new_tokens=2")).out
    )
    assert hub[-1][:2] == ("some.one/a-seed", "v1/x")
    assert sorted(os.listdir("out/hf/some.one")) == ["a-seed", "a-seed@v1-x"]


@pytest.mark.parametrize("name", ["hf:", "hf:seed", "hf:../seed", "hf:a/b/c", "hf:a/b@", "hf:a/.."])
def test_what_names_no_model(name, hub):
    assert f"{name} names no model of the Hugging Face Hub" in error_line(run("sample.py", f"--model={name}"))


def test_without_a_network(tmp_path, monkeypatch):
    """With the package itself, which conftest.py keeps offline."""
    monkeypatch.chdir(tmp_path)
    message = error_line(run("mix.py", "--experts=hf:some.one/a-seed,hf:some.one/b"))
    assert "hf:some.one/a-seed could not be downloaded" in message and "give the folder of a copy" in message


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install -r requirements-extra.txt" in error_line(run("sample.py", "--model=hf:some.one/a-seed"))
