"""Where to compute and in which precision, and the signals that stop a run."""

import contextlib
import math
import os
import signal

import torch
import torch.distributed as dist
from torch import nn

from common.config import key
from common.errors import UserError

DEVICE = ("auto", "cpu", "cuda")
DTYPE = ("auto", "float32", "bfloat16")
COMPILE = ("auto", "on", "off")


def device_key():
    return key("auto", "where to compute; auto is cuda where there is one", DEVICE)


def dtype_key():
    return key("auto", "precision of activations; auto is bfloat16 where it is faster", DTYPE)


def compile_key():
    return key("auto", "torch.compile; auto is on CUDA; on a CPU it needs a C++ compiler, pays in two minutes", COMPILE)


def threads_key():
    return key(0, "CPU threads; 0 leaves the choice to torch", within="[0, 1024]")


def pick_device(name, threads=0):
    """The torch device for a config's `device`: under torchrun each process gets its own GPU."""
    if threads:
        torch.set_num_threads(threads)
    if name == "cuda" and not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a CPU build"
        raise UserError(
            f"--device=cuda, but torch finds no CUDA GPU: this torch {built}; install one that fits the driver, or use "
            "--device=cpu or --device=auto"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def pick_dtype(name, device, config):
    """The activations' dtype for a config's `dtype`.

    auto: bfloat16 on CUDA, and on a CPU with avx512_bf16 for models wide enough to gain: 1.2 times at width 128.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    wide = config.hidden_size >= 128
    return torch.bfloat16 if wide and torch.cpu._is_avx512_bf16_supported() else torch.float32


def place(model, device, dtype):
    """Move a model to its device, and set the precision it computes in."""
    model.compute_dtype = pick_dtype(dtype, device, model.config)
    return model.to(device)


@contextlib.contextmanager
def shapes_alone():
    """Modules made inside have shapes, but neither memory nor numbers: they are on the meta device, where nothing is
    drawn either, since torch would load its compiler for that, which takes a second."""
    draw = nn.init.normal_
    nn.init.normal_ = lambda tensor, *_, **__: tensor
    try:
        with torch.device("meta"):
            yield
    finally:
        nn.init.normal_ = draw


def free_memory():
    """Bytes that a process can still take, as Linux estimates them; infinite where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            sizes = dict(line.split(":") for line in file)
        return int(sizes["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return math.inf


def check_memory(folder, needed):
    """UserError when weights of `needed` bytes do not fit: the system would kill the process without a word."""
    if needed > (free := free_memory()):
        needs = f"{needed / 1e9:.1f} GB of memory in float32"
        raise UserError(
            f"{folder} needs {needs}, {free / 1e9:.1f} GB are free; use a larger machine, or score "
            "it one layer at a time: python -m study.by_layer"
        )


def compiled(model, choice, device):
    """The model for training steps: as torch.compile makes it where `choice` (see compile_key) says so, else itself.

    It is compiled as a whole, or layer by layer where no graph may reach: between layers, where several processes
    gather weights, and into experts in float32, whose grouped_mm torch.compile takes in bfloat16 alone.
    """
    if choice == "off" or (choice == "auto" and device.type != "cuda"):
        return model
    plain_experts = model.config.num_local_experts and model.compute_dtype != torch.bfloat16
    if not (plain_experts or dist.is_initialized()):
        return torch.compile(model)
    for layer in model.model.layers:
        if plain_experts:
            experts = layer.block_sparse_moe.experts
            experts.forward = torch.compiler.disable(experts.forward)
        layer.forward = compiled_in_training(layer.forward)
    return model


def compiled_in_training(forward):
    """A layer's forward pass that is compiled where gradients are wanted, and plain in evaluations, which are short."""
    quick = torch.compile(forward)
    return lambda *arguments: (quick if torch.is_grad_enabled() else forward)(*arguments)


def send(tensor, device):
    """Copy a CPU tensor to the device; to a GPU from pinned memory, so that nobody waits for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a number to look at between two steps, so that no step is cut in half."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        self.number = number
