"""Mix expert checkpoints into one: the MiX step of Branch-Train-MiX (Sukhbaatar et al. 2024, section 3.2).

    python mix.py --experts=out/cpu/expert-code,out/cpu/expert-math,out/cpu/seed --out_dir=out/cpu/mixed

Every tensor of the result is one of three things (`mix` below):

    stacked    the feed-forward weights of dense model e, which become expert e of the layer's MoE, untouched
    averaged   attention, norms, embeddings and output head: the mean over all experts
    new        one router per layer, (E, D): the only parameters that nobody has trained

The paper's variants, and some special cases:

    --experts=SEED,SEED,SEED,SEED   copies of one model: sparse upcycling (Komatsuzaki et al. 2022)
    --drop=0.5      on top of that, redraws half of each copy's hidden units: Drop-Upcycling (Nakamura et al. 2025)
    --method=soup   averages everything: a dense model
    --keep=embeddings   takes the embeddings of the last expert, the seed, and averages the rest (docs/mixing.md)
    --split=C       cuts each feed-forward network into C chunks of F / C hidden units: N C small experts
    --blend=True    cuts each into N chunks and makes expert n from chunk n of all of them: N experts of full size

A feed-forward network is a sum over its hidden units, so its chunks, each with gate 1, add up to it. With --split=C,
give --num_experts_per_tok=k C to keep the active size. The gates still sum to 1, now over C times as many terms, so the
output is C times too small; the paper describes no correction, --rescale=True is one.

You can add and remove experts later: a mixture keeps the regression behind its ridge routers (docs/open_ends.md).

    python mix.py --mixture=out/cpu/btx --add=out/cpu/expert-poems --out_dir=out/cpu/btx-poems
    python mix.py --mixture=out/cpu/btx-poems --remove=expert-poems --out_dir=out/cpu/btx-again

The experts' configs may differ a little: --dry_run shows where and writes nothing, --config_from=FOLDER names the
expert whose values count (docs/published.md).

Tensors are streamed from the experts' files to the new one, so memory holds one tensor of each expert at a time. Only
--router_init=contrast and ridge hold a model in memory (new_routers below).
"""

import dataclasses
import functools
import math
import os
import zlib
from typing import NamedTuple

import torch

from common.config import key, parse, split_list
from common.corpus import Corpus
from common.errors import UserError, command
from common.hf import (
    FEED_FORWARD,
    GROUPS,
    MIXTURE_KEYS,
    Padded,
    Parent,
    WeightFiles,
    copy_tokenizer,
    differing,
    expected_tensors,
    group_of,
    hidden_dim,
    left_behind,
    likeness,
    local_folder,
    model_name,
    model_type,
    same_tokenizer,
    write_config,
    write_weights,
)
from common.run import Run, ancestors, mixtures_of, parent_of, read_sums, write_sums
from common.tokenizer import has_tokenizer, tokenizer_hash
from model import WIDTH, ModelConfig, Transformer, on_meta

FROM_TEXT = ("contrast", "ridge")  # router starts that read training text
STARTS = ("normal", "zero", *FROM_TEXT)
MARGIN = 4.0  # contrast: how far an expert's logit for its own text exceeds its logit for average text
WINDOWS, LENGTH = 16, 256  # of training text per domain; a mean over 4,096 tokens is stable enough
RIDGE_WINDOWS = 64  # a regression needs more
RIDGE = 1e-2  # lambda, as a share of the states' mean square
RIDGE_SCALE = 3.0  # logit margin of a clearly recognised domain; larger values commit harder and learn less
# keys of config.json that no tensor's shape depends on: --config_from chooses where experts differ
CHOICES = ("bos_token_id", "eos_token_id", "max_position_embeddings", "rope_theta", "rope_scaling", "rms_norm_eps")
SETTLED = ("method", "router_init", "keep", "num_experts_per_tok")  # a mixture has its own, so --mixture takes none
STRANGER = 0.5  # a cosine of embeddings below this means unrelated models; no branch has come near it


