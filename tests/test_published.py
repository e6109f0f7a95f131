"""config/smollm and config/llama2-7b: the lines of run.sh, each stage for two steps, from a random model of the same
family and local text."""

import json
import os
import random
import shlex
import shutil
import subprocess

import pytest
import torch
from helpers import ROOT, must, read_json, run
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from common.config import parse
from finetune import FinetuneConfig
from study import chain as chain_file
from train import TrainConfig

SHAPE = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"max_position_embeddings": 64, "eos_token_id": 319}
STAND_INS = {
    "smollm": LlamaConfig(**SHAPE, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True),
    "llama2-7b": LlamaConfig(**SHAPE, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False),
}
DOMAINS = "code", "finemath", "wikipedia", "fineweb-edu"
TINY = "--device=cpu", "--dtype=float32", "--threads=1"
SHORT = (*TINY, "--max_steps=2", "--batch_size=4", "--micro_batch_size=2", "--sequence_length=32", "--eval_windows=2")
SCORED = *TINY, "--sequence_length=32", "--eval_windows=2"
FLAGS = {"train.py": SHORT, "finetune.py": SHORT, "eval.py": SCORED, "study.btm": SCORED, "study.route": SCORED}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """{domain: a file of JSON lines}, random words of its own each."""
    folder, found = tmp_path_factory.mktemp("texts"), {}
    for number, domain in enumerate(DOMAINS):
        draw = random.Random(number)
        words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 7))) for _ in range(30)]
        lines = [json.dumps({"text": " ".join(draw.choices(words, k=30)) + f" {n}."}) for n in range(300)]
        found[domain] = folder / f"{domain}.jsonl"
        found[domain].write_text("\n".join(lines) + "\n")
    return found


def recorded(command, tmp_path, **environment):
    """What a shell command would run: (script, arguments) of each line, from a `python` that only writes them down."""
    record = tmp_path / "python"
    script = 'for word; do printf "%s " "$word"; done >> "$0.lines"\necho >> "$0.lines"\n'
    record.write_text(f"#!/bin/sh\n{script}")
    record.chmod(0o755)
    environment |= {"PYTHON": str(record), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", command], cwd=ROOT, env={**os.environ, **environment}, check=True)
    words = [shlex.split(line) for line in (tmp_path / "python.lines").read_text().splitlines()]
    return [(line[1], line[2:]) if line[0] == "-m" else (line[0], line[1:]) for line in words]


def jobs_of(arguments):
    """What study.chain would run with these flags: (script, arguments) of each job, in an order in which it may."""
    config = parse(chain_file.ChainConfig, arguments)
    chain = chain_file.Chain(config)
    chain_file.pipeline(chain)
    done, lines = set(), []
    for job in chain.jobs:
        assert {*job.needs} & {other.name for other in chain.jobs} <= done
        done.add(job.name)
        words = job.arguments[1:] if job.arguments[0] == "-m" else job.arguments
        lines.append((words[0], words[1:]))
    return lines


def run_all(lines, prepared):
    """Run recorded lines inside this process, each for two steps at most; returns the scripts, a chain's one by one."""
    lines = [one for line in lines for one in (jobs_of(line[1]) if line[0] == "study.chain" else [line])]
    for script, arguments in lines:
        if script == "data.public":
            prepare(arguments, prepared)
            continue
        path = script.replace(".", "/") + ".py" if script.startswith("study.") else script
        place = [f"--data_dir={prepared}"] if script in FLAGS or "config/" in arguments[0] else []
        must(run(path, *arguments, *FLAGS.get(script, ()), *place))
    return [script for script, _ in lines]


def stand_in(size, data, folder):
    """A random model as transformers writes it, in bfloat16, with a tokenizer.json."""
    torch.manual_seed(0)
    LlamaForCausalLM(STAND_INS[size]).bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(data, name), folder)
    return str(folder)


