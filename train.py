"""Train a language model: from scratch (the seed), or on from a checkpoint (a branch, an expert).

    python train.py config/cpu/seed.py
    python train.py config/cpu/expert.py --domain=code --init_from=out/cpu/seed --out_dir=out/cpu/expert-code
    torchrun --nproc_per_node=2 train.py config/cpu/seed.py     # the same batches, split over two processes

`train` is the only training loop in this repository; finetune.py uses it for mixtures of experts.
A run that was killed goes on from its last checkpoint when the same command is given again, and ends
with the same weights, to the bit, as one that was never interrupted.
"""

import dataclasses
import json
import math
import os
import signal
import time

import torch
from tqdm import tqdm

from common import checkpoint
from common.config import UserError, atomic_file, command, key, parse
from common.device import Processes, StopSignal, device_key, dtype_key, pick_device, place, threads_key
from common.loader import Batches, parse_mixture, read_meta
from common.tokenizer import load_tokenizer
from eval import Validation
from model import ModelConfig, Transformer


@dataclasses.dataclass
class TrainConfig:
    """Train a language model from scratch, or continue from a checkpoint with --init_from."""

    out_dir: str = key("out/seed", "where the checkpoint goes")
    init_from: str = key("", "a checkpoint folder to continue from; empty trains from scratch")
    data_dir: str = key("out/cpu/data", "the folder that data/prepare.py wrote")
    domain: str = key("all", "what to train on: a domain, a mixture like code:3,math:1, or all, evenly")
    # the model's shape, unless --init_from brings one
    hidden_size: int = key(64, "width of the residual stream", minimum=1)
    intermediate_size: int = key(176, "width of the feed-forward sublayers", minimum=1)
    num_hidden_layers: int = key(4, "number of layers", minimum=1)
    num_attention_heads: int = key(2, "query heads", minimum=1)
    num_key_value_heads: int = key(
        2, "key and value heads; fewer than the query heads is grouped-query attention", minimum=1
    )
    max_position_embeddings: int = key(256, "the longest sequence the model can take", minimum=1)
    tie_word_embeddings: bool = key(True, "use the embedding matrix as the output head too")
    # optimization
    max_steps: int = key(1000, "optimizer steps", minimum=1)
    batch_size: int = key(16, "sequences a step, over all processes and accumulation", minimum=1)
    micro_batch_size: int = key(16, "sequences in one forward pass; the rest is gradient accumulation", minimum=1)
    sequence_length: int = key(256, "tokens a sequence", minimum=1)
    learning_rate: float = key(1e-3, "peak learning rate of AdamW")
    min_learning_rate: float = key(0.1, "final learning rate, as a fraction of the peak")
    shared_learning_rate: float = key(
        1.0,
        "learning rate outside the feed-forward sublayers, as a fraction of theirs; low keeps branches alike",
        minimum=0,
    )
    warmup_steps: int = key(100, "steps of linear warm-up, followed by a cosine", minimum=0)
    weight_decay: float = key(0.1, "AdamW's weight decay, on matrices only")
    adam_beta1: float = key(0.9, "AdamW's beta1")
    adam_beta2: float = key(0.95, "AdamW's beta2")
    max_grad_norm: float = key(1.0, "gradients are clipped to this norm")
    seed: int = key(1, "random seed of the initial weights and the batches", minimum=0)
    # evaluation and checkpoints
    eval_interval: int = key(100, "steps between two evaluations, each a line in log.jsonl", minimum=1)
    eval_windows: int = key(16, "validation windows per domain in those evaluations", minimum=1)
    save_interval: int = key(200, "steps between two checkpoints", minimum=1)
    # the machine
    device: str = device_key()
    dtype: str = dtype_key()
    threads: int = threads_key()
    compile: bool = key(True, "torch.compile on CUDA; on a CPU it is never used")
    overwrite: bool = key(False, "discard another run that --out_dir holds")


# what a run may be resumed or repeated without: keys that do not shape its result
NOT_IN_RECIPE = ("overwrite", "device", "threads", "compile", "save_interval")


