"""Checkpoint folders: weights in several files, the Hub, and the model card of a mixture."""

import os
import re
import shutil
import sys
import types

import pytest
import torch
from helpers import SHAPE, SHORT, TOKENS, error_line, must, read, read_json, run, run_process, weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common import hf
from common.hf import INDEX, WEIGHTS, divide_into_files, local_folder, model_name, remove_weights, weights_hash
from common.run import read_run
from model import Transformer

LIMIT = 30_000  # bytes; a tiny mixture is about ten times as large


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(hf, "FILE_BYTES", LIMIT)


def file_names(folder):
    return sorted(name for name in os.listdir(folder) if re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name))


def test_files_by_hand():
    sizes = {"a": 4, "b": 4, "c": 1, "d": 20, "e": 2, "f": 8}
    assert divide_into_files(sizes, 10) == [["a", "b", "c"], ["d"], ["e", "f"]]
    assert divide_into_files(sizes, 100) == [[*"abcdef"]]


@pytest.mark.parametrize("method", ["btx", "soup"])
def test_files_hold_what_one_would(method, seed, experts, tmp_path, monkeypatch):
    flags = f"--experts={','.join([*experts, seed])}", f"--method={method}"
    must(run("mix.py", *flags, f"--out_dir={tmp_path}/one"))
    monkeypatch.setattr(hf, "FILE_BYTES", LIMIT)
    must(run("mix.py", *flags, f"--out_dir={tmp_path}/many"))
    names, index = file_names(tmp_path / "many"), read_json(tmp_path / "many" / INDEX)
    assert len(names) > 3 and not os.path.exists(tmp_path / "many" / WEIGHTS)
    assert sorted(set(index["weight_map"].values())) == names
    together, whole = {}, weights(tmp_path / "one")
    for name in names:
        assert (
            os.path.getsize(tmp_path / "many" / name) <= LIMIT + 4000 or len(load_file(tmp_path / "many" / name)) == 1
        )
        found = load_file(tmp_path / "many" / name)
        assert {index["weight_map"][key] for key in found} == {name}
        together |= found
    assert {key: tensor.numpy().tobytes() for key, tensor in together.items()} == {
        key: tensor.tobytes() for key, tensor in whole.items()
    }
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    ids = torch.randint(320, (2, 20))
    with torch.no_grad():
        ours = Transformer.from_pretrained(f"{tmp_path}/many")(ids).logits
        assert ours.equal(Transformer.from_pretrained(f"{tmp_path}/one")(ids).logits)
        assert (AutoModelForCausalLM.from_pretrained(tmp_path / "many")(ids).logits - ours).abs().max() <= 1e-5


def test_a_damaged_or_missing_file_is_made_again(seed, experts, tmp_path, small_files):
    mix = "mix.py", f"--experts={','.join(experts)}", f"--out_dir={tmp_path}/mixed"
    must(run(*mix))
    folder, before = tmp_path / "mixed", weights_hash(tmp_path / "mixed")
    assert read_json(folder / "run.json")["weights"] == before
    assert "nothing to do" in must(run(*mix)).out
    name = file_names(folder)[2]
    content = bytearray(read(folder / name))
    content[-5] ^= 1
    for damage in (lambda: (folder / name).write_bytes(content), lambda: os.remove(folder / name)):
        damage()
        assert weights_hash(folder) != before
        assert "missing or damaged; making it again" in must(run(*mix)).out
        assert weights_hash(folder) == before
    (folder / INDEX).write_text("[]")
    assert weights_hash(folder) is None
    os.remove(folder / INDEX)
    assert weights_hash(folder) is None
    assert "missing or damaged" in must(run(*mix)).out and weights_hash(folder) == before


def test_a_kill_leaves_nothing_that_looks_complete(seed, experts, tmp_path):
    """Killed while it writes each of the files in turn; then the same command makes it whole."""
    mix = "mix.py", f"--experts={','.join(experts)}", f"--out_dir={tmp_path}/mixed"
    folder = tmp_path / "mixed"
    limit = f"from common import hf\nhf.FILE_BYTES = {LIMIT}\n"
    for number in (1, 2, 4):
        hook = f"""{limit}
import os
whole, calls = hf.atomic_file, []
def dying(path):
    calls.append(path)
    if len(calls) == {number}:
        open(path + ".tmp", "wb").write(b"half")
        os._exit(9)
    return whole(path)
hf.atomic_file = dying
"""
        assert run_process(*mix, hook=hook).code == 9
        assert len(file_names(folder)) == number - 1
        assert not os.path.exists(folder / INDEX) and weights_hash(folder) is None
        assert not read_run(folder)["finished"]
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(folder)
        assert "is not finished" in error_line(run("mix.py", f"--experts={folder},{folder}", f"--out_dir={tmp_path}/x"))
    hook = f"{limit}import os\nhf.write_json = lambda *arguments, **options: os._exit(9)"  # the index
    assert run_process(*mix, hook=hook).code == 9
    assert len(file_names(folder)) > 4 and weights_hash(folder) is None
    must(run_process(*mix, hook=limit))
    assert read_run(folder)["weights"] == weights_hash(folder)
    assert not [name for name in os.listdir(folder) if "tmp" in name]


