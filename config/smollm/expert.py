"""A branch of SmolLM2-135M; run.sh sets its domain, seed and output folder."""

init_from = "hf:HuggingFaceTB/SmolLM2-135M"
out_dir = "out/smollm/expert-code"
data_dir = "out/smollm/data"
domain = "code"

max_steps = 4000  # 1.05 B tokens
batch_size = 128  # 262,144 tokens
micro_batch_size = 16
sequence_length = 2048
learning_rate = 3e-4  # the best of 1e-4, 3e-4 and 1e-3 after 8 thousand tokens (LOG.md)
warmup_steps = 100
eval_interval = 500
eval_windows = 32
save_interval = 500
