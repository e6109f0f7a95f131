"""route.py and tokens.py: statistics against plain loops over tokens, the extracted expert against a router that
is forced, and the page of tokens in a real browser."""

import dataclasses
import html.parser
import itertools
import json
import math
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from helpers import error_line, must, read_json, run, tokens_of

from common.tokenizer import load_tokenizer
from model import ModelConfig, Transformer, generate
from study import route
from study import tokens as view

NAMES = ("expert-code", "expert-math", "expert-prose", "seed")
L, E = 3, 4


def random_mixture(k=2, vocab_size=320):
    torch.manual_seed(k)
    shape = {"vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": L}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    experts = {"num_local_experts": E, "num_experts_per_tok": k, "expert_names": NAMES}
    model = Transformer(ModelConfig(**shape, **heads, **experts))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far enough from 0 that experts and routers differ visibly
    return model


def random_gates(k, tokens=50):
    """(L, tokens, E): softmax over the k largest of random logits, as numpy."""
    logits = np.random.default_rng(k).normal(size=(L, tokens, E))
    kept = np.where(logits >= np.sort(logits, axis=-1)[..., [-k]], np.exp(logits), 0)
    return kept / kept.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_statistics_equal_loops_over_tokens(k):
    domains = {"code": random_gates(k), "math": random_gates(k, tokens=31)[:, ::-1] ** 3}  # as unscaled as a switch's
    config = dataclasses.replace(random_mixture(k).config)
    found = route.routing_of({d: torch.tensor(g.copy()) for d, g in domains.items()}, config)
    assert found["experts"] == ["A code", "B math", "C prose", "D seed"]
    for domain, gates in domains.items():
        for layer in range(L):
            rows = gates[layer]
            used, entropy = np.zeros(E), []
            for g in rows:
                used += g > 0
                p = [x / sum(g) for x in g if x > 0]
                entropy.append(-sum(x * math.log2(x) for x in p))
            ours = {name: values[layer] for name, values in found["domains"][domain].items()}
            close = {"rtol": 0, "atol": 1e-5}
            np.testing.assert_allclose(ours["share"], used / used.sum(), **close)
            np.testing.assert_allclose(ours["weight"], rows.sum(0) / rows.sum(), **close)
            np.testing.assert_allclose(ours["gate_entropy"], np.mean(entropy), **close)


def test_entropy_by_hand():
    """One expert: 0 bits. Two halves: 1 bit. Four quarters: 2 bits."""
    for gates, bits in (([1, 0, 0, 0], 0), ([0.5, 0, 0.5, 0], 1), ([0.25] * 4, 2), ([0, 0.3, 0, 0], 0)):
        assert route.gate_entropy(torch.tensor([[gates]], dtype=torch.float32)).tolist() == pytest.approx([bits])


def test_mutual_information_by_hand():
    """Nothing when every domain spreads alike; log2 of the domains when each has an expert of its own."""
    alike = torch.tensor([[[0.7, 0.2, 0.1]]] * 3)  # (domains, 1, E)
    assert route.mutual_information(alike).tolist() == pytest.approx([0], abs=1e-7)
    own = torch.eye(3).unsqueeze(1)
    assert route.mutual_information(own).tolist() == pytest.approx([math.log2(3)])
    # two domains: the first all to one expert, the second half and half. p(e) = 3/4, 1/4, and by hand
    # 1/2 log2(4/3) + 1/4 log2(2/3) + 1/4 log2(2) = 0.3113
    mixed = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]])
    assert route.mutual_information(mixed).tolist() == pytest.approx([0.3113], abs=1e-4)


def test_mutual_information_equals_the_textbooks_sum():
    """sum_de p(d, e) log2(p(d, e) / p(d) p(e)), on random shares, for each layer by itself."""
    weights = torch.rand(5, L, E, dtype=torch.float64)
    weights /= weights.sum(dim=-1, keepdim=True)

    joint = weights / 5  # p(d, e)
    independent = joint.sum(dim=0) / 5  # p(d) p(e)
    expected = (joint * (joint / independent).log2()).sum(dim=(0, 2))
    torch.testing.assert_close(route.mutual_information(weights), expected)


def test_dead_means_under_one_percent_of_all_choices():
    """Two choices per token. Expert C gets 2 of 200 in one domain alone, D 4: of all choices 0.5 % and 1 %."""
    gates = torch.zeros(1, 100, 4)
    gates[..., :2] = 0.5
    other = gates.clone()
    gates[0, :2] = torch.tensor([0.5, 0, 0.5, 0])
    gates[0, 2:6] = torch.tensor([0.5, 0, 0, 0.5])
    entry = route.routing_of({"code": gates, "math": other}, random_mixture().config)
    assert entry["dead"] == [["C prose"]]


