"""The variants of mix.py: each against numpy, and against the exact property that it is chosen for."""

import os
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SHORT, error_line, must, read_json, read_log, run, tokens_of, val_tokens, weights
from transformers import AutoModelForCausalLM

from model import ModelConfig, Transformer

MATRICES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@pytest.fixture
def mix(tmp_path):
    """Function(folders, flags) -> the folder that mix.py makes of them."""

    def make(folders, *flags, name="mixed"):
        folders = [folders] if isinstance(folders, str) else folders
        must(run("mix.py", f"--experts={','.join(folders)}", f"--out_dir={tmp_path}/{name}", *flags))
        return f"{tmp_path}/{name}"

    return make


@pytest.fixture
def ids(data):
    return torch.from_numpy(val_tokens(data, "math")[:200]).view(2, 100)


def expert(tensors, layer, number, matrix):
    return tensors[f"model.layers.{layer}.block_sparse_moe.experts.{number}.{matrix}.weight"]


def dense(tensors, layer, matrix):
    return tensors[f"model.layers.{layer}.mlp.{MATRICES[matrix]}.weight"]


def rest(tensors):
    """Everything but experts, feed-forwards and routers."""
    return {name: one for name, one in tensors.items() if ".mlp." not in name and "block_sparse_moe" not in name}


def same_rest(ours, theirs):
    ours, theirs = rest(ours), rest(theirs)
    assert ours.keys() == theirs.keys()
    for name, one in ours.items():
        assert one.tobytes() == theirs[name].tobytes(), name


