"""Branch-Train-Merge (Li et al. 2022, arXiv 2208.03306): use the experts as an ensemble, without further training.

    python -m study.btm config/cpu/eval.py --experts=out/cpu/expert-code,out/cpu/expert-math,out/cpu/seed

adds a row per ensemble to the results.json that eval.py writes.

Each expert predicts the next token, and their probabilities are averaged with weights that follow the text so far:

    p(x_t | x_<t) = sum_e w_e,t p_e(x_t | x_<t)

There are two ways to choose weights. NearestEnsemble is the BTX paper's: the k experts whose training text is nearest
by tf-idf count equally. PosteriorEnsemble is Bayes' rule, the unknown being the expert: from the last token alone, as
in BTM's code, from the whole text so far, or in between, with the fixed share of Herbster and Warmuth.

Reading order: Ensemble, NearestEnsemble, PosteriorEnsemble.
"""

import dataclasses
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from common.config import key, parse, split_list
from common.corpus import Corpus
from common.device import pick_device
from common.errors import UserError, command
from common.hf import same_tokenizer
from common.run import hash_of, history_of, mixtures_of, parent_of
from eval import Entry, EvalConfig, evaluate, read_domains
from model import ModelConfig, Output, Transformer
from train import validation_scores

SHARES = (0.001, 0.003, 0.01, 0.03, 0.1)  # of its weights, which an ensemble may return to the prior at each token

# ---- the ensemble ----


class EnsembleCache:
    """What an ensemble of N experts knows about B texts so far.

    caches: the experts' key-value caches. evidence: (B, 1, N), summed over the text; each subclass defines its own.
    expected: N tensors (B, V), log-probabilities of the next token; 0 before the first, which no expert predicts.
    """

    def __init__(self, caches, batch_size, vocab_size, device):
        self.caches = caches
        self.evidence = torch.zeros(batch_size, 1, len(caches), device=device)
        self.expected = [torch.zeros(batch_size, vocab_size, device=device) for _ in caches]

    def add(self, evidence):
        """Add the evidence from T tokens, (B, T, N). Returns the sums up to and including each token, (B, T, N)."""
        sums = self.evidence + evidence.cumsum(dim=1)
        self.evidence = sums[:, -1:]
        return sums


