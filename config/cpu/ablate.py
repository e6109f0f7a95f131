"""The variants of mixing, routing and finetuning, each from the experts that the pipeline trained."""

out_dir = "out/cpu/ablate"
report = "out/cpu/report"
finetune = "config/cpu/finetune.py"
eval = "config/cpu/eval.py"
data_dir = "out/cpu/data"
steps = 300
long_steps = 1200
seeds = 2
