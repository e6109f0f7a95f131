"""Evaluation on 128 windows per domain and 80 problems per task: more would take longer than training a branch."""

out_dir = "out/cpu/report"
data_dir = "out/cpu/data"
sequence_length = 256
eval_windows = 128
task_problems = 80
