"""Train a language model: from scratch (the seed), or on from a checkpoint (a branch, an expert).

    python train.py config/cpu/seed.py
    python train.py config/cpu/expert.py --domain=code --init_from=out/cpu/seed --out_dir=out/cpu/expert-code
    torchrun --nproc_per_node=2 train.py config/cpu/seed.py     # the same batches, split over two processes

`train` is the only training loop here; finetune.py uses it for mixtures. A run that was killed goes on from its last
checkpoint when the same command is given again, and ends with the same weights, to the bit, as one never interrupted.
(On CUDA within rounding: there, gradients of embeddings and attention are sums in no fixed order.)
"""

import contextlib
import dataclasses
import json
import math
import os
import signal
import time

import torch
from tqdm import tqdm

from common import runs
from common.config import key, parse, split_list
from common.corpus import Batches, Corpus
from common.device import (
    StopSignal,
    compile_key,
    compiled,
    device_key,
    dtype_key,
    pick_device,
    pick_dtype,
    send,
    threads_key,
)
from common.errors import UserError, command
from common.files import write_atomically
from common.fit import check_sizes, report_memory
from common.hub import local_folder
from common.parallel import Processes
from common.state import load_state, new_state, save_state
from common.weights import copy_tokenizer, group_of, same_tokenizer
from eval import Validation
from model import ModelConfig, Transformer

FREEZABLE = ("embeddings", "head", "attention", "norms", "experts", "router")


@dataclasses.dataclass
class TrainConfig:
    """Train a language model from scratch, or continue from a checkpoint with --init_from."""

    out_dir: str = key("out/seed", "where the checkpoint goes")
    init_from: str = key("", "a checkpoint to continue from, a folder or hf:OWNER/NAME; empty trains from scratch")
    data_dir: str = key("out/cpu/data", "the folder that data/prepare.py wrote")
    domain: str = key("all", "what to train on: a domain, a mixture like code:3,math:1, or all, evenly")
    # the model's shape, unless --init_from brings one
    hidden_size: int = key(64, "width of the residual stream", within="[8, inf)")
    intermediate_size: int = key(176, "width of the feed-forward sublayers", within="[8, inf)")
    num_hidden_layers: int = key(4, "number of layers", within="[1, inf)")
    num_attention_heads: int = key(2, "query heads", within="[1, inf)")
    num_key_value_heads: int = key(2, "key and value heads; fewer is grouped-query attention", within="[1, inf)")
    max_position_embeddings: int = key(256, "the longest sequence the model can take", within="[1, inf)")
    tie_word_embeddings: bool = key(True, "use the embedding matrix as the output head too")
    # optimization
    max_steps: int = key(1000, "optimizer steps", within="[1, inf)")
    batch_size: int = key(16, "sequences per step, over all processes and accumulation", within="[1, inf)")
    micro_batch_size: int = key(16, "sequences in one forward pass; the rest is accumulated", within="[1, inf)")
    sequence_length: int = key(256, "tokens per sequence", within="[1, inf)")
    splice: float = key(0.0, "share of sequences that change domain at a random place", within="[0, 1]")
    learning_rate: float = key(1e-3, "peak learning rate of AdamW", within="(0, inf)")
    min_learning_rate: float = key(0.1, "final learning rate, as a fraction of the peak", within="[0, 1]")
    router_learning_rate: float = key(1.0, "learning rate of the routers, as a multiple of it", within="(0, inf)")
    warmup_steps: int = key(100, "steps of linear warm-up, followed by a cosine", within="[0, inf)")
    weight_decay: float = key(0.1, "AdamW's weight decay, on matrices only", within="[0, inf)")
    adam_beta1: float = key(0.9, "AdamW's beta1", within="[0, 1)")
    adam_beta2: float = key(0.95, "AdamW's beta2", within="[0, 1)")
    max_grad_norm: float = key(1.0, "gradients are clipped to this norm", within="(0, inf)")
    freeze: str = key("none", f"what stays fixed: none, all-but-router, or some of {', '.join(FREEZABLE)}")
    seed: int = key(1, "random seed of the initial weights and the batches", within="[0, inf)")
    # evaluation and checkpoints
    eval_interval: int = key(100, "steps between two evaluations, each a line in log.jsonl", within="[1, inf)")
    eval_windows: int = key(16, "validation windows per domain in those evaluations", within="[1, inf)")
    save_interval: int = key(200, "steps between two checkpoints", within="[1, inf)")
    # the machine
    device: str = device_key()
    dtype: str = dtype_key()
    threads: int = threads_key()
    compile: str = compile_key()
    shard_size: int = key(1, "torchrun's processes that share one copy of the weights; 0 is all", within="[0, inf)")
    expert_parallel: int = key(1, "torchrun's processes that divide a mixture's experts up", within="[1, inf)")
    checkpoint_activations: bool = key(False, "keep no activations inside a layer, compute them twice: less memory")
    dry_run: bool = key(False, "print the memory that the run will need, and stop")
    overwrite: bool = key(False, "start anew, discarding the run that --out_dir holds")
    same_code: bool = key(False, "keep a run although the source changed: the change does not touch its result")


