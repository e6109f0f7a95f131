"""Branch-Train-Merge against a few lines of numpy, which compare the text so far anew for every token."""

import json

import numpy as np
import pytest
import torch
from helpers import val_tokens

import checkpoint
from btm import Ensemble, expert_profiles, load_ensemble, term_counts, training_mixture
from data.loader import list_domains
from model import generate


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


@pytest.fixture(scope="module")
def folders(experts, seed):
    return [*experts, seed]


@pytest.mark.parametrize("k", [1, 2])
def test_probabilities_equal_brute_force(k, folders, data):
    ensemble = load_ensemble(folders, data, k)
    domains = {"math": 320, "rain": 320}
    counts = {domain: term_counts(data, domain, size).double().numpy() for domain, size in domains.items()}
    mixtures = [{"math": 1.0}, {"rain": 1.0}, {"math": 0.5, "rain": 0.5}]
    assert [training_mixture(folder, data) for folder in folders] == mixtures
    models = [checkpoint.load_model(folder) for folder in folders]
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
    ensemble = load_ensemble(folders[:2], data, 1)
    for n, domain in enumerate(("math", "rain")):
        weights = ensemble.weights(torch.from_numpy(val_tokens(data, domain)[None, :400]))
        assert weights.sum(dim=-1).allclose(torch.ones(400))
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


@pytest.mark.parametrize("k", [1, 2])
def test_cached_generation_equals_reading_it_all_again(k, folders, data):
    ensemble = load_ensemble(folders, data, k)
    prompts = [val_tokens(data, domain)[:length].tolist() for domain, length in (("math", 9), ("rain", 3), ("math", 5))]
    for prompt, answer in zip(prompts, generate(ensemble, prompts, 15), strict=True):
        for token in answer:
            assert token == ensemble(torch.tensor([prompt])).logits[0, -1].argmax()
            prompt.append(token)


def test_the_cache_remembers_the_text(folders, data):
    """A text that changes its domain: the last tokens alone would ask another expert than the whole text does."""
    ensemble = load_ensemble(folders[:2], data, 1)
    parts = [torch.from_numpy(val_tokens(data, domain)[None, :n]) for domain, n in (("math", 60), ("rain", 20))]
    ids = torch.cat(parts, dim=1)
    assert not ensemble.weights(ids)[:, 60:].equal(ensemble.weights(parts[1]))
    cache = ensemble.new_cache(1, 80)
    pieces = [ensemble(piece, cache=cache).logits for piece in (parts[0], *parts[1].split(1, dim=1))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), ensemble(ids).logits, rtol=1e-4, atol=1e-5)


def test_parameters(folders, data):
    one = checkpoint.load_model(folders[0]).num_parameters()[1]
    ensemble = load_ensemble(folders, data, 2)
    assert isinstance(ensemble, Ensemble)
    assert ensemble.num_parameters() == (2 * one, 3 * one)


def test_all_means_the_domains_that_were_there_when_it_trained(data, tmp_path):
    """A domain that was prepared after the seed had trained is none of the seed's."""
    recipe = {"config": {"domain": "all"}, "data": {"math": "hash"}}
    (tmp_path / "run.json").write_text(json.dumps({"recipe": recipe}))
    assert len(list_domains(data)) > 1
    assert training_mixture(str(tmp_path), data) == {"math": 1.0}
