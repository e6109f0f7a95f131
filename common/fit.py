"""Whether a run fits: its sizes to each other, and its memory to the machine, counted before it starts."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from common.errors import UserError
from common.fused import chunk_rows

PEAK, MFU = 989e12, 0.4  # an H100's bf16 FLOP/s by its datasheet, and the share of them that dense models reach


def check_sizes(config, corpus, model, processes):
    """Raise UserError unless sequences and tokens fit the model, and batches the processes."""
    if config.sequence_length > model.config.max_position_embeddings:
        raise UserError(
            f"--sequence_length={config.sequence_length} is longer than the model's "
            f"max_position_embeddings={model.config.max_position_embeddings}; shorten it"
        )
    entries = corpus.encoding.n_vocab
    if entries > model.config.vocab_size:
        raise UserError(
            f"{corpus.folder} has a tokenizer of {entries} entries, the model's vocab_size is only "
            f"{model.config.vocab_size}; prepare the data with the model's tokenizer"
        )
    share, rest = divmod(config.batch_size, processes.world)
    if rest or share % min(share, config.micro_batch_size):
        raise UserError(
            f"--batch_size={config.batch_size} is no multiple of --micro_batch_size={config.micro_batch_size} "
            f"times {processes.world} process(es)"
        )
    if config.shard_size and processes.world % config.shard_size and not config.dry_run:
        raise UserError(f"--shard_size={config.shard_size} does not divide torchrun's {processes.world} process(es)")


# ---- memory ----


def kept_bytes(model, rows, length, double=False):
    """Bytes that a forward pass of `rows` sequences keeps for the backward pass, parameters and tables not counted.
    double: count those in bfloat16 as if they were in float32. With fake tensors it computes nothing."""
    known = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    found = {}  # {storage: bytes}, so that views count once

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage.nbytes() * (1 + (double and tensor.dtype == torch.bfloat16))
        return tensor

    ids = torch.zeros(rows, length, dtype=torch.long, device=model.cos.device)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(ids, ids, step=torch.zeros((), device=ids.device))  # kept alive: storages must not be reused
    assert output.loss.requires_grad
    return sum(found.values())


def count_memory(model, rows, length, shards=1):
    """{part: bytes} of a training run on one GPU, with `rows` sequences in a forward pass, without torch.compile.
    shards: over how many GPUs one copy of the model is spread.

    The parts are there together when a backward pass begins; fragments and libraries come on top. A mixture in float32
    is traced in bfloat16, the only dtype in which grouped_mm has shapes without numbers. The trace is a CPU's, which in
    bfloat16 keeps attention's inputs in fp32, too: of activations, a GPU needs up to a fifth less.
    """
    double = model.compute_dtype == torch.float32 and model.config.num_local_experts > 0
    with FakeTensorMode():  # shapes without numbers
        shadow = type(model)(model.config)
        for ours, theirs in zip(model.parameters(), shadow.parameters(), strict=True):
            theirs.requires_grad = ours.requires_grad
        shadow.compute_dtype, shadow.recompute = torch.bfloat16 if double else model.compute_dtype, model.recompute
        one, two = (kept_bytes(shadow, n, length, double) for n in (1, 2))
    casts = 0 if double else 2 * one - two  # what does not grow with the rows: weights in the activations' dtype
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logits = min(rows * length, chunk_rows("cuda", model.config.vocab_size)) * model.config.vocab_size
    layers = model.model.layers
    layer = sum(parameter.numel() for parameter in layers[0].parameters())
    gathered = total - (len(layers) - 2) * layer if shards > 1 else 0  # what no layer holds, a layer and the next one
    return {
        "parameters (fp32)": 4 * total // shards,
        "gradients (fp32)": 4 * trained // shards,
        "AdamW (two fp32 moments)": 8 * trained // shards,
        "weights gathered from shards": 4 * gathered,
        "activations of a micro-batch": casts + rows * (two - one),
        "a chunk of logits": logits * (4 + 4 + model.compute_dtype.itemsize),
    }


def report_memory(config, model):
    """Print what --dry_run promises."""
    rows, active, total = min(config.micro_batch_size, config.batch_size), *model.num_parameters()
    print(f"{total:,d} parameters, {active:,d} active for a token; {rows} x {config.sequence_length} tokens a pass")
    parts = count_memory(model, rows, config.sequence_length, shards=max(1, config.shard_size))
    for name, size in {**parts, "together": sum(parts.values())}.items():
        print(f"{name:30s} {size / 2**30:9.2f} GiB")
    flops = model.flops_per_token(config.sequence_length) * config.max_steps * config.batch_size
    flops *= config.sequence_length
    print(f"{flops:.3g} FLOPs, {flops / PEAK / MFU / 3600:.2f} hours on an H100 at {MFU:.0%} of its bf16 peak")
