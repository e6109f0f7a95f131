"""When does branching pay? BTX, sparse upcycling and dense training at equal FLOPs, at many budgets.

    bash run.sh cpu regime        # or, with data prepared and other random seeds:
    python -m study.regime --size=cpu --seeds=4,5     # other random seeds
    python -m study.regime config/cpu/worlds.py       # two to six worlds with facts of their own

A point is a chain with the pipeline's configs but another width and budget: all steps, warm-up included, times a scale.
From one seed model come BTX (branches, mixture, finetuning), upcycling and dense training, both for the FLOPs that BTX
took after the seed model. At one point of this grid the branches' share of the tokens is varied too, at equal FLOPs,
and the number of domains, at equal tokens. Where a row has several rates, the one that is best on validation text
counts; scores are on test text, of one domain and spliced from two. Writes regime.json and regime.png after each chain,
and can be stopped and continued like every other stage. docs/regime.md has what was found.
"""

import dataclasses
import os
from typing import NamedTuple

from common.config import key, parse, split_list
from common.errors import UserError, command, read_json, write_json
from common.run import read_log, read_run, versions
from finetune import FinetuneConfig
from study.compare import CompareConfig
from study.cost import flops_per_token, own_cost, split_budget
from study.draw import plot_regime
from study.regime_tables import ROWS, TASKS, all_tables, lines_of
from study.stages import StudyConfig, parse_study, prepare, run
from study.tables import BITS, add_average


@dataclasses.dataclass
class RegimeConfig(StudyConfig):
    """Run BTX, upcycling and dense training at several widths, budgets, shares of branches and sets of domains."""

    widths: str = key("32,64", "values of hidden_size, separated by commas; heads stay 16 wide")
    scales: str = key("0.125,0.25,0.5", "what all steps of the configs are multiplied by")
    seeds: str = key("1,2,3", "random seeds of the chains")
    repeated: float = key(64.0, "chains of width times scale above this get the first seed alone", within="(0, inf)")
    sets: str = key("code+math+wiki", "sets of domains: the grid's, then others to try, separated by commas")
    shares: str = key("", "shares of the tokens after the seed for the branches to try, such as 0.5,0.2")
    axis_width: int = key(64, "the width at which shares and sets are tried", within="[16, inf)")
    axis_scale: float = key(0.25, "the scale at which shares and sets are tried", within="(0, inf)")
    btx_rates: str = key("7e-4", "peak learning rates of BTX's finetuning; the best on validation text counts")
    upcycle_rates: str = key("3e-3", "those of upcycling")
    dense_rates: str = key("3e-3", "those of dense training")
    seed_domains: str = key("", "what the seed model is trained on, such as prose:2,math; empty is a point's domains")
    problems: int = key(
        1, "problems a domain; 1: none are tabled, as small budgets leave answers at chance level", within="[1, inf)"
    )
    comparison: str = key("", "a compare.json to take one point more from: the configs as they are")


class Point(NamedTuple):
    """A chain to train. share: the branches' part of the tokens after the seed; 0 is what the configs give them."""

    axis: str
    width: int
    scale: float
    domains: tuple
    share: float = 0.0


def points_of(config):
    """The points that a config asks for. UserError where it makes no sense."""
    try:
        widths = [int(width) for width in split_list(config.widths)]
        scales = [float(scale) for scale in split_list(config.scales)]
        shares = [float(share) for share in split_list(config.shares)]
        [int(number) for number in split_list(config.seeds)]
    except ValueError as error:
        raise UserError(f"--widths, --scales, --shares and --seeds are numbers separated by commas: {error}") from None
    if any(width < 16 or width % 16 for width in widths) or any(scale <= 0 for scale in scales):
        raise UserError("--widths must be multiples of 16, and --scales above 0")
    if not all(0 < share < 1 for share in shares):
        raise UserError("--shares must lie between 0 and 1: branches and finetuning both need tokens")
    sets = [tuple(names.split("+")) for names in split_list(config.sets)]
    if not (widths and scales and sets and split_list(config.seeds)):
        raise UserError("--widths, --scales, --sets and --seeds must not be empty")
    if any(len(names) < 2 for names in sets):
        raise UserError(f"--sets={config.sets}: each set needs two domains or more, such as code+math")
    grid = [Point("budget", width, scale, sets[0]) for scale in scales for width in widths]
    axis = config.axis_width, config.axis_scale
    further = [Point("share", *axis, sets[0], share) for share in shares]
    further += [Point("domains", *axis, names) for names in sets[1:]]
    if further and Point("budget", *axis, sets[0]) not in grid:
        raise UserError(f"--axis_width and --axis_scale name no point of the grid: {axis[0]}, {axis[1]:g}")
    return grid + further


