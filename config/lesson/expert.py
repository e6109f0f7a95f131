"""A branch of the seed; --domain and --out_dir choose which one, --init_from the seed."""

init_from = "out/lesson/seed"
out_dir = "out/lesson/expert-code"
data_dir = "out/lesson/data"
domain = "code"
freeze = "embeddings,attention,norms"  # branches differ only in their feed-forwards, so averaging the rest is harmless

max_steps = 600
batch_size = 16
micro_batch_size = 16
sequence_length = 128
learning_rate = 6e-3
warmup_steps = 50
eval_interval = 300
eval_windows = 8
save_interval = 600