# what a run may be resumed or repeated without: keys that do not shape its result
NOT_IN_RECIPE = ("overwrite", "same_code", "device", "threads", "compile", "save_interval")
NOT_IN_RECIPE += ("shard_size", "expert_parallel", "checkpoint_activations", "dry_run")
# the source that decides a run's result
CODE = ("model.py", "train.py", "common/fused.py", "common/rope.py", "common/corpus.py", "common/weights.py")
CODE += ("common/device.py", "common/parallel.py", "common/shards.py", "common/expert_parallel.py")


def make_recipe(config, corpus, mixture, code):
    """Everything that decides a run's result: its config, data and source, and the recipe of the weights before it."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_IN_RECIPE}
    parents = {config.init_from: runs.parent_of(config.init_from)[0]} if config.init_from else {}
    data = {"data": corpus.hashes(mixture), "mixture": mixture}
    return {"config": settings, **data, "parents": parents, "code": runs.code_hashes(*code)}


def build_model(config, corpus):
    """The model a run starts from: the checkpoint --init_from, or fresh weights of the configured shape."""
    if config.init_from:
        return Transformer.from_pretrained(config.init_from)
    shape = {field.name for field in dataclasses.fields(ModelConfig)} & dataclasses.asdict(config).keys()
    tokens = {"vocab_size": corpus.encoding.n_vocab, "eos_token_id": corpus.encoding.eot_token}
    torch.manual_seed(config.seed)
    try:
        return Transformer(ModelConfig(**tokens, **{name: getattr(config, name) for name in shape}))
    except ValueError as error:
        raise UserError(f"the model's shape does not fit: {error}") from None


def freeze(model, text):
    """Fix the parameters of the groups that `text` names (--freeze), in place. UserError when nothing would train."""
    groups = [] if text == "none" else split_list(text)
    if groups == ["all-but-router"]:
        groups = [group for group in FREEZABLE if group != "router"]
    if unknown := set(groups) - set(FREEZABLE):
        known = ", ".join(("none", "all-but-router", *FREEZABLE))
        raise UserError(f"--freeze={text}: {min(unknown)!r} is no part of a model; freeze must be one of {known}")
    present = set()
    for name, parameter in model.named_parameters():
        group = group_of(name).replace("feed-forward", "experts")
        parameter.requires_grad = group not in groups
        present.add(group)
    if text != "all-but-router" and not present.issuperset(groups):
        raise UserError(f"--freeze={text}: this model has no {min(set(groups) - present)} of its own; leave it out")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"--freeze={text} leaves nothing to train; freeze less")


def make_optimizer(config, model):
    """AdamW with weight decay on matrices (and stacks of them), not on norms. Routers have a rate of their own."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = config.router_learning_rate if group_of(name) == "router" else 1.0
            decay = config.weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((scale, decay), []).append(parameter)
    betas = config.adam_beta1, config.adam_beta2
    # AdamW keeps a group's `scale` as it is; train_step multiplies the learning rate by it
    groups = [{"params": params, "weight_decay": decay, "scale": scale} for (scale, decay), params in groups.items()]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)


