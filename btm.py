"""Branch-Train-Merge (Li et al. 2022) as the BTX paper runs it: the experts as an ensemble, routed by tf-idf.

For each token the text so far is compared with each expert's training text: the cosine between tf-idf vectors
over token ids. The k nearest experts each predict the next token, and their probabilities are averaged.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import checkpoint
from configurator import UserError
from data.loader import cut, parse_mixture, read_tokens
from model import Output


def term_counts(data_dir, domain, vocab_size, length=256, windows=500):
    """(windows, V) token counts of windows spread evenly over a domain's training text."""
    tokens = read_tokens(data_dir, domain, "train", length)
    rows, _ = cut(tokens, np.linspace(0, len(tokens) - length - 1, windows).astype(int), length)
    return torch.zeros(windows, vocab_size).scatter_add_(1, rows, torch.ones_like(rows, dtype=torch.float32))


def expert_profiles(mixtures, counts):
    """Each expert's mean training tf-idf vector, scaled so that a dot product with term counts ranks by cosine.

    mixtures: for each expert {domain: weight}. counts: {domain: (windows, V)}. Returns (V, N).
    """
    windows = torch.cat(list(counts.values()))
    idf = torch.log(len(windows) / (1 + (windows > 0).sum(dim=0)))  # (V,)
    mean = {domain: F.normalize(c * idf, dim=1).mean(dim=0) for domain, c in counts.items()}
    profiles = torch.stack([sum(w * mean[domain] for domain, w in mixture.items()) for mixture in mixtures])
    # the text's own norm is the same for every expert, so leaving it out does not change the order
    return (idf * F.normalize(profiles, dim=1)).T


class EnsembleCache:
    """The experts' key-value caches, and each expert's similarity to the text so far, (B, N)."""

    def __init__(self, caches, similarity):
        self.caches, self.similarity = caches, similarity


class Ensemble(nn.Module):
    """N models that predict as one. Has the forward pass, cache and counts of model.Transformer."""

    def __init__(self, models, profiles, k):
        super().__init__()
        self.models = nn.ModuleList(models)
        self.register_buffer("profiles", profiles)  # (V, N)
        self.config, self.k = models[0].config, k

    @property
    def compute_dtype(self):
        return self.models[0].compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype):
        for model in self.models:
            model.compute_dtype = dtype

    @property
    def max_length(self):
        return min(model.max_length for model in self.models)

    def weights(self, ids, cache=None):
        """(B, T, N): 1 / k for the k experts nearest to the text up to and including each token, else 0."""
        similarity = self.profiles[ids].cumsum(dim=1)  # (B, T, N)
        if cache is not None:
            similarity = similarity + cache.similarity.unsqueeze(1)
            cache.similarity = similarity[:, -1]
        nearest = similarity.topk(self.k, dim=-1).indices  # (B, T, k)
        return torch.zeros_like(similarity).scatter(-1, nearest, 1 / self.k)

    def forward(self, ids, targets=None, cache=None):
        """As Transformer's; `logits` are the logarithms of the averaged probabilities, (B, T, V) in fp32."""
        weights = self.weights(ids, cache)  # (B, T, N)
        caches = cache.caches if cache is not None else [None] * len(self.models)
        probabilities = 0
        for n, model in enumerate(self.models):
            p = model(ids, cache=caches[n]).logits.float().softmax(dim=-1)  # (B, T, V)
            probabilities = probabilities + weights[..., n : n + 1] * p
        log_probabilities = probabilities.log()
        loss = None if targets is None else F.nll_loss(log_probabilities.flatten(0, 1), targets.flatten())
        return Output(log_probabilities, loss, 0.0, None, {})

    def new_cache(self, batch_size, length):
        caches = [model.new_cache(batch_size, length) for model in self.models]
        return EnsembleCache(caches, torch.zeros(batch_size, len(self.models), device=self.profiles.device))

    def num_parameters(self):
        """(active, total): k experts run for a token, N are kept."""
        sizes = [model.num_parameters()[1] for model in self.models]
        return self.k * max(sizes), sum(sizes)


def training_mixture(folder, data_dir):
    """{domain: weight} that a checkpoint was trained on, from its run.json."""
    recipe = (checkpoint.read_run(folder) or {}).get("recipe", {})
    if "domain" not in recipe.get("config", {}):
        raise UserError(f"{folder} does not say what it was trained on (no training run.json), which is needed here")
    text = recipe["config"]["domain"]
    return parse_mixture(",".join(recipe["data"]) if text == "all" else text, data_dir)  # all that there was then


def load_ensemble(folders, data_dir, k):
    """Read expert checkpoints into an Ensemble on the CPU; profiles come from their domains' training text."""
    if len(folders) < k:
        raise UserError(f"--experts={','.join(folders)}: top-{k} needs at least {k} experts")
    mixtures = [training_mixture(folder, data_dir) for folder in folders]
    models = [checkpoint.load_model(folder) for folder in folders]
    domains = dict.fromkeys(domain for mixture in mixtures for domain in mixture)
    counts = {domain: term_counts(data_dir, domain, models[0].config.vocab_size) for domain in domains}
    return Ensemble(models, expert_profiles(mixtures, counts), k)