# ---- training ----


def settings_of(config, stage):
    """The config of a training stage."""
    return parse(FinetuneConfig, [config.stage(stage)])


def length_flags(config, stage, steps):
    """--max_steps, and --warmup_steps in the config's proportion to them."""
    settings = settings_of(config, stage)
    steps = max(1, round(steps))
    return f"--max_steps={steps}", f"--warmup_steps={round(settings.warmup_steps * steps / settings.max_steps)}"


def shape_flags(width, settings):
    """The seed model's shape at another width: heads of 16, feed-forwards in the config's proportion to the width."""
    hidden = round(width * settings.intermediate_size / settings.hidden_size / 8) * 8
    heads = f"--num_attention_heads={width // 16}", f"--num_key_value_heads={width // 16}"
    return f"--hidden_size={width}", f"--intermediate_size={hidden}", *heads


def data_folder(config):
    """The study's own data: all sets of domains with one tokenizer, away from the pipeline's."""
    return config.path("regime/data")


def steps_for(config, stage, tokens):
    """How many steps of a stage take so many tokens."""
    settings = settings_of(config, stage)
    return tokens / (settings.batch_size * settings.sequence_length)


def names_of(mixture):
    """The domains of a mixture such as prose:2,math."""
    return [entry.partition(":")[0] for entry in split_list(mixture)]


