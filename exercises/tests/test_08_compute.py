"""Counted by running the model and writing down the shape of every matrix product."""

import torch
from reference import config, random_model
from torch.utils.flop_counter import FlopCounterMode


def runs(steps=(100, 100, 50)):
    from exercises.compute import Run

    mixture = config(num_local_experts=3, num_experts_per_tok=2)
    shapes = [config(), config(), mixture]
    return [Run(shape, count, 8, 32) for shape, count in zip(shapes, steps, strict=True)]


def test_a_dense_model_by_hand():
    """D 16, F 24, V 24, two layers with 256 + 128 + 128 + 256 weights in attention and 3 * 16 * 24 behind it."""
    from exercises.compute import training_flops

    assert training_flops(config(tie_word_embeddings=True), 32) == 6 * (2 * 1920 + 384) + 12288
    assert training_flops(config(tie_word_embeddings=False), 32) == 6 * (2 * 1920 + 384) + 12288


def test_a_mixture_by_hand():
    """Two of three experts run, and a router of 3 * 16 chooses them."""
    from exercises.compute import training_flops

    shape = config(num_local_experts=3, num_experts_per_tok=2)
    assert training_flops(shape, 32) == 6 * (2 * (768 + 2 * 1152 + 48) + 384) + 12288


def test_torch_counts_the_same_matrix_products():
    from exercises.compute import training_flops

    model, ids = random_model(tie_word_embeddings=True), torch.zeros(1, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(ids, ids).loss.backward()
    products = sum(value for name, value in counter.get_flop_counts()["Global"].items() if "mm" in str(name))
    counted = products / 32
    assert abs(training_flops(model.config, 32) - counted) < 0.02 * counted


def test_data_matched_steps_have_the_same_tokens():
    from exercises.compute import Run, matched_steps

    by_data, _ = matched_steps(runs(), Run(config(), 0, 16, 16))
    assert by_data == 250
    assert matched_steps(runs((7, 0, 0)), Run(config(), 0, 8, 64))[0] == 4  # 3.5 rounds to the even number


def test_compute_matched_steps_are_more():
    """Per token, dense 6 * 4224 + 12288 = 37632 and mixture 6 * 6624 + 12288 = 52032: 200 + 50 * 1.3826 steps."""
    from exercises.compute import Run, matched_steps

    by_data, by_flops = matched_steps(runs(), Run(config(), 0, 8, 32))
    assert (by_data, by_flops) == (250, 269)
