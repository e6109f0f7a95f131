"""Evaluation on 256 windows of 1,024 tokens and 500 problems."""

out_dir = "out/gpu80/report"
data_dir = "out/gpu80/data"
sequence_length = 1024
eval_windows = 256
task_problems = 500
device = "cuda"
dtype = "bfloat16"