@dataclasses.dataclass
class MixConfig:
    """Mix N dense checkpoints of one shape into a mixture of N experts, or average them."""

    experts: str = key("", "checkpoint folders or hf:OWNER/NAME, separated by commas, in the order of the experts")
    out_dir: str = key("out/mixed", "where the mixed checkpoint goes")
    method: str = key(
        "btx", "btx stacks feed-forward networks and averages the rest; soup averages everything", ("btx", "soup")
    )
    num_experts_per_tok: int = key(2, "experts that each token is sent to", within="[1, inf)")
    split: int = key(1, "cut each feed-forward network into this many chunks, each an expert", within="[1, inf)")
    rescale: bool = key(False, "with --split: multiply each chunk's output by the number of chunks")
    blend: bool = key(False, "make expert n from chunk n of every feed-forward network")
    keep: str = key("none", "parts to take from the last expert, the seed, instead of averaging, such as embeddings")
    drop: float = key(0.0, "fraction of each expert's hidden units to redraw at random", within="[0, 1]")
    router_init: str = key(
        "normal", "how routers start; contrast and ridge read the experts' training text (see new_routers)", STARTS
    )
    router_std: float = key(0.02, "standard deviation of the new routers' weights", within="[0, inf)")
    data_dir: str = key("out/cpu/data", "where --router_init=contrast and ridge find the training text")
    published_on: str = key("", "for these two: the domains published experts were trained on; empty: the others' own")
    seed: int = key(1, "random seed of routers and redrawn units", within="[0, inf)")
    mixture: str = key("", "instead of --experts: a mixture made with --router_init=ridge, for --add and --remove")
    add: str = key("", "experts to add to it: their feed-forward networks; all else stays as it is in the mixture")
    remove: str = key("", "names of experts to remove from it")
    config_from: str = key("", "the expert to follow where stop tokens, context length or added tokens differ")
    dry_run: bool = key(False, "show what would be mixed, and write nothing")
    overwrite: bool = key(False, "mix again, discarding the checkpoint in --out_dir")


# ---- the method ----


def mix(experts, shapes, routers, config):
    """Yield (name, tensor) for each of `shapes`, in order: the mixed model. experts: a list of {name: tensor} of dense
    models. shapes: those of the result, dense for a soup. routers: {name: (E, D)}."""
    for name in shapes:
        if name.endswith("block_sparse_moe.gate.weight"):
            yield name, routers[name]  # new
        elif ".experts." in name:
            yield name, feed_forward(name, experts, config)  # stacked
        elif group_of(name) in split_list(config.keep):
            yield name, experts[-1][name]  # kept as the seed has it
        else:
            yield name, mean([expert[name] for expert in experts])  # averaged


@torch.no_grad()
def mean(tensors):
    """The mean of equally shaped tensors, in their own dtype. Computed in float64, so precisely that the mean of N
    copies is the copy; and in pieces that fit a CPU's cache, so large tensors need little time and memory."""
    result = torch.empty(tensors[0].shape, dtype=functools.reduce(torch.promote_types, (t.dtype for t in tensors)))
    for piece, *parts in zip(*(tensor.flatten().split(2**15) for tensor in (result, *tensors)), strict=True):
        total = torch.zeros(piece.shape, dtype=torch.float64)
        for part in parts:
            total += part.to(torch.float64, copy=True).div_(len(tensors))  # a copy: parts may be float64 already
        piece.copy_(total)
    return result


