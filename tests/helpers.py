"""What several tests need: running the scripts as a user would, and reading what they leave."""

import contextlib
import io
import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import sys
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# a training run of a second or less; the model's shape is for the seed alone
SHAPE = (
    "--hidden_size=32",
    "--intermediate_size=48",
    "--num_hidden_layers=2",
    "--num_attention_heads=4",
    "--num_key_value_heads=2",
    "--max_position_embeddings=128",
)
SHORT = (
    "--max_steps=12",
    "--batch_size=8",
    "--micro_batch_size=4",
    "--sequence_length=32",
    "--learning_rate=3e-3",
    "--warmup_steps=3",
    "--eval_interval=4",
    "--eval_windows=4",
    "--save_interval=5",
    "--device=cpu",
    "--dtype=float32",
    "--threads=1",
)
TOKENS = 12 * 8 * 32  # of one such run


# Python code that ends the process at the n-th time that a file takes its name, just before or just after
KILL_AT_RENAME = """
import os, signal
replace, count = os.replace, 0
def replace_or_die(*names):
    global count
    count += 1
    if count == {n} and {before}:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)
    if count == {n}:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace_or_die
"""

# Python code that sends the process a signal while it fetches the batch of a step
SIGNAL_AT_STEP = """
import os, signal, common.corpus
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, which has it ignored
fetch = common.corpus.Batches.__call__
def fetch_or_signal(self, step, *rows):
    if step == {step}:
        os.kill(os.getpid(), {signal})
    return fetch(self, step, *rows)
common.corpus.Batches.__call__ = fetch_or_signal
"""


class Result(NamedTuple):
    code: int
    out: str
    err: str


def run(script, *arguments):
    """Run a script of the repository inside this process (importing torch anew would take a second each time)."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv, handlers = (
        sys.argv,
        {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)},
    )
    sys.argv = [script, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(os.path.join(ROOT, script), run_name="__main__")
    except SystemExit as leave:
        code = leave.code or 0
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Result(code, out.getvalue(), err.getvalue())


def published_tokenizer(data, folder, template, eos, *markers):
    """Our tokenizer as transformers saves one, in a folder, with special tokens and a chat template; returns theirs."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_file(os.path.join(data, "tokenizer.json"))
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)
    theirs.add_special_tokens({"additional_special_tokens": list(markers)})
    theirs.chat_template = template
    theirs.save_pretrained(folder)
    return theirs


def must(result):
    """The result of a run that has to succeed."""
    assert result.code == 0, result.err
    return result


def _child(script, arguments, hook, out, err):
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    out.close()
    err.close()
    os.chdir(ROOT)
    sys.argv = [script, *arguments]
    exec(hook, {})
    runpy.run_path(script, run_name="__main__")


_processes = multiprocessing.get_context("forkserver")  # forks from a process that has torch imported already
_processes.set_forkserver_preload(["finetune", "torch._dynamo"])


def start_process(script, *arguments, hook=""):
    """Start a script in a process of its own, after the Python code `hook`. Returns the process, and where its output
    and its errors can be read."""
    (out, child_out), (err, child_err) = (_processes.Pipe(duplex=False) for _ in range(2))
    process = _processes.Process(target=_child, args=(script, [*map(str, arguments)], hook, child_out, child_err))
    process.start()
    child_out.close()
    child_err.close()
    return process, out, err


def finish_process(process, out, err):
    """The Result of a process that start_process has started."""
    texts = []
    for ours in (out, err):
        with open(ours.fileno(), "rb", closefd=False) as file:
            texts.append(file.read().decode())  # until the process ends
    process.join()
    return Result(process.exitcode, *texts)


def run_process(script, *arguments, hook=""):
    """Run a script in a process of its own, after the Python code `hook`."""
    return finish_process(*start_process(script, *arguments, hook=hook))


def run_ranks(world, script, *arguments, hook="", hook_rank=None):
    """The Results of `world` processes that train together, as torchrun would start them (which takes seconds more).
    hook: Python code for each of them, or for the one of hook_rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        lines = f"import os; os.environ.update({ {name: str(value) for name, value in place.items()} })\n"
        own = hook if hook_rank in (None, rank) else ""
        started.append(start_process(script, *arguments, hook=lines + own))
    return [finish_process(*one) for one in started]


def error_line(result):
    """The message of a run that failed as a UserError does: exit code 2, one line, no traceback."""
    assert result.code == 2, result
    assert "Traceback" not in result.err
    lines = [line for line in result.err.replace("\r", "\n").split("\n") if line.strip()]
    errors = [line for line in lines if "error:" in line]
    assert len(errors) == 1 and errors[0].startswith("error: ") and lines[-1] == errors[0], result.err
    assert all("%|" in line for line in lines[:-1]), result.err  # only a progress bar may stand before it
    assert result.err.endswith("\n")
    return errors[0]


def read(path):
    with open(path, "rb") as file:
        return file.read()


def read_json(path):
    with open(path) as file:
        return json.load(file)


def read_log(folder):
    with open(os.path.join(folder, "log.jsonl")) as file:
        return [json.loads(line) for line in file]


def weights(folder):
    """{name: numpy array} of a checkpoint folder."""
    return load_file(os.path.join(folder, "model.safetensors"))


def same_bits(a, b):
    """Assert that two runs have left the same weights and the same log."""
    for name in ("model.safetensors", "log.jsonl"):
        assert read(os.path.join(a, name)) == read(os.path.join(b, name)), name


def meta_of(size):
    """What meta.json says of a domain whose splits have `size` tokens each."""
    splits = {split: {"tokens": size} for split in ("train", "val", "test")}
    return {"dtype": "uint16", "content_hash": "", "tokenizer_hash": "", **splits}


def tokens_of(data, domain, split):
    """The tokens of a domain's split, read without the project's loader."""
    meta = read_json(os.path.join(data, domain, "meta.json"))
    return np.fromfile(os.path.join(data, domain, f"{split}.bin"), dtype=meta["dtype"]).astype(np.int64)


def val_tokens(data, domain):
    return tokens_of(data, domain, "val")


def prose(text):
    """A Markdown page without its fenced blocks, where # is a comment and brackets are code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
