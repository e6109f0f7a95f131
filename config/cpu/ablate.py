"""The variants of mixing, routing and finetuning, each from the experts that the pipeline trained."""

steps = 70
long_steps = 210
seeds = 2