class Ensemble(nn.Module):
    """N models that predict as one. Has the forward pass, cache and counts of model.Transformer.

    k: how many of them predict each token. Subclasses define in `log_weights` which ones, and how much each counts.
    readings: the models' outputs on whole texts, which do not depend on the weights; ensembles of the same models may
    share them, and then each text is read only once for all of them.
    """

    def __init__(self, models, k):
        super().__init__()
        self.models = nn.ModuleList(models)
        self.config, self.k, self.readings = models[0].config, k, {}

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

    def log_weights(self, ids, likelihood, cache):
        """The log weights of the experts in predicting each token's successor, (B, T, N) in fp32.

        ids: (B, T). likelihood: (B, T, N), the log-probability that each expert gave each id; 0 for a text's first.
        cache: an EnsembleCache, which is updated.
        """
        raise NotImplementedError

    def ask(self, ids, targets, cache):
        """Each expert's log-probabilities after each token, N tensors (B, T, V) in fp32, or with targets (B, T, 1); and
        the log-probability that each had given the ids themselves, (B, T, N)."""
        experts, likelihood = [], []
        for n, model in enumerate(self.models):
            log_p = model(ids, cache=cache.caches[n]).logits.float().log_softmax(dim=-1)  # (B, T, V)
            first = cache.expected[n].gather(-1, ids[:, :1])  # (B, 1)
            rest = log_p[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)  # (B, T - 1)
            likelihood.append(torch.cat((first, rest), dim=1))
            cache.expected[n] = log_p[:, -1].clone()  # a view would keep all of log_p
            experts.append(log_p if targets is None else log_p.gather(-1, targets.unsqueeze(-1)))
        return experts, torch.stack(likelihood, dim=-1)

    def read(self, ids, targets=None, cache=None):
        """Each expert's log-probabilities, N tensors (B, T, V) in fp32, and the log weights (B, T, N).

        With targets (B, T) only the targets' are kept, (B, T, 1), and remembered if there is no cache.
        """
        whole = targets is not None and cache is None
        cache = cache or self.new_cache(*ids.shape)
        if not whole:
            experts, likelihood = self.ask(ids, targets, cache)
        else:
            text = ids.shape, *(part.cpu().numpy().tobytes() for part in (ids, targets))
            if text not in self.readings:
                self.readings[text] = self.ask(ids, targets, cache)
            experts, likelihood = self.readings[text]
        return experts, self.log_weights(ids, likelihood, cache)

    def weigh(self, ids, targets=None, cache=None):
        """The ensemble's log-probabilities after each of ids: (B, T, V) in fp32, or (B, T, 1) of the targets alone."""
        experts, log_weights = self.read(ids, targets, cache)
        weighted = [log_p + log_weights[..., n : n + 1] for n, log_p in enumerate(experts)]
        return functools.reduce(torch.logaddexp, weighted)  # (B, T, V), or (B, T, 1) of the targets

    def forward(self, ids, targets=None, cache=None):
        """As Transformer's; `logits` are log-probabilities, (B, T, V) in fp32, and every target counts."""
        log_p = self.weigh(ids, targets, cache)
        if targets is None:
            return Output(log_p, None, None, 0.0, None, {})
        losses = -log_p.squeeze(-1)  # (B, T)
        return Output(None, losses.mean(), losses, 0.0, None, {})

    def new_cache(self, batch_size, length):
        caches = [model.new_cache(batch_size, length) for model in self.models]
        return EnsembleCache(caches, batch_size, self.config.vocab_size, next(self.parameters()).device)

    def num_parameters(self):
        """(active, total): a token uses k experts, and N are in memory."""
        sizes = [model.num_parameters()[1] for model in self.models]
        return self.k * max(sizes), sum(sizes)


# ---- weights by tf-idf ----


class NearestEnsemble(Ensemble):
    """The k experts nearest to the text so far weigh 1 / k each, the others 0 (Sukhbaatar et al. 2024).

    Nearest means the largest cosine between tf-idf vectors over token ids: the text's and the mean of an expert's
    training text.
    """

    def __init__(self, models, profiles, k):
        super().__init__(models, k)
        self.register_buffer("profiles", profiles)  # (V, N), from expert_profiles

    def log_weights(self, ids, likelihood, cache):
        similarity = cache.add(self.profiles[ids])  # (B, T, N)
        nearest = similarity.topk(self.k, dim=-1).indices  # (B, T, k)
        return torch.full_like(similarity, -math.inf).scatter(-1, nearest, -math.log(self.k))


def term_counts(corpus, domain, vocab_size, length=256, windows=500):
    """(windows, V) token counts in up to `windows` windows, spread evenly over a domain's training text."""
    rows, _ = corpus.windows(domain, "train", length, windows)
    return torch.zeros(len(rows), vocab_size).scatter_add_(1, rows, torch.ones_like(rows, dtype=torch.float32))


def expert_profiles(mixtures, counts):
    """Each expert's mean training tf-idf vector, scaled so that a dot product with term counts ranks by cosine.

    mixtures: for each expert, {domain: weight}. counts: {domain: (windows, V)}. Returns (V, N).
    """
    windows = torch.cat(list(counts.values()))
    idf = torch.log(len(windows) / (1 + (windows > 0).sum(dim=0)))  # (V,)
    mean = {domain: F.normalize(c * idf, dim=1).mean(dim=0) for domain, c in counts.items()}
    profiles = torch.stack([sum(w * mean[domain] for domain, w in mixture.items()) for mixture in mixtures])
    # the text's own norm is the same for every expert, so leaving it out does not change the order
    return (idf * F.normalize(profiles, dim=1)).T


