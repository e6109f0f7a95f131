"""Equal compute: how long a dense model may train for the cost of BTX."""

import dataclasses

from common.hf import expected_tensors, group_of


@dataclasses.dataclass
class Run:
    """A training run: the shape of its model (a ModelConfig), and its steps, batch size and sequence length."""

    shape: object
    steps: int
    batch_size: int
    sequence_length: int

    @property
    def tokens(self):
        return self.steps * self.batch_size * self.sequence_length


def training_flops(shape, sequence_length):
    """Training FLOPs of one token, with nothing frozen:

        6 * (weights in matmuls that one token uses) + 12 L D T

    Every weight in a matmul is multiplied and added once in the forward pass, once for the gradient of its input and
    once for its own gradient: 2 FLOPs each. The head is a matmul, tied to the embeddings or not; norms are not. One
    token uses num_experts_per_tok of num_local_experts feed-forwards, and all of everything else, routers included.
    12 L D T is for attention's two products of activations, in L layers of width D over sequences of T tokens.

    shape: a ModelConfig, dense or mixed. expected_tensors(shape): {name: shape} of its tensors, with separate ones for
    each expert and without a tied head. group_of(name): "embeddings", "head", "attention", "norms", "router" or
    "feed-forward".
    """
    weights = 0
    for name, (rows, *columns) in expected_tensors(shape).items():
        if not columns or (group_of(name) == "embeddings" and not shape.tie_word_embeddings):
            continue
        share = shape.num_experts_per_tok / shape.num_local_experts if ".experts." in name else 1
        weights += rows * columns[0] * share
    return round(6 * weights) + 12 * shape.num_hidden_layers * shape.hidden_size * sequence_length


def matched_steps(runs, dense):
    """How many steps the dense run may take, as a whole number.

    runs: everything that BTX trained after the seed, a list of Run. dense: the Run that continues from the same seed;
    its own `steps` do not matter. Returns (data-matched steps, for the same number of tokens; compute-matched steps,
    for the same training FLOPs), each rounded to the nearest.
    """
    per_step = dense.batch_size * dense.sequence_length
    flops = sum(run.tokens * training_flops(run.shape, run.sequence_length) for run in runs)
    by_data = sum(run.tokens for run in runs) / per_step
    by_flops = flops / (training_flops(dense.shape, dense.sequence_length) * per_step)
    return round(by_data), round(by_flops)
