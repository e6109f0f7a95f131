"""What BTX, sparse upcycling and dense training cost at sizes that nobody here has run: formulas, and tables of them.

    python -m study.scaling --picture=docs/scaling.png      # prints the tables of docs/scaling.md

All three start from one seed model and spend the same training FLOPs: BTX in branches that do not talk to each other
and a short finetuning of their mixture, upcycling in the mixture alone, dense training in the dense model alone. A
stage takes as long as its computation or its messages, whichever is longer, as if all of one could hide behind the
other: that favours whoever sends more. FLOPs, parameters and bytes are counted by the code that trains (model.py,
study/cost.py); speeds and prices are assumed (Site).
"""

import dataclasses
import math
from typing import NamedTuple

from common.config import key, parse
from common.device import shapes_alone
from common.errors import command
from model import ModelConfig, Transformer
from study.cost import NUMBER_BYTES, exchange_bytes, step_bytes
from study.draw import plot_scaling
from study.tables import markdown_table

EXPERTS = 4  # branches, and experts of the mixture, two of which see a token
STATE_BYTES = 4 * NUMBER_BYTES  # a parameter's weight, gradient and AdamW's two moments
MIXTURE_SPEED = 0.82  # FLOP/s of a mixture over a dense model's: results/bench, width 128 in bf16
BANDWIDTHS = 1, 10, 100, 400, 3200  # Gbit/s of a worker; 3,200 is a cluster with 400 for each of a machine's 8 cards


class Site(NamedTuple):
    """What a worker is: FLOP/s in dense training, bytes of memory for the training state, dollars an hour."""

    name: str
    flops: float
    memory: float
    price: float


# assumed: 40 % of the datasheet's 989 TFLOP/s in bf16 a card, a tenth of its 80 GB for activations, 2.50 $ an hour
MACHINE = Site("machine with 8 H100", 8 * 0.4 * 989e12, 8 * 0.9 * 80e9, 8 * 2.50)
# measured: 27,135 tokens/s of 2.78 MFLOPs each (results/bench, width 64 in fp32, one core of a Xeon)
CORE = Site("CPU core", 75.4e9, 1e9, 0.0)


class Model(NamedTuple):
    """What a stage trains: parameters, training FLOPs a token, speed over a dense model's. Of a mixture also how many
    parameters are in its experts, the rows that a token sends to them in all layers, and the numbers in a row."""

    parameters: int
    flops: float
    speed: float
    experts: int = 0
    rows: int = 0
    width: int = 0


class Size(NamedTuple):
    """The dense model and the mixture, and their training after the seed: tokens in all branches and in the finetuning,
    tokens a step, and tokens that a worker takes in one forward pass."""

    dense: Model
    mixture: Model
    branch_tokens: float
    finetune_tokens: float
    batch: float
    micro_batch: float
    site: Site


def models(vocabulary, width, hidden, layers, heads, kv_heads, length, tie=False):
    """The dense Model of a shape and the mixture of EXPERTS of it, counted without numbers."""
    shape = ModelConfig(vocabulary, width, hidden, layers, heads, kv_heads, length, tie_word_embeddings=tie)
    found = []
    for experts, speed in ((0, 1.0), (EXPERTS, MIXTURE_SPEED)):
        with shapes_alone():
            model = Transformer(dataclasses.replace(shape, num_local_experts=experts))
        placed = [parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name]
        rows = shape.num_experts_per_tok * layers if experts else 0
        found.append(Model(model.num_parameters()[1], model.flops_per_token(length), speed, sum(placed), rows, width))
    return found


def published(*shape):
    """A published shape, trained after the seed in the paper's proportions: 453 B tokens in branches and 80 B in
    finetuning for 6.74 B parameters, batches of 4 M tokens (Sukhbaatar et al. 2024, section 4.1)."""
    dense, mixture = models(*shape)
    scale = dense.parameters / 6.74e9
    return Size(dense, mixture, 453e9 * scale, 80e9 * scale, 4e6, 8 * 4 * 4096, MACHINE)


# ---- one stage ----


