"""Where to compute and in which precision, and the signals that stop a run."""

import os
import signal

import torch
import torch.distributed as dist

from common.errors import UserError

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16")
COMPILE = ("auto", "on", "off")


def pick_device(name, threads=0):
    """The torch device for a config's `device`; under torchrun each process gets its own GPU. auto: cuda, else mps (a
    Mac's GPU, for a single process), else cpu."""
    if threads:
        torch.set_num_threads(threads)
    alone = os.environ.get("WORLD_SIZE", "") in ("", "1")  # common/parallel.py checks the other variables
    has_mps = torch.backends.mps.is_available() and alone
    if name == "mps" and not has_mps:
        why = "torch finds no Mac GPU" if alone else "torchrun's processes cannot share a Mac's GPU"
        raise UserError(f"--device=mps, but {why}; use --device=cpu or --device=auto")
    if name == "cuda" and not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a CPU build"
        raise UserError(
            f"--device=cuda, but torch finds no CUDA GPU: this torch {built}; install one that fits the driver, or use "
            "--device=cpu or --device=auto"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if name != "cuda":
        return torch.device(name)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def pick_dtype(name, device, config):
    """The activations' dtype for a config's `dtype`.

    auto: bfloat16 on CUDA, and on a CPU with avx512_bf16 for models wide enough to gain (1.2 times as fast at width
    128). MPS gets float32; nobody has measured it.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "mps":
        return torch.float32
    wide = config.hidden_size >= 128
    return torch.bfloat16 if wide and torch.cpu._is_avx512_bf16_supported() else torch.float32


def widest_float(device):
    """The dtype for sums over many numbers: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def place(model, device, dtype):
    """Move a model to its device and set its compute precision."""
    model.compute_dtype = pick_dtype(dtype, device, model.config)
    return model.to(device)


def compiled(model, choice, device):
    """The model to use in training steps: compiled by torch.compile if `choice` says so ("auto": on CUDA), or as it is.
    If torch.compile lacks a tool, "on" raises UserError and "auto" prints a line and leaves the model as it is."""
    if choice == "off" or (choice == "auto" and device.type != "cuda"):
        return model
    if why := compiler_error(device):
        needs = "a C compiler and triton" if device.type == "cuda" else "g++, or clang++ on a Mac,"
        failed = f"torch.compile does not work here ({why}); it needs {needs} and Python's headers"
        if choice == "on":
            raise UserError(f"{failed}; install them or use --compile=off")
        print(f"{failed}; training without it")
        return model
    return compile_model(model)


def compiler_error(device):
    """Why torch.compile fails on a device, in one line; "" if it works. To find out, it compiles one small function:
    what it needs depends on the versions of torch, triton and Python. The real model then compiles sooner."""
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # torch has dozens of kinds
        error = getattr(error, "inner_exception", error)
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def compile_model(model):
    """Compile a model as a whole; or layer by layer if several processes gather weights between layers, or experts
    compute in float32. Those experts are left out: torch.compile takes grouped_mm only in bfloat16."""
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
    """A layer's forward pass, compiled when gradients are enabled, and plain in evaluations, which are short."""
    quick = torch.compile(forward)
    return lambda *arguments: (quick if torch.is_grad_enabled() else forward)(*arguments)


def send(tensor, device):
    """Copy a CPU tensor to the device; to a GPU asynchronously, from pinned memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def gpu_count():
    """How many GPUs there are to run jobs on: CUDA GPUs, or a Mac's one."""
    return torch.cuda.device_count() or int(torch.backends.mps.is_available())


def catch_signals():
    """A list to which SIGTERM, Ctrl-C and a closed terminal append their signal numbers from now on. The training loop
    looks at it between steps, so that no step is cut in half."""
    caught = []
    for number in stopping_signals():
        signal.signal(number, lambda number, frame: caught.append(number))
    return caught


def stopping_signals():
    """The signals that ask a process to end; a closed terminal's only if nohup does not have it ignored."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT] + [signal.SIGHUP] * (not ignored)
