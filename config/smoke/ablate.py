"""The variants of mixing, routing and finetuning, each from the experts that the pipeline trained."""

steps = 4
long_steps = 8
seeds = 1
