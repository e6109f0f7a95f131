"""Evaluation at toy size."""

out_dir = "out/smoke/report"
data_dir = "out/smoke/data"
sequence_length = 128
eval_windows = 8
task_problems = 8
max_new_tokens = 16
spliced_windows = 48
