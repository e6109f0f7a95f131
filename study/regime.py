"""When does branching pay? BTX, sparse upcycling and dense training at equal FLOPs, at several widths and budgets.

    bash run.sh cpu regime        # or, with the data prepared: python -m study.regime --size=cpu --seeds=4,5

A point is a chain (study.chain) with the pipeline's configs at another width and budget: all steps, including warm-up,
are multiplied by a scale. Scores are bits per byte of test text. Writes regime.json and regime.png after each chain;
you can stop and continue it like every other stage. docs/regime.md has the results.
"""

import dataclasses
import os
import shlex

from common.config import key, split_list
from common.errors import UserError, command, read_json, write_json
from common.run import read_run, total_cost, versions
from study.chain import StudyConfig, chain_of, parse_study, pipeline, read_settings
from study.draw import plot_regime
from study.tables import difference, markdown_table, short

RIVALS = {"upcycle-cm": "upcycling", "dense-cm": "dense training"}


@dataclasses.dataclass
class RegimeConfig(StudyConfig):
    """Train chains over widths, budgets and random seeds, and compare."""

    widths: str = key("32,64", "widths of the seed model, multiples of 16, separated by commas")
    scales: str = key("0.25,0.5,1", "factors for all steps in the configs, separated by commas")
    seeds: str = key("1,2,3", "the random seeds of every point, separated by commas")


def points_of(config):
    """[(width, scale)], small chains first. UserError for values that make no sense."""
    try:
        widths = [int(width) for width in split_list(config.widths)]
        scales = [float(scale) for scale in split_list(config.scales)]
        numbers = [int(number) for number in split_list(config.seeds)]
    except ValueError as error:
        raise UserError(f"--widths, --scales and --seeds must be numbers separated by commas: {error}") from None
    if not (widths and scales and numbers) or any(width < 16 or width % 16 for width in widths) or min(scales) <= 0:
        raise UserError("--widths must be multiples of 16, --scales above 0, and --seeds not empty")
    return sorted(((width, scale) for width in widths for scale in scales), key=lambda point: point[0] * point[1])


def length_flags(config, stage, scale):
    """A stage's flags, with its steps and warm-up multiplied by a scale."""
    given = getattr(config, f"{stage}_flags")
    settings = read_settings(config, stage, *shlex.split(given))
    steps = max(1, round(settings.max_steps * scale))
    return f"{given} --max_steps={steps} --warmup_steps={round(settings.warmup_steps * steps / settings.max_steps)}"


def shape_flags(config, width):
    """The seed model's shape at another width: heads of size 16, feed-forwards in the same proportion to the width."""
    settings = read_settings(config, "seed")
    hidden = round(width * settings.intermediate_size / settings.hidden_size / 8) * 8
    heads = f"--num_attention_heads={width // 16} --num_key_value_heads={width // 16}"
    return f"--hidden_size={width} --intermediate_size={hidden} {heads}"


def measure_point(config, width, scale, number):
    """Train and score a point with one random seed; returns {row: its scores and costs}."""
    folder = config.path(f"regime/width-{width}/scale-{scale:g}/seed{number}")
    stages = {f"{stage}_flags": length_flags(config, stage, scale) for stage in ("seed", "expert", "finetune")}
    stages["seed_flags"] += f" {shape_flags(config, width)}"
    chain = chain_of(config, folder, number, report=False, **stages)
    pipeline(chain)
    models = [chain.config.path(name) for name in ("btx", *(f"compare/{rival}" for rival in RIVALS))]
    flags = (f"--model={','.join(models)}", chain.all_domains(), f"--data_dir={chain.data}")
    flags += ("--task_problems=1", "--max_new_tokens=1")
    chain.add(chain.config.path("report"), "eval.py", "eval", *flags, needs=models)
    chain.run(quiet=True)
    rows = read_json(chain.config.path("report/results.json"), "run again")["rows"]
    return {"rows": rows, "seed_tokens": total_cost(read_run(chain.seed_folder)["history"])["tokens"]}


def point_of(width, scale, chains):
    """A point of regime.json. chains: {random seed: measure_point}."""
    first = next(iter(chains.values()))
    named = {row["name"]: row for row in first["rows"]}
    parameters = named["dense-cm"]["total_params"]
    return {
        "width": width,
        "scale": scale,
        "parameters": parameters,
        "tokens_per_parameter": named["btx"]["train_tokens"] / parameters,
        "seed_tokens": first["seed_tokens"],
        "seeds": list(chains),
        "chains": [chain["rows"] for chain in chains.values()],
    }


def lines_of(points):
    """The lines of regime.png, for each width and rival: BTX's lead in bits per byte against tokens per parameter."""
    lines = []
    for rival in RIVALS:
        for width in dict.fromkeys(point["width"] for point in points):
            some = [point for point in points if point["width"] == width]
            leads, halves = zip(*(difference(point["chains"], rival, "bpb", "avg") for point in some), strict=True)
            x = [point["tokens_per_parameter"] for point in some]
            lines.append({"width": width, "rival": rival, "x": x, "lead": list(leads), "half": list(halves)})
    return lines


def regime_table(points):
    """A table of BTX's lead over its rivals, with a row for each point: the mean and half of its 95 % interval."""
    body = []
    for point in points:
        cells = [str(point["width"]), f"{point['scale']:g}", short(point["parameters"])]
        cells += [f"{point['tokens_per_parameter']:.0f}", str(len(point["seeds"]))]
        for rival in RIVALS:
            lead, half = difference(point["chains"], rival, "bpb", "avg")
            cells.append(f"{lead:+.3f} ± {half:.3f}" if len(point["seeds"]) > 1 else f"{lead:+.3f}")
        body.append(cells)
    header = ["width", "scale", "parameters", "tokens per parameter", "random seeds"]
    return markdown_table([*header, *(f"ahead of {words}" for words in RIVALS.values())], body)


def main():
    config = parse_study(RegimeConfig, "regime")
    report = config.path("report")
    os.makedirs(report, exist_ok=True)
    points = []
    for width, scale in points_of(config):
        chains = {}
        for number in map(int, split_list(config.seeds)):
            chains[number] = measure_point(config, width, scale, number)
            done = [*points, point_of(width, scale, chains)]
            settings = {"config": dataclasses.asdict(config), "versions": versions()}
            write_json(os.path.join(report, "regime.json"), {"points": done, **settings})
            plot_regime(lines_of(done), os.path.join(report, "regime.png"))
        points = done
    print(regime_table(points))


if __name__ == "__main__":
    command(main)
