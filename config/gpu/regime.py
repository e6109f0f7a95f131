"""BTX minus dense training at several widths and budgets."""

out_dir = "out/gpu/regime"
report = "out/gpu/report"
data_dir = "out/gpu/data"
seed = "config/gpu/seed.py"
expert = "config/gpu/expert.py"
mix = "config/gpu/mix.py"
finetune = "config/gpu/finetune.py"
eval = "config/gpu/eval.py"
widths = "256,512,768"
scales = "0.25,0.5,1"
largest = 768.0
dense_learning_rate = 2e-4