def learning_rate(config, step):
    """Linear warm-up to the peak, then a cosine down to its fraction `min_learning_rate`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    low = config.min_learning_rate
    return config.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2)


def train_step(config, step, model, optimizer, batches, processes, stop):
    """One optimizer step. Returns ({name: mean over the batch}, gradient norm, whether to stop).

    The names are loss, aux_loss and those of the model's own statistics, which are numbers or lists of them. All that
    the host wants to know is one vector on the device, read once, when everything has been launched. stop: a
    StopSignal; its number is averaged like the rest, so that every process leaves at the same step.
    """
    device, parts, sums = processes.device, processes.micro_batches(config.batch_size, config.micro_batch_size), {}
    number = torch.full((), step, device=device)
    for start, end in parts:
        processes.expect(model, last=end == parts[-1][1])
        inputs, targets = (send(part, device) for part in batches(step, start, end))
        torch.manual_seed(hash((config.seed, step, start)))  # noise by place: a tuple of ints hashes alike everywhere
        output = model(inputs, targets, step=number)
        ((output.loss + output.aux_loss) / len(parts)).backward()
        for name, value in {"loss": output.loss, "aux_loss": output.aux_loss, **output.stats}.items():
            sums[name] = sums.get(name, 0) + value.detach().double() / len(parts)
    norm = processes.clip_gradients(model, config.max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step) * group["scale"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    stopped = torch.full((1,), float(stop.number), dtype=torch.float64, device=device)
    vector = processes.mean(torch.cat([*(value.flatten() for value in sums.values()), norm.double().view(1), stopped]))
    *values, norm, stopped = vector.cpu().tolist()  # the only place where the host waits for the device
    values, means = iter(values), {}
    for name, value in sums.items():
        means[name] = [next(values) for _ in range(len(value))] if value.dim() else next(values)
    if not (math.isfinite(means["loss"]) and math.isfinite(norm)):
        raise UserError(
            f"step {step}: the loss is {means['loss']}, the gradient's norm {norm}; {config.out_dir} keeps its last "
            "good checkpoint; try a lower --learning_rate"
        )
    return means, norm, stopped > 0


class Recorder:
    """What is done besides training: progress bar, evaluations, log.jsonl and checkpoints.

    All processes take part, since each may hold but a piece of the weights; the first one prints and writes. log.jsonl
    holds nothing that differs between two runs of one recipe; times go to run.json.
    """

    def __init__(self, config, run, corpus, model, optimizer, processes, state):
        self.config, self.run, self.corpus, self.model, self.optimizer = config, run, corpus, model, optimizer
        self.processes = processes
        self.validation = Validation(corpus, config.sequence_length, config.eval_windows)
        self.tokens_per_step = config.batch_size * config.sequence_length
        self.flops_per_token = model.flops_per_token(config.sequence_length)
        self.started = time.monotonic() - state["seconds"]
        self.sums = state["sums"]  # of what train_step returns, over the steps since the last evaluation
        self.log, self.shards = state["log"], state["shards"]  # the text of log.jsonl; see common/state.py
        shown = {"desc": config.out_dir, "unit": "step", "dynamic_ncols": True, "disable": not processes.first}
        self.bar = tqdm(total=config.max_steps, initial=state["step"], **shown)

    def begin(self, step):
        """Score and save the weights that a fresh run starts from; bring log.jsonl to where a resumed one goes on."""
        if step == 0:
            self.evaluate(step)
            self.save(step)
        else:
            self.write_log()

    def cost(self, step):
        """Tokens, FLOPs and seconds of this run so far."""
        tokens = step * self.tokens_per_step
        return {"tokens": tokens, "flops": tokens * self.flops_per_token, "seconds": time.monotonic() - self.started}

    def speed(self, step):
        cost = self.cost(step)
        return f"{cost['tokens'] / cost['seconds'] / 1000:.1f}k tokens/s"

    def record(self, step, means, norm):
        """Note one step's results; evaluate when it is time to."""
        for name, value in means.items():
            self.sums[name] = self.sums.get(name, 0) + torch.tensor(value, dtype=torch.float64)
        self.bar.set_postfix_str(f"loss {means['loss']:.3f}, {self.speed(step)}", refresh=False)
        self.bar.update()
        if step % self.config.eval_interval == 0 or step == self.config.max_steps:
            steps = (step - 1) % self.config.eval_interval + 1
            self.evaluate(step, **{name: (value / steps).tolist() for name, value in self.sums.items()}, grad_norm=norm)
            self.sums = {}

    def evaluate(self, step, **training):
        """Score the model on the validation windows; one line to log.jsonl and one to the screen."""
        cost = self.cost(step)
        scores = self.validation.scores(self.model)
        line = {"step": step, "tokens": cost["tokens"], "flops": cost["flops"], **training, **scores}
        self.log += json.dumps(line) + "\n"
        self.write_log()
        loss = f"loss {training['loss']:.3f}  " if training else ""
        bpb = "  ".join(f"{name} {value:.3f}" for name, value in scores["bpb"].items())
        self.bar.write(f"step {step:6d}  {loss}bits per byte: {bpb}")

    def write_log(self):
        if self.processes.first:
            write_atomically(os.path.join(self.config.out_dir, runs.LOG), self.log)

    def save(self, step, finished=False):
        """Write a checkpoint: the training state, which decides where a killed run resumes, then the model."""
        folder, cost = self.config.out_dir, self.cost(step)
        state = {"step": step, "seconds": cost["seconds"], "log": self.log, "sums": self.sums, "shards": self.shards}
        self.shards = save_state(folder, state, self.model, self.optimizer, self.processes)
        weights = self.processes.whole_weights(self.model)
        if not self.processes.first:
            return
        self.model.save_pretrained(folder, weights)
        copy_tokenizer(self.corpus.folder, folder)
        run = {**self.run, "step": step, "history": {**runs.history_of(self.config.init_from), folder: cost}}
        (runs.finish_run if finished else runs.write_run)(folder, run)


