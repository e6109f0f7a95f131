"""Branch-Train-Merge against a few lines of numpy, which compare the text so far anew for every token."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import error_line, must, read_json, run, val_tokens

from common.corpus import Corpus
from common.run import trained_on
from model import ModelConfig, Transformer, generate
from study.btm import (
    ENSEMBLES,
    SHARES,
    NearestEnsemble,
    PosteriorEnsemble,
    best_share,
    cached_prior,
    expert_profiles,
    held_out_prior,
    load_nearest,
    term_counts,
)


def similarities(ids, mixtures, counts):
    """(T, N): the cosine of the tf-idf vector of ids[: t + 1] with each expert's mean training tf-idf vector."""
    windows = np.concatenate(list(counts.values()))
    idf = np.log(len(windows) / (1 + (windows > 0).sum(axis=0)))
    centres = []
    for mixture in mixtures:
        rows = {domain: counts[domain] * idf for domain in mixture}
        means = {d: (row / np.linalg.norm(row, axis=1, keepdims=True)).mean(axis=0) for d, row in rows.items()}
        centres.append(sum(weight * means[domain] for domain, weight in mixture.items()))
    result = np.zeros((len(ids), len(centres)))
    for t in range(len(ids)):
        text = np.bincount(ids[: t + 1], minlength=len(idf)) * idf
        result[t] = [text @ c / np.linalg.norm(text) / np.linalg.norm(c) for c in centres]
    return result


def weights_of(ensemble, ids):
    """(B, T, N): how much each expert counts in predicting what follows each token."""
    with torch.no_grad():
        return ensemble.read(torch.as_tensor(ids))[1].exp()


@pytest.fixture(scope="module")
def folders(experts, seed):
    return [*experts, seed]


@pytest.mark.parametrize("k", [1, 2])
def test_probabilities_equal_brute_force(k, folders, data):
    ensemble = load_nearest(folders, Corpus(data), k)
    domains = {"math": 320, "rain": 320}
    counts = {domain: term_counts(Corpus(data), domain, size).double().numpy() for domain, size in domains.items()}
    mixtures = [{"math": 1.0}, {"rain": 1.0}, {"math": 0.5, "rain": 0.5}]
    assert [trained_on(folder) for folder in folders] == mixtures
    models = [Transformer.from_pretrained(folder) for folder in folders]
    picks = np.zeros(3)
    for domain in domains:
        tokens = val_tokens(data, domain)[:61]
        ids, targets = torch.from_numpy(tokens[None, :-1]), torch.from_numpy(tokens[None, 1:])
        near = similarities(tokens[:-1], mixtures, counts)
        order = np.argsort(-near, axis=1)
        ranked = np.take_along_axis(near, order, axis=1)
        clear = ranked[:, k - 1] - ranked[:, k] > 1e-5  # rounding may decide the others
        assert clear.mean() > 0.9
        with torch.no_grad():
            each = [model(ids).logits[0].softmax(dim=-1).numpy() for model in models]
            output = ensemble(ids)
        expected = np.array([np.mean([each[n][t] for n in order[t, :k]], axis=0) for t in range(60)])
        np.testing.assert_allclose(output.logits[0].exp().numpy()[clear], expected[clear], rtol=1e-4, atol=1e-7)
        picks += np.bincount(order[:, :k].flatten(), minlength=3)
        loss = -np.log(output.logits[0].exp().numpy()[np.arange(60), tokens[1:]]).mean()
        assert ensemble(ids, targets).loss.item() == pytest.approx(loss, rel=1e-5)
    assert (picks[:2] > 20).all()  # both experts had their say


def test_each_domain_asks_its_own_expert_first(folders, data):
    ensemble = load_nearest(folders[:2], Corpus(data), 1)
    for n, domain in enumerate(("math", "rain")):
        weights = weights_of(ensemble, val_tokens(data, domain)[None, :100])
        assert weights.sum(dim=-1).allclose(torch.ones(100))
        assert weights[0, :, n].mean() > 0.95


