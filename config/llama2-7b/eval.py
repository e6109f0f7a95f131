"""Evaluation on 256 windows per domain; lm_eval asks the questions (README.md)."""

out_dir = "out/llama2-7b/report"
data_dir = "out/llama2-7b/data"
sequence_length = 4096
eval_windows = 256
device = "cuda"
dtype = "bfloat16"