def feed_forward(name, experts, config):
    """The matrix `name` ("model.layers.0.block_sparse_moe.experts.3.w1.weight") of the mixture: dense model 3's, or
    what --blend, --split, --rescale and --drop make of it."""
    prefix, number, matrix, _ = name.rsplit(".", 3)
    layer, number = prefix.removesuffix(".block_sparse_moe.experts"), int(number)
    source = next(f"{layer}.mlp.{dense}.weight" for dense, ours in FEED_FORWARD.items() if ours == matrix)
    dim, n = hidden_dim(name), len(experts)
    if config.blend:
        # chunk `number` of every expert, joined along the hidden units
        return torch.cat([expert[source].chunk(n, dim)[number] for expert in experts], dim)
    expert, chunk = divmod(number, config.split)
    tensor = experts[expert][source].chunk(config.split, dim)[chunk]
    if config.rescale and dim == 1:
        tensor = tensor * config.split
    return redraw(name, tensor, config.drop, config.seed) if config.drop else tensor


def generator(seed, name):
    """A source of random numbers that depend only on a seed and a tensor's name, not on earlier draws."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def redraw(name, tensor, share, seed):
    """Redraw max(1, round(share * units)) of an expert's hidden units (Drop-Upcycling, section 3): each matrix's new
    weights come from one normal, with the mean and std of all the weights that it drops.

    A unit is a row of w1 and w3 and the same column of w2. name: "...experts.3.w1.weight".
    """
    dim, expert = hidden_dim(name), name.rsplit(".", 2)[0]
    units = tensor.size(dim)
    order = torch.randperm(units, generator=generator(seed, expert))  # the same for the expert's three matrices
    dropped = order[: max(1, round(share * units))]
    old = tensor.index_select(dim, dropped).float()
    new = torch.normal(old.mean().item(), old.std().item(), old.shape, generator=generator(seed, name))
    return tensor.index_copy(dim, dropped, new.to(tensor.dtype))


# ---- how new routers start ----


def new_routers(config, shapes, parents, experts, dense):
    """Make the routers, which no expert has: ({name: (E, D)}, the Regression behind them or None).

        normal    drawn from a normal distribution, as in the BTX paper
        zero      all logits are equal: every gate starts at 1 / k, and ties decide until training breaks them
        contrast  row i is what sets expert i's mean hidden state apart from the mean over all experts
        ridge     the linear map that best predicts a token's expert from its hidden state (ridge regression)

    contrast and ridge send most of a domain's tokens to its own expert from the first step. They need some training
    text, and the averaged model in memory, which is small compared with the mixture. The chunks of a split expert
    share its row. When experts join or leave a mixture, its trained rows move by as much as the regression's do: a
    mixture that was never finetuned becomes what mixing everything from scratch would make.
    shapes: those of the result. parents: a list of Parent. dense: the experts' ModelConfig.
    """
    shapes = {name: shape for name, shape in shapes.items() if name.endswith("block_sparse_moe.gate.weight")}
    if config.router_init == "zero" or not shapes:
        return {name: torch.zeros(shape) for name, shape in shapes.items()}, None
    if config.router_init == "normal" and not config.mixture:
        random = torch.Generator().manual_seed(config.seed)
        std = config.router_std
        return {name: torch.normal(0.0, std, shape, generator=random) for name, shape in shapes.items()}, None
    averaged = Transformer(dense)
    parameters = dict(averaged.named_parameters())
    for name, tensor in mix(experts, expected_tensors(dense), {}, config):
        parameters[name].data.copy_(tensor)
    mixtures, corpus = training_of(config), Corpus(config.data_dir)
    if config.router_init == "contrast":
        rows, found = contrast_routers(averaged, experts, mixtures, corpus), None  # L of (N, D)
    else:
        kept = Regression(**read_sums(config.mixture)) if config.mixture else Regression([], [], {})
        names = [parent.name for parent in parents]
        stay = [parent.number for parent in parents if parent.number is not None]
        known = {reading: one for reading, one in kept.sums.items() if reading[1] in names[: len(stay)]}
        found = Regression(names, mixtures, sums_of(averaged, experts, names, mixtures, corpus, known))
        rows = ridge_routers(found)
        if stay:
            for row, before, name in zip(rows, ridge_routers(kept), shapes, strict=True):
                row[: len(stay)] += (parents[0].mixture[name] - before)[stay]
    chunks = [shape[0] // len(experts) for shape in shapes.values()]
    return {name: row.repeat_interleave(n, dim=0) for name, row, n in zip(shapes, rows, chunks, strict=True)}, found


@torch.no_grad()
def hidden_states(model, corpus, domain, count):
    """L tensors (S, D): the input of each layer's feed-forward sublayer on `count` windows of a domain's train text."""
    length = min(LENGTH, model.max_length)
    windows, _ = corpus.windows(domain, "train", length, count)
    states = []
    norms = [layer.post_attention_layernorm for layer in model.model.layers]
    hooks = [norm.register_forward_hook(lambda _, x, h: states.append(h.flatten(0, 1))) for norm in norms]
    model(windows, windows)  # with targets it keeps no logits
    for hook in hooks:
        hook.remove()
    return states


def contrast_routers(averaged, experts, mixtures, corpus):
    """L tensors (N, D). Let m_i be the averaged model's mean state on expert i's text, c_i = m_i - mean over i of m_i.
    Row i is c_i MARGIN / (mean over i of |c_i|^2): its logit on its own text is MARGIN above that on average text."""
    states = {}  # (L, D) of each domain
    for domain in dict.fromkeys(domain for mixture in mixtures for domain in mixture):
        layers = hidden_states(averaged, corpus, domain, WINDOWS)
        states[domain] = torch.stack([x.mean(dim=0) for x in layers])
    own = torch.stack([sum(share * states[d] for d, share in mixture.items()) for mixture in mixtures])  # (N, L, D)
    contrast = own - own.mean(dim=0)  # (N, L, D)
    rows = contrast * MARGIN / contrast.pow(2).sum(dim=-1, keepdim=True).mean(dim=0)
    return list(rows.unbind(dim=1))


class Regression(NamedTuple):
    """The statistics from which ridge routers are solved.

    names: the experts'. mixtures: for each expert, the {domain: share} it was trained on. sums: over the hidden states
    X of each domain, as read by the named expert: {("code", "expert-code"): (X'X (L, D, D), the rows' sum (L, D))}.
    """

    names: list
    mixtures: list
    sums: dict


def sums_of(averaged, experts, names, mixtures, corpus, known):
    """Compute Regression.sums; those that are `known` are not computed again.

    The closed form is DUME's (arXiv 2603.29765). DUME uses the states of the averaged model; here each domain is read
    with its own expert's feed-forwards in the averaged model, as a mixture that routes correctly would read it.
    averaged: a Transformer, whose feed-forwards are overwritten. experts: a list of {name: tensor}.
    """
    parameters = dict(averaged.named_parameters())
    sums = {}
    for domain in dict.fromkeys(domain for mixture in mixtures for domain in mixture):
        own = max(range(len(experts)), key=lambda i: mixtures[i].get(domain, 0.0))
        reading = domain, names[own]
        if reading in known:
            sums[reading] = known[reading]
            continue
        for name, parameter in parameters.items():
            if ".mlp." in name:
                parameter.data.copy_(experts[own][name])
        states = hidden_states(averaged, corpus, domain, RIDGE_WINDOWS)  # L of (S, D)
        sums[reading] = torch.stack([x.T @ x for x in states]), torch.stack([x.sum(dim=0) for x in states])
    return sums


def ridge_routers(found):
    """L tensors (N, D): W = (X'X + lambda I)^-1 X'Y, scaled; rows of X are states, rows of Y say whose they are.

    Y's entry for expert i is the domain's share of its training over the largest such share, centred over experts.
    Where a domain's own expert has 1, a seed trained on all N domains has 1 / N; once that expert is gone, it has 1.
    """
    squares = 0.0
    products = 0.0
    for (domain, _), (xx, total) in found.sums.items():
        shares = torch.tensor([mixture.get(domain, 0.0) for mixture in found.mixtures])  # (N,)
        shares = shares / shares.max()
        squares = squares + xx  # (L, D, D)
        products = products + total.unsqueeze(-1) * (shares - shares.mean())  # (L, D, N)
    penalty = RIDGE * squares.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None] * torch.eye(squares.size(1))
    return list(RIDGE_SCALE * torch.linalg.solve(squares + penalty, products).mT)


def training_of(config):
    """For each expert of the result, the {domain: share} it was trained on."""
    published = Corpus(config.data_dir).mixture(config.published_on) if config.published_on else None
    kept = Regression(**read_sums(config.mixture))[:2] if config.mixture else ([], [])
    stay = [mixture for name, mixture in zip(*kept, strict=True) if name not in split_list(config.remove)]
    return stay + mixtures_of(split_list(config.experts or config.add), published)


# ---- the script ----


def check_options(config):
    """Raise UserError for options that make no sense together."""
    if bool(config.mixture) != bool(config.add or config.remove):
        raise UserError("--add and --remove change a mixture; give --mixture=DIR and one of them")
    if bool(config.mixture) == bool(config.experts):
        raise UserError("nothing to mix; give either --experts=DIR,DIR,... or --mixture=DIR")
    kept = set() if config.keep == "none" else set(split_list(config.keep))
    if unknown := kept - set(GROUPS):
        raise UserError(f"--keep={config.keep}: {min(unknown)!r} is not a part of a model; use {', '.join(GROUPS)}")
    variants = {"--split": config.split > 1, "--blend": config.blend, "--drop": config.drop > 0}
    variants[f"--router_init={config.router_init}"] = config.router_init in FROM_TEXT
    chosen = [name for name, present in variants.items() if present]
    others = [name for name in SETTLED if getattr(config, name) != getattr(MixConfig, name)]
    if config.mixture and (anew := [*chosen, *(f"--{name}={getattr(config, name)}" for name in others)]):
        raise UserError(f"{anew[0]} does not go with --mixture; leave it out")
    if config.method == "soup" and chosen:
        raise UserError(f"{' and '.join(chosen)}: a soup has no experts; use --method=btx")
    if config.blend and len(chosen) > 1:
        rest = " and ".join(name for name in chosen if name != "--blend")
        raise UserError(f"--blend makes each expert from chunks of all: it does not go with {rest}; give one of them")


def read_parents(config, folders):
    """A list of Parent: the checkpoints to mix; or a mixture's experts, without those removed and with those added."""
    shapes = [ModelConfig.from_pretrained(folder) for folder in folders]
    files = [WeightFiles(folder, shape) for folder, shape in zip(folders, shapes, strict=True)]
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    if not config.mixture:
        if len(set(names)) < len(names):
            names = [f"{name}.{copy}" for copy, name in enumerate(names)]
        return list(map(Parent, names, folders, shapes, files))
    has, gone = read_sums(config.mixture)["names"], split_list(config.remove)
    if unknown := [name for name in gone if name not in has]:
        raise UserError(f"--remove={unknown[0]}: {config.mixture} has {', '.join(has)}; name one of them")
    routing = {name: getattr(shapes[0], name) for name in MIXTURE_KEYS} | {"num_local_experts": 0}
    dense = dataclasses.replace(shapes[0], num_local_experts=0)
    parents = [Parent(n, folders[0], dense, files[0], files[0], i) for i, n in enumerate(has) if n not in gone]
    for name, folder, shape, own in list(zip(names, folders, shapes, files, strict=True))[1:]:
        if name in has and name not in gone:
            raise UserError(f"--add={folder}: {config.mixture} already has an expert {name}; rename the folder")
        parents.append(Parent(name, folder, dataclasses.replace(shape, **routing), own, files[0]))
    return parents


def common_shape(config, parents):
    """(one ModelConfig for all experts, [notes on what was chosen where theirs differ]). UserError where they cannot
    be reconciled."""
    folders, configs = [parent.folder for parent in parents], [parent.shape for parent in parents]
    chosen, notes = 0, []
    if config.config_from:
        source = local_folder(config.config_from)
        if source not in folders:
            raise UserError(f"--config_from={config.config_from} is not one of the experts; name one of them")
        chosen = folders.index(source)
    widths = [one.intermediate_size for one in configs]
    for name, values in differing(configs).items():
        if name == "intermediate_size" and config.method == "btx":
            notes.append(f"feed-forwards of width {', '.join(map(str, widths))}: the narrower ones are zero-padded")
            continue
        other = next(i for i, value in enumerate(values) if value != values[0])
        differ = f"{folders[other]} has {name} {values[other]}, but {folders[0]} has {values[0]}"
        if name not in CHOICES:
            raise UserError(f"{differ}; experts must be branches of one seed")
        if not config.config_from:
            raise UserError(f"{differ}; give --config_from=FOLDER, the expert whose values to use")
        notes.append(f"{name} is {values[chosen]}, as in {model_name(folders[chosen])}: {differ}")
    width = max(widths)
    if config.method == "btx":
        width = math.ceil(width / WIDTH) * WIDTH
    return dataclasses.replace(configs[chosen], intermediate_size=width), notes


def mixed_config(config, dense, names):
    """The shape of the result, given the experts' shape `dense`."""
    if config.method == "soup":
        return dense
    split, size = len(names) if config.blend else config.split, dense.intermediate_size
    if size % split:
        raise UserError(f"{split} chunks do not divide the experts' intermediate_size {size}")
    k = dense.num_experts_per_tok if config.mixture else config.num_experts_per_tok
    if config.blend:
        names = [f"blend.{i}" for i in range(split)]
    elif split > 1:
        names, size = [f"{name}.{chunk}" for name in names for chunk in range(split)], size // split
    if k > len(names):
        raise UserError(f"--num_experts_per_tok={k}, but there are only {len(names)} experts")
    counts = {"num_local_experts": len(names), "num_experts_per_tok": k}
    try:
        return dataclasses.replace(dense, intermediate_size=size, expert_names=tuple(names), **counts)
    except ValueError as error:
        raise UserError(f"--split={config.split}: {error}") from None


def print_counts(shapes, config):
    """Print how many tensors were averaged (or kept, with --mixture), stacked and newly made."""
    kinds = {"kept" if config.mixture else "averaged": [], "stacked": [], "new": []}
    for name in shapes:
        kinds["new" if ".gate." in name else "stacked" if ".experts." in name else next(iter(kinds))].append(name)
    for kind, names in kinds.items():
        if names:
            size = sum(torch.Size(shapes[name]).numel() for name in names)
            print(f"{kind:9s} {len(names):4d} tensors, {size:13,d} parameters, such as {names[-1]}")


def make_recipe(config, folders):
    """Everything that decides the result, except source code."""
    left_out = ("overwrite", "dry_run", *(() if config.mixture else ("mixture", "add", "remove")))
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in left_out}
    recipe = {"config": settings, "parents": {folder: parent_of(folder)[0] for folder in folders}}
    for folder in folders[bool(config.mixture) :]:
        if ModelConfig.from_pretrained(folder).num_local_experts:
            raise UserError(f"{folder} is already a mixture; mix.py takes dense checkpoints")
    if config.router_init in FROM_TEXT or config.mixture:
        domains = {domain for mixture in training_of(config) for domain in mixture}
        recipe["data"] = Corpus(config.data_dir).hashes(sorted(domains))
        same_tokenizer([*folders, config.data_dir])
    return recipe


