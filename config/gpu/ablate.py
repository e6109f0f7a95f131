"""The variants of mixing, routing and finetuning, each from the experts that the pipeline trained."""

out_dir = "out/gpu/ablate"
report = "out/gpu/report"
finetune = "config/gpu/finetune.py"
eval = "config/gpu/eval.py"
data_dir = "out/gpu/data"
steps = 325
long_steps = 1300
seeds = 2
