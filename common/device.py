"""Where to compute and in which precision, and the signals that stop a run."""

import os
import signal

import torch
import torch.distributed as dist

from common.errors import UserError

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16")
COMPILE = ("auto", "on", "off")


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


def compiled(model, choice, device):
    """The model for training steps: as torch.compile makes it where `choice` says so ("auto": on CUDA), or itself."""
    if choice == "off" or (choice == "auto" and device.type != "cuda"):
        return model
    return compile_model(model)


def compile_model(model):
    """Compile a model as a whole, or layer by layer where no graph may reach: between layers, where several processes
    gather weights, and into experts in float32, whose grouped_mm torch.compile takes in bfloat16 alone."""
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
    """Copy a CPU tensor to the device; to a GPU asynchronously, from pinned memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def catch_signals():
    """A list to which SIGTERM and Ctrl-C append their numbers from here on, to be looked at between two steps, so that
    no step is cut in half."""
    caught = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: caught.append(number))
    return caught
