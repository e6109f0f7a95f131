"""A branch of the seed; --domain, --out_dir and --init_from say which one."""

init_from = "out/gpu/seed"
out_dir = "out/gpu/expert-code"
data_dir = "out/gpu/data"
domain = "code"

max_steps = 430  # 28 M tokens
batch_size = 64
micro_batch_size = 64
sequence_length = 1024
learning_rate = 5e-4  # a fifth of the seed's peak, as in config/cpu: branches that drift too far cannot be averaged
warmup_steps = 50
eval_interval = 100
eval_windows = 64
save_interval = 250

device = "cuda"  # a wheel that does not fit the driver is an error, not a run on the CPU
