"""One tiny pipeline for the whole test session: data, a seed, two experts, their mixture and its finetuning."""

import json
import os
import random
import shutil

os.environ["OMP_NUM_THREADS"] = "1"  # for child processes; two cores go round many tests
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from helpers import SHAPE, SHORT, must, run, run_process

torch.set_num_threads(1)
torch.manual_seed(0)


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    return str(tmp_path_factory.mktemp("session"))


@pytest.fixture(scope="session")
def data(work):
    """The built-in math domain, and one of our own: `rain`, random sentences over a few words."""
    draw = random.Random(1)
    words = "the rain river sea falls sings over under old grey slowly and never again"
    path = os.path.join(work, "rain.jsonl")
    with open(path, "w") as file:
        for _ in range(400):
            sentences = [" ".join(draw.choices(words.split(), k=9)).capitalize() + "." for _ in range(6)]
            file.write(json.dumps({"text": " ".join(sentences)}) + "\n")
    folder = os.path.join(work, "data")
    flags = f"--out_dir={folder}", f"--domains=math,rain={path}", "--vocab_size=320", "--max_bytes=120_000"
    must(run_process("data/prepare.py", *flags, hook="import sys; sys.path.insert(0, '.')"))
    return folder


@pytest.fixture(scope="session")
def seed(work, data):
    folder = os.path.join(work, "seed")
    must(run("train.py", *SHAPE, *SHORT, f"--data_dir={data}", f"--out_dir={folder}"))
    return folder


@pytest.fixture(scope="session")
def experts(work, data, seed):
    """Two branches of the seed: for math and for rain."""
    folders = [os.path.join(work, f"expert-{domain}") for domain in ("math", "rain")]
    for domain, folder in zip(("math", "rain"), folders, strict=True):
        flags = f"--data_dir={data}", f"--domain={domain}", f"--init_from={seed}", f"--out_dir={folder}"
        must(run("train.py", *SHORT, *flags))
    return folders


@pytest.fixture(scope="session")
def mixed(work, seed, experts):
    """The two experts and the seed as a mixture of three."""
    folder = os.path.join(work, "mixed")
    must(run("mix.py", f"--experts={','.join([*experts, seed])}", f"--out_dir={folder}"))
    return folder


@pytest.fixture(scope="session")
def btx(work, data, mixed):
    folder = os.path.join(work, "btx")
    must(run("finetune.py", *SHORT, f"--data_dir={data}", f"--init_from={mixed}", f"--out_dir={folder}"))
    return folder


@pytest.fixture(scope="session")
def short_config(work, data):
    """SHORT as a config file, for drivers that start other scripts."""
    path = os.path.join(work, "short.py")
    with open(path, "w") as file:
        for flag in SHORT:
            name, value = flag.removeprefix("--").split("=")
            file.write(f"{name} = {value!r}\n" if name in ("device", "dtype") else f"{name} = {value}\n")
        file.write(f"data_dir = {data!r}\n")
    return path


@pytest.fixture(scope="session")
def eval_config(work, data):
    """A config file of eval.py that takes a moment."""
    path = os.path.join(work, "eval.py")
    with open(path, "w") as file:
        file.write(f"data_dir = {data!r}\nsequence_length = 32\neval_windows = 4\ntask_problems = 4\n")
        file.write("max_new_tokens = 4\nspliced_windows = 6\n")
    return path


@pytest.fixture(scope="session")
def configs(work, data, short_config, eval_config):
    """A folder of configs for the studies, whose every stage takes a moment."""
    folder = os.path.join(work, "configs")
    os.makedirs(folder)
    for name in ("seed", "expert", "finetune", "eval"):
        shutil.copy(eval_config if name == "eval" else short_config, os.path.join(folder, f"{name}.py"))
    with open(os.path.join(folder, "mix.py"), "w") as file:
        file.write(f"data_dir = {data!r}\nrouter_init = 'ridge'\n")
    return folder


@pytest.fixture(scope="module")
def in_this_process():
    """Chains run their jobs inside this process, in order; importing torch anew for each would take seconds."""
    from study import chain

    def run_here(jobs, folder, *_, **__):
        for job in jobs:
            arguments = list(job.arguments)
            script = arguments.pop(0)
            if script == "-m":
                script = arguments.pop(0).replace(".", "/") + ".py"
            must(run(script, *arguments))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain, "run_jobs", run_here)
        yield


@pytest.fixture(scope="session")
def chain_configs(work, configs):
    """The same with what a chain needs from its beginning: the seed model's shape, and the rivals' settings. What a
    stage or a rival sets is no default and nobody else's, so that a recipe shows which of them it is made of."""
    folder = os.path.join(work, "chain-configs")
    shutil.copytree(configs, folder)
    with open(os.path.join(folder, "seed.py"), "a") as file:
        file.write("".join(flag.removeprefix("--").replace("=", " = ") + "\n" for flag in SHAPE))
    with open(os.path.join(folder, "expert.py"), "a") as file:
        file.write("freeze = 'embeddings,attention,norms'\nweight_decay = 0.05\n")
    with open(os.path.join(folder, "finetune.py"), "a") as file:
        file.write("splice = 0.4\nweight_decay = 0.06\nrouter_learning_rate = 3.0\nrouter_aux_loss_coef = 0.03\n")
    with open(os.path.join(folder, "chain.py"), "w") as file:
        file.write("dense_flags = '--learning_rate=2e-3 --min_learning_rate=0.2'\n")
        file.write("upcycle_flags = '--learning_rate=1e-3 --router_aux_loss_coef=0.02'\n")
    return folder
