"""Where averaging hurts: against models that were written out and evaluated one by one."""

import numpy as np
import pytest
import torch
from helpers import error_line, must, read, read_json, run, weights

from common.corpus import Corpus
from model import Transformer
from train import bits_per_byte


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("damage"))


@pytest.fixture(scope="module")
def flags(data, seed, experts, folder):
    reading = f"--data_dir={data}", "--sequence_length=32", "--eval_windows=4", "--device=cpu"
    return f"--experts={','.join([*experts, seed])}", *reading, f"--out_dir={folder}"


@pytest.fixture(scope="module")
def groups(flags, folder):
    must(run("study/damage.py", *flags))
    return read_json(f"{folder}/damage.json")["groups"]


def at_home(model, data, domain):
    """A model's bits per byte on the windows that the study takes."""
    corpus = Corpus(data)
    return bits_per_byte(model, *corpus.windows(domain, "val", 32, 4), corpus.token_bytes)


def test_nothing_replaced_is_the_expert_and_everything_is_the_soup(groups, data, seed, experts, tmp_path):
    must(run("mix.py", f"--experts={','.join([*experts, seed])}", f"--out_dir={tmp_path}/soup", "--method=soup"))
    soup = Transformer.from_pretrained(f"{tmp_path}/soup")
    nothing, everything = groups["nothing"], groups["everything (soup)"]
    assert nothing["averaged"] == nothing["seed"] and nothing["drift"] == 0
    for domain, expert in zip(("math", "rain"), experts, strict=True):
        own = at_home(Transformer.from_pretrained(expert), data, domain)
        assert nothing["averaged"][domain] == pytest.approx(own, rel=1e-6)
        assert everything["averaged"][domain] == pytest.approx(at_home(soup, data, domain), rel=1e-5)
        start = at_home(Transformer.from_pretrained(seed), data, domain)
        assert everything["seed"][domain] == pytest.approx(start, rel=1e-6)


def test_one_group_by_hand(groups, data, seed, experts):
    """Attention: the means and the distances, taken by numpy from the files."""
    files = [weights(folder) for folder in (*experts, seed)]
    names = [name for name in files[0] if "self_attn" in name]
    scores, drifts = {}, []
    for domain, expert, own in zip(("math", "rain"), experts, files, strict=False):
        model = Transformer.from_pretrained(expert)
        parameters = dict(model.named_parameters())
        for name in names:
            mean = np.mean([one[name] for one in files], axis=0, dtype=np.float64)
            parameters[name].data.copy_(torch.from_numpy(mean))
        scores[domain] = at_home(model, data, domain)
        far = np.concatenate([(own[name] - files[-1][name]).ravel() for name in names])
        drifts.append(np.linalg.norm(far) / np.linalg.norm(np.concatenate([files[-1][name].ravel() for name in names])))
    found = groups["attention"]
    assert found["averaged"] == pytest.approx({**scores, "avg": sum(scores.values()) / 2}, rel=1e-5)
    assert found["drift"] == pytest.approx(sum(drifts) / 2, rel=1e-4) and found["drift"] > 0


def test_the_page_and_the_picture(groups, folder):
    page = read(f"{folder}/damage.md").decode()
    assert all(f"| {label} |" in page for label in groups)
    assert {f"layer {i}, all but feed-forward" for i in range(2)} < groups.keys()
    assert read(f"{folder}/damage.png").startswith(b"\x89PNG")


def test_some_domains_alone(flags, groups, tmp_path):
    must(run("study/damage.py", *flags[:-1], f"--out_dir={tmp_path}", "--domains=rain"))
    found = read_json(tmp_path / "damage.json")["groups"]
    assert found["norms"]["averaged"].keys() == {"rain", "avg"}
    assert found["norms"]["averaged"]["rain"] == groups["norms"]["averaged"]["rain"]


def test_what_is_refused(flags, seed, experts, mixed, tmp_path):
    out = f"--out_dir={tmp_path}"
    assert "at least two branches" in error_line(run("study/damage.py", *flags[1:], out, f"--experts={seed}"))
    mixture = f"--experts={experts[0]},{mixed},{seed}"
    assert "name branches of one seed" in error_line(run("study/damage.py", *flags[1:], out, mixture))