def test_training_leaves_several_files_and_goes_on_from_them(data, tmp_path, small_files):
    seed = f"{tmp_path}/seed"
    must(run("train.py", *SHAPE, *SHORT, "--max_steps=1", f"--data_dir={data}", f"--out_dir={seed}"))
    assert len(file_names(seed)) > 1 and read_json(f"{seed}/run.json")["weights"] == weights_hash(seed)
    flags = *SHORT, "--max_steps=1", f"--data_dir={data}"
    must(run("train.py", *flags, f"--init_from={seed}", f"--out_dir={tmp_path}/branch"))
    assert "nothing to do" in must(run("train.py", *flags, f"--init_from={seed}", f"--out_dir={tmp_path}/branch")).out


def test_one_file_and_several_take_each_others_place(seed, experts, tmp_path, monkeypatch):
    model, folder = Transformer.from_pretrained(seed), tmp_path / "model"
    model.save_pretrained(str(folder))
    monkeypatch.setattr(hf, "FILE_BYTES", LIMIT)
    model.save_pretrained(str(folder))
    assert not os.path.exists(folder / WEIGHTS) and len(file_names(folder)) > 1
    monkeypatch.undo()
    model.save_pretrained(str(folder))
    assert sorted(os.listdir(folder)) == ["config.json", WEIGHTS]
    assert read(folder / WEIGHTS) == read(os.path.join(seed, WEIGHTS))
    for name in ("model.safetensors.txt", "my-model.safetensors"):
        (folder / name).write_text("someone's own")
    remove_weights(folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors.txt", "my-model.safetensors"]


def test_half_precision_goes_in_and_out_file_by_file(seed, experts, tmp_path, small_files):
    for name, folder in zip("ab", experts, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16)
        model.save_pretrained(tmp_path / name, max_shard_size="20KB")
    must(run("mix.py", f"--experts={tmp_path}/a,{tmp_path}/b", f"--out_dir={tmp_path}/mixed"))
    found = {}
    for name in file_names(tmp_path / "mixed"):
        found |= load_file(tmp_path / "mixed" / name)
    a, b = (
        {k: v for name in file_names(tmp_path / x) for k, v in load_file(tmp_path / x / name).items()} for x in "ab"
    )
    assert len(file_names(tmp_path / "a")) > 1 and len(file_names(tmp_path / "mixed")) > 1
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    name = "model.embed_tokens.weight"
    assert found[name].equal(((a[name].double() + b[name].double()) / 2).bfloat16())
    expert = found["model.layers.0.block_sparse_moe.experts.1.w3.weight"]
    assert expert.equal(b["model.layers.0.mlp.up_proj.weight"])


def test_infinity_is_found_and_a_large_sum_is_none(seed, tmp_path):
    """Numbers are summed to find NaN and infinity; a sum that overflows is looked at again."""
    config = read(os.path.join(seed, "config.json"))
    tensors = load_file(os.path.join(seed, WEIGHTS))
    name = "model.layers.0.mlp.up_proj.weight"
    for value, fine in ((3e38, True), (float("inf"), False), (float("nan"), False)):
        (tmp_path / "config.json").write_bytes(config)
        save_file({**tensors, name: torch.full_like(tensors[name], value)}, tmp_path / WEIGHTS)
        if fine:
            Transformer.from_pretrained(str(tmp_path))
        else:
            assert f"{name} contains NaN or infinity" in error_line(
                run("mix.py", f"--experts={tmp_path},{tmp_path}", f"--out_dir={tmp_path}/mixed-{value}")
            )


def test_a_model_that_does_not_fit_is_refused_with_what_it_needs(mixed, monkeypatch):
    parameters = Transformer.from_pretrained(mixed).num_parameters()[1]
    monkeypatch.setattr(hf, "free_memory", lambda: 4 * parameters - 1)
    needed = f"{mixed} needs {4 * parameters / 1e9:.1f} GB of memory in float32"
    assert needed in error_line(run("sample.py", f"--model={mixed}"))
    monkeypatch.setattr(hf, "free_memory", lambda: 4 * parameters)
    Transformer.from_pretrained(mixed)
    monkeypatch.undo()
    assert 1e8 < hf.free_memory() < 1e14


# ---- the Hub: what is asked of it, what becomes of it, and what is said where there is none ----


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
    assert "*.json" in hub[0][2] and not [name for name in hub[0][2] if name.endswith((".py", ".bin", "*"))]
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
    assert f"{name} does not name a model on the Hub" in error_line(run("sample.py", f"--model={name}"))


def test_without_a_network(tmp_path, monkeypatch):
    """With the package itself, which conftest.py keeps offline."""
    monkeypatch.chdir(tmp_path)
    message = error_line(run("mix.py", "--experts=hf:some.one/a-seed,hf:some.one/b"))
    assert "hf:some.one/a-seed could not be downloaded" in message and "give the folder of a copy" in message


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install -r requirements-extra.txt" in error_line(run("sample.py", "--model=hf:some.one/a-seed"))


# ---- the model card ----


def parts(folder):
    """(head, body) of a card: what the Hub's own parser makes of the YAML, or a plain reading of it; and the text."""
    text = read(os.path.join(folder, "README.md")).decode()
    yaml = pytest.importorskip("yaml")
    start, head, body = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(head), body


def test_a_dense_run_has_no_card(seed, experts):
    assert not any(os.path.exists(os.path.join(folder, "README.md")) for folder in (seed, *experts))


def test_the_cards_of_mixtures(mixed, btx):
    head, body = parts(mixed)
    assert head["base_model"] == ["expert-math", "expert-rain", "seed"] and head["base_model_relation"] == "merge"
    assert head["library_name"] == "transformers" and "moe" in head["tags"] and "domains" not in head
    assert head["training_tokens"] == 3 * TOKENS
    assert "# mixed" in body and "A mixture of 3 experts (expert-math, expert-rain, seed), 2 for each token." in body
    head, body = parts(btx)
    assert head["base_model"] == ["mixed"] and head["base_model_relation"] == "finetune"
    assert head["training_tokens"] == 4 * TOKENS and sorted(head["domains"]) == ["math", "rain"]


def test_the_hub_accepts_the_head(mixed):
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard.load(os.path.join(mixed, "README.md"))
    assert card.data.pipeline_tag == "text-generation" and card.data.library_name == "transformers"


def test_a_router_that_transformers_does_not_have_is_said(data, mixed, tmp_path):
    flags = *SHORT, "--max_steps=1", f"--data_dir={data}", f"--init_from={mixed}", f"--out_dir={tmp_path}/switch"
    must(run("finetune.py", *flags, "--router=switch"))
    head, body = parts(tmp_path / "switch")
    assert "library_name" not in head and "transformers has no router 'switch'" in body
    Transformer.from_pretrained(f"{tmp_path}/switch")


def test_no_card_before_the_end(data, mixed, tmp_path):
    """A mixture that is made anew has no card until it is finished."""
    flags = *SHORT, f"--data_dir={data}", f"--init_from={mixed}", f"--out_dir={tmp_path}/run"
    must(run("finetune.py", *flags, "--max_steps=1"))
    assert os.path.exists(tmp_path / "run" / "README.md")
    beyond_reason = "--learning_rate=1e30", "--max_grad_norm=1e30", "--warmup_steps=0"
    error_line(run("finetune.py", *flags, "--overwrite=True", *beyond_reason))
    assert not os.path.exists(tmp_path / "run" / "README.md")


def test_names():
    assert model_name("out/hf/some.one/a-seed@v1") == "some.one/a-seed"
    assert model_name("/data/out/hf/some.one/a-seed/") == "some.one/a-seed"
    assert model_name("out/cpu/expert-code/") == "expert-code"


@pytest.mark.parametrize("name", ["nobody/a-model", "https://huggingface.co/nobody/a-model"])
def test_an_address_of_the_hub_without_its_sign(name, data, tmp_path):
    done = run("train.py", *SHORT, f"--data_dir={data}", f"--init_from={name}", f"--out_dir={tmp_path}/run")
    assert "a model of the Hugging Face Hub as hf:OWNER/NAME" in error_line(done)