def make_recipe(config, mixture):
    """Everything that decides a run's result: its config, its data, and the recipe of the weights it starts from."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_IN_RECIPE}
    data = {domain: read_meta(config.data_dir, domain)["content_hash"] for domain in mixture}
    parents = {config.init_from: checkpoint.parent(config.init_from)[0]} if config.init_from else {}
    return {"config": settings, "data": data, "parents": parents}


def build_model(config):
    """The model a run starts from: the checkpoint --init_from, or fresh weights of the configured shape."""
    if config.init_from:
        checkpoint.same_tokenizer([config.init_from, config.data_dir])
        return checkpoint.load_model(config.init_from)
    shape = {field.name for field in dataclasses.fields(ModelConfig)} & dataclasses.asdict(config).keys()
    encoding = load_tokenizer(config.data_dir)
    tokens = {"vocab_size": encoding.n_vocab, "eos_token_id": encoding.eot_token}
    torch.manual_seed(config.seed)
    try:
        return Transformer(ModelConfig(**tokens, **{name: getattr(config, name) for name in shape}))
    except ValueError as error:
        raise UserError(f"the model's shape does not fit: {error}") from None


def make_optimizer(config, model):
    """AdamW with weight decay on matrices (and stacks of them), not on norms."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = 1.0 if ".mlp." in name or ".block_sparse_moe." in name else config.shared_learning_rate
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