def test_a_mixture_of_domains_has_the_mean_profile():
    """By hand: four windows; words 0 and 1 are in two of them, words 2 and 3 in one, which fixes their idf."""
    counts = {"a": torch.tensor([[3.0, 4, 0, 0], [6, 8, 0, 0]]), "b": torch.tensor([[0.0, 0, 1, 0], [0, 0, 0, 2]])}
    profiles = expert_profiles([{"a": 1.0}, {"a": 0.5, "b": 0.5}], counts)
    common, rare = np.log(4 / 3), np.log(4 / 2)
    a, b = np.array([0.6, 0.8, 0, 0]), np.array([0, 0, 0.5, 0.5])
    half = (a + b) / 2
    idf = np.array([common, common, rare, rare])
    expected = np.stack([idf * a, idf * half / np.linalg.norm(half)], axis=1)
    np.testing.assert_allclose(profiles.numpy(), expected, rtol=1e-6)


def test_ensembles_of_the_same_experts_read_a_text_once(models, ids, monkeypatch):
    """Scores are those of ensembles that read for themselves; other texts, other targets and caches are read anew."""
    texts = [(ids[:, :-1], ids[:, 1:]), (ids[:, :-1], ids[:, :-1]), (ids[:, 1:], ids[:, :-1])]
    ensembles = [PosteriorEnsemble(models, PRIOR), PosteriorEnsemble(models, PRIOR, prefix=True)]
    with torch.no_grad():
        alone = [[-one(*text).losses for text in texts] for one in ensembles]
        whole = [[one(text).logits.gather(-1, to[..., None])[..., 0] for text, to in texts] for one in ensembles]
        ensembles[0].readings = ensembles[1].readings = {}
        calls, forward = [], Transformer.forward
        monkeypatch.setattr(Transformer, "forward", lambda *a, **b: calls.append(1) or forward(*a, **b))
        shared = [[-one(*text).losses for text in texts] for one in ensembles]
        assert len(calls) == len(models) * len(texts)
        ensembles[0].read(*texts[0], ensembles[0].new_cache(*texts[0][0].shape))
        assert len(calls) == len(models) * (len(texts) + 1)
    torch.testing.assert_close(shared, alone, rtol=0, atol=0)
    torch.testing.assert_close(shared, whole)


@pytest.mark.parametrize("k", [1, 2])
def test_cached_generation_equals_reading_it_all_again(k, folders, data):
    ensemble = load_nearest(folders, Corpus(data), k)
    prompts = [val_tokens(data, domain)[:length].tolist() for domain, length in (("math", 9), ("rain", 3), ("math", 5))]
    for prompt, answer in zip(prompts, generate(ensemble, prompts, 15), strict=True):
        for token in answer:
            assert token == ensemble(torch.tensor([prompt])).logits[0, -1].argmax()
            prompt.append(token)


def test_the_cache_remembers_the_text(folders, data):
    """A text that changes its domain: the last tokens alone would ask another expert than the whole text does."""
    ensemble = load_nearest(folders[:2], Corpus(data), 1)
    parts = [torch.from_numpy(val_tokens(data, domain)[None, :n]) for domain, n in (("math", 60), ("rain", 20))]
    ids = torch.cat(parts, dim=1)
    assert not weights_of(ensemble, ids)[:, 60:].equal(weights_of(ensemble, parts[1]))
    cache = ensemble.new_cache(1, 80)
    pieces = [ensemble(piece, cache=cache).logits for piece in (parts[0], *parts[1].split(1, dim=1))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), ensemble(ids).logits, rtol=1e-4, atol=1e-5)


def test_parameters(folders, data):
    one = Transformer.from_pretrained(folders[0]).num_parameters()[1]
    ensemble = load_nearest(folders, Corpus(data), 2)
    assert isinstance(ensemble, NearestEnsemble)
    assert ensemble.num_parameters() == (2 * one, 3 * one)


def tiny(number, scale=6.0):
    """A random model of eleven words with strong opinions."""
    torch.manual_seed(number)
    model = Transformer(ModelConfig(11, 16, 16, 1, 2, 2, 512))
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    return model


PRIOR = torch.tensor([0.15, 0.5, 0.05, 0.3])


def eot(corpus):
    """The token between documents, which stands for no byte."""
    return corpus.encoding.eot_token


@pytest.fixture(scope="module")
def models():
    return [tiny(number) for number in range(4)]


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 11, (3, 14), generator=torch.Generator().manual_seed(0))