def load_nearest(folders, corpus, k):
    """Load expert checkpoints as a NearestEnsemble on the CPU; profiles come from their domains' training text."""
    mixtures = mixtures_of(folders)
    models = [Transformer.from_pretrained(folder) for folder in folders]
    domains = dict.fromkeys(domain for mixture in mixtures for domain in mixture)
    counts = {domain: term_counts(corpus, domain, models[0].config.vocab_size) for domain in domains}
    return NearestEnsemble(models, expert_profiles(mixtures, counts), k)


# ---- weights by Bayes' rule ----


class PosteriorEnsemble(Ensemble):
    """The posterior over experts given the text so far, by Bayes' rule (Li et al. 2022; Gururangan et al. 2022).

        prefix=False  w_e,t ~ prior_e p_e(x_{t-1} | x_<t-1)         as in BTM's code: the last token's likelihood alone
        prefix=True   w_e,t ~ prior_e prod_{s<t} p_e(x_s | x_<s)    as in a textbook

    The product over a long text gets so sure of itself that it never changes its mind. With a share, that part of the
    weights returns to the prior after each token (fixed share: Herbster and Warmuth 1998, Tracking the Best Expert):

        w_e,t ~ (1 - share) w'_e,t + share prior_e    with    w'_e,t ~ w_e,t-1 p_e(x_{t-1} | x_<t-1)

    No expert predicts a text's first token, so the prior alone weighs the experts right after it.
    prior: (N,) probabilities.
    """

    def __init__(self, models, prior, prefix=False, share=0.0):
        super().__init__(models, len(models))
        self.register_buffer("log_prior", prior.log().log_softmax(dim=0))  # (N,)
        self.prefix, self.share = prefix, share

    def log_weights(self, ids, likelihood, cache):
        if not self.prefix:
            return (self.log_prior + likelihood).log_softmax(dim=-1)
        share = torch.tensor(float(self.share))
        back = self.log_prior + share.log()  # (N,)
        log_w = self.log_prior + cache.evidence[:, 0]  # (B, N); a text's evidence starts at 0
        found = []
        for log_p in likelihood.unbind(dim=1):  # (B, N) each
            log_w = (log_w + log_p).log_softmax(dim=-1)
            log_w = torch.logaddexp(log_w + (-share).log1p(), back)
            found.append(log_w)
        cache.evidence = (log_w - self.log_prior).unsqueeze(1)
        return torch.stack(found, dim=1)  # (B, T, N)


def cached_prior(log_posteriors, decay=0.3):
    """(N,): the exponential moving average of posteriors over a domain's held-out windows, in order.

    log_posteriors: (windows, N), at each window's end, under a uniform prior. The average starts uniform and serves as
    the next window's prior: prior = decay * posterior + (1 - decay) * prior. BTM's code also gives the newest posterior
    a weight of 0.3 (pandas' ewm with alpha = 0.3).
    """
    prior = torch.full_like(log_posteriors[0], 1 / log_posteriors.size(1))  # (N,)
    for log_posterior in log_posteriors:
        posterior = (prior.log() + log_posterior).softmax(dim=0)
        prior = decay * posterior + (1 - decay) * prior
    return prior


@torch.no_grad()
def held_out_prior(ensemble, corpus, length, windows=100):
    """(N,): the mean over all domains of their cached priors, each from up to `windows` windows of validation text.

    BTM's own evaluation uses the prior of the domain at hand, so it is told the domain. Here no model is told, so one
    prior serves all domains. ensemble: a PosteriorEnsemble with a uniform prior.
    """
    priors = []
    for domain in corpus.domains:
        ids, _ = corpus.windows(domain, "val", min(length, ensemble.max_length), windows)  # (windows, T)
        parts = ids.to(ensemble.log_prior.device).split(16)
        priors.append(cached_prior(torch.cat([ensemble.read(part, targets=part)[1][:, -1] for part in parts])))
    return torch.stack(priors).mean(dim=0)


