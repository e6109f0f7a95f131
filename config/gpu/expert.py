"""A branch of GPT-2's size; --domain, --out_dir and --init_from say which one."""

init_from = "out/gpu/seed"
out_dir = "out/gpu/expert-code"
data_dir = "out/gpu/data"
domain = "code"

max_steps = 500
batch_size = 64
micro_batch_size = 32
sequence_length = 1024
learning_rate = 2e-4  # far below the seed's: branches that drift too far cannot be averaged
warmup_steps = 50
eval_interval = 100
eval_windows = 64
save_interval = 250

device = "cuda"  # a wheel that does not fit the driver is an error, not a run on the CPU