def bayes(models, prior, ids, prefix):
    """In plain Python, every prefix read anew: the weights (T, N) and the next token's probabilities (T, V)."""
    weights, mixtures = [], []
    with torch.no_grad():
        for t in range(1, len(ids) + 1):
            each = [model(ids[None, :t]).logits[0].double().softmax(dim=-1).tolist() for model in models]
            seen = range(1, t) if prefix else range(max(1, t - 1), t)
            joint = [p * math.prod(each[e][s - 1][ids[s]] for s in seen) for e, p in enumerate(prior)]
            weights.append([one / sum(joint) for one in joint])
            mixtures.append([sum(weights[-1][e] * each[e][-1][v] for e in range(len(models))) for v in range(11)])
    return np.array(weights), np.array(mixtures)


@pytest.mark.parametrize("prefix", [False, True])
def test_posteriors_equal_brute_force(models, ids, prefix):
    ensemble = PosteriorEnsemble(models, PRIOR, prefix)
    prior = PRIOR.tolist()
    targets = ids.roll(-1, dims=1)
    expected = [bayes(models, prior, row, prefix) for row in ids]
    weights = np.stack([weights for weights, _ in expected])
    mixtures = np.stack([mixture for _, mixture in expected])
    np.testing.assert_allclose(weights_of(ensemble, ids).numpy(), weights, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(weights[:, 0], np.tile(prior, (3, 1)))  # nothing but the prior
    output = ensemble(ids)
    np.testing.assert_allclose(output.logits.exp().detach().numpy(), mixtures, rtol=1e-4, atol=1e-7)
    assert output.loss is None
    loss = -np.log(np.take_along_axis(mixtures, targets.numpy()[..., None], axis=-1)).mean()
    assert ensemble(ids, targets).loss.item() == pytest.approx(loss, rel=1e-5)
    one = models[0].num_parameters()[1]
    assert ensemble.num_parameters() == (4 * one, 4 * one)


def test_the_two_posteriors_differ(models, ids):
    last, prefix = (weights_of(PosteriorEnsemble(models, PRIOR, prefix=prefix), ids) for prefix in (False, True))
    assert last[:, :2].allclose(prefix[:, :2])  # one token has been predicted at most
    assert (last[:, 2:] - prefix[:, 2:]).abs().amax() > 0.1


@pytest.mark.parametrize("prefix", [False, True])
def test_posterior_with_cache_equals_without(models, ids, prefix):
    """The pieces are such that a piece's first weights need what the one before it expected."""
    ensemble = PosteriorEnsemble(models, PRIOR, prefix=prefix)
    cache = ensemble.new_cache(3, 14)
    pieces = [ensemble(piece, cache=cache).logits for piece in ids.split([5, *[1] * 9], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), ensemble(ids).logits, rtol=1e-4, atol=1e-5)
    prompts = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]]
    for prompt, answer in zip(prompts, generate(ensemble, prompts, 12), strict=True):
        assert len(answer) == 12
        text = list(prompt)
        for token in answer:
            assert token == ensemble(torch.tensor([text])).logits[0, -1].argmax()
            text.append(token)


# ---- fixed share ----


def fixed_share(models, prior, ids, share):
    """As `bayes`, every prefix read anew: one step of Bayes' rule, then a share of the weights is the prior again."""
    weights, mixtures, kept = [], [], prior
    with torch.no_grad():
        for t in range(1, len(ids) + 1):
            if t > 1:
                before = [model(ids[None, : t - 1]).logits[0, -1].double().softmax(dim=-1).tolist() for model in models]
                joint = [w * p[ids[t - 1]] for w, p in zip(kept, before, strict=True)]
                kept = [(1 - share) * one / sum(joint) + share * p for one, p in zip(joint, prior, strict=True)]
            each = [model(ids[None, :t]).logits[0, -1].double().softmax(dim=-1).tolist() for model in models]
            weights.append(kept)
            mixtures.append([sum(w * p[v] for w, p in zip(kept, each, strict=True)) for v in range(11)])
    return np.array(weights), np.array(mixtures)


