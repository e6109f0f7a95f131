"""Train a language model: from scratch (the seed), or further from a checkpoint (a branch, which becomes an expert).

    python train.py config/cpu/seed.py
    python train.py config/cpu/expert.py --domain=code --init_from=out/cpu/seed --out_dir=out/cpu/expert-code
    torchrun --nproc_per_node=2 train.py config/cpu/seed.py     # the same batches, split over two processes

`train` is the only training loop here; finetune.py uses it for mixtures. If a run is killed, give the same command
again: it resumes from the last checkpoint and ends with the weights of an uninterrupted run, bit for bit.
(On CUDA within rounding: gradients of embeddings and attention are summed in no fixed order there.)
"""

import dataclasses
import math
import signal

import torch
from tqdm import tqdm

from common.config import key, parse, split_list
from common.corpus import LOSS_ON, Batches, Corpus
from common.device import COMPILE, DEVICES, DTYPES, catch_signals, compiled, pick_device, pick_dtype, send, widest_float
from common.errors import UserError, command
from common.hf import group_of, local_folder, same_tokenizer
from common.parallel import Processes
from common.run import Run, parent_of
from common.tokenizer import has_tokenizer
from model import IGNORE, ModelConfig, Transformer

FREEZABLE = ("embeddings", "head", "attention", "norms", "experts", "router")


@dataclasses.dataclass
class TrainConfig:
    """Train a language model from scratch, or continue from a checkpoint with --init_from."""

    out_dir: str = key("out/seed", "where the checkpoint goes")
    init_from: str = key("", "the checkpoint to continue from, a folder or hf:OWNER/NAME; empty trains from scratch")
    data_dir: str = key("out/cpu/data", "the folder that data/prepare.py wrote")
    domain: str = key("all", "what to train on: a domain, a mixture like code:3,math:1, or all, evenly")
    loss_on: str = key("text", "what the loss counts: all text, or only the answers in chats", LOSS_ON)
    # the model's shape, unless --init_from brings one
    hidden_size: int = key(64, "width of the residual stream", within="[8, inf)")
    intermediate_size: int = key(176, "width of the feed-forward sublayers", within="[8, inf)")
    num_hidden_layers: int = key(4, "number of layers", within="[1, inf)")
    num_attention_heads: int = key(2, "query heads", within="[1, inf)")
    num_key_value_heads: int = key(2, "key and value heads; fewer is grouped-query attention", within="[1, inf)")
    max_position_embeddings: int = key(256, "the longest sequence the model can take", within="[1, inf)")
    tie_word_embeddings: bool = key(True, "share one matrix between embeddings and output head")
    # optimization
    max_steps: int = key(1000, "optimizer steps", within="[1, inf)")
    batch_size: int = key(16, "sequences per step, over all processes and accumulation", within="[1, inf)")
    micro_batch_size: int = key(16, "sequences per forward pass; gradients add up over the batch", within="[1, inf)")
    sequence_length: int = key(256, "tokens per sequence", within="[1, inf)")
    splice: float = key(0.0, "share of sequences that switch domain at a random place", within="[0, 1]")
    learning_rate: float = key(1e-3, "peak learning rate of AdamW", within="(0, inf)")
    min_learning_rate: float = key(0.1, "final learning rate, as a fraction of the peak", within="[0, 1]")
    router_learning_rate: float = key(1.0, "learning rate of routers, as a multiple of the others'", within="(0, inf)")
    warmup_steps: int = key(100, "steps of linear warm-up, before a cosine decay", within="[0, inf)")
    weight_decay: float = key(0.1, "AdamW's weight decay, on matrices only", within="[0, inf)")
    adam_beta1: float = key(0.9, "AdamW's beta1", within="[0, 1)")
    adam_beta2: float = key(0.95, "AdamW's beta2", within="[0, 1)")
    max_grad_norm: float = key(1.0, "gradients are clipped to this norm", within="(0, inf)")
    freeze: str = key("none", f"what not to train: none, all-but-router, or a list from {', '.join(FREEZABLE)}")
    seed: int = key(1, "random seed of the initial weights and the batches", within="[0, inf)")
    # evaluation and checkpoints
    eval_interval: int = key(100, "steps between evaluations, each a line in log.jsonl", within="[1, inf)")
    eval_windows: int = key(16, "validation windows per domain in those evaluations", within="[1, inf)")
    save_interval: int = key(200, "steps between checkpoints", within="[1, inf)")
    # the machine
    device: str = key("auto", "where to compute; auto picks cuda or mps if available", DEVICES)
    dtype: str = key("auto", "precision of activations; auto picks bfloat16 where it is faster", DTYPES)
    threads: int = key(0, "CPU threads; 0 lets torch choose", within="[0, 1024]")
    compile: str = key("auto", "torch.compile; auto: only on CUDA. A CPU needs a C++ compiler and minutes", COMPILE)
    shard_size: int = key(1, "torchrun processes that share one copy of the weights; 0 means all", within="[0, inf)")
    expert_parallel: int = key(1, "torchrun processes that divide a mixture's experts among them", within="[1, inf)")
    checkpoint_activations: bool = key(False, "recompute activations in the backward pass: slower, less memory")
    overwrite: bool = key(False, "start over, discarding the run in --out_dir")


