"""Evaluation on 128 windows a domain and 80 problems a task: more would take longer than a branch."""

out_dir = "out/cpu/report"
data_dir = "out/cpu/data"
sequence_length = 256
eval_windows = 128
task_problems = 80