def feed_forward(x, w1, w2, w3):
    return (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T


# ---- upcycling ----


def test_upcycled_copies_are_the_model_to_the_bit(seed, mix, ids):
    before, after = weights(seed), weights(mix([seed] * 3))
    same_rest(before, after)
    for layer in range(2):
        for number in range(3):
            for matrix in MATRICES:
                assert expert(after, layer, number, matrix).tobytes() == dense(before, layer, matrix).tobytes()
    folder = mix([seed] * 3)
    config = ModelConfig.from_pretrained(folder)
    assert config.num_local_experts == 3 and config.expert_names == ("seed.0", "seed.1", "seed.2")
    assert read_json(os.path.join(folder, "run.json"))["history"].keys() == {seed}
    expected = Transformer.from_pretrained(seed)(ids).logits
    for changes in ({}, {"num_experts_per_tok": 1}, {"router": "soft"}, {"router": "sample"}):
        logits = Transformer.from_pretrained(folder, **changes)(ids).logits
        assert (logits - expected).abs().max() <= 1e-5  # sample's gate is 1 in evaluation


@pytest.mark.parametrize(("share", "dropped"), [(0.5, 24), (0.25, 12), (1.0, 48)])
def test_drop_upcycling_redraws_whole_units(seed, mix, share, dropped):
    before, after = weights(seed), weights(mix([seed] * 3, f"--drop={share}"))
    same_rest(before, after)
    chosen = []
    for layer in range(2):
        for number in range(3):
            units = []
            for matrix in MATRICES:
                # hidden units as rows: (F, D)
                old, new = dense(before, layer, matrix), expert(after, layer, number, matrix)
                old, new = (old.T, new.T) if matrix == "w2" else (old, new)
                changed = (old != new).all(axis=1)
                assert ((old != new).any(axis=1) == changed).all()  # a unit is drawn anew as a whole or not at all
                units.append(tuple(np.flatnonzero(changed)))
                mean, std, count = old[changed].mean(), old[changed].std(), new[changed].size
                assert abs(new[changed].mean() - mean) < 4 * std / count**0.5
                assert new[changed].std() == pytest.approx(std, rel=4 / (2 * count) ** 0.5)
            assert units[0] == units[1] == units[2] and len(units[0]) == dropped
            chosen.append(units[0])
    if share < 1:
        assert len(set(chosen)) == 6  # every expert of every layer forgets something else


# ---- split and blend ----


@pytest.mark.parametrize("chunks", [2, 3])
def test_the_chunks_of_a_domain_add_up_to_its_feed_forward(seed, experts, mix, chunks):
    folders = [*experts, seed]
    after = weights(mix(folders, f"--split={chunks}"))
    for layer in range(2):
        x = torch.randn(50, 32)
        for number, folder in enumerate(folders):
            before = weights(folder)
            parts = [[expert(after, layer, number * chunks + c, m) for c in range(chunks)] for m in MATRICES]
            for matrix, pieces in zip(MATRICES, parts, strict=True):
                joined = np.concatenate(pieces, axis=1 if matrix == "w2" else 0)
                assert joined.tobytes() == dense(before, layer, matrix).tobytes()
            total = sum(feed_forward(x, *map(torch.from_numpy, chunk)) for chunk in zip(*parts, strict=True))
            whole = feed_forward(x, *(torch.from_numpy(dense(before, layer, m)) for m in MATRICES))
            torch.testing.assert_close(total, whole, rtol=1e-4, atol=1e-6)
    config = ModelConfig.from_pretrained(mix(folders, f"--split={chunks}"))
    assert (config.num_local_experts, config.intermediate_size) == (3 * chunks, 48 // chunks)
    assert config.expert_names[:2] == ("expert-math.0", "expert-math.1")


def test_split_copies_are_the_model_once_rescaled(seed, mix, ids):
    """Gates that sum to 1 over all chunks make the sum as many times too small as there are chunks."""
    expected = Transformer.from_pretrained(seed)(ids).logits
    flags = "--split=3", "--router_init=zero", "--num_experts_per_tok=6"
    for rescale in (True, False):
        folder = mix([seed, seed], *flags, f"--rescale={rescale}", name=str(rescale))
        close = (Transformer.from_pretrained(folder)(ids).logits - expected).abs().max() <= 1e-5
        assert close == rescale
    plain, rescaled = weights(mix([seed, seed], *flags, name="False")), weights(f"{os.path.dirname(folder)}/True")
    for number in range(6):
        for matrix, factor in {"w1": 1, "w2": 3, "w3": 1}.items():
            old, new = (expert(tensors, 1, number, matrix) for tensors in (plain, rescaled))
            np.testing.assert_allclose(new, factor * old, rtol=1e-6)


def test_blend_gives_each_expert_a_chunk_of_everyone(seed, experts, mix, ids):
    folders = [*experts, seed]
    folder = mix(folders, "--blend=True")
    before, after = [weights(one) for one in folders], weights(folder)
    for layer in range(2):
        for matrix in MATRICES:
            for number in range(3):
                rows = slice(16 * number, 16 * number + 16)
                if matrix == "w2":
                    expected = np.concatenate([dense(one, layer, matrix)[:, rows] for one in before], axis=1)
                else:
                    expected = np.concatenate([dense(one, layer, matrix)[rows] for one in before])
                assert expert(after, layer, number, matrix).tobytes() == expected.tobytes()
    assert ModelConfig.from_pretrained(folder).intermediate_size == 48
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert (Transformer.from_pretrained(folder)(ids).logits - theirs(ids).logits).abs().max() <= 1e-5


# ---- what the seed gives ----


def test_kept_parts_are_the_seeds(seed, experts, mix):
    folders = [*experts, seed]
    plain, kept = weights(mix(folders, name="plain")), weights(mix(folders, "--keep=embeddings,norms"))
    for name, tensor in kept.items():
        ours = "norm" in name or "embed_tokens" in name
        assert tensor.tobytes() == (weights(seed) if ours else plain)[name].tobytes(), name
    assert plain["model.embed_tokens.weight"].tobytes() != kept["model.embed_tokens.weight"].tobytes()


# ---- router starts ----


def routers(folder):
    return [weights(folder)[f"model.layers.{layer}.block_sparse_moe.gate.weight"] for layer in range(2)]


def mean_states(folder, data, domain):
    """(L, D): transformers' view of the mean input to each feed-forward, on 16 windows of 128 training tokens."""
    meta = read_json(os.path.join(data, domain, "meta.json"))
    tokens = np.fromfile(os.path.join(data, domain, "train.bin"), dtype=meta["dtype"]).astype(np.int64)
    starts = np.linspace(0, len(tokens) - 129, 16).astype(int)
    seen = []
    model = AutoModelForCausalLM.from_pretrained(folder)
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double().mean(dim=(0, 1)).numpy()))
    with torch.no_grad():
        model(torch.from_numpy(np.stack([tokens[start : start + 128] for start in starts])))
    return np.stack(seen)