def shard_size(model, site):
    """Workers that share one copy of the training state: the least power of two that has room for it."""
    return 2 ** max(0, math.ceil(math.log2(STATE_BYTES * model.parameters / site.memory)))


def bytes_a_step(model, workers, size):
    """Bytes that each worker sends in a step."""
    shards = shard_size(model, size.site)
    micro_batches = max(1, round(size.batch / workers / size.micro_batch))
    return step_bytes(model.parameters, workers, shards, micro_batches) / workers


def stage_seconds(model, tokens, workers, gigabits, size):
    """Seconds to train on so many tokens; infinite where the workers cannot hold the model."""
    if shard_size(model, size.site) > workers:
        return math.inf
    computing = tokens * model.flops / (workers * size.site.flops * model.speed)
    sending = tokens / size.batch * bytes_a_step(model, workers, size) * 8 / (gigabits * 1e9)
    return max(computing, sending)


# ---- three ways to spend the same FLOPs ----


def plan(size, workers):
    """{method: [(model, tokens, workers)]}: the stages of each, one after another. BTX's branches run side by side on
    equal shares of the workers, so one of them stands for all."""
    dense, mixture = size.dense, size.mixture
    flops = size.branch_tokens * dense.flops + size.finetune_tokens * mixture.flops
    branch = dense, size.branch_tokens / EXPERTS, workers / EXPERTS
    return {
        "BTX": [branch, (mixture, size.finetune_tokens, workers)],
        "upcycling": [(mixture, flops / mixture.flops, workers)],
        "dense": [(dense, flops / dense.flops, workers)],
    }


def hours(stages, gigabits, size):
    return sum(stage_seconds(*stage, gigabits, size) for stage in stages) / 3600


def terabytes(stages, size):
    """Sent by each worker in all of its stages."""
    return sum(tokens / size.batch * bytes_a_step(model, w, size) for model, tokens, w in stages) / 1e12


def crossing(size, workers, rival):
    """The Gbit/s below which BTX is done before `rival`; infinite where it always is, 0 where it never is."""
    stages = plan(size, workers)

    def ahead(gigabits):
        return hours(stages["BTX"], gigabits, size) < hours(stages[rival], gigabits, size)

    low, high = 1e-6, 1e6
    if ahead(high) or not ahead(low):
        return math.inf if ahead(high) else 0.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if ahead(middle) else (low, middle)
    return low


# ---- tables ----


def sizes():
    """{name: Size}: config/cpu, and the shapes of TinyLlama, Llama 2 7B and Llama 2 70B."""
    own = models(1024, 64, 384, 4, 4, 4, 256, tie=True)
    return {
        "config/cpu": Size(*own, 3 * 800 * 2048, 420 * 2048, 2048, 2048, CORE),
        "1 B": published(32000, 2048, 5632, 22, 32, 4, 4096),
        "7 B": published(32000, 4096, 11008, 32, 32, 32, 4096),
        "70 B": published(32000, 8192, 28672, 80, 64, 8, 4096),
    }


def groups(found):
    """Pairs (size's name, workers) of the tables: config/cpu has a batch of 8 sequences, so no more workers."""
    return [(name, workers) for name in found for workers in ((8,) if name == "config/cpu" else (8, 64))]


def number(value):
    """Three digits: '0.00123', '12.3', '1,230'; words for what cannot be."""
    if value in (0.0, math.inf):
        return "never" if value == 0 else "always"
    digits = max(0, 2 - math.floor(math.log10(value)))
    return f"{round(value, 2 - math.floor(math.log10(value))):,.{digits}f}"


def model_table(found):
    header = [
        "",
        "million parameters, dense / mixture",
        "MFLOPs a token",
        "training state, GB",
        "workers that hold a copy",
    ]
    body = []
    for name, size in found.items():
        both = size.dense, size.mixture
        cells = [[number(model.parameters / 1e6) for model in both], [number(model.flops / 1e6) for model in both]]
        cells += [[number(STATE_BYTES * model.parameters / 1e9) for model in both]]
        cells += [[str(shard_size(model, size.site)) for model in both]]
        body.append([name, *(" / ".join(pair) for pair in cells)])
    return markdown_table(header, body)