@pytest.mark.parametrize("share", [0.0, 0.03, 0.4, 1.0])
def test_fixed_share_equals_brute_force(models, ids, share):
    ensemble = PosteriorEnsemble(models, PRIOR, prefix=True, share=share)
    weights, mixtures = zip(*(fixed_share(models, PRIOR.tolist(), row, share) for row in ids), strict=True)
    np.testing.assert_allclose(weights_of(ensemble, ids).numpy(), np.stack(weights), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(ensemble(ids).logits.exp().detach(), np.stack(mixtures), rtol=1e-4, atol=1e-7)
    targets = ids.roll(-1, dims=1)
    loss = -np.log(np.take_along_axis(np.stack(mixtures), targets.numpy()[..., None], axis=-1)).mean()
    assert ensemble(ids, targets).loss.item() == pytest.approx(loss, rel=1e-5)
    if share == 0:  # the textbook's
        np.testing.assert_allclose(weights[0], bayes(models, PRIOR.tolist(), ids[0], True)[0], rtol=1e-5)
    if share == 1:  # whatever was read
        np.testing.assert_allclose(weights_of(ensemble, ids), PRIOR.expand(3, 14, 4), rtol=1e-5)


def test_fixed_share_is_a_sum_over_all_ways_to_change_the_expert(models, ids):
    """Before each token the text goes on with its expert, or, with probability 0.2, draws one anew from the prior: the
    weights are what this says of the next token's expert, summed over all 4^6 paths."""
    share, prior, text = 0.2, PRIOR.double().numpy(), ids[0, :6]
    with torch.no_grad():
        each = [model(text[None]).logits[0].double().softmax(dim=-1) for model in models]
    seen = np.array([[1.0, *(p[s - 1, text[s]].item() for s in range(1, 6))] for p in each])  # (4, 6)
    for t in range(1, 7):  # after t tokens, of which the first tells nothing
        joint = np.zeros(4)
        for path in itertools.product(range(4), repeat=t):  # of the tokens 1 ... t
            chance = prior[path[0]]
            for s in range(1, t):
                chance *= seen[path[s - 1], s] * ((1 - share) * (path[s] == path[s - 1]) + share * prior[path[s]])
            joint[path[-1]] += chance
        found = weights_of(PosteriorEnsemble(models, PRIOR, prefix=True, share=share), text[None, :t])[0, -1]
        np.testing.assert_allclose(found, joint / joint.sum(), rtol=1e-4)


@pytest.mark.parametrize("share", [0.05, 1.0])
def test_fixed_share_with_cache_equals_without(models, ids, share):
    ensemble = PosteriorEnsemble(models, PRIOR, prefix=True, share=share)
    cache = ensemble.new_cache(3, 14)
    pieces = [ensemble(piece, cache=cache).logits for piece in ids.split([5, *[1] * 9], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), ensemble(ids).logits, rtol=1e-4, atol=1e-5)
    prompts = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]]
    for prompt, answer in zip(prompts, generate(ensemble, prompts, 12), strict=True):
        text = list(prompt)
        for token in answer:
            assert token == ensemble(torch.tensor([text])).logits[0, -1].argmax()
            text.append(token)
        assert len(answer) == 12


def test_fixed_share_recovers_from_a_change_of_source(models):
    """60 tokens that one expert wrote, then 20 of another's: the whole text's product goes on asking the first one."""
    text, random = torch.tensor([[5]]), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for t in range(1, 81):
            p = models[0 if t < 60 else 1](text).logits[0, -1].softmax(dim=-1)
            text = torch.cat((text, torch.multinomial(p, 1, generator=random)[None]), dim=1)
    uniform = torch.full((4,), 0.25)
    certain, shared = (PosteriorEnsemble(models, uniform, prefix=True, share=share) for share in (0.0, 0.01))
    first, last = weights_of(certain, text)[0, [59, 80]], weights_of(shared, text)[0, [59, 80]]
    assert first[0, 0] > 0.99 and last[0, 0] > 0.9  # both knew the first author
    assert first[1, 1] < 0.01 and last[1, 1] > 0.9  # one has found the second
    inputs, targets = text[:, :-1], text[:, 1:]
    losses = [ensemble(inputs, targets).losses[0, 60:].mean().item() for ensemble in (certain, shared)]
    assert losses[1] < losses[0] - 0.3


