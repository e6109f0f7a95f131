"""The variants of mixing, routing and finetuning, all from the pipeline's experts."""

steps = 325
long_steps = 1300
seeds = 2