@pytest.mark.parametrize("chunks", [1, 2])
def test_contrast_start_points_at_each_experts_text(seed, experts, data, mix, chunks):
    """The seed's own text is everything, evenly."""
    folders = [*experts, seed]
    soup = mix(folders, "--method=soup", name="soup")
    means = {domain: mean_states(soup, data, domain) for domain in ("math", "rain")}
    own = [means["math"], means["rain"], (means["math"] + means["rain"]) / 2]
    found = routers(mix(folders, "--router_init=contrast", f"--data_dir={data}", f"--split={chunks}"))
    for layer in range(2):
        rows = np.stack([one[layer] for one in own]) - np.mean([one[layer] for one in own], axis=0)
        rows *= 4 / np.mean([row @ row for row in rows])
        np.testing.assert_allclose(found[layer], rows.repeat(chunks, axis=0), rtol=1e-2, atol=1e-2)
        logits = found[layer] @ np.stack([one[layer] for one in own]).T  # (rows, texts)
        assert (logits[:chunks].argmax(axis=1) == 0).all()  # the math expert's rows like its own text best


def test_a_published_seed_counts_as_trained_on_all_that_the_branches_were(seed, experts, data, mix, tmp_path):
    """Without run.json the seed's routers start as they do with one that says "math and rain, evenly"; with
    --published_on they start as if it had read that alone."""
    published = tmp_path / "published"
    shutil.copytree(seed, published)
    os.remove(published / "run.json")
    flags = "--router_init=ridge", f"--data_dir={data}"
    known = routers(mix([*experts, seed], *flags, name="known"))
    for ours, theirs in zip(routers(mix([*experts, str(published)], *flags, name="foreign")), known, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    told = mix([*experts, str(published)], *flags, "--published_on=rain", name="told")
    for rows in routers(told):
        np.testing.assert_allclose(rows[1], rows[2], rtol=1e-4, atol=1e-5)  # both read rain alone
        assert not np.allclose(rows[0], rows[1])
    assert "there is no domain 'hail'" in error_line(
        run("mix.py", f"--experts={experts[0]},{published}", *flags, "--published_on=hail", f"--out_dir={tmp_path}/no")
    )


@pytest.mark.parametrize("without_rain", [False, True])
def test_ridge_start_is_the_regression(seed, experts, data, mix, without_rain):
    """Again by numpy's least squares, which minimizes |X w - y|^2 + lambda |w|^2 when sqrt(lambda) I is added below X,
    on the states of transformers' models: the soup with the feed-forwards of a domain's own expert. Where rain has no
    expert, the seed, which has read it, stands in for one."""
    folders = [experts[0], seed] if without_rain else [*experts, seed]
    soup, found = (
        mix(folders, "--method=soup", name="soup"),
        routers(mix(folders, "--router_init=ridge", f"--data_dir={data}")),
    )
    states = {domain: [] for domain in ("math", "rain")}
    for domain, folder in zip(states, folders, strict=False):
        model = AutoModelForCausalLM.from_pretrained(soup)
        own = {name: torch.from_numpy(one) for name, one in weights(folder).items() if ".mlp." in name}
        model.load_state_dict(own, strict=False)
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda _, x, d=domain: states[d].append(x[0].double().flatten(0, 1)))
        tokens = tokens_of(data, domain, "train")
        starts = np.linspace(0, len(tokens) - 129, 64).astype(int)
        with torch.no_grad():
            model(torch.from_numpy(np.stack([tokens[start : start + 128] for start in starts])))
    targets = [[0.25, -0.25], [-0.5, 0.5]] if without_rain else [[0.5, -0.5, 0.0], [-0.5, 0.5, 0.0]]
    for layer in range(2):
        x = np.concatenate([states["math"][layer].numpy(), states["rain"][layer].numpy()])
        y = np.repeat(np.array(targets), len(x) // 2, axis=0)
        penalty = 0.01 * (x**2).sum(axis=0).mean()
        x, y = np.concatenate([x, penalty**0.5 * np.eye(32)]), np.concatenate([y, np.zeros((32, len(folders)))])
        expected = 3 * np.linalg.lstsq(x, y, rcond=None)[0].T
        np.testing.assert_allclose(found[layer], expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


def test_zero_start_gives_equal_gates(experts, mix, ids):
    folder = mix(experts, "--router_init=zero", "--num_experts_per_tok=2")
    assert all((router == 0).all() for router in routers(folder))
    assert (Transformer.from_pretrained(folder)(ids).gates == 0.5).all()


# ---- experts that come and go ----


@pytest.fixture(scope="module")
def held(seed, data, tmp_path_factory):
    """Branches of the seed that train their feed-forwards alone, so that nothing but these differs."""
    folders = {domain: str(tmp_path_factory.mktemp("held") / f"expert-{domain}") for domain in ("math", "rain")}
    for domain, folder in folders.items():
        flags = f"--data_dir={data}", f"--init_from={seed}", f"--domain={domain}", f"--out_dir={folder}"
        must(run("train.py", *SHORT, *flags, "--freeze=embeddings,attention,norms"))
    return folders


def change(mixture, folder, data, *flags):
    must(run("mix.py", f"--mixture={mixture}", f"--data_dir={data}", f"--out_dir={folder}", *flags))
    return folder


def same_tensors(ours, theirs, order=None):
    """The same bytes under the same names; order: expert i of ours is expert order[i] of theirs."""
    ours, theirs = weights(ours), weights(theirs)
    assert ours.keys() == theirs.keys()
    for name, one in ours.items():
        other = theirs[name]
        if order and ".experts." in name:
            start, number, end = re.split(r"(?<=experts\.)(\d+)(?=\.)", name)
            other = theirs[f"{start}{order[int(number)]}{end}"]
        elif order and name.endswith("gate.weight"):
            other = other[order] + 0.0  # no -0.0
            one = one + 0.0
        assert one.tobytes() == other.tobytes(), name


def test_an_expert_that_joins_and_leaves_again_gives_what_mixing_anew_gives(seed, held, data, mix, tmp_path):
    flags = "--router_init=ridge", f"--data_dir={data}"
    two, three = mix([held["math"], seed], *flags, name="two"), mix([*held.values(), seed], *flags, name="three")
    joined = change(two, tmp_path / "joined", data, f"--add={held['rain']}")
    same_tensors(joined, three, order=[0, 2, 1])
    config = ModelConfig.from_pretrained(joined)
    assert config.expert_names == ("expert-math", "seed", "expert-rain") and config.num_experts_per_tok == 2
    same_tensors(change(joined, tmp_path / "left", data, "--remove=expert-rain"), two)
    both = change(joined, tmp_path / "both", data, "--remove=seed", f"--add={seed}/")  # a new name is the old folder's
    same_tensors(both, joined, order=[0, 2, 1])


def test_trained_rows_move_by_as_much_as_the_regression_does(seed, held, data, mix, tmp_path):
    """In a finetuned mixture: what the new expert brings is its feed-forwards alone, and the rows of the others are the
    trained ones, plus what mixing three gives more than mixing two."""
    flags = "--router_init=ridge", f"--data_dir={data}"
    two, three = mix([held["math"], seed], *flags, name="two"), mix([held["math"], seed, held["rain"]], *flags)
    tuned = two
    for name in ("once", "twice"):  # as an instructed mixture is
        steps = f"--data_dir={data}", f"--init_from={tuned}", "--freeze=embeddings,attention,norms"
        tuned = f"{tmp_path}/{name}"
        must(run("finetune.py", *SHORT, *steps, f"--out_dir={tuned}"))
    joined = change(tuned, tmp_path / "joined", data, f"--add={held['rain']}")
    before, after = weights(tuned), weights(joined)
    same_rest(before, after)
    new = weights(held["rain"])
    for layer in range(2):
        for matrix in MATRICES:
            for number in range(2):
                assert (expert(after, layer, number, matrix) == expert(before, layer, number, matrix)).all()
            assert (expert(after, layer, 2, matrix) == dense(new, layer, matrix)).all()
    # the regressions of before and after read the shared weights of the mixture, which were not trained
    for ours, trained, old, anew in zip(*map(routers, (joined, tuned, two, three)), strict=True):
        np.testing.assert_allclose(ours[:2], trained + anew[:2] - old, rtol=1e-3, atol=1e-4)


def test_what_an_expert_leaves_behind_is_said(seed, experts, data, mix, tmp_path):
    """Branches that trained their attention, too: the mixture keeps its own."""
    two = mix([experts[0], seed], "--router_init=ridge", f"--data_dir={data}")
    done = run(
        "mix.py", f"--mixture={two}", f"--add={experts[1]}", f"--data_dir={data}", f"--out_dir={tmp_path}/joined"
    )
    assert "such as model.embed_tokens.weight, differ and stay behind" in must(done).out
    assert "kept " in done.out and "averaged" not in done.out
    same_rest(weights(two), weights(tmp_path / "joined"))


CHANGES = {
    "--mixture={two}": "--add and --remove change a mixture",
    "--add={rain}": "--add and --remove change a mixture",
    "--mixture={two} --add={rain} --experts={rain}": "--experts=DIR,DIR,... or --mixture=DIR",
    "--mixture={two} --add={rain} --split=2": "--split does not go with --mixture",
    "--mixture={two} --add={rain} --method=soup": "--method=soup does not go with --mixture",
    "--mixture={two} --add={rain} --router_init=zero": "--router_init=zero does not go with --mixture",
    "--mixture={two} --add={rain} --num_experts_per_tok=3": "--num_experts_per_tok=3 does not go with --mixture",
    "--mixture={two} --add={rain} --keep=embeddings": "--keep=embeddings does not go with --mixture",
    "--mixture={two} --add={math}": "already has an expert expert-math",
    "--mixture={two} --add={two}": "is already a mixture",
    "--mixture={two} --remove=rain": "--remove=rain: {two} has expert-math, seed",
    "--mixture={two} --remove=seed": "only 1 experts",
    "--mixture={plain} --add={rain}": "{plain} has no router_sums.pt, nor have those",
    "--mixture={split} --add={rain}": "{split} has expert-math.0, expert-math.1",
}


def test_changes_that_make_no_sense_are_error_lines(seed, held, data, mix, tmp_path):
    flags = "--router_init=ridge", f"--data_dir={data}"
    places = {**held, "two": mix([held["math"], seed], *flags, name="two"), "plain": mix([held["math"], seed])}
    places["split"] = mix([held["math"], seed], *flags, "--split=2", name="split")
    for options, expected in CHANGES.items():
        options = options.format(**places).split()
        done = run("mix.py", *options, f"--data_dir={data}", f"--out_dir={tmp_path}/no")
        assert expected.format(**places) in error_line(done), options
    assert not (tmp_path / "no").exists()


# ---- the command ----

BAD = {
    "--method=soup --split=2": "--split: a soup has no experts",
    "--method=soup --blend=True --drop=0.5": "--blend and --drop: a soup has no experts",
    "--method=soup --router_init=contrast": "use --method=btx",
    "--blend=True --split=2": "it does not go with --split",
    "--blend=True --router_init=contrast": "it does not go with --router_init=contrast",
    "--split=5": "5 chunks do not divide",
    "--split=4": "multiples of 8",
    "--split=0": "split must lie in [1, inf)",
    "--keep=tail": "'tail' is not a part of a model",
    "--drop=-0.1": "drop must lie in [0, 1]",
    "--drop=nan": "drop must be a finite number",
    "--router_std=inf": "router_std must be a finite number",
    "--router_init=domain": "router_init must be one of 'normal', 'zero', 'contrast', 'ridge'",
    "--method=upcycle": "one of 'btx', 'soup'",
    "--num_experts_per_tok=4": "only 3 experts",
}


@pytest.mark.parametrize("flags", BAD)
def test_options_that_make_no_sense_are_error_lines(flags, seed, experts, tmp_path):
    done = run("mix.py", f"--experts={','.join([*experts, seed])}", f"--out_dir={tmp_path}/mixed", *flags.split())
    assert BAD[flags] in error_line(done)
    assert not (tmp_path / "mixed").exists()


VARIANTS = {
    "upcycle": "",
    "drop-upcycle": "--drop=0.5",
    "split": "--split=2 --num_experts_per_tok=4",
    "split-contrast": "--split=2 --rescale=True --router_init=contrast",
    "blend": "--blend=True",
    "zero": "--router_init=zero",
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_steps_of_finetuning_each_variant(variant, seed, experts, data, mix, tmp_path):
    folders = [seed] * 3 if "upcycle" in variant else [*experts, seed]
    flags = [*VARIANTS[variant].split(), f"--data_dir={data}"]
    folder = mix(folders, *flags)
    k = ModelConfig.from_pretrained(folder).num_experts_per_tok
    steps = f"--data_dir={data}", f"--init_from={folder}", f"--num_experts_per_tok={k}", "--max_steps=2"
    must(run("finetune.py", *SHORT, *steps, f"--out_dir={tmp_path}/run"))
    before, after = weights(folder), weights(f"{tmp_path}/run")
    assert np.isfinite(read_log(f"{tmp_path}/run")[-1]["loss"])
    assert all(before[name].tobytes() != after[name].tobytes() for name in before if name.endswith("gate.weight"))
    again = run("mix.py", f"--experts={','.join(folders)}", f"--out_dir={folder}", *flags)
    assert "nothing to do" in must(again).out