def test_the_best_share_by_hand(folders, data, monkeypatch):
    """On validation text and no other, bits per byte of windows of one domain and of spliced ones count alike. Either
    kind alone would choose another share."""
    corpus, length = Corpus(data), 64
    models = [Transformer.from_pretrained(folder) for folder in folders]
    kinds = [{}, {pair: torch.cat((x, y[:, -1:]), dim=1) for pair, (x, y) in corpus.spliced("val", length, 6).items()}]
    for domain in ("math", "rain"):
        tokens = val_tokens(data, domain)
        starts = np.linspace(0, len(tokens) - length - 1, 6).astype(int)
        kinds[0][domain] = torch.from_numpy(np.stack([tokens[start : start + length + 1] for start in starts]))
    scores = np.zeros((2, len(SHARES)))  # by kind
    for kind, texts in enumerate(kinds):
        for rows in texts.values():
            with torch.no_grad():
                p = [model(rows[:, :-1]).logits.double().softmax(dim=-1) for model in models]
            p = np.stack([one.gather(-1, rows[:, 1:, None])[..., 0].numpy() for one in p])  # (3, windows, length)
            size = len(corpus.encoding.decode_bytes([t for t in rows[:, 1:].flatten().tolist() if t != eot(corpus)]))
            for i, share in enumerate(SHARES):
                weights, bits = np.full(p.shape[:2], 1 / 3), 0.0
                for t in range(length):
                    joint = weights * p[:, :, t]
                    bits -= np.log2(joint.sum(axis=0)).sum()
                    weights = (1 - share) * joint / joint.sum(axis=0) + share / 3
                scores[kind, i] += bits / size / len(texts)
    best = SHARES[scores.sum(axis=0).argmin()]
    ensemble = PosteriorEnsemble(models, torch.full((3,), 1 / 3), prefix=True)
    splits, tokens = set(), Corpus.tokens

    def noted(self, domain, split, length):
        splits.add(split)
        return tokens(self, domain, split, length)

    monkeypatch.setattr(Corpus, "tokens", noted)
    assert best_share(ensemble, corpus, length, windows=6) == best and splits == {"val"}
    assert best not in {SHARES[one.argmin()] for one in scores}
    assert best_share(ensemble, Corpus(data, "math"), length, windows=6) == min(SHARES)  # nothing to splice


# ---- special cases ----


@pytest.mark.parametrize("prefix", [False, True])
def test_identical_experts_are_one_model(models, ids, prefix):
    ensemble = PosteriorEnsemble([models[0], tiny(0), tiny(0)], torch.tensor([0.7, 0.2, 0.1]), prefix=prefix)
    targets = ids.roll(-1, dims=1)
    assert ensemble(ids, targets).loss.item() == pytest.approx(models[0](ids, targets).loss.item(), rel=1e-5)
    assert weights_of(ensemble, ids).allclose(torch.tensor([0.7, 0.2, 0.1]))


@pytest.mark.parametrize("prefix", [False, True])
def test_long_texts_of_improbable_tokens_stay_finite(prefix):
    """500 tokens, whose probabilities multiply to less than any float holds; the weights are still right."""
    models = [tiny(number, scale=60.0) for number in range(3)]
    ids = torch.randint(0, 11, (1, 500), generator=torch.Generator().manual_seed(1))
    ensemble = PosteriorEnsemble(models, torch.tensor([0.2, 0.3, 0.5]), prefix=prefix)
    weights = weights_of(ensemble, ids)[0]
    assert weights.sum(dim=-1).allclose(torch.ones(500))
    assert ensemble(ids).logits.isfinite().all()
    with torch.no_grad():
        each = [model(ids).logits[0].double().log_softmax(dim=-1) for model in models]
    seen = torch.stack([log_p[:-1].gather(1, ids[0, 1:, None])[:, 0] for log_p in each], dim=-1)  # (499, 3)
    assert (seen.sum(dim=0) < -1000).all()
    total = seen.cumsum(dim=0) if prefix else seen
    expected = (total + torch.tensor([0.2, 0.3, 0.5]).log()).softmax(dim=-1)
    torch.testing.assert_close(weights[1:].double(), expected, rtol=1e-2, atol=1e-3)


def test_cached_prior_by_hand():
    """Two windows: 0.3 * (0.8, 0.2) + 0.7 * (0.5, 0.5) = (0.59, 0.41), which is the prior of the second window."""
    posteriors = torch.tensor([[0.8, 0.2], [0.25, 0.75]])
    second = 0.59 * 0.25 / (0.59 * 0.25 + 0.41 * 0.75)
    expected = 0.3 * second + 0.7 * 0.59
    assert cached_prior(posteriors[:1].log()).tolist() == pytest.approx([0.59, 0.41])
    assert cached_prior(posteriors.log()).tolist() == pytest.approx([expected, 1 - expected])
    assert cached_prior(posteriors.flip(0).log()).tolist() != pytest.approx([expected, 1 - expected], abs=1e-3)