class Trainer:
    """Trains one point with one random seed: what is finished is skipped. Folders are named after their rates."""

    def __init__(self, config, point, number):
        self.config, self.point, self.number = config, point, number
        self.folder = self.folder_of("-".join(point.domains))
        shared = "-".join(names_of(config.seed_domains))  # one seed model for all sets of domains
        self.seed = f"{self.folder_of(shared) if shared else self.folder}/seed"
        self.data = f"--data_dir={data_folder(config)}"
        self.rivals = parse(CompareConfig, [config.stage("compare")])  # its rows' flags, but for the rates

    def folder_of(self, names):
        point = self.point
        return self.config.path(f"regime/width-{point.width}/{names}/scale-{point.scale:g}/seed{self.number}")

    def start(self, script, stage, out_dir, *flags):
        """Run a script with a stage's config (none if empty) into a folder; returns the folder."""
        configs = [self.config.stage(stage)] if stage else []
        run(script, *configs, f"--out_dir={out_dir}", f"--seed={self.number}", *flags)
        return out_dir

    def train(self, script, stage, out_dir, steps, *flags, domains=()):
        """Train for so many steps on some domains, or all of the point's, evenly."""
        names = f"--domain={','.join(domains or self.point.domains)}"
        return self.start(script, stage, out_dir, self.data, names, *length_flags(self.config, stage, steps), *flags)

    def each_rate(self, rates, script, stage, out_dir, steps, *flags):
        """Train once with each of the rates; returns the folders."""
        return [
            self.train(script, stage, f"{out_dir}-{rate}", steps, *flags, f"--learning_rate={rate}")
            for rate in split_list(rates)
        ]

    def train_seed(self):
        settings = settings_of(self.config, "seed")
        shape = shape_flags(self.point.width, settings)
        domains = split_list(self.config.seed_domains)
        self.train("train.py", "seed", self.seed, self.point.scale * settings.max_steps, *shape, domains=domains)

    def usual_lengths(self):
        """(steps of each branch, steps of the finetuning): the configs', scaled. Sets of domains share the steps that
        the grid's branches have together."""
        usual = len(split_list(self.config.sets)[0].split("+")) / len(self.point.domains)
        branch = usual * self.point.scale * settings_of(self.config, "expert").max_steps
        return branch, self.point.scale * settings_of(self.config, "finetune").max_steps

    def lengths_of_share(self, branches, btx):
        """The same at another share, for the FLOPs of the usual branches and finetuning (their folders)."""
        flops = flops_of(branches, btx)
        branch, mixture = (flops_per_token(read_run(folder)) for folder in (branches[0], btx))
        tokens = split_budget(flops, self.point.share, branch, mixture)
        each = steps_for(self.config, "expert", tokens[0]) / len(branches)
        return each, steps_for(self.config, "finetune", tokens[1])

    def train_btx(self, folder, branch_steps, finetune_steps):
        """(the branches' folders, the finetuned mixture's with each rate)."""
        start, branches = f"--init_from={self.seed}", []
        for name in self.point.domains:
            path = f"{folder}/expert-{name}"
            branches.append(self.train("train.py", "expert", path, branch_steps, start, domains=[name]))
        experts = f"--experts={','.join([*branches, self.seed])}"
        mixed = self.start("mix.py", "mix", f"{folder}/mixed", self.data, experts)
        start = f"--init_from={mixed}"
        rates = self.config.btx_rates
        return branches, self.each_rate(rates, "finetune.py", "finetune", f"{folder}/btx", finetune_steps, start)

    def train_upcycled(self, flops, per_token):
        """Copies of the seed model as the experts, all tensors trained, random routers: for as many FLOPs."""
        copies = f"--experts={','.join([self.seed] * (len(self.point.domains) + 1))}"
        mixed = self.start("mix.py", "", f"{self.folder}/upcycled", copies)
        steps = steps_for(self.config, "finetune", flops / per_token)
        flags = f"--init_from={mixed}", *self.rivals.upcycle_flags.split()
        path = f"{self.folder}/upcycle-cm"
        return self.each_rate(self.config.upcycle_rates, "finetune.py", "finetune", path, steps, *flags)

    def train_dense(self, flops):
        """The seed model goes on with all domains, all tensors trained: for as many FLOPs."""
        steps = steps_for(self.config, "expert", flops / flops_per_token(read_run(self.seed)))
        flags = f"--init_from={self.seed}", "--freeze=none", *self.rivals.dense_flags.split()
        path = f"{self.folder}/dense-cm"
        return self.each_rate(self.config.dense_rates, "train.py", "expert", path, steps, *flags)


def flops_of(branches, btx):
    """BTX's FLOPs after the seed: the branches' and the finetuning's (their folders)."""
    return sum(own_cost(read_run(folder))["flops"] for folder in [*branches, btx])


def best_of(folders, domains):
    """The folder whose run ended with the fewest bits per byte on the validation text of some domains."""
    return min(folders, key=lambda folder: sum(read_log(folder)[-1]["bpb"][name] for name in domains))


