"""Evaluation on 256 windows per domain; lm_eval asks the questions (docs/real.md)."""

out_dir = "out/smollm/report"
data_dir = "out/smollm/data"
sequence_length = 2048
eval_windows = 256
spliced_windows = 0