def hours_table(found):
    header = ["", "workers", "", *(f"{gigabits:,} Gbit/s" for gigabits in BANDWIDTHS), "TB sent by a worker"]
    body = []
    for name, workers in groups(found):
        for method, stages in plan(found[name], workers).items():
            cells = [number(hours(stages, gigabits, found[name])) for gigabits in BANDWIDTHS]
            body.append([name, str(workers), method, *cells, number(terabytes(stages, found[name]))])
    return markdown_table(header, body)


def price_table(found):
    header = ["", "workers", "", *(f"{gigabits:,} Gbit/s" for gigabits in BANDWIDTHS)]
    body = []
    for name, workers in groups(found):
        price = found[name].site.price * workers / 1000
        for method, stages in plan(found[name], workers).items() if price else ():
            cells = [number(hours(stages, gigabits, found[name]) * price) for gigabits in BANDWIDTHS]
            body.append([name, str(workers), method, *cells])
    return markdown_table(header, body)


def crossing_table(found):
    header = ["", "workers", "before dense training, below", "before upcycling, below"]
    body = []
    for name, workers in groups(found):
        cells = [number(crossing(found[name], workers, rival)) for rival in ("dense", "upcycling")]
        body.append([name, str(workers), *(cell if cell.isalpha() else f"{cell} Gbit/s" for cell in cells)])
    return markdown_table(header, body)


def expert_bytes(mixture, tokens):
    """Bytes that each of EXPERTS cards sends in a micro-batch of `tokens`, where together they hold one copy of the
    mixture: (all of it in pieces, an expert on each card and the rest in pieces). Rows travel in bfloat16."""
    pieces = step_bytes(mixture.parameters, EXPERTS, EXPERTS)
    placed = step_bytes(mixture.parameters - mixture.experts, EXPERTS, EXPERTS)
    placed += exchange_bytes(EXPERTS * tokens * mixture.rows, mixture.width, EXPERTS, number_bytes=2)
    return pieces / EXPERTS, placed / EXPERTS


def level_tokens(mixture):
    """The tokens in a card's micro-batch at which both ways of expert_bytes send the same."""
    (pieces, none), (_, one) = (expert_bytes(mixture, tokens) for tokens in (0, 1))
    return (pieces - none) / (one - none)


def expert_table(found):
    header = ["", "in pieces, GB", "an expert on each GPU, GB", "level at a micro-batch of"]
    body = []
    for name, size in found.items():
        if size.site is MACHINE:
            sent = expert_bytes(size.mixture, size.micro_batch / 8)  # eight cards
            body.append([name, *(number(one / 1e9) for one in sent), f"{level_tokens(size.mixture):,.0f} tokens"])
    return markdown_table(header, body)


def tables(found):
    """{heading: table}, as docs/scaling.md shows them."""
    return {
        "Models": model_table(found),
        "Hours": hours_table(found),
        "Thousand dollars": price_table(found),
        "Where BTX is done first": crossing_table(found),
        "Experts in pieces or placed": expert_table(found),
    }


def curves(found, name, workers, points=120):
    """{method: [(Gbit/s, hours)]} for the picture."""
    size = found[name]
    speeds = [0.1 * (3200 / 0.1) ** (i / (points - 1)) for i in range(points)]
    return {method: [(x, hours(stages, x, size)) for x in speeds] for method, stages in plan(size, workers).items()}


@dataclasses.dataclass
class ScalingConfig:
    """Print what BTX, sparse upcycling and dense training cost at several sizes and network speeds."""

    picture: str = key("", "where to draw hours over network speed; empty draws nothing")


def main():
    config, found = parse(ScalingConfig), sizes()
    for heading, table in tables(found).items():
        print(f"### {heading}\n\n{table}\n")
    if config.picture:
        panels = {"config/cpu on 8 CPU cores": ("config/cpu", 8), "7 B on 64 machines with 8 H100": ("7 B", 64)}
        plot_scaling({title: curves(found, *which) for title, which in panels.items()}, config.picture)


if __name__ == "__main__":
    command(main)