def test_top_pairs_are_unordered():
    pairs = view.list_pairs(random_mixture().config)
    assert pairs == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    gates = torch.tensor([[0, 0.9, 0, 0.1], [0, 0.1, 0, 0.9], [0.6, 0.4, 0, 0], [0.1, 0.2, 0.3, 0.4]])
    assert view.top_pairs(gates, pairs).tolist() == [4, 4, 0, 5]
    alone = view.list_pairs(random_mixture(k=1).config)
    assert view.top_pairs(gates, alone).tolist() == [1, 3, 0, 3]


@pytest.mark.parametrize("e", range(E))
def test_extracted_expert_equals_a_router_forced_to_it(e):
    model = random_mixture(k=1)
    dense = view.extract_expert(model, e)
    assert not dense.config.num_local_experts
    ids = torch.randint(0, 320, (2, 40))
    for layer in model.model.layers:
        logits = torch.zeros(E)
        logits[e] = 1
        layer.block_sparse_moe.gate.forward = lambda x, logits=logits: logits.expand(len(x), E)
    with torch.no_grad():
        torch.testing.assert_close(dense(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_bits_equal_cross_entropy_token_by_token():
    model = random_mixture()
    ids = torch.randint(0, 320, (30,)).tolist()
    gates, found = view.trace(model, [ids])
    models = [model, *(view.extract_expert(model, e) for e in range(E))]
    assert gates.shape == (L, 30, E) and found[:, 0].isnan().all()
    with torch.no_grad():
        for one, bits in zip(models, found, strict=True):
            for t in range(1, 30):
                log_p = one(torch.tensor([ids[:t]])).logits[0, -1].double().log_softmax(-1)
                assert bits[t].item() == pytest.approx(-log_p[ids[t]].item() / math.log(2), abs=1e-4)


# ---- the page ----

TEXT = '<script>alert("&amp; \'x\'")</script> {{data}}\n\tif a < b:\n        return "</span>"\x1b[31m\x00\n'


class Page(html.parser.HTMLParser):
    """The text of each token, the JSON data, and every attribute of a page."""

    def __init__(self, source):
        super().__init__()
        self.tokens, self.data, self.attributes, self.inside = [], "", [], None
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.attributes += attributes
        self.inside = "data" if ("id", "data") in attributes else "token" if ("data-t", None) in attributes else None
        if self.inside == "token":
            self.tokens.append("")

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, text):
        if self.inside == "token":
            self.tokens[-1] += text
        if self.inside == "data":
            self.data += text


@pytest.fixture(params=[1, 2])
def page(request, data, tmp_path):
    """(the path of a page of two texts, its model, the texts' ids)"""
    encoding = load_tokenizer(data)
    model = random_mixture(request.param, encoding.n_vocab)
    texts = [encoding.encode_ordinary(TEXT), [*encoding.encode_ordinary("The rain sings."), encoding.eot_token]]
    path = str(tmp_path / "page.html")
    view.write_page(path, "a <b> & c", model, encoding, texts)
    return path, model, texts


def test_page_holds_every_token_and_its_numbers(page):
    path, model, texts = page
    with open(path) as file:
        source = file.read()
    assert len(source.encode()) < 1e6
    assert not re.search(r"https?:|//[a-z]|\bsrc\b|@import|url\(|fetch\(", source)
    found = Page(source)
    assert not {"src", "href", "onclick"} & {name for name, _ in found.attributes}
    assert source.count("<script") == 2 and "<title>a &lt;b&gt; &amp; c</title>" in source

    expected = TEXT.replace("\n", "↵\n").replace("\t", "→\t").replace("\x1b", "\\x1b").replace("\x00", "\\x00")
    assert "".join(found.tokens[: len(texts[0])]) == expected
    assert "".join(found.tokens[len(texts[0]) :]) == "The rain sings.<|endoftext|>"

    numbers = json.loads(found.data)
    gates, traced = view.trace(model, texts)
    np.testing.assert_allclose(np.array(numbers["gates"]).swapaxes(0, 1), 100 * gates, atol=0.51)
    bits = np.array(numbers["bits"], dtype=float)  # (T, 1 + E)
    np.testing.assert_allclose(bits, traced.T, atol=0.006)
    for layer, token in itertools.product(range(L), range(len(bits))):
        best = sorted(gates[layer, token].topk(min(2, model.config.num_experts_per_tok)).indices.tolist())
        assert numbers["pairs"][numbers["pair"][layer][token]] == best


def test_half_a_character_is_shown_as_bytes(data):
    encoding = load_tokenizer(data)  # of a text without this character
    tokens = encoding.encode_ordinary("€")
    assert [view.visible(encoding, token) for token in tokens] == ["\\xe2", "\\x82", "\\xac"]


def test_page_works_in_a_browser(page, tmp_path):
    """Chromium runs it without a word of complaint; slider, arrow keys and a click change what is shown."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium here")
    path, *_ = page
    with open(path) as file:
        source = file.read()
    use = """<script>
        slider.value = 2; slider.dispatchEvent(new Event("input"))
        tokens[4].click()
        tokens[4].dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }))
        tokens[5].dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown", bubbles: true }))
    </script>"""
    driven = tmp_path / "driven.html"
    driven.write_text(source + use)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={tmp_path}/u"]
    done = subprocess.run(
        [browser, *flags, "--dump-dom", f"file://{driven}"], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    dom = done.stdout
    numbers = json.loads(Page(source).data)
    assert re.search(r'id="layer-number">1 ', dom)
    rows = re.search(r'<tbody id="rows">(.*?)</tbody>', dom, re.S)[1]
    assert [int(gate) for gate in re.findall(r">(\d+) %</td>", rows)] == numbers["gates"][5][1]
    assert f">{numbers['bits'][5][0]:.2f}</td>" in rows
    styles = re.findall(r"<span data-t[^>]*text-decoration: ([^;]*);", dom)
    lines = ["solid", "dotted", "double", "dashed", "wavy"]
    styles = [set(lines) & set(style.split()) or {"solid"} for style in styles]  # solid goes without saying
    assert styles == [{lines[p % len(lines)]} for p in numbers["pair"][1]]


# ---- the scripts ----


def test_tokens_of_a_continuation(btx, seed, tmp_path):
    page = tmp_path / "page.html"
    flags = "--prompt=The rain", "--max_new_tokens=12", "--temperature=0", "--device=cpu", "--num_samples=2"
    done = must(run("study/tokens.py", f"--model={btx}", *flags, f"--page={page}"))
    assert str(page) in done.out
    model, encoding = Transformer.from_pretrained(btx), load_tokenizer(btx)
    ids = encoding.encode_ordinary("The rain")
    answer = generate(model, [ids], 12, {encoding.eot_token})[0]
    texts = [view.visible(encoding, token) for token in ids + answer]
    assert Page(page.read_text()).tokens == texts * 2
    message = error_line(run("study/tokens.py", f"--model={seed}", *flags, f"--page={page}"))
    assert seed in message and "dense" in message


def test_route_writes_what_it_says(btx, mixed, seed, data, tmp_path):
    size = f"--data_dir={data}", "--sequence_length=32", "--eval_windows=5", "--device=cpu", "--threads=1"
    done = must(run("study/route.py", f"--model={btx},{mixed}", f"--out_dir={tmp_path}", *size))
    assert "btx: the expert reveals" in done.out
    found = read_json(tmp_path / "routing.json")
    assert [entry["name"] for entry in found["models"]] == ["btx", "mixed"]
    for name in ("routing.png", "tokens-math.html", "tokens-rain.html"):
        assert 1000 < os.path.getsize(tmp_path / name) < 1e6

    # the numbers are those of the test windows, cut here without the loader
    tokens = tokens_of(data, "math", "test")
    rows = np.stack([tokens[s : s + 32] for s in np.linspace(0, len(tokens) - 33, 5).astype(int)])
    with torch.no_grad():
        gates = Transformer.from_pretrained(btx)(torch.from_numpy(rows)).gates.numpy()  # (L, B, T, E)
    share = (gates > 0).mean(axis=(1, 2)) / 2
    np.testing.assert_allclose(found["models"][0]["domains"]["math"]["share"], share, atol=1e-5)

    before = os.stat(tmp_path / "routing.png").st_mtime_ns
    assert "nothing to do" in must(run("study/route.py", f"--model={btx},{mixed}", f"--out_dir={tmp_path}", *size)).out
    assert os.stat(tmp_path / "routing.png").st_mtime_ns == before
    must(run("study/route.py", f"--model={btx},{mixed}", f"--out_dir={tmp_path}/again", *size))
    assert read_json(tmp_path / "again/routing.json") == found
    must(run("study/route.py", f"--model={btx}", f"--out_dir={tmp_path}/val", *size, "--split=val"))
    val = read_json(tmp_path / "val/routing.json")
    assert (val["config"]["split"], found["config"]["split"]) == ("val", "test")
    assert val["models"][0]["domains"] != found["models"][0]["domains"]

    message = error_line(run("study/route.py", f"--model={btx},{seed}", f"--out_dir={tmp_path}/dense", *size))
    assert seed in message and "dense" in message
    message = error_line(
        run("study/route.py", f"--model={btx}", f"--out_dir={tmp_path}/x", *size, "--sequence_length=512")
    )
    assert "512" in message and "128" in message
