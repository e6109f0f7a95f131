"""The variants of mixing, routing and finetuning, each from the experts that the pipeline trained."""

steps = 300
long_steps = 1200
seeds = 2
