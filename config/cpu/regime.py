"""BTX minus dense training at several widths and budgets."""

out_dir = "out/cpu/regime"
report = "out/cpu/report"
data_dir = "out/cpu/data"
seed = "config/cpu/seed.py"
expert = "config/cpu/expert.py"
finetune = "config/cpu/finetune.py"
eval = "config/cpu/eval.py"
