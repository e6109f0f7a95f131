"""What a step takes, and how long BTX, upcycling and dense training last on workers joined by a slow network.

    python -m study.clock --size=cpu --threads=1 --clock=cpu

Measures a training step of a dense model, of a branch (the expert's config, its frozen parts included), of the mixture
and of a mixture with the branch's frozen parts, taking turns in one process, with the whole batch and with a worker's
part of it. From these it works out

    matched      how many steps the mixture and the dense model get in the device time that BTX takes after the seed
    network      the seconds after the seed on N workers over B bit/s, at equal training FLOPs

and writes step_times.json, network.json and network.png. (Sukhbaatar et al. 2024, section 4.1.2, match compute by
device time, too.)
"""

import dataclasses
import os
import statistics
from typing import NamedTuple

import torch

from common.config import key, parse, split_list
from common.corpus import Batches, Corpus
from common.device import compile_key, compiled, device_key, pick_device, place, threads_key
from common.errors import UserError, command, read_json, write_json
from common.parallel import Processes
from common.run import versions
from finetune import FinetuneConfig
from mix import MixConfig
from model import ModelConfig, Transformer
from study.cost import NUMBER_BYTES, step_bytes, trained_numbers
from study.draw import bits, plot_network
from study.parts import in_turns
from study.stages import StudyConfig, parse_study
from train import build_model, freeze, make_optimizer, train_step

KINDS = "dense", "branch", "mixture", "frozen mixture"
PAIRS = ("btx", "upcycle-cm"), ("btx", "dense-cm"), ("upcycle-cm", "dense-cm")


@dataclasses.dataclass
class ClockConfig(StudyConfig):
    """Measure the steps of a size's models, and what follows for clusters."""

    workers: int = key(4, "machines; each branch has one to itself", within="[2, inf)")
    turns: int = key(12, "timed turns, after two that warm up", within="[1, inf)")
    clock: str = key("wall", "wall, or cpu: the processor's time for this process; use one thread", ("wall", "cpu"))
    compile: str = compile_key()
    device: str = device_key()
    threads: int = threads_key()


class NoSignal:
    """A StopSignal that never stops."""

    number = 0


class Schedule(NamedTuple):
    """What one way of training does after the seed model, as a cluster sees it. seconds: computing. bits: what each
    worker sends."""

    seconds: float
    bits: float

    def at(self, bandwidth):
        """Seconds over a network in which each worker sends `bandwidth` bit/s; nothing is sent while it computes."""
        return self.seconds + self.bits / bandwidth


# ---- arithmetic ----


def matched_steps(spent, seconds):
    """{kind: how many of its steps take the device time of `spent`}.

    spent: {kind: steps} that BTX takes after the seed model, such as {"branch": 2400, "mixture": 420}: the steps of all
    branches together. seconds: {kind: seconds a step}, measured on one machine. The paper's compute-matching by
    GPU-days: upcycle-tm gets the steps of "mixture", dense-tm those of "dense".
    """
    total = sum(steps * seconds[kind] for kind, steps in spent.items())
    return {kind: round(total / step) for kind, step in seconds.items()}


def read_matched(path, spent):
    """The "matched_steps" of a step_times.json; UserError unless BTX's steps after the seed were `spent` then, too."""
    found = read_json(path, "measure again: python -m study.clock")
    theirs = found.get("spent_by_btx") if isinstance(found, dict) else None
    if theirs != spent:
        raise UserError(f"{path} is of a BTX of {theirs} steps, not {spent}; run study.clock again")
    return found["matched_steps"]


def schedule_of(steps, workers, seconds, numbers):
    """The Schedule of data-parallel training: each of `steps` takes `seconds` on every worker, then a ring all-reduce
    of `numbers` gradients."""
    return Schedule(steps * seconds, steps * step_bytes(numbers, workers) / workers * 8)


def crossing(ours, theirs):
    """The bandwidth, bit/s, at which two schedules take equally long; None when one is always ahead."""
    less, more = theirs.bits - ours.bits, ours.seconds - theirs.seconds
    return less / more if less * more > 0 else None


# ---- measuring ----


class Settings(NamedTuple):
    """The configs that decide a step: of the training stages, and of the mixing."""

    seed: FinetuneConfig
    branch: FinetuneConfig
    mixture: FinetuneConfig
    mixing: MixConfig

    @classmethod
    def of(cls, config):
        stages = (parse(FinetuneConfig, [config.stage(name)]) for name in ("seed", "expert", "finetune"))
        return cls(*stages, parse(MixConfig, [config.stage("mix")]))


def models_of(settings, corpus):
    """{kind: (config of its training, model)} for KINDS. Weights are random: times do not depend on them."""
    dense = build_model(settings.seed, corpus).config
    routing = {name: getattr(settings.mixture, name) for name in ("router", "router_aux_loss_coef", "balance")}
    experts = {"num_local_experts": len(split_list(settings.mixing.experts))}
    experts |= {"num_experts_per_tok": settings.mixing.num_experts_per_tok, **routing}
    frozen = settings.branch.freeze
    found = {}
    for kind in KINDS:
        mixed = "mixture" in kind
        training = settings.mixture if mixed else settings.branch
        training = dataclasses.replace(training, freeze=frozen if kind in ("branch", "frozen mixture") else "none")
        shape = ModelConfig(**{**dataclasses.asdict(dense), **(experts if mixed else {})})
        found[kind] = training, Transformer(shape)
        freeze(found[kind][1], training.freeze)
    return found


