"""When does branching pay? BTX minus dense training of the same tokens, over tokens per parameter and width.

    python -m study.regime --size=cpu

For each width and each scale: a seed model, its branches, the mixture and its finetuning, all with the pipeline's
configs but their steps multiplied by the scale, and the data-matched dense model of compare.py. Writes regime.json and
regime.png. It can be stopped and continued like every other stage.
"""

import dataclasses
import os

from common.config import key, parse, split_list
from common.errors import UserError, command
from common.files import read_json, write_json
from common.runs import versions
from finetune import FinetuneConfig
from study.compare import Chain, train_dense
from study.draw import plot_regime
from study.stages import StudyConfig, parse_study, run, run_chain
from study.tables import regime_table


@dataclasses.dataclass
class RegimeConfig(StudyConfig):
    """Run BTX and dense training at several widths and budgets."""

    widths: str = key("32,64,96", "values of hidden_size, separated by commas; heads stay 16 wide")
    scales: str = key("0.125,0.25,0.5,1", "what all steps of the configs are multiplied by")
    largest: float = key(64.0, "leave out runs with width times scale above this: they take longest", within="(0, inf)")
    dense_learning_rate: float = key(6e-3, "peak learning rate of the dense runs", within="(0, inf)")


def chain_flags(config, width, scale):
    """run.sh's variables for a chain of one width and budget."""

    def steps(name):
        return f"--max_steps={max(1, round(scale * parse(FinetuneConfig, [config.stage(name)]).max_steps))}"

    shape = f"--hidden_size={width} --intermediate_size={round(width * 8 / 3 / 16) * 16}"
    heads = f"--num_attention_heads={width // 16} --num_key_value_heads={width // 16}"
    return {
        "SEED_FLAGS": f"{shape} {heads} {steps('seed')}",
        "EXPERT_FLAGS": steps("expert"),
        "FINETUNE_FLAGS": steps("finetune"),
    }


def point(width, scale, rows):
    """One point of the curves: both models' scores, and the tokens that each had per parameter of the dense model.

    rows: of results.json or compare.json, two of them named btx and dense-dm.
    """
    named = {row["name"]: row for row in rows}
    btx, dense = named["btx"], named["dense-dm"]
    tasks = [task for task in btx["accuracy"] if task != "avg"]
    return {
        "width": width,
        "scale": scale,
        "parameters": dense["total_params"],
        "tokens_per_parameter": dense["train_tokens"] / dense["total_params"],
        "bpb": {name: named[name]["bpb"] for name in ("btx", "dense-dm")},
        "accuracy": {name: {t: named[name]["accuracy"][t] for t in tasks} for name in ("btx", "dense-dm")},
        "difference": btx["bpb"]["avg"] - dense["bpb"]["avg"],
    }


def measure(config, width, scale):
    """Train and evaluate one point."""
    folder = config.path(f"regime/width-{width}-scale-{scale}")
    run_chain(config.size, folder, **chain_flags(config, width, scale))
    chain = Chain(folder)
    train_dense(config, chain, "dense-dm", config.dense_learning_rate, tokens=chain.tokens)
    models = f"{chain.path('btx')},{chain.path('dense-dm')}"
    run("eval.py", config.stage("eval"), f"--model={models}", f"--out_dir={folder}/scores")
    return point(width, scale, read_json(f"{folder}/scores/results.json", "run again")["rows"])


def main():
    config = parse_study(RegimeConfig, "regime")
    try:
        widths = [int(width) for width in split_list(config.widths)]
        scales = [float(scale) for scale in split_list(config.scales)]
    except ValueError as error:
        raise UserError(f"--widths and --scales are numbers separated by commas: {error}") from None
    if any(width < 16 or width % 16 for width in widths) or any(scale <= 0 for scale in scales):
        raise UserError("--widths must be multiples of 16, and --scales above 0")
    points = [measure(config, width, scale) for width in widths for scale in scales if width * scale <= config.largest]
    if not points:
        raise UserError(f"--largest={config.largest} leaves no run; raise it")
    report = config.path("report")
    os.makedirs(report, exist_ok=True)
    comparison = os.path.join(report, "compare.json")
    width = parse(FinetuneConfig, [config.stage("seed")]).hidden_size
    if os.path.exists(comparison) and not any((p["width"], p["scale"]) == (width, 1) for p in points):
        # the comparison is one point more: the configs as they are, the mean of several random seeds
        points.append(
            point(width, 1.0, read_json(comparison, f"make it again: bash run.sh {config.size} compare")["rows"])
        )
    found = {"points": points, "config": dataclasses.asdict(config), "versions": versions()}
    write_json(os.path.join(report, "regime.json"), found)
    plot_regime(points, os.path.join(report, "regime.png"))
    print(regime_table(points))


if __name__ == "__main__":
    command(main)