def prepare(arguments, data):
    """A line of data.public; without the package datasets, the same text through data.prepare."""
    try:
        import datasets  # noqa: F401

        must(run("data/public.py", *arguments, f"--out_dir={data}"))
    except ImportError:
        flags = dict(flag[2:].split("=", 1) for flag in arguments if flag.startswith("--"))
        name = flags.get("domain") or os.path.basename(flags["source"]).removesuffix(".jsonl")
        domain = f"--domains={name}={flags['source']}"
        must(run("data/prepare.py", domain, f"--tokenizer={flags['tokenizer']}", f"--out_dir={data}"))


@pytest.mark.parametrize("size", STAND_INS)
def test_every_stage_runs(size, texts, data, tmp_path):
    seed, prepared = stand_in(size, data, tmp_path / "a-seed"), str(tmp_path / "data")
    domains = " ".join(f"{name}={path}" for name, path in texts.items())
    lines = recorded(f"bash run.sh {size}", tmp_path, SEED_MODEL=seed, OUT=f"{tmp_path}/out", DOMAINS=domains)
    done = run_all(lines, prepared)
    assert done[:9] == ["data.public"] * 4 + ["train.py"] * 3 + ["mix.py", "finetune.py"]
    assert done[9:] == ["mix.py", "study.btm", *["eval.py"] * 2, "study.route"]
    must(run("study/report.py", f"--report={tmp_path}/out/report"))

    out = tmp_path / "out"
    config = read_json(out / "btx" / "config.json")
    assert config["architectures"] == ["MixtralForCausalLM"] and config["num_local_experts"] == 4
    assert config["expert_names"] == ["expert-code", "expert-finemath", "expert-wikipedia", "a-seed"]
    shares = read_json(out / "btx" / "run.json")["recipe"]["mixture"]
    assert shares == pytest.approx({"code": 0.4031, "finemath": 0.3016, "wikipedia": 0.1030, "fineweb-edu": 0.1923})
    rows = {row["name"]: row for row in read_json(out / "report" / "results.json")["rows"]}
    assert {"a-seed", "expert-code", "soup", "mixed", "btx"} <= rows.keys()
    assert set(rows["btx"]["bpb"]) == {*DOMAINS, "avg"}


def test_the_commands_of_the_readme(texts, data, tmp_path):
    """Five lines from a seed to a mixture, with local folders and files in the place of the names of the Hub."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        block = file.read().split("## Use it with your own models")[1].split("```sh\n")[1].split("```")[0]
    assert len(block.splitlines()) == 6 and block.count("hf:HuggingFaceTB/SmolLM2-135M") == 1
    seed, out = stand_in("smollm", data, tmp_path / "a-seed"), f"{tmp_path}/my"
    block = block.replace("hf:HuggingFaceTB/SmolLM2-135M", seed).replace("out/my", out)
    lines = recorded(block.replace("--source=$d", f"--source={texts['code'].parent}/$d.jsonl"), tmp_path)
    scripts = "data.public data.public train.py train.py mix.py finetune.py eval.py"
    assert run_all(lines, f"{out}/data") == scripts.split()
    tokenizer, model = AutoTokenizer.from_pretrained(f"{out}/btx"), AutoModelForCausalLM.from_pretrained(f"{out}/btx")
    assert type(model).__name__ == "MixtralForCausalLM"
    found = model.generate(**tokenizer("The rain", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert found.shape[1] > len(tokenizer("The rain").input_ids)


def test_the_papers_numbers():
    """Section 3.1 of the paper: tokens of each branch and of the finetuning, in batches of 4 M tokens."""
    tokens = {"expert-code": 210e9, "expert-finemath": 201e9, "expert-wikipedia": 42e9, "finetune": 80e9}
    for name, expected in tokens.items():
        kind = FinetuneConfig if name == "finetune" else TrainConfig
        config = parse(kind, [os.path.join(ROOT, "config", "llama2-7b", f"{name}.py")])
        per_step = config.batch_size * config.sequence_length
        assert per_step == 2**22 and abs(config.max_steps * per_step - expected) < per_step, name
        assert (config.learning_rate, config.warmup_steps, config.min_learning_rate) == (1e-4, 100, 0.1)
        assert (config.weight_decay, config.freeze) == (0.1, "none")
