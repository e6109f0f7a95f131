"""Evaluation on 64 windows a domain; the tasks are beyond models of this size, so few problems are asked."""

out_dir = "out/lesson/report"
data_dir = "out/lesson/data"
sequence_length = 128
eval_windows = 64
task_problems = 20
max_new_tokens = 32