@torch.no_grad()
def best_share(ensemble, corpus, length, windows=100):
    """The one of SHARES with the fewest bits per byte of validation text: the mean over windows of one domain (up to
    `windows` of each) and windows that switch domain (so many in total). ensemble: a PosteriorEnsemble by prefix."""
    length = min(length, ensemble.max_length)
    pure = {domain: corpus.windows(domain, "val", length, windows) for domain in corpus.domains}
    kinds = [kind for kind in (pure, corpus.spliced("val", length, windows)) if kind]

    def score(share):
        ensemble.share = share
        return sum(validation_scores(ensemble, kind, corpus.token_bytes)["bpb"]["avg"] for kind in kinds)

    return min(SHARES, key=score)


def load_posterior(folders, corpus, length, device, readings, windows, prefix=False, share=False):
    """Load expert checkpoints as a PosteriorEnsemble.

    By the last token it uses held_out_prior's prior; by the whole text a uniform one and, if `share`, best_share's
    share. Both are found on `device`, from `windows` windows of `length` tokens. readings: Ensemble's, to share.
    """
    models = [Transformer.from_pretrained(folder) for folder in folders]
    uniform = torch.full((len(models),), 1 / len(models))
    ensemble = PosteriorEnsemble(models, uniform, prefix).to(device)
    ensemble.readings = readings
    if not prefix:
        return PosteriorEnsemble(models, held_out_prior(ensemble, corpus, length, windows))
    if share:
        ensemble.share = best_share(ensemble, corpus, length, windows)
        ensemble.settings = {"share": ensemble.share}
    return ensemble


# ---- the script ----

# rows of results.json: name -> function(folders, corpus, tokens per window, device, readings, windows)
ENSEMBLES = {
    "btm-top1": lambda folders, corpus, *_: load_nearest(folders, corpus, 1),
    "btm-top2": lambda folders, corpus, *_: load_nearest(folders, corpus, 2),
    "btm-posterior": load_posterior,
    "btm-posterior-prefix": functools.partial(load_posterior, prefix=True),
    "btm-share": functools.partial(load_posterior, prefix=True, share=True),
}


@dataclasses.dataclass
class EnsembleConfig(EvalConfig):
    """Evaluate experts as the ensembles of Branch-Train-Merge. All keys of eval.py except --model, and:"""

    experts: str = key("", "checkpoint folders of the experts, separated by commas")
    suffix: str = key("", "text to add to the rows' names, to tell sets of experts apart")


def main():
    config = parse(EnsembleConfig)
    folders = split_list(config.experts)
    if config.model or not folders:
        raise UserError("give the ensembles' experts as --experts=DIR,DIR, and no --model, which is for eval.py")
    if len(folders) < 2:
        raise UserError(f"--experts={config.experts}: top-2 needs at least 2 experts")
    corpus = Corpus(config.data_dir, config.domains)
    # the experts' weights must not come from unread text either
    read = Corpus(config.data_dir, ",".join(read_domains(corpus, config)))
    same_tokenizer([config.data_dir, *folders])
    sizes = {folder: ModelConfig.from_pretrained(folder).vocab_size for folder in folders}
    if len(set(sizes.values())) > 1:
        raise UserError(f"--experts have vocabularies of different sizes, impossible to average ({sizes}); name others")
    corpus.check_vocabulary(folders[0], sizes[folders[0]])
    device = pick_device(config.device, config.threads)
    readings = {}
    ids = [parent_of(folder)[0] for folder in folders]

    def load(name):
        windows = min(100, 2 * config.eval_windows)
        ensemble = ENSEMBLES[name](folders, read, config.sequence_length, device, readings, windows)
        ensemble.readings = readings
        return ensemble

    entries = []
    for name in ENSEMBLES:
        identity = hash_of([name, ids])
        entries.append(Entry(name + config.suffix, identity, history_of(folders), functools.partial(load, name)))
    evaluate(config, corpus, entries)


if __name__ == "__main__":
    command(main)
