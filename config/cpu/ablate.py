"""The variants of mixing, routing and finetuning, each from the experts that the pipeline trained."""

steps = 140
long_steps = 420
seeds = 2
