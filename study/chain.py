"""The whole pipeline with one random seed: seed, branches, mixture, finetuning, and rivals with the same compute.

    bash run.sh                   # prepares the data first; or, with the data prepared:
    python -m study.chain --size=cpu --seed=2

Six methods define how each stage is started: seed, branch, mix, finetune, dense, upcycle. All studies that train chains
use them (study.compare, study.ablate, study.regime). Jobs that do not depend on each other run side by side, each on
its own core or GPU: that branches never communicate is the point of Branch-Train-MiX. Each job writes a log in
out_dir/logs, is resumed if it was stopped, and is skipped if it is finished.
"""

import dataclasses
import functools
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
from typing import NamedTuple

from tqdm import tqdm

from common.config import key, parse, split_list
from common.corpus import Corpus
from common.device import gpu_count, stopping_signals
from common.errors import UserError, command
from common.hf import local_folder
from eval import EvalConfig
from finetune import FinetuneConfig
from mix import MixConfig
from model import ModelConfig, Transformer, on_meta
from train import TrainConfig, build_model, freeze

FINETUNING = 80 / 453  # the paper's finetuning tokens for each token of its branches (section 3.1)
LEAST_WINDOWS = 32  # to score in each domain; fewer would say too little
HELD = "--freeze=embeddings,attention,norms"  # branches train only their feed-forwards


@dataclasses.dataclass
class StudyConfig:
    """The keys that all studies have."""

    size: str = key("cpu", "which pipeline: the folders config/SIZE and out/SIZE")
    configs: str = key("", "the folder with the stages' configs; empty: config/SIZE")
    out_dir: str = key("", "the pipeline's folder; empty: out/SIZE")
    domains: str = key("code,math,wiki", "the domains, with a branch each")
    data_dir: str = key("", "the prepared text; empty: as in the stages' configs")
    flags: str = key("", "more flags for every stage that trains or scores", free_text=True)
    seed_flags: str = key("", "more flags for the seed's training", free_text=True)
    expert_flags: str = key("", "more flags for the branches", free_text=True)
    finetune_flags: str = key("", "more flags for the finetuning", free_text=True)
    launch: str = key("", "what starts train.py and finetune.py, such as torchrun --nproc_per_node=8", free_text=True)
    jobs: int = key(0, "jobs to run side by side; 0: one for each GPU, or each core", within="[0, inf)")

    def __post_init__(self):
        self.configs = self.configs or os.path.join("config", self.size)
        self.out_dir = self.out_dir or os.path.join("out", self.size)
        if split_list(self.out_dir) != [self.out_dir]:
            raise UserError(f"--out_dir={self.out_dir}: use a name without commas, or spaces at either end")
        for name, value in dataclasses.asdict(self).items():
            try:
                shlex.split(value if name.endswith(("flags", "launch")) else "")
            except ValueError as error:
                raise UserError(f"--{name}={value}: {str(error).lower()}; quote it as in a shell") from None

    def stage(self, name):
        """The config file of a stage: "finetune" -> config/cpu/finetune.py."""
        return os.path.join(self.configs, f"{name}.py")

    def path(self, name):
        """Something in the pipeline's folder: "report" -> out/cpu/report."""
        return os.path.join(self.out_dir, name)


@dataclasses.dataclass
class ChainConfig(StudyConfig):
    """Train a chain: seed, branches, mixture, finetuning, dense training and upcycling; then score and report."""

    seed: int = key(1, "the random seed of all training", within="[0, inf)")
    published: str = key("", "a checkpoint to use as the seed, a folder or hf:OWNER/NAME")
    tokens: float = key(
        0, "tokens that a branch reads; sets all other sizes too (see sizes_for); 0: as configured", within="[0, inf)"
    )
    generalist: str = key("", "a domain that gets no branch, being the seed's own kind of text")
    unread: str = key("", "domains to score all models on, but train none on: what do they forget?")
    mixture: str = key("", "what the finetuning reads, such as code:3,math:1; empty: all domains evenly")
    rivals: bool = key(True, "also train dense and upcycled models with BTX's FLOPs")
    forms: bool = key(False, "also train BTX with random routers, and from branches that train only feed-forwards")
    report: bool = key(True, "score every model and write the report")
    dense_flags: str = key("", "flags for dense training, on top of the branches'", free_text=True)
    upcycle_flags: str = key("", "flags for upcycling, on top of the finetuning's", free_text=True)

    def __post_init__(self):
        super().__post_init__()
        if both := [name for name in split_list(self.unread) if name in split_list(self.domains)]:
            raise UserError(f"--unread={self.unread}: {both[0]} is also in --domains; name it in only one of them")


