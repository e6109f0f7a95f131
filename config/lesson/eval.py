"""Evaluation on 64 windows a domain and 100 problems a task."""

out_dir = "out/lesson/report"
data_dir = "out/lesson/data"
sequence_length = 128
eval_windows = 64
task_problems = 100
max_new_tokens = 64
