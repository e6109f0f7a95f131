"""Rotary position embedding (Su et al. 2021), and how published models stretch it to longer texts.

Sizes: T positions, K head_dim. Hugging Face's convention: feature i is paired with feature i + K / 2.
"""

import math

import torch


def linear(frequencies, factor):
    """Position interpolation (Chen et al. 2023): every angle is `factor` times smaller."""
    return frequencies / factor


def llama3(frequencies, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings):
    """Llama 3.1's: divide the low frequencies by `factor`, keep the high ones, and slide from one to the other between.

    turns: how often a feature goes round within the length that the model was trained on.
    """
    turns = original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / factor


SCALINGS = {
    "linear": (linear, ("factor",)),
    "llama3": (llama3, ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")),
}


def rotary_table(config):
    """cos and sin of every position's angles, each (max_position_embeddings, K / 2), on the CPU. config: a
    model.ModelConfig."""
    dimensions = torch.arange(0, config.head_dim, 2, device="cpu").float()
    frequencies = config.rope_theta ** (-dimensions / config.head_dim)
    if config.rope_scaling:
        settings = {**config.rope_scaling}
        scale, _ = SCALINGS[settings.pop("rope_type")]
        frequencies = scale(frequencies, **settings)
    angles = torch.arange(config.max_position_embeddings, device="cpu").float()[:, None] * frequencies
    return angles.cos(), angles.sin()