class Plan(NamedTuple):
    """What to make: the ModelConfig of an expert and of the result, the Parents, their tensors, the dtype to store,
    the cosines of `likeness`, and notes for the model card."""

    dense: ModelConfig
    result: ModelConfig
    parents: list
    experts: list
    dtype: torch.dtype
    cosines: list
    notes: list


def make_plan(config, folders):
    """Examine all experts; UserError if they cannot be mixed."""
    parents = read_parents(config, folders)
    if config.dry_run:
        for name, values in differing([parent.shape for parent in parents]).items():
            print(f"{name} differs: {', '.join(map(str, values))}")
    dense, notes = common_shape(config, parents)
    same_tokenizer(folders, added=not config.config_from)
    result = mixed_config(config, dense, [parent.name for parent in parents])
    dtype = functools.reduce(torch.promote_types, (parent.files.dtype for parent in parents))
    cosines = likeness(parents)
    for parent, cosine in zip(parents, cosines, strict=True):
        if cosine < STRANGER:
            name, first = model_name(parent.folder), model_name(parents[0].folder)
            notes.append(f"{name} is unrelated to {first} (cosine of embeddings {cosine:.2f}): their mean is noise")
        if left := left_behind(parent):
            others = f"{len(left)} other tensors, such as {left[0]}"
            notes.append(f"{parent.name} brings its feed-forwards; {others}, differ and stay behind")
    experts = [Padded(parent, dense.intermediate_size) for parent in parents]
    return Plan(dense, result, parents, experts, dtype, cosines, notes)