def measure(config, models, corpus, part):
    """{kind: [seconds]} of steps on a `part`-th of the batch."""
    device, steps = pick_device(config.device, config.threads), {}
    processes = Processes(device)
    for kind, (training, model) in models.items():
        size = training.batch_size // part
        if size < 1:
            raise UserError(f"--workers={part}: a batch of {training.batch_size} has no part for each worker")
        own = dataclasses.replace(training, batch_size=size, micro_batch_size=min(size, training.micro_batch_size))
        batches = Batches(corpus, corpus.mixture("all"), own.sequence_length, size, seed=0)
        model = place(model, device, own.dtype)
        run, optimizer = compiled(model, config.compile, device), make_optimizer(own, model)
        arguments = own, 0, run, optimizer, batches, processes, NoSignal
        steps[kind] = lambda arguments=arguments: train_step(*arguments)
    return in_turns(config, device, steps)


# ---- what follows ----


def schedules(settings, models, whole, part, workers):
    """{way to train: Schedule} after the seed model, all with BTX's training FLOPs, on `workers` machines.

    whole, part: {kind: seconds} of a step on the whole batch and on a worker's part of it. Every branch runs on one
    machine, all side by side; everything else is data-parallel. What one worker of a ring sends counts.
    """
    length = settings.branch.sequence_length
    flops = {kind: own.batch_size * length * model.flops_per_token(length) for kind, (own, model) in models.items()}
    numbers = {kind: trained_numbers(model) for kind, (_, model) in models.items()}
    branches = len(split_list(settings.mixing.experts)) - 1
    rounds = -(-branches // workers)  # with more branches than machines some have to wait
    branch, finetuning = settings.branch.max_steps, settings.mixture.max_steps
    total = branches * branch * flops["branch"] + finetuning * flops["mixture"]
    alone = Schedule(rounds * branch * whole["branch"], 0.0)
    together = schedule_of(finetuning, workers, part["mixture"], numbers["mixture"])
    found = {"btx": Schedule(*(a + b for a, b in zip(alone, together, strict=True)))}
    for name, kind in {"upcycle-cm": "mixture", "dense-cm": "dense"}.items():
        found[name] = schedule_of(total / flops[kind], workers, part[kind], numbers[kind])
    return found


def main():
    config = parse_study(ClockConfig, "clock")
    settings = Settings.of(config)
    corpus = Corpus(settings.branch.data_dir)
    torch.manual_seed(1)
    models = models_of(settings, corpus)
    times = {part: measure(config, models, corpus, part) for part in (1, config.workers)}
    medians = {part: {kind: statistics.median(t) for kind, t in found.items()} for part, found in times.items()}
    branches = len(split_list(settings.mixing.experts)) - 1
    spent = {"branch": branches * settings.branch.max_steps, "mixture": settings.mixture.max_steps}
    matched = matched_steps(spent, medians[1])
    report = config.path("report")
    os.makedirs(report, exist_ok=True)
    setting = {"config": dataclasses.asdict(config), "threads": torch.get_num_threads(), "versions": versions()}
    step_times = {
        "seconds": medians[1],
        "minima": {kind: min(found) for kind, found in times[1].items()},
        "seconds_of_a_workers_part": medians[config.workers],
        "spent_by_btx": spent,
        "matched_steps": {"upcycle-tm": matched["mixture"], "dense-tm": matched["dense"]},
    }
    write_json(os.path.join(report, "step_times.json"), {**step_times, **setting})
    found = schedules(settings, models, medians[1], medians[config.workers], config.workers)
    crossings = {f"{one} over {other}": crossing(found[one], found[other]) for one, other in PAIRS}
    network = {"schedules": {name: one._asdict() for name, one in found.items()}, "crossings": crossings}
    network |= {"workers": config.workers, "gradient_bytes": NUMBER_BYTES}
    write_json(os.path.join(report, "network.json"), {**network, **setting})
    plot_network(network["schedules"], crossings, config.workers, os.path.join(report, "network.png"))
    for kind, seconds in medians[1].items():
        print(f"{kind:15s} {1000 * seconds:7.1f} ms a step, {seconds / medians[1]['dense']:.2f} of dense")
    for name, steps in step_times["matched_steps"].items():
        print(f"{name}: {steps} steps take the device time that BTX takes after the seed")
    for one, other in PAIRS:
        who = f"{one} is done before {other}, after the seed on {config.workers} workers"
        print(f"{who}: {where(found[one], found[other])}")


def where(ours, theirs):
    """At which bandwidths `ours` is done first, in words."""
    speed = crossing(ours, theirs)
    if speed is None:
        return "at every bandwidth" if ours.at(1.0) < theirs.at(1.0) else "at none"
    return f"{'below' if ours.bits < theirs.bits else 'above'} {bits(speed)}/s from each worker"


if __name__ == "__main__":
    command(main)