@pytest.mark.parametrize("prefix", [False, True])
def test_held_out_prior_is_the_mean_over_domains(prefix, folders, data):
    """Seven windows of 32 tokens a domain; posteriors at their ends by brute force."""
    models = [Transformer.from_pretrained(folder) for folder in folders]
    each = []
    for domain in ("math", "rain"):
        tokens, prior = val_tokens(data, domain), np.full(3, 1 / 3)
        for start in np.linspace(0, len(tokens) - 33, 7).astype(int):
            window = torch.from_numpy(tokens[start : start + 32])
            with torch.no_grad():
                log_p = [model(window[None]).logits[0].double().log_softmax(dim=-1) for model in models]
            seen = np.array([[one[s - 1, window[s]].item() for s in range(1, 32)] for one in log_p])  # (3, 31)
            log_posterior = np.log(prior) + (seen.sum(axis=1) if prefix else seen[:, -1])
            posterior = np.exp(log_posterior - log_posterior.max())
            prior = 0.7 * prior + 0.3 * posterior / posterior.sum()
        each.append(prior)
    assert abs(each[0] - each[1]).max() > 0.05
    ensemble = PosteriorEnsemble(models, torch.full((3,), 1 / 3), prefix=prefix)
    found = held_out_prior(ensemble, Corpus(data), 32, windows=7)
    np.testing.assert_allclose(found.numpy(), np.mean(each, axis=0), rtol=1e-3)


def test_loading_the_rows(folders, data):
    """Each name gives another ensemble; windows longer than the models take are shortened. What one has read, those
    after it need not read again, and they find the same."""
    corpus, readings = Corpus(data), {}
    loaded = {name: load(folders, corpus, 200, "cpu", readings, 20) for name, load in ENSEMBLES.items()}
    kinds = {name: (type(one), one.k, getattr(one, "prefix", None)) for name, one in loaded.items()}
    assert kinds == {
        "btm-top1": (NearestEnsemble, 1, None),
        "btm-top2": (NearestEnsemble, 2, None),
        "btm-posterior": (PosteriorEnsemble, 3, False),
        "btm-posterior-prefix": (PosteriorEnsemble, 3, True),
        "btm-share": (PosteriorEnsemble, 3, True),
    }
    uniform = torch.full((3,), 1 / 3)
    plain = [PosteriorEnsemble(list(loaded["btm-posterior"].models), uniform, prefix) for prefix in (False, True)]
    prior = held_out_prior(plain[0], corpus, 128, 20)
    assert loaded["btm-posterior"].log_prior.exp().allclose(prior) and not prior.allclose(uniform, atol=1e-3)
    for name in ("btm-posterior-prefix", "btm-share"):
        assert loaded[name].log_prior.exp().allclose(uniform)
    share = best_share(plain[1], corpus, 128, 20)
    assert plain[0].readings and plain[0].readings.keys() <= readings.keys()
    shares = [loaded[name].share for name in ("btm-posterior", "btm-posterior-prefix", "btm-share")]
    assert shares == [0, 0, share] and share in SHARES
    assert loaded["btm-share"].settings == {"share": share}
    assert not any(hasattr(one, "settings") for name, one in loaded.items() if name != "btm-share")


def test_rows_join_those_of_eval(folders, seed, data, eval_config, tmp_path):
    """The second time nothing is scored: the file stays as it is."""
    out_dir = f"--out_dir={tmp_path}/report"
    must(run("eval.py", eval_config, f"--model={seed}", out_dir))
    must(run("study/btm.py", eval_config, f"--experts={','.join(folders)}", out_dir))
    rows = {row["name"]: row for row in read_json(tmp_path / "report" / "results.json")["rows"]}
    assert list(rows) == ["seed", *ENSEMBLES]
    assert rows["btm-top1"]["runs"] == [seed, *folders[:2]] and rows["btm-top1"]["id"] != rows["btm-top2"]["id"]
    before = (tmp_path / "report" / "results.json").read_bytes()
    must(run("study/btm.py", eval_config, f"--experts={','.join(folders)}", out_dir))
    assert (tmp_path / "report" / "results.json").read_bytes() == before
    assert "--experts" in error_line(run("study/btm.py", eval_config, out_dir))
