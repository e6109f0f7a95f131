"""BTX minus dense training at several widths and budgets."""

out_dir = "out/smoke/regime"
report = "out/smoke/report"
data_dir = "out/smoke/data"
seed = "config/smoke/seed.py"
expert = "config/smoke/expert.py"
mix = "config/smoke/mix.py"
finetune = "config/smoke/finetune.py"
eval = "config/smoke/eval.py"
widths = "16,32"
scales = "0.2"
dense_learning_rate = 2e-3
