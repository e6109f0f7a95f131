"""A branch at toy size; --domain and --out_dir choose which one, --init_from the seed."""

init_from = "out/smoke/seed"
out_dir = "out/smoke/expert-code"
data_dir = "out/smoke/data"
domain = "code"

max_steps = 30
batch_size = 8
micro_batch_size = 8
sequence_length = 128
learning_rate = 2e-3
warmup_steps = 5
eval_interval = 15
eval_windows = 4
save_interval = 15
