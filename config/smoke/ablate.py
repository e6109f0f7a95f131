"""The variants of mixing, routing and finetuning, each from the experts that the pipeline trained."""

out_dir = "out/smoke/ablate"
report = "out/smoke/report"
finetune = "config/smoke/finetune.py"
eval = "config/smoke/eval.py"
data_dir = "out/smoke/data"
steps = 4
long_steps = 8
seeds = 1