# keys of the model's shape
SHAPE = {field.name for field in dataclasses.fields(ModelConfig)} & {
    field.name for field in dataclasses.fields(TrainConfig)
}
# keys that do not affect a run's result, so a run may be resumed or repeated with other values
NOT_IN_RECIPE = ("overwrite", "device", "threads", "compile", "save_interval")
NOT_IN_RECIPE += ("shard_size", "expert_parallel", "checkpoint_activations")


def make_recipe(config, corpus, mixture):
    """Everything that decides a run's result, except source code: its config, its data, the weights it starts from."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_IN_RECIPE}
    if config.loss_on == "text":
        del settings["loss_on"]  # as in runs from before this key existed
    parents = {config.init_from: parent_of(config.init_from)[0]} if config.init_from else {}
    return {"config": settings, "data": corpus.hashes(mixture), "mixture": mixture, "parents": parents}


def build_model(config, corpus):
    """The model a run starts from: the checkpoint --init_from, or random weights of the configured shape."""
    if config.init_from:
        return Transformer.from_pretrained(config.init_from)
    tokens = {"vocab_size": corpus.encoding.n_vocab, "eos_token_id": corpus.encoding.eot_token}
    torch.manual_seed(config.seed)
    try:
        return Transformer(ModelConfig(**tokens, **{name: getattr(config, name) for name in SHAPE}))
    except ValueError as error:
        raise UserError(f"no model has these sizes: {error}") from None


def freeze(model, text):
    """Freeze the groups of parameters that `text` (--freeze) names, in place. UserError if nothing is left to train."""
    groups = [] if text == "none" else split_list(text)
    if groups == ["all-but-router"]:
        groups = [group for group in FREEZABLE if group != "router"]
    if unknown := set(groups) - set(FREEZABLE):
        known = ", ".join(("none", "all-but-router", *FREEZABLE))
        raise UserError(f"--freeze={text}: {min(unknown)!r} is not a part of a model; choose from {known}")
    present = set()
    for name, parameter in model.named_parameters():
        group = group_of(name).replace("feed-forward", "experts")
        parameter.requires_grad = group not in groups
        present.add(group)
    if text != "all-but-router" and not present.issuperset(groups):
        raise UserError(f"--freeze={text}: this model has no separate {min(set(groups) - present)}; leave it out")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"--freeze={text} leaves nothing to train; freeze less")


def make_optimizer(config, model):
    """AdamW, with weight decay on matrices (and stacks of them) but not on norms, and a learning rate for routers."""
    groups = {}  # {(scale of the learning rate, weight decay): parameters}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = config.router_learning_rate if group_of(name) == "router" else 1.0
            decay = config.weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((scale, decay), []).append(parameter)
    betas = config.adam_beta1, config.adam_beta2
    # AdamW ignores a group's `scale`; train_step multiplies the learning rate by it
    groups = [{"params": params, "weight_decay": decay, "scale": scale} for (scale, decay), params in groups.items()]
    # fused: one pass over the parameters, on a CPU too
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)


def learning_rate(config, step):
    """Linear warm-up to the peak, then a cosine down to its fraction `min_learning_rate`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    low = config.min_learning_rate
    return config.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2)


