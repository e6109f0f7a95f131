"""The variants of mixing, routing and finetuning, each from the experts that the pipeline trained."""

steps = 150
long_steps = 600
seeds = 2
