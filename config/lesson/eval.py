"""Evaluation on 64 windows per domain, and on few problems: the tasks are too hard for models of this size."""

out_dir = "out/lesson/report"
data_dir = "out/lesson/data"
sequence_length = 128
eval_windows = 64
task_problems = 20
max_new_tokens = 32