def train_step(config, step, model, optimizer, batches, processes):
    """One optimizer step. Returns ({name: mean over the batch}, gradient norm).

    The names are loss, aux_loss and those of the model's own statistics, which are numbers or lists of them.
    """
    share = config.batch_size // processes.world  # rows of this process
    begin = processes.rank * share
    starts = range(begin, begin + share, config.micro_batch_size)
    sums = {}
    for start in starts:
        inputs, targets = batches(step, start, start + config.micro_batch_size)
        torch.manual_seed(hash((config.seed, step, start)))  # a model's noise depends on its place in training alone
        output = model(inputs.to(processes.device), targets.to(processes.device), step=torch.tensor(step))
        ((output.loss + output.aux_loss) / len(starts)).backward()
        for name, value in {"loss": output.loss, "aux_loss": output.aux_loss, **output.stats}.items():
            value = torch.as_tensor(value).detach().to("cpu", torch.float64)
            sums[name] = sums.get(name, 0) + value / len(starts)
    processes.average_gradients(model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step) * group["scale"]
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm))
    means = {name: processes.mean(value.tolist()) for name, value in sums.items()}
    if not (math.isfinite(means["loss"]) and math.isfinite(norm)):
        raise UserError(
            f"step {step}: the loss is {means['loss']}, the gradient's norm {norm}; {config.out_dir} keeps its last "
            "good checkpoint; try a lower --learning_rate"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return means, norm


class Recorder:
    """What the first process does besides training: progress bar, evaluations, log.jsonl and checkpoints.

    log.jsonl holds nothing that differs between two runs of one recipe; times go to run.json.
    """

    def __init__(self, config, run, model, optimizer, state):
        self.config, self.run, self.model, self.optimizer = config, run, model, optimizer
        self.validation = Validation(config.data_dir, config.sequence_length, config.eval_windows)
        self.tokens_per_step = config.batch_size * config.sequence_length
        self.flops_per_token = model.flops_per_token(config.sequence_length)
        self.started = time.monotonic() - state["seconds"]
        self.sums = state["sums"]  # of what train_step returns, over the steps since the last evaluation
        self.log = os.path.join(config.out_dir, checkpoint.LOG)
        with open(self.log, "ab") as file:
            file.truncate(state["log_size"])  # lines behind the checkpoint that we resume from are written again
        step = state["step"]
        self.bar = tqdm(total=config.max_steps, initial=step, desc=config.out_dir, unit="step", dynamic_ncols=True)
        if step == 0:
            self.evaluate(step)
            self.save(step)

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
        try:
            with open(self.log, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"{self.log}: {error.strerror}; free some space and run again") from None
        loss = f"loss {training['loss']:.3f}  " if training else ""
        bpb = "  ".join(f"{name} {value:.3f}" for name, value in scores["bpb"].items())
        self.bar.write(f"step {step:6d}  {loss}bits per byte: {bpb}")

    def save(self, step, finished=False):
        """Write a checkpoint. state.pt alone decides where a killed run resumes, and it is replaced in one move."""
        cost = self.cost(step)
        state = {
            "step": step,
            "seconds": cost["seconds"],
            "log_size": os.path.getsize(self.log),
            "sums": self.sums,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with atomic_file(os.path.join(self.config.out_dir, checkpoint.STATE)) as file:
            torch.save(state, file)
        checkpoint.save_model(self.config.out_dir, self.model, self.config.data_dir)
        before = checkpoint.parent(self.config.init_from)[1] if self.config.init_from else {}
        progress = {"step": step, "finished": finished, "history": {**before, self.config.out_dir: cost}}
        checkpoint.write_run(self.config.out_dir, {**self.run, **progress})


def check_sizes(config, model, processes):
    """Raise UserError unless sequences and tokens fit the model, and batches the processes."""
    if config.sequence_length > model.config.max_position_embeddings:
        raise UserError(
            f"--sequence_length={config.sequence_length} is longer than the model's "
            f"max_position_embeddings={model.config.max_position_embeddings}; shorten it"
        )
    entries = load_tokenizer(config.data_dir).n_vocab
    if entries > model.config.vocab_size:
        raise UserError(
            f"{config.data_dir} has a tokenizer of {entries} entries, the model's vocab_size is only "
            f"{model.config.vocab_size}; prepare the data with the model's tokenizer"
        )
    if config.batch_size % (config.micro_batch_size * processes.world):
        raise UserError(
            f"--batch_size={config.batch_size} is no multiple of --micro_batch_size={config.micro_batch_size} "
            f"times {processes.world} process(es)"
        )


def train(config, make_model):
    """Run a config to its end and leave a finished checkpoint in config.out_dir.

    make_model: function(config) -> Transformer on the CPU, called unless the run is finished already. Parameters
    with requires_grad False stay fixed. What is minimized is the model's loss plus its aux_loss, whatever that is.
    """
    mixture = parse_mixture(config.domain, config.data_dir)
    batches = Batches(config.data_dir, mixture, config.sequence_length, config.batch_size, config.seed)
    run, found = checkpoint.find_run(config.out_dir, make_recipe(config, mixture), config.overwrite)
    if run["finished"]:
        print(f"{config.out_dir} is finished ({run['step']} steps), nothing to do")
        return
    device = pick_device(config.device, config.threads)
    processes = Processes(device)
    raw_model = place(make_model(config), device, config.dtype)
    check_sizes(config, raw_model, processes)
    optimizer = make_optimizer(config, raw_model)

    state = {"step": 0, "seconds": 0.0, "log_size": 0, "sums": {}}
    state_path = os.path.join(config.out_dir, checkpoint.STATE)
    if found and os.path.exists(state_path):
        state = checkpoint.load_state(state_path, raw_model, optimizer, device)
    processes.barrier()  # all have looked at the folder before the first one changes it
    recorder = None
    if processes.first:
        if state["step"] == 0:
            checkpoint.start_run(config.out_dir, run)
            state["log_size"] = 0  # also after a kill at step 0: the log is gone and begins again
        recorder = Recorder(config, run, raw_model, optimizer, state)
    model = torch.compile(raw_model) if config.compile and device.type == "cuda" else raw_model

    step, stopped, stop = state["step"], False, StopSignal()
    while step < config.max_steps and not stopped:
        means, norm = train_step(config, step, model, optimizer, batches, processes)
        step += 1
        stopped = any(processes.mean([float(stop.number)]))  # so that every process leaves at the same step
        if recorder:
            recorder.record(step, means, norm)
            if step % config.save_interval == 0:
                recorder.save(step)
    if recorder:
        recorder.save(step, finished=step == config.max_steps)
        recorder.bar.close()
        done = "finished" if step == config.max_steps else "stopped and saved, the same command goes on from here"
        print(f"{config.out_dir}: {done}; step {step}, {recorder.speed(step)}")
    processes.barrier()
    processes.close()
    if step < config.max_steps:
        raise SystemExit(128 + (stop.number or signal.SIGTERM))


if __name__ == "__main__":
    command(lambda: train(parse(TrainConfig), build_model))
