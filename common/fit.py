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
    shards, parallel, experts = config.shard_size, config.expert_parallel, model.config.num_local_experts
    if parallel > 1 and not experts:
        raise UserError(f"--expert_parallel={parallel} is for mixtures, and this model is dense; leave it out")
    if parallel > 1 and experts % parallel:
        raise UserError(f"--expert_parallel={parallel} does not divide the model's {experts} experts")
    if shards % parallel and parallel % shards:
        raise UserError(f"--expert_parallel={parallel}, --shard_size={shards}: one must be a multiple of the other")
    for flag, size in (("--shard_size", shards), ("--expert_parallel", parallel)):
        if size and processes.world % size and not config.dry_run:
            raise UserError(f"{flag}={size} does not divide torchrun's {processes.world} process(es)")


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


def keep_share(experts, processes):
    """Leave 1 / processes of a layer's experts, to be traced alone: as many rows come from the others as go to them."""
    run, kept = experts.forward, len(experts.w1) // processes
    for parameter in experts.parameters():
        parameter.data = parameter.data[:kept].clone()
    experts.forward = lambda x, ends: run(x, ends[:kept])


def count_memory(model, rows, length, shards=1, expert_parallel=1):
    """{part: bytes} of a training run on one GPU, with `rows` sequences in a forward pass, without torch.compile.
    shards: over how many GPUs one copy of the model is spread. expert_parallel: how many share the experts; routing is
    taken to be even.

    The parts are there together when a backward pass begins; fragments and libraries come on top. A mixture in float32
    is traced in bfloat16, the only dtype in which grouped_mm has shapes without numbers. The trace is a CPU's, which in
    bfloat16 keeps attention's inputs in fp32, too: of activations, a GPU needs up to a fifth less.
    """
    double = model.compute_dtype == torch.float32 and model.config.num_local_experts > 0
    with FakeTensorMode():  # shapes without numbers
        shadow = type(model)(model.config)
        for ours, theirs in zip(model.parameters(), shadow.parameters(), strict=True):
            theirs.requires_grad = ours.requires_grad
        if expert_parallel > 1:
            for layer in shadow.model.layers:
                keep_share(layer.block_sparse_moe.experts, expert_parallel)
        shadow.compute_dtype, shadow.recompute = torch.bfloat16 if double else model.compute_dtype, model.recompute
        one, two = (kept_bytes(shadow, n, length, double) for n in (1, 2))
    casts = 0 if double else 2 * one - two  # what does not grow with the rows: weights in the activations' dtype
    logits = min(rows * length, chunk_rows("cuda", model.config.vocab_size)) * model.config.vocab_size
    total = trained = gathered = 0
    for name, parameter in model.named_parameters():
        whole, holders = parameter.numel(), shards
        if ".experts." in name:
            whole, holders = whole // expert_parallel, max(1, shards // expert_parallel)
        total += whole / holders
        trained += whole / holders * parameter.requires_grad
        far = name.startswith("model.layers.") and int(name.split(".")[2]) > 1  # a layer and the next one are there
        gathered += whole * (holders > 1 and not far)
    return {
        "parameters (fp32)": int(4 * total),
        "gradients (fp32)": int(4 * trained),
        "AdamW (two fp32 moments)": int(8 * trained),
        "weights gathered from shards": 4 * gathered,
        "activations of a micro-batch": casts + rows * (two - one),
        "a chunk of logits": logits * (4 + 4 + model.compute_dtype.itemsize),
    }


def report_memory(config, model):
    """Print what --dry_run promises."""
    rows, active, total = min(config.micro_batch_size, config.batch_size), *model.num_parameters()
    print(f"{total:,d} parameters, {active:,d} active for a token; {rows} x {config.sequence_length} tokens a pass")
    sharing = max(1, config.shard_size), config.expert_parallel
    parts = count_memory(model, rows, config.sequence_length, *sharing)
    for name, size in {**parts, "together": sum(parts.values())}.items():
        print(f"{name:30s} {size / 2**30:9.2f} GiB")
    flops = model.flops_per_token(config.sequence_length) * config.max_steps * config.batch_size
    flops *= config.sequence_length
    print(f"{flops:.3g} FLOPs, {flops / PEAK / MFU / 3600:.2f} hours on an H100 at {MFU:.0%} of its bf16 peak")
