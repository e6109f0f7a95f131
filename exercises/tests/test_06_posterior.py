import math

import torch


class Fixed(torch.nn.Module):
    """A model that gives the same probabilities wherever it is asked. It stands in for a Transformer."""

    def __init__(self, probabilities):
        super().__init__()
        self.log_p = torch.nn.Parameter(torch.tensor(probabilities).log())
        self.config = type("Config", (), {"vocab_size": len(probabilities)})

    def forward(self, ids, cache=None):
        return type("Output", (), {"logits": self.log_p.expand(*ids.shape, -1)})

    def new_cache(self, batch_size, length):
        return None


TABLES = [0.5, 0.25, 0.25], [0.1, 0.1, 0.8]  # two experts' probabilities of three tokens
TEXT = [0, 0, 2]


def posterior(prefix, prior=(0.5, 0.5), text=TEXT, share=0.0):
    """(T, N): the weights for the successor of each token of the text."""
    from study.btm import PosteriorEnsemble

    ensemble = PosteriorEnsemble([Fixed(table) for table in TABLES], torch.tensor(prior), prefix, share)
    with torch.no_grad():
        return ensemble.read(torch.tensor([text]))[1][0].exp()


def test_bayes_over_the_whole_prefix_by_hand():
    """The first token is predicted by nobody. Then 0.5 against 0.1, then 0.5 * 0.25 against 0.1 * 0.8."""
    expected = torch.tensor([[1 / 2, 1 / 2], [5 / 6, 1 / 6], [0.125 / 0.205, 0.08 / 0.205]])
    torch.testing.assert_close(posterior(prefix=True), expected)


def test_the_last_token_alone_by_hand():
    expected = torch.tensor([[1 / 2, 1 / 2], [5 / 6, 1 / 6], [0.25 / 1.05, 0.8 / 1.05]])
    torch.testing.assert_close(posterior(prefix=False), expected)


def test_the_prior_counts():
    weights = posterior(prefix=True, prior=(0.2, 0.8))
    torch.testing.assert_close(weights[1], torch.tensor([0.2 * 0.5, 0.8 * 0.1]) / 0.18)
    torch.testing.assert_close(weights[0], torch.tensor([0.2, 0.8]))


def test_a_share_goes_back_to_the_prior_by_hand():
    """Half of the weights after each token: 5/6 becomes 2/3, then (2/3 * 0.25, 1/3 * 0.8) is normalized and halved."""
    weights = posterior(prefix=True, share=0.5)
    torch.testing.assert_close(weights[0], torch.tensor([1 / 2, 1 / 2]))
    torch.testing.assert_close(weights[1], torch.tensor([2 / 3, 1 / 3]))
    torch.testing.assert_close(weights[2], torch.tensor([0.5 / 2.6 + 0.25, 0.8 / 2.6 + 0.25]))


def test_a_long_text_stays_finite_and_exact():
    """2,000 tokens, odds of (5/16)^1000 * 5^1000: far outside of what a float holds."""
    weights = posterior(prefix=True, text=[0] + [2, 0] * 1000 + [0])
    assert weights.isfinite().all()
    odds = 1000 * math.log(0.25 * 0.5 / (0.8 * 0.1)) + math.log(5)
    assert odds > 100 and weights[-1, 0] > 0.999
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(weights)))


def test_a_text_read_in_pieces_is_the_same_text():
    from study.btm import PosteriorEnsemble

    for prefix in (True, False):
        ensemble = PosteriorEnsemble([Fixed(table) for table in TABLES], torch.tensor([0.3, 0.7]), prefix=prefix)
        ids, cache = torch.tensor([[0, 0, 2, 1, 0, 2]]), ensemble.new_cache(1, 6)
        with torch.no_grad():
            parts = [ensemble.read(part, cache=cache)[1] for part in ids.split(2, dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), ensemble.read(ids)[1])
