"""The variants of mixing, routing and finetuning, all from the pipeline's experts."""

steps = 4
long_steps = 8
seeds = 1