def train(config, make_model, code=CODE):
    """Run a config to its end and leave a finished checkpoint in config.out_dir.

    make_model: function(config, corpus) -> Transformer on the CPU, called unless the run is finished already. What is
    minimized is the model's loss plus its aux_loss, whatever that is. code: the source files that decide the result.
    """
    config = dataclasses.replace(config, init_from=local_folder(config.init_from))
    corpus = Corpus(config.data_dir)
    mixture = corpus.mixture(config.domain)
    recipe = make_recipe(config, corpus, mixture, code)
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(Processes())
        was_there = os.path.isdir(config.out_dir)
        if processes.first:
            stack.enter_context(runs.locked(config.out_dir))
        run, found = processes.from_first(runs.find_run, config.out_dir, recipe, config.overwrite, config.same_code)
        if run["finished"]:
            print(f"{config.out_dir} is finished ({run['step']} steps), nothing to do")
            return
        if config.init_from:
            same_tokenizer([config.init_from, config.data_dir])
        processes.device = device = pick_device(config.device, config.threads)
        raw_model = make_model(config, corpus)
        freeze(raw_model, config.freeze)
        check_sizes(config, corpus, raw_model, processes)
        raw_model.compute_dtype = pick_dtype(config.dtype, device, raw_model.config)
        raw_model.recompute = config.checkpoint_activations
        if config.dry_run:
            report_memory(config, raw_model)
            return
        processes.spread(raw_model, config.shard_size, config.expert_parallel).to(device)
        stage = len(runs.history_of(config.init_from))  # how many runs came before: a branch draws other windows
        batches = Batches(corpus, mixture, config.sequence_length, config.batch_size, config.seed, config.splice, stage)
        optimizer = make_optimizer(config, raw_model)

        state = load_state(config.out_dir, config.max_steps, raw_model, optimizer) if found else new_state()
        processes.barrier()  # all have looked at the folder before the first one changes it
        if processes.first and not was_there:  # so it is not locked yet, though another process may have made it since
            stack.enter_context(runs.locked(config.out_dir, create=True))
        if state["step"] == 0:
            state["log"] = ""  # also after a kill at step 0: the log is gone and begins again
            processes.from_first(runs.start_run, config.out_dir, run)
        recorder = Recorder(config, run, corpus, raw_model, optimizer, processes, state)
        recorder.begin(state["step"])
        run_steps(config, state["step"], raw_model, optimizer, batches, processes, recorder)


def run_steps(config, step, raw_model, optimizer, batches, processes, recorder):
    """The training loop, from `step` to the end or to a signal that stops it."""
    model = compiled(raw_model, config.compile, processes.device)
    stopped, stop = False, StopSignal()
    while step < config.max_steps and not stopped:
        means, norm, stopped = train_step(config, step, model, optimizer, batches, processes, stop)
        step += 1
        recorder.record(step, means, norm)
        if step % config.save_interval == 0:
            recorder.save(step)
    recorder.save(step, finished=step == config.max_steps)
    recorder.bar.close()
    done = "finished" if step == config.max_steps else "stopped and saved, the same command goes on from here"
    print(f"{config.out_dir}: {done}; step {step}, {recorder.speed(step)}")
    processes.barrier()
    if step < config.max_steps:
        raise SystemExit(128 + (stop.number or signal.SIGTERM))


if __name__ == "__main__":
    command(lambda: train(parse(TrainConfig), build_model))
