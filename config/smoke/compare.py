"""BTX against dense training, sparse upcycling and Branch-Train-Merge, at equal tokens and at equal FLOPs."""

report = "out/smoke/report"
data_dir = "out/smoke/data"
expert = "config/smoke/expert.py"
finetune = "config/smoke/finetune.py"
eval = "config/smoke/eval.py"
dense_learning_rate = 2e-3
upcycle_learning_rate = 2e-3