def measure(config, point, number):
    """Train and evaluate a point with one random seed; returns its ROWS with their scores and costs."""
    trainer = Trainer(config, point, number)
    folder = trainer.folder
    trainer.train_seed()
    branches, btx = trainer.train_btx(folder, *trainer.usual_lengths())
    flops, per_token = flops_of(branches, btx[0]), flops_per_token(read_run(btx[0]))
    if point.share:
        folder = f"{folder}/share-{point.share:g}"
        btx = trainer.train_btx(folder, *trainer.lengths_of_share(branches, btx[0]))[1]
    rows = {"btx": btx, "upcycle-cm": trainer.train_upcycled(flops, per_token), "dense-cm": trainer.train_dense(flops)}
    best = {name: best_of(folders, point.domains) for name, folders in rows.items()}
    run(
        "eval.py",
        config.stage("eval"),
        trainer.data,
        f"--model={','.join(best.values())}",
        f"--domains={','.join(sorted(point.domains))}",
        f"--out_dir={folder}/scores",
        f"--task_problems={config.problems}",
        *(["--max_new_tokens=1"] if config.problems == 1 else []),  # nothing to be learned from one answer
    )
    scored = {row["name"]: row for row in read_json(f"{folder}/scores/results.json", "run again")["rows"]}
    found = []
    for name, path in best.items():
        rate = float(os.path.basename(path).removeprefix(f"{name}-"))
        row = row_of(name, scored[os.path.basename(path)], own_cost(read_run(trainer.seed)))
        if config.problems > 1:
            row |= {metric: scored[os.path.basename(path)][metric] for metric in TASKS}
            add_average(row)
        found.append({**row, "rate": rate, "last_run_tokens": own_cost(read_run(path))["tokens"]})
    return found


def row_of(name, scored, seed):
    """A row of regime.json from one of results.json; tokens and FLOPs are those after the seed model's own (`seed`)."""
    return {
        "name": name,
        **{metric: scored[metric] for metric in BITS},
        "tokens": scored["train_tokens"] - seed["tokens"],
        "flops": scored["train_flops"] - seed["flops"],
        "parameters": scored["total_params"],
        "seed_tokens": seed["tokens"],
    }


def from_comparison(config):
    """(point, chains) of a compare.json: the configs as they are."""
    remedy = "make it again: bash run.sh cpu compare"
    chains = read_json(config.comparison, remedy)["chains"]
    if "spliced" not in chains[0][0]:
        raise UserError(f"--comparison={config.comparison} has no scores on spliced windows; {remedy}")
    finetuning = settings_of(config, "finetune")
    last = finetuning.max_steps * finetuning.batch_size * finetuning.sequence_length
    found = {}
    for number, rows in enumerate(chains, start=1):
        named = {row["name"]: row for row in rows}
        seed = {"tokens": named["seed"]["train_tokens"], "flops": named["seed"]["train_flops"]}
        found[number] = [{**row_of(name, named[name], seed), "last_run_tokens": last} for name in ROWS]
    domains = tuple(name for name in chains[0][0]["bpb"] if name != "avg")
    return Point("budget", settings_of(config, "seed").hidden_size, 1.0, domains), found


def summarize(point, chains):
    """A point of regime.json. chains: {random seed: rows of `measure`}."""
    rows = next(iter(chains.values()))
    btx, dense = (next(row for row in rows if row["name"] == name) for name in ("btx", "dense-cm"))
    found = {**point._asdict(), "share": 1 - btx["last_run_tokens"] / btx["tokens"], "parameters": dense["parameters"]}
    found["tokens_per_parameter"] = (btx["seed_tokens"] + btx["tokens"]) / dense["parameters"]
    return {**found, "seeds": list(chains), "chains": list(chains.values())}


def main():
    config = parse_study(RegimeConfig, "regime")
    points, numbers = points_of(config), [int(number) for number in split_list(config.seeds)]
    known = dict([from_comparison(config)]) if config.comparison else {}
    names = sorted({*names_of(config.seed_domains), *(name for point in points for name in point.domains)})
    prepare(config.stage("data"), data_folder(config), names)
    report = config.path("report")
    os.makedirs(report, exist_ok=True)
    chains = {point: {} for point in points} | known
    for point in sorted(points, key=lambda point: point.width * point.scale):
        for number in numbers:
            if number == numbers[0] or point.width * point.scale <= config.repeated:
                chains[point][number] = measure(config, point, number)
                done = [summarize(one, rows) for one, rows in chains.items() if rows]
                settings = {"config": dataclasses.asdict(config), "versions": versions()}
                write_json(os.path.join(report, "regime.json"), {"points": done, **settings})
                plot_regime(lines_of(done), os.path.join(report, "regime.png"))
    print(*all_tables(done).values(), sep="\n\n")


if __name__ == "__main__":
    command(main)
