import math

import numpy as np
import torch

MIXTURES = [{"rain": 1.0}, {"code": 1.0}, {"rain": 0.25, "code": 0.75}]


def counts():
    """Token counts of six windows a domain over five tokens; token 4 is in every window, so it says nothing."""
    random = np.random.default_rng(1)
    rain, code = random.poisson([3, 1, 0.3, 0.1, 4], (6, 5)), random.poisson([0.2, 1, 3, 0.7, 4], (6, 5))
    for windows in (rain, code):
        windows[:, 4] += 1
    return {"rain": rain.astype(float), "code": code.astype(float)}


def unit(vector):
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector] if length else list(vector)


def profiles_by_hand():
    """Each expert's mean tf-idf vector, a list of lists, and idf."""
    found = counts()
    windows = [list(row) for rows in found.values() for row in rows]
    idf = [math.log(len(windows) / (1 + sum(row[v] > 0 for row in windows))) for v in range(5)]
    mean = {}
    for domain, rows in found.items():
        vectors = [unit([row[v] * idf[v] for v in range(5)]) for row in rows]
        mean[domain] = [sum(vector[v] for vector in vectors) / len(vectors) for v in range(5)]
    experts = [[sum(share * mean[d][v] for d, share in mixture.items()) for v in range(5)] for mixture in MIXTURES]
    return experts, idf


def cosines(tokens):
    """The cosine of a text's tf-idf vector with each expert's."""
    experts, idf = profiles_by_hand()
    text = unit([tokens.count(v) * idf[v] for v in range(5)])
    return [sum(a * b for a, b in zip(text, unit(expert), strict=True)) for expert in experts]


def profiles():
    from study.btm import expert_profiles

    return expert_profiles(MIXTURES, {domain: torch.from_numpy(rows) for domain, rows in counts().items()})


def test_profiles_rank_texts_by_cosine():
    ours, random = profiles(), np.random.default_rng(2)
    assert ours.shape == (5, 3)
    for _ in range(50):
        tokens = random.integers(0, 5, 12).tolist()
        dots, expected = ours[tokens].sum(dim=0).tolist(), cosines(tokens)
        assert np.argsort(dots).tolist() == np.argsort(expected).tolist()


def test_a_profile_is_idf_times_a_unit_vector():
    experts, idf = profiles_by_hand()
    expected = [[idf[v] * unit(expert)[v] for expert in experts] for v in range(5)]
    torch.testing.assert_close(profiles(), torch.tensor(expected, dtype=torch.float64))


def weights(k, ids):
    from study.btm import EnsembleCache, NearestEnsemble

    class Model(torch.nn.Module):
        config = None

    ensemble = NearestEnsemble([Model() for _ in MIXTURES], profiles().float(), k)
    cache = EnsembleCache([None] * 3, len(ids), 5, "cpu")
    return ensemble.log_weights(ids, torch.zeros(*ids.shape, 3), cache).exp()


def test_the_k_nearest_share_the_weight():
    ids = torch.from_numpy(np.random.default_rng(3).integers(0, 4, (4, 7)))
    for k in (1, 2, 3):
        ours = weights(k, ids)
        for b in range(4):
            for t in range(7):
                near = cosines(ids[b, : t + 1].tolist())
                best = sorted(range(3), key=lambda e: -near[e])[:k]
                expected = [1 / k if e in best else 0.0 for e in range(3)]
                assert np.allclose(ours[b, t].tolist(), expected), (b, t, k)
