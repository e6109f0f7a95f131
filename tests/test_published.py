"""config/smollm and config/llama2-7b: the lines of run.sh, each stage for two steps, from a random model of the same
family and local text."""

import dataclasses
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
    script = '[ "$1" != -c ] || exit 0\nfor word; do printf "%s " "$word"; done >> "$0.lines"\necho >> "$0.lines"\n'
    record.write_text(f"#!/bin/sh\n{script}")
    record.chmod(0o755)
    environment |= {"PYTHON": str(record), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", command], cwd=ROOT, env={**os.environ, **environment}, check=True)
    words = [shlex.split(line) for line in (tmp_path / "python.lines").read_text().splitlines()]
    return [(line[1], line[2:]) if line[0] == "-m" else (line[0], line[1:]) for line in words]


def jobs_of(arguments, prepared):
    """What study.chain would run with these flags: (script, arguments) of each job, in an order in which it may."""
    [size] = [flag.removeprefix("--size=") for flag in arguments if flag.startswith("--size=")]
    chain = chain_file.Chain(parse(chain_file.ChainConfig, [f"config/{size}/chain.py", *arguments]))
    chain.data = prepared
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
    done, waiting = [], list(lines)
    while waiting:
        script, arguments = waiting.pop(0)
        if script == "study.chain":
            waiting = [*jobs_of(arguments, prepared), *waiting]
            continue
        done.append(script)
        if script == "data.public":
            prepare(arguments, prepared)
            continue
        path = script.replace(".", "/") + ".py" if script.startswith("study.") else script
        place = [f"--data_dir={prepared}"] if script in FLAGS or "config/" in arguments[0] else []
        must(run(path, *arguments, *FLAGS.get(script, ()), *place))
    return done


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
    rivals = ["mix.py", "finetune.py", "train.py"] if size == "smollm" else []
    first = ["data.public"] * 4 + rivals + ["train.py"] * 3 + ["mix.py", "finetune.py"]
    assert done[: len(first)] == first
    forms = ["mix.py", "finetune.py", *["train.py"] * 3, "mix.py", "finetune.py"] if size == "smollm" else []
    scores = ["study.btm", *["eval.py"] * (4 if rivals else 2)]
    assert done[len(first) :] == ["mix.py", *forms, *scores, "study.route"]
    must(run("study/report.py", f"--report={tmp_path}/out/report"))

    out = tmp_path / "out"
    config = read_json(out / "btx" / "config.json")
    assert config["architectures"] == ["MixtralForCausalLM"] and config["num_local_experts"] == 4
    assert config["expert_names"] == ["expert-code", "expert-finemath", "expert-wikipedia", "a-seed"]
    shares = read_json(out / "btx" / "run.json")["recipe"]["mixture"]
    assert shares == pytest.approx({"code": 0.4031, "finemath": 0.3016, "wikipedia": 0.1030, "fineweb-edu": 0.1923})
    rows = {row["name"]: row for row in read_json(out / "report" / "results.json")["rows"]}
    rivals = {"dense-cm", "upcycle-cm", "btx-paper", "mixed-held", "btx-held"} if rivals else set()
    ensembles = {"btm-top1", "btm-top2", "btm-posterior", "btm-posterior-prefix", "btm-share"}
    branches = {f"expert-{domain}" for domain in DOMAINS[:3]}
    assert {"seed", *branches, "soup", "mixed", "btx", *ensembles, *rivals} == rows.keys()
    assert set(rows["btx"]["bpb"]) == {*DOMAINS, "avg"}


def test_tokens_are_the_one_dial(texts, data, tmp_path, in_this_process):
    """TOKENS of a branch: steps, batches, windows and the finetuning follow, in the paper's proportion; dense training
    and upcycling take BTX's FLOPs; text that is not read is scored alone. Then the same command does nothing."""
    pytest.importorskip("datasets")
    seed = stand_in("smollm", data, tmp_path / "seed")
    names = {"DOMAINS": ("code", "finemath"), "UNREAD": ("wikipedia",)}
    given = {key: " ".join(f"{name}={texts[name]}" for name in some) for key, some in names.items()}
    lines = recorded("bash run.sh smollm", tmp_path, SEED_MODEL=seed, OUT=f"{tmp_path}/out", TOKENS="1000", **given)
    assert [script for script, _ in lines] == ["data.public"] * 3 + ["study.chain"]
    for script, arguments in lines[:-1]:
        must(run("data/public.py", *arguments, f"--out_dir={tmp_path}/data", "--column=text"))
        assert "--tokens=1000" in arguments and script == "data.public"
    place = f"--flags={' '.join((*TINY[:1], f'--data_dir={tmp_path}/data'))}"
    config = parse(chain_file.ChainConfig, ["config/smollm/chain.py", *lines[-1][1], place])
    chain = chain_file.Chain(config)
    chain.data = str(tmp_path / "data")
    chain_file.pipeline(chain)
    chain.run(quiet=True)

    out, costs = tmp_path / "out", {}
    for name in (
        "expert-code",
        "btx",
        "compare/btx-paper",
        "compare/btx-held",
        "compare/dense-cm",
        "compare/upcycle-cm",
    ):
        recipe = read_json(out / name / "run.json")["recipe"]
        settings = recipe["config"]
        assert (settings["batch_size"], settings["sequence_length"]) == (4, 16)  # 1000 ** 0.6 = 63 tokens a step
        costs[name] = settings["max_steps"] * 64
    branch, finetuning = costs["expert-code"], costs["btx"]
    assert abs(branch - 1000) <= 32 and abs(finetuning - 2 * 1000 * 80 / 453) <= 32
    rows = {row["name"]: row for row in read_json(out / "report" / "results.json")["rows"]}
    assert rows["btx"]["train_tokens"] == 2 * branch + finetuning
    step = rows["upcycle-cm"]["train_flops"] / costs["compare/upcycle-cm"] * 64
    for rival in ("dense-cm", "upcycle-cm", "btx-paper"):
        assert abs(rows[rival]["train_flops"] - rows["btx"]["train_flops"]) <= step
    assert rows["btx-held"]["train_flops"] < rows["btx"]["train_flops"]
    for row in rows.values():
        assert set(row["bpb"]) == {"code", "finemath", "avg"} and set(row["unread"]) == {"wikipedia", "avg"}
    frozen = {name: read_json(out / name / "run.json")["recipe"]["config"]["freeze"] for name in costs}
    assert frozen["expert-code"] == frozen["compare/dense-cm"] == "none"
    held = read_json(out / "compare" / "held-code" / "run.json")["recipe"]["config"]["freeze"]
    assert held == "embeddings,attention,norms"
    starts = {name: read_json(out / name / "run.json")["recipe"]["config"]["router_init"] for name in ("mixed",)}
    starts |= {"printed": read_json(out / "compare" / "mixed-paper" / "run.json")["recipe"]["config"]["router_init"]}
    assert starts == {"mixed": "ridge", "printed": "normal"}


def test_a_billion_tokens_are_the_configs_own_sizes():
    """TOKENS=1.05e9 gives what config/smollm says without it: 4,000 steps of 128 windows of 2,048 tokens."""
    config = parse(chain_file.ChainConfig, ["--size=smollm", "--domains=code,finemath,wikipedia", "--tokens=1.05e9"])
    chain = chain_file.Chain(dataclasses.replace(config, published=ROOT))
    for stage in ("expert", "finetune"):
        ours, usual = chain.settings(stage), chain_file.read_settings(config, stage)
        assert (ours.batch_size, ours.sequence_length) == (usual.batch_size, usual.sequence_length) == (128, 2048)
        assert ours.max_steps == pytest.approx(usual.max_steps, rel=0.01)
        assert (ours.warmup_steps, ours.eval_interval) == pytest.approx((100, 500), abs=2)


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