def print_plan(folders, plan):
    """Print what mixing would do."""
    for parent, cosine in zip(plan.parents, plan.cosines, strict=True):
        tokenizer = f"tokenizer {tokenizer_hash(parent.folder)[:8]}" if has_tokenizer(parent.folder) else "no tokenizer"
        dtype = str(parent.files.dtype).removeprefix("torch.")
        print(f"{parent.folder}: {dtype}, {tokenizer}, cosine of embeddings with the first {cosine:.3f}")
    common = set.intersection(*map(ancestors, folders))
    print(f"common ancestors in run.json: {', '.join(sorted(common)) or 'none'}")
    with on_meta():
        active, total = Transformer(plan.result).num_parameters()
    size = total * plan.dtype.itemsize / 1e9
    dtype = str(plan.dtype).removeprefix("torch.")
    parameters = f"{active:,} of {total:,} parameters a token"
    print(f"the result: {model_type(plan.result)}, {parameters}, {size:.3f} GB in {dtype}")


def main():
    config = parse(MixConfig)
    check_options(config)
    lists = {name: [*map(local_folder, split_list(getattr(config, name)))] for name in ("experts", "mixture", "add")}
    folders = [folder for some in lists.values() for folder in some]
    # a trailing slash does not make it a different mixture
    config = dataclasses.replace(config, **{name: ",".join(some) for name, some in lists.items()})
    recipe = make_recipe(config, folders)
    if config.dry_run:
        plan = make_plan(config, folders)
        print_plan(folders, plan)
        print_counts(expected_tensors(plan.result), config)
        print("\n".join([*plan.notes, "nothing was written"]))
        return
    with Run(config.out_dir, recipe, config.overwrite) as run:
        if run.finished:
            print(f"{config.out_dir} is finished; nothing to do")
            return
        plan = make_plan(config, folders)
        shapes = expected_tensors(plan.result)
        routers, regression = new_routers(config, shapes, plan.parents, plan.experts, plan.dense)
        for note in plan.notes:
            print(note)

        run.begin()
        tensors = mix(plan.experts, shapes, routers, config)
        weights = write_weights(config.out_dir, plan.result, tensors, plan.dtype)
        write_config(config.out_dir, plan.result, plan.dtype)
        first = next(filter(has_tokenizer, folders), folders[0])
        copy_tokenizer(local_folder(config.config_from) or first, config.out_dir)
        if regression:
            write_sums(config.out_dir, regression._asdict())
        run.finish(weights, plan.notes)
    print_counts(shapes, config)
    print(f"{config.out_dir}: {len(plan.parents)} experts mixed ({config.method})")


if __name__ == "__main__":
    command(main)
