"""The variants of mixing, routing and finetuning, each from the experts that the pipeline trained."""

steps = 325
long_steps = 1300
seeds = 2
