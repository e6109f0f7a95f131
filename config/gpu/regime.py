"""BTX minus dense training at several widths and budgets."""

out_dir = "out/gpu/regime"
report = "out/gpu/report"
data_dir = "out/gpu/data"
seed = "config/gpu/seed.py"
expert = "config/gpu/expert.py"
mix = "config/gpu/mix.py"
finetune = "config/gpu/finetune.py"
eval = "config/gpu/eval.py"
widths = "192,384"
scales = "0.25,0.5,1"
largest = 192.0  # larger runs take longest
dense_learning_rate = 5e-4