# ---- evaluation in training ----


@torch.no_grad()
def window_bits(model, inputs, targets, tokens=4096):
    """(bits of each window (N,) in float64, how often each layer used each expert (L, E), or None for a dense model).

    inputs, targets: (N, T). tokens: how many to read at a time; an ensemble keeps V logits for each.
    """
    device = next(model.parameters()).device
    batch_size = max(1, tokens // inputs.size(1))
    nats = []  # these stay on the device and are read once
    used = None
    for x, y in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
        output = model(send(x, device), send(y, device))
        nats.append(output.losses.to(widest_float(device)).sum(dim=1))
        if output.gates is not None:
            count = (output.gates > 0).sum(dim=(1, 2))  # (L, E)
            used = count if used is None else used + count
    return torch.cat(nats).cpu().double() / math.log(2), used


def bytes_of(targets, token_bytes):
    """How many bytes of text the targets spell; IGNORE counts as none. token_bytes: (V,)."""
    return int(token_bytes[targets[targets != IGNORE]].sum())


def bits_per_byte(model, inputs, targets, token_bytes):
    """Total bits over total bytes of all windows, comparable between tokenizers. token_bytes: (V,)."""
    bits, _ = window_bits(model, inputs, targets)
    return bits.sum().item() / bytes_of(targets, token_bytes)


def validation_scores(model, windows, token_bytes):
    """{"bpb": {domain: bits per byte, "avg": their mean}, "bits": {domain: the bits of each window}}, and for a mixture
    "load": {domain: L x E shares}.

    A share is the fraction of a layer's (token, expert) pairs that went to an expert; a layer's E shares sum to 1.
    windows: {domain: (inputs, targets)}, from Corpus.windows.
    """
    bpb, bits, load = {}, {}, {}
    for domain, (inputs, targets) in windows.items():
        found, used = window_bits(model, inputs, targets)
        bits[domain] = [round(number, 2) for number in found.tolist()]
        bpb[domain] = found.sum().item() / bytes_of(targets, token_bytes)
        if used is not None:
            shares = used / used.sum(dim=1, keepdim=True)
            load[domain] = [[round(share, 4) for share in layer] for layer in shares.tolist()]
    bpb["avg"] = sum(bpb.values()) / len(bpb)
    return {"bpb": bpb, "bits": bits, "load": load} if load else {"bpb": bpb, "bits": bits}


# ---- the run ----


def check_sizes(config, corpus, model, processes):
    """Raise UserError unless sequences and tokens fit the model, and batches divide over the processes."""
    for name in sorted(SHAPE) if config.init_from else ():
        asked, has = getattr(config, name), getattr(model.config, name)
        if asked not in (has, getattr(TrainConfig, name)):
            raise UserError(f"--{name}={asked}: {config.init_from} has {has}; leave it out")
    if config.sequence_length > model.max_length:
        raise UserError(
            f"--sequence_length={config.sequence_length} is longer than the model's "
            f"max_position_embeddings={model.max_length}; shorten it"
        )
    corpus.check_vocabulary("the model", model.config.vocab_size)
    share, rest = divmod(config.batch_size, processes.world)
    if rest or share % min(share, config.micro_batch_size):
        raise UserError(
            f"--batch_size={config.batch_size} is not a multiple of --micro_batch_size={config.micro_batch_size} "
            f"times {processes.world} process(es)"
        )
    if config.shard_size != 1 or config.expert_parallel != 1:
        check_layout(config, model.config.num_local_experts, processes.world)


def check_layout(config, experts, world):
    """Raise UserError unless the model can be divided over torchrun's processes as the flags ask."""
    shards = config.shard_size
    parallel = config.expert_parallel
    if parallel > 1 and not experts:
        raise UserError(f"--expert_parallel={parallel} is for mixtures, and this model is dense; leave it out")
    if parallel > 1 and experts % parallel:
        raise UserError(f"--expert_parallel={parallel} does not divide the model's {experts} experts")
    if shards % parallel and parallel % shards:
        raise UserError(f"--expert_parallel={parallel}, --shard_size={shards}: one must be a multiple of the other")
    for flag, size in (("--shard_size", shards), ("--expert_parallel", parallel)):
        if size and world % size:
            raise UserError(f"{flag}={size} does not divide torchrun's {world} process(es)")


def train_step(config, step, model, optimizer, batches, processes):
    """One optimizer step on the batch of `step`: minimizes output.loss + output.aux_loss.

    Returns {name: mean over this process's part of the batch}: loss, aux_loss, the routers' statistics, and grad_norm,
    the gradient's norm before clipping. They are tensors on the device, so that reading them can wait.
    """
    parts = processes.micro_batches(config.batch_size, config.micro_batch_size)
    number = torch.full((), step, device=processes.device)
    metrics = {}
    precise = widest_float(processes.device)  # keeps sums over many steps exact
    for start, stop in parts:
        if processes.world > 1:  # average gradients between processes on the last micro-batch only
            model.set_requires_all_reduce(stop == parts[-1][1])
        inputs, targets = (send(part, processes.device) for part in batches(step, start, stop))  # (B, T) each
        # a router's noise depends only on the place in the batch; a tuple of ints has the same hash everywhere
        torch.manual_seed(hash((config.seed, step, start)))
        output = model(inputs, targets, step=number)
        # micro-batches count equally: the gradient is that of the batch's mean (nearly so with --loss_on=answers)
        ((output.loss + output.aux_loss) / len(parts)).backward()
        for name, value in {"loss": output.loss, "aux_loss": output.aux_loss, **output.stats}.items():
            metrics[name] = metrics.get(name, 0) + value.detach().to(precise) / len(parts)
    metrics["grad_norm"] = processes.clip_gradients(model, config.max_grad_norm).to(precise)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step) * group["scale"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # no gradient is kept until the next backward pass
    return metrics


def train(config, make_model):
    """Run a config to its end and leave a finished checkpoint in config.out_dir.

    make_model: function(config, corpus) -> Transformer on the CPU, called unless the run is already finished.
    """
    config = dataclasses.replace(config, init_from=local_folder(config.init_from))  # hf:OWNER/NAME is downloaded
    corpus = Corpus(config.data_dir)
    mixture = corpus.mixture(config.domain)
    recipe = make_recipe(config, corpus, mixture)
    # from here on the folder is locked; if it holds a run of another recipe, that is an error
    with Processes() as processes, Run(config.out_dir, recipe, config.overwrite, processes) as run:
        if run.finished:
            print(f"{config.out_dir} is finished ({config.max_steps} steps); nothing to do")
            return
        tokenizer = corpus.folder
        if config.init_from:
            same_tokenizer([config.init_from, config.data_dir])  # ids of another tokenizer would be noise
            if has_tokenizer(config.init_from):
                tokenizer = config.init_from  # with its chat template

        # the model, on its device; under torchrun, in pieces
        processes.device = device = pick_device(config.device, config.threads)
        model = make_model(config, corpus)
        freeze(model, config.freeze)
        check_sizes(config, corpus, model, processes)
        if config.warmup_steps >= config.max_steps:
            highest = learning_rate(config, config.max_steps - 1)
            print(f"a warm-up of {config.warmup_steps} steps outlasts the run: the learning rate ends at {highest:.2g}")
        model.compute_dtype = pick_dtype(config.dtype, device, model.config)
        model.recompute = config.checkpoint_activations
        if processes.world > 1:
            processes.shard(model, config.shard_size, config.expert_parallel)
        model.to(device)
        optimizer = make_optimizer(config, model)

        # run.stage makes a branch's windows differ from those that the seed model has read
        length = config.sequence_length
        stage, loss_on = run.stage, config.loss_on
        batches = Batches(corpus, mixture, length, config.batch_size, config.seed, config.splice, stage, loss_on)
        scored = [name for name in corpus.domains if loss_on == "text" or "answers" in corpus.metas[name]]
        windows = {name: corpus.windows(name, "val", length, config.eval_windows, loss_on) for name in scored}
        tokens_per_step = config.batch_size * length
        flops_per_token = model.flops_per_token(length)

        step = run.resume(model, optimizer, config.max_steps)  # 0, or the step at which the run was stopped
        resumed = step > 0  # then this step's evaluation and checkpoint are already done
        compiled_model = compiled(model, config.compile, device)
        signals = catch_signals()
        stop = 0
        shown = {"desc": config.out_dir, "unit": "step", "dynamic_ncols": True, "disable": not processes.first}
        bar = tqdm(total=config.max_steps, initial=step, **shown)
        while True:
            last = step == config.max_steps
            cost = {"tokens": step * tokens_per_step, "flops": step * tokens_per_step * flops_per_token}
            cost["seconds"] = run.seconds

            # evaluate: a line in log.jsonl, with nothing in it that differs between two runs of one recipe
            if (step % config.eval_interval == 0 or last) and not resumed:
                scores = validation_scores(model, windows, corpus.token_bytes)
                del scores["bits"]  # of each window
                steps = (step - 1) % config.eval_interval + 1  # since the last line
                means = {name: (value / steps).tolist() for name, value in run.sums.items()}
                run.add({"step": step, "tokens": cost["tokens"], "flops": cost["flops"], **means, **scores})
                bpb = "  ".join(f"{name} {value:.3f}" for name, value in scores["bpb"].items())
                bar.write(f"step {step:6d}  bits per byte: {bpb}")

            # save, unless there is nothing to lose yet; stop, at the end or when told to
            if (step % config.save_interval == 0 and step > 0 and not resumed) or last or stop:
                run.save(step, model, optimizer, tokenizer, cost, finished=last)
            if last or stop:
                break

            # step
            metrics = train_step(config, step, compiled_model, optimizer, batches, processes)
            metrics["stop"] = torch.full_like(metrics["loss"], float(sum(signals)))
            metrics = processes.mean(metrics)  # includes the signal, so that all processes stop at the same step
            summary = [metrics["loss"], metrics["grad_norm"], metrics.pop("stop")]
            loss, norm, stop = torch.stack(summary).tolist()  # the only place where the host waits for the device
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise UserError(
                    f"step {step}: the loss is {loss}, the gradient's norm {norm}; the last checkpoint in "
                    f"{config.out_dir}, if any, is still good; try a lower --learning_rate"
                )
            # sums for the next line of the log; they are part of a checkpoint
            for name, value in metrics.items():
                run.sums[name] = run.sums.get(name, 0) + value
            step += 1
            resumed = False
            speed = f"{step * tokens_per_step / run.seconds / 1000:.1f}k tokens/s"
            bar.set_postfix_str(f"loss {loss:.3f}, {speed}", refresh=False)
            bar.update()

        # a run stopped by a signal exits with that signal's code
        bar.close()
        done = "finished" if last else "stopped and saved; run the same command to resume"
        print(f"{config.out_dir}: {done}; step {step}, {step * tokens_per_step / run.seconds / 1000:.1f}k tokens/s")
        processes.barrier()
        if not last:
            raise SystemExit(128 + (signals[-1] if signals else signal.SIGTERM))


def main():
    train(parse(TrainConfig), build_model)


if __name__ == "__main__":
    command(main)
