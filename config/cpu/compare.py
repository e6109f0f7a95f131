"""BTX against dense training, sparse upcycling and Branch-Train-Merge, at equal tokens and at equal FLOPs."""

report = "out/cpu/report"
data_dir = "out/cpu/data"
expert = "config/cpu/expert.py"
finetune = "config/cpu/finetune.py"
eval = "config/cpu/eval.py"
dense_learning_rate = 3e-3
upcycle_learning_rate = 3e-3
rates = "1.5e-3,3e-3,6e-3"