def parse_study(cls, name):
    """A study's config: the command line, on top of the config file that it names, or else config/SIZE/<name>.py."""
    flags = sys.argv[1:]
    if flags and not flags[0].startswith("-"):
        return parse(cls, flags)
    settings = parse(cls, flags).stage(name)
    return parse(cls, [settings, *flags] if os.path.exists(settings) else flags)


# ---- jobs, side by side ----


class Job(NamedTuple):
    """A command to run. name: for its progress bar and log. needs: the names of the jobs it waits for. trains: whether
    --launch applies."""

    name: str
    arguments: tuple
    needs: tuple = ()
    trains: bool = False


class Screen:
    """On a terminal, a line for each running job, redrawn in place; in a file, a line when a job ends."""

    def __init__(self, rows):
        self.live = sys.stderr.isatty()
        self.lines = []
        if self.live:
            style = {"bar_format": "{desc}", "dynamic_ncols": True, "leave": False}
            self.lines = [tqdm(total=0, position=row, **style) for row in range(rows)]

    def show(self, row, text):
        if self.live:
            self.lines[row].set_description_str(text[: terminal_width()])

    def print(self, text):
        tqdm.write(text)

    def close(self):
        for line in self.lines:
            line.close()


def terminal_width():
    """The width of the terminal, minus one; some terminals report 0."""
    return (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1


def follow(process, log, show, say):
    """Copy a job's output to its log, line by line. A progress bar, which redraws itself, goes to `show` instead; lines
    that warn of outdated results also go to `say`. Returns the last line."""
    text, last = b"", ""
    block = b"\n"
    while block:
        block = process.stdout.read1(4096)
        text += block or b"\n"  # the last line may lack its line end
        *lines, text = text.replace(b"\r", b"\n").split(b"\n")
        for line in (line.decode(errors="replace").strip() for line in lines):
            if "it/s" in line or "step/s" in line or "%|" in line:
                show(line)
            elif line:
                log.write(line + "\n")
                log.flush()
                last = line
                if "--overwrite=True" in line:
                    say(line)
    return last


def run_jobs(jobs, folder, slots=0, launch="", quiet=False):
    """Run jobs, each as soon as the jobs it needs are done, up to `slots` at a time, in the order of the list. Each has
    one thread if several run; a job alone uses all cores. UserError if some failed, after the others have ended."""
    gpus = gpu_count()
    slots = slots or (1 if launch else gpus or os.cpu_count() or 1)
    waiting, running, done, failed = list(jobs), {}, set(), {}
    names = {job.name for job in jobs}
    screen = Screen(min(slots, len(jobs)))
    free = list(range(slots))
    changed = threading.Condition()
    stopped = []

    def stop(number, frame):
        """Pass a signal on: training saves and ends."""
        stopped.append(number)
        for process in list(running.values()):  # a copy: jobs may end meanwhile
            process.send_signal(number)

    def work(job, slot, process):
        with open(os.path.join(folder, "logs", f"{job.name.replace('/', '-')}.log"), "a", encoding="utf-8") as log:
            last = follow(process, log, lambda text: screen.show(slot, text), screen.print)
        code = process.wait()
        with changed:
            del running[job.name]
            free.append(slot)
            screen.show(slot, "")
            if code:
                failed[job.name] = code, last
            else:
                done.add(job.name)
            if code or not quiet:
                screen.print(last if not code else f"{job.name}: {last}")
            changed.notify()

    os.makedirs(os.path.join(folder, "logs"), exist_ok=True)
    handlers = {number: signal.signal(number, stop) for number in stopping_signals()}
    try:
        with changed:
            while running or (waiting and not stopped):
                ready = [job for job in waiting if {*job.needs} & names <= done and not stopped]
                waiting = [job for job in waiting if not {*job.needs} & (failed.keys())]
                if ready and free:
                    job = ready[0]
                    waiting.remove(job)
                    alone = slots == 1 or (not running and len(ready) == 1)
                    slot = free.pop(0)
                    running[job.name] = process = start(job, launch, gpus, slot, alone)
                    if stopped:  # a signal came while it was being started
                        process.send_signal(stopped[-1])
                    threading.Thread(target=work, args=(job, slot, process)).start()
                elif running:
                    changed.wait(1.0)
                else:
                    break  # the jobs left wait for jobs that failed
    finally:
        screen.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if stopped:
        raise SystemExit(128 + stopped[0])
    if failed:
        name, (_, last) = next(iter(failed.items()))
        where = os.path.join(folder, "logs", f"{name.replace('/', '-')}.log")
        raise UserError(f"{', '.join(failed)} failed ({last}); see {where}; run the same command to resume")


def start(job, launch, gpus, slot, alone):
    """Start a job's process."""
    launcher = shlex.split(launch) if launch and job.trains else [sys.executable]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if sys.stderr.isatty():
        environment |= {"COLUMNS": str(terminal_width()), "LINES": "24"}
    if gpus > 1 and not launch:
        environment["CUDA_VISIBLE_DEVICES"] = str(slot % gpus)
    if not gpus and not alone:
        environment["OMP_NUM_THREADS"] = "1"
    arguments = [*launcher, *job.arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(arguments, env=environment, start_new_session=True, **pipes)


# ---- the stages, each a command ----


class Chain:
    """The jobs of one chain, defined by its ChainConfig. Each of the six stages adds its job to `jobs` and returns the
    folder that the job writes."""

    def __init__(self, config):
        self.config = config
        self.jobs = []
        self.domains = split_list(config.domains)
        self.generalist = config.generalist if config.generalist in self.domains else ""
        self.branched = [domain for domain in self.domains if domain != self.generalist]
        if not self.branched:
            raise UserError(f"--domains={config.domains}: no domain is left to branch on; name one more")
        self.sizes = sizes_for(config, len(self.branched)) if config.tokens else {}
        self.seed_folder = local_folder(config.published) if config.published else config.path("seed")
        self.data = config.data_dir or self.settings("seed" if not config.published else "finetune").data_dir

    def add(self, folder, script, stage, *flags, needs=(), trains=False):
        """Add a job that runs one of our scripts with a stage's config, unless it is there; returns its folder."""
        settings = [self.config.stage(stage)] if stage and os.path.exists(self.config.stage(stage)) else []
        arguments = (script, *settings, *self.size(stage), f"--out_dir={folder}", *flags)
        arguments += tuple(shlex.split(self.config.flags)) if trains else ()
        job = Job(*self.names([folder]), arguments, self.names(needs), trains)
        if job.name not in {other.name for other in self.jobs}:
            self.jobs.append(job)
        return folder

    def size(self, stage):
        """The flags by which --tokens changes a stage's config."""
        return self.sizes.get(stage.split("-")[0], ())

    def settings(self, stage, flags=""):
        """The config of a training stage, with some flags on top."""
        return read_settings(self.config, stage, *self.size(stage), *shlex.split(flags))

    def scoring(self):
        """The config of evaluations."""
        return parse(EvalConfig, [self.config.stage("eval"), *self.size("eval")])

    def names(self, folders):
        return tuple(os.path.relpath(folder, self.config.out_dir) for folder in folders)

    def train(self, folder, script, stage, start, domain, *flags, needs=()):
        """Add a training run. start: the checkpoint to start from, or "". needs: more folders that other jobs make."""
        flags = (f"--domain={domain}", f"--data_dir={self.data}", f"--seed={self.config.seed}", *flags)
        if start:
            flags = (f"--init_from={start}", *flags)
        return self.add(folder, script, stage, *flags, needs=[*([start] if start else []), *needs], trains=True)

    def seed(self):
        """Train one small language model on all domains, unless a published model is the seed."""
        if self.config.published:
            return self.seed_folder
        domains = ",".join(sorted(self.domains))
        return self.train(self.seed_folder, "train.py", "seed", "", domains, *shlex.split(self.config.seed_flags))

    def branch(self, domain, *flags, folder=None):
        """Train the seed model further on one domain: an expert."""
        stage = self.stage_of(domain)
        folder = folder or self.config.path(f"expert-{domain}")
        flags = (*shlex.split(self.config.expert_flags), *flags)
        return self.train(folder, "train.py", stage, self.seed_folder, domain, *flags)

    def stage_of(self, domain):
        """The stage of a branch: a domain may have its own settings, in config/SIZE/expert-DOMAIN.py."""
        own = f"expert-{domain}"
        return own if os.path.exists(self.config.stage(own)) else "expert"

    def mix(self, experts, *flags, folder=None, stage="mix"):
        """Turn feed-forward layers into a mixture of experts, and average the rest."""
        flags = (f"--experts={','.join(experts)}", f"--data_dir={self.data}", f"--seed={self.config.seed}", *flags)
        flags += (f"--published_on={self.generalist}",) if self.config.published else ()
        return self.add(folder or self.config.path("mixed"), "mix.py", stage, *flags, needs=experts)

    def finetune(self, mixed, *flags, folder=None):
        """Train the mixture on all domains together, so that its routers learn."""
        mixture = self.config.mixture or ",".join(sorted(self.domains))
        flags = (*shlex.split(self.config.finetune_flags), *flags)
        return self.train(folder or self.config.path("btx"), "finetune.py", "finetune", mixed, mixture, *flags)

    def dense(self, steps, *flags, folder=None):
        """Train all tensors of the seed model further, on the data that BTX reads."""
        folder = folder or self.config.path("compare/dense-cm")
        splice = self.budget.splice_of(self.budget.dense, steps)
        given = f"{self.config.expert_flags} --splice={splice} {self.config.dense_flags}"
        flags = (*shlex.split(given), f"--max_steps={steps}", "--freeze=none", *flags)
        return self.train(folder, "train.py", "expert", self.seed_folder, self.budget.mixture, *flags)

    def copies(self, *flags, folder):
        """Mix copies of the seed model: it is each of the experts."""
        return self.mix([self.seed_folder] * (len(self.branched) + 1), *flags, folder=folder, stage="")

    def upcycle(self, steps, *flags, folder=None, copies=None):
        """Train a mixture of copies of the seed model (Komatsuzaki et al. 2022), on the data that BTX reads.
        copies: the folder of such a mixture, if its settings are not the usual ones."""
        experts_per_token = f"--num_experts_per_tok={self.budget.experts_per_token}"
        upcycled = copies or self.copies(experts_per_token, folder=self.config.path("compare/upcycled"))
        folder = folder or self.config.path("compare/upcycle-cm")
        splice = self.budget.splice_of(self.budget.upcycling, steps)
        given = f"{self.config.finetune_flags} --splice={splice} {self.config.upcycle_flags}"
        flags = (*shlex.split(given), f"--max_steps={steps}", *flags)
        return self.train(folder, "finetune.py", "finetune", upcycled, self.budget.mixture, *flags)

    def score(self, *models):
        """Add one job that scores some checkpoints, each a row of the chain's results.json."""
        rows = [f"seed={model}" if model == self.seed_folder else model for model in models]
        self.add_score(f"scores/{self.names(models)[0]}", ("eval.py",), f"--model={','.join(rows)}", needs=models)

    def score_ensembles(self, experts, suffix=""):
        """Add the job for Branch-Train-Merge's rows. suffix: tells these experts' rows from those of others."""
        flags = (f"--experts={','.join(experts)}", f"--suffix={suffix}")
        self.add_score(f"scores/btm{suffix}", ("-m", "study.btm"), *flags, needs=experts)

    def add_score(self, name, script, *flags, needs):
        """Add a job that scores. flags: for its script, on top of those that all scores share."""
        settings = (self.config.stage("eval"), *self.size("eval"), self.all_domains(), f"--data_dir={self.data}")
        settings += (f"--unread={self.config.unread}", f"--out_dir={self.config.path('report')}")
        arguments = (*script, *settings, *flags, *shlex.split(self.config.flags))
        self.jobs.append(Job(name, arguments, self.names(needs)))

    def all_domains(self):
        """The flag that limits evaluations to these domains, whatever else the data folder may hold."""
        return f"--domains={','.join(sorted([*self.domains, *split_list(self.config.unread)]))}"

    def run(self, quiet=False):
        """Run the jobs that have been added; see run_jobs."""
        run_jobs(self.jobs, self.config.out_dir, self.config.jobs, self.config.launch, quiet)

    @functools.cached_property
    def budget(self):
        """What BTX spends after the seed: see Budget."""
        return Budget(self)


def chain_of(config, folder, number, **settings):
    """A Chain for a study, with no jobs yet: in its own folder, with one random seed and the rivals' settings from
    config/SIZE/chain.py. config: a StudyConfig. settings: other values of ChainConfig."""
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(StudyConfig)}
    values = {**shared, "out_dir": folder, "seed": number, **settings}
    rivals = [config.stage("chain")] if os.path.exists(config.stage("chain")) else []
    return Chain(parse(ChainConfig, [*rivals, *(f"--{name}={value}" for name, value in values.items())]))


class Budget:
    """What a chain spends after the seed model, from its configs: tokens and training FLOPs, of BTX and its rivals."""

    def __init__(self, chain):
        config = chain.config
        self.branch = chain.settings("expert", config.expert_flags)
        self.branches = {name: chain.settings(chain.stage_of(name), config.expert_flags) for name in chain.branched}
        self.dense = chain.settings("expert", f"{config.expert_flags} {config.dense_flags}")
        self.upcycling = chain.settings("finetune", f"{config.finetune_flags} {config.upcycle_flags}")
        self.finetuning = chain.settings("finetune", config.finetune_flags)
        self.experts_per_token = parse(MixConfig, [config.stage("mix")]).num_experts_per_tok
        corpus = Corpus(chain.data)
        self.dense_config = dense = self.seed_config(chain, corpus)
        count = len(chain.branched) + 1
        self.mixed_config = mixed = dataclasses.replace(
            dense, num_local_experts=count, num_experts_per_tok=self.experts_per_token, expert_names=("",) * count
        )
        read = {domain: tokens_of(settings) for domain, settings in self.branches.items()}
        self.finetuning_tokens = tokens_of(self.finetuning)
        self.tokens = sum(read.values()) + self.finetuning_tokens
        self.spliced_tokens = self.finetuning.splice * self.finetuning_tokens
        self.branch_flops = flops_per_token(self.branch, dense, self.branch.freeze)
        self.whole_branch_flops = flops_per_token(self.branch, dense, "none")
        self.mixture_flops = flops_per_token(self.finetuning, mixed, self.finetuning.freeze)
        self.dense_flops = flops_per_token(self.dense, dense, "none")
        self.upcycling_flops = flops_per_token(self.upcycling, mixed, self.upcycling.freeze)
        self.flops = self.finetuning_tokens * self.mixture_flops
        for domain, settings in self.branches.items():
            self.flops += read[domain] * flops_per_token(settings, dense, settings.freeze)
        shares = dict(read)  # the tokens that BTX reads of each domain
        for domain, share in corpus.mixture(config.mixture or ",".join(chain.domains)).items():
            shares[domain] = shares.get(domain, 0) + share * self.finetuning_tokens
        self.mixture = ",".join(f"{domain}:{count:.0f}" for domain, count in shares.items())

    def seed_config(self, chain, corpus):
        """The ModelConfig of the seed model, which need not be there yet."""
        if chain.config.published:
            return ModelConfig.from_pretrained(chain.seed_folder)
        with on_meta():
            return build_model(chain.settings("seed", chain.config.seed_flags), corpus).config

    def splice_of(self, settings, steps):
        """The share of spliced windows that gives `steps` steps as many of them as BTX's finetuning has: branches can
        have none, so those are all that BTX reads."""
        return min(1.0, self.spliced_tokens / tokens_of(settings, steps))

    def dense_steps(self):
        """How many steps of dense training cost BTX's FLOPs."""
        return round(self.flops / self.dense_flops / tokens_of(self.dense, 1))

    def upcycle_steps(self):
        """How many steps of upcycling cost BTX's FLOPs."""
        return round(self.flops / self.upcycling_flops / tokens_of(self.upcycling, 1))

    def whole_branch_steps(self, flops):
        """How many steps of a branch that trains all of its tensors cost `flops`."""
        return round(flops / self.whole_branch_flops / tokens_of(self.branch, 1))


def read_settings(config, stage, *flags):
    """The config of a training stage, with some flags on top."""
    return parse(FinetuneConfig if stage == "finetune" else TrainConfig, [config.stage(stage), *flags])


def sizes_for(config, branches):
    """{stage: the flags with which each of `branches` branches reads config.tokens}.

    An optimizer step takes tokens^0.6 of them: 1 G are 4,000 steps of 128 windows of 2,048 tokens, 40 k are 78 steps of
    2 windows of 256. This is our rule of thumb, which grows about as critical batch sizes do; nobody has swept it. The
    ratio of finetuning to branches is the paper's. Scores read a tenth of a branch's tokens in each domain, or more.
    """
    per_step = config.tokens**0.6
    longest = parse(EvalConfig, [config.stage("eval")])
    length = min(longest.sequence_length, 2 ** max(3, int(math.log2(per_step / 2))))
    batch = max(2, 2 ** round(math.log2(per_step / length)))
    found = {}
    for stage, tokens in {"expert": config.tokens, "finetune": FINETUNING * branches * config.tokens}.items():
        usual = read_settings(config, stage)
        steps = max(1, round(tokens / batch / length))
        values = {"max_steps": steps, "batch_size": batch, "sequence_length": length}
        values["micro_batch_size"] = min(batch, usual.micro_batch_size)
        values["warmup_steps"] = math.ceil(steps * usual.warmup_steps / usual.max_steps)
        values["eval_interval"] = min(usual.eval_interval, math.ceil(steps / 2))
        values["save_interval"] = math.ceil(steps / 4)
        values["eval_windows"] = max(2, min(usual.eval_windows, round(config.tokens / 40 / length)))
        found[stage] = values
    windows = min(longest.eval_windows, max(LEAST_WINDOWS, round(config.tokens / 10 / length)))
    found["eval"] = {"sequence_length": length, "eval_windows": windows}
    return {stage: tuple(f"--{name}={value}" for name, value in values.items()) for stage, values in found.items()}


def tokens_of(settings, steps=None):
    """How many tokens a stage reads, in `steps` steps or in all."""
    return (steps or settings.max_steps) * settings.batch_size * settings.sequence_length


def flops_per_token(settings, model_config, frozen):
    """Training FLOPs per token in a stage."""
    with on_meta():
        model = Transformer(model_config)
    freeze(model, frozen)
    return model.flops_per_token(settings.sequence_length)


# ---- the pipeline ----


def pipeline(chain):
    """Add every job of the chain: train, mix, score and draw."""
    config = chain.config
    seed = chain.seed()
    rivals = []
    if config.rivals:  # the longest jobs go first, so that nothing waits for them at the end
        rivals.append(chain.upcycle(chain.budget.upcycle_steps()))
        rivals.append(chain.dense(chain.budget.dense_steps()))
    branches = [chain.branch(domain) for domain in chain.branched]
    experts = [*branches, seed]
    mixed = chain.mix(experts)
    btx = chain.finetune(mixed)
    soup = chain.mix(experts, "--method=soup", folder=config.path("soup"), stage="")
    forms = other_forms(chain, experts) if config.forms else []
    if config.report:
        chain.score_ensembles(experts)  # first: they take longest
        chain.score(seed, *branches)
        chain.score(soup, mixed, btx)
        for some in (rivals, forms):
            if some:
                chain.score(*some)
        size = chain.size("eval") or (f"--sequence_length={chain.scoring().sequence_length}",)
        arguments = (f"--model={btx}", f"--data_dir={chain.data}", chain.all_domains(), *size)
        arguments += (f"--out_dir={config.path('report')}",)
        chain.jobs.append(Job("routing", ("-m", "study.route", *arguments), chain.names([btx])))


def other_forms(chain, experts):
    """BTX with the paper's random routers, from the same branches; and BTX from branches that train only their
    feed-forwards. Both are mixed and finetuned like BTX."""
    path, seed = chain.config.path, chain.seed_folder
    mixed = chain.mix(experts, "--router_init=normal", folder=path("compare/mixed-paper"))
    printed = chain.finetune(mixed, folder=path("compare/btx-paper"))
    held = [chain.branch(domain, HELD, folder=path(f"compare/held-{domain}")) for domain in chain.branched]
    mixed = chain.mix([*held, seed], folder=path("compare/mixed-held"))
    return [printed, mixed, chain.finetune(mixed, folder=path("compare/btx-held"))]


def draw_report(config):
    """Print the table of a finished chain, and how it differs from config/SIZE/expected.json."""
    arguments = [sys.executable, "-m", "study.report", f"--report={config.path('report')}"]
    expected = os.path.join(config.configs, "expected.json")
    usual = config.out_dir == os.path.join("out", config.size) and config.rivals and config.domains == "code,math,wiki"
    if usual and os.path.exists(expected):
        arguments.append(f"--expected={expected}")
    done = subprocess.run(arguments)
    if done.returncode:
        raise SystemExit(done.returncode)


def main():
    config = parse_study(ChainConfig, "chain")
    chain = Chain(config)
    pipeline(chain)
    chain.run()
    if config.report:
        draw_report(config)


if __name__ == "__main__":
    command(main)
