"""The variants of mixing, routing and finetuning, all from the pipeline's experts."""

steps = 70
long_steps = 210
seeds = 2
