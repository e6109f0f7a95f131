"""The mixture's finetuning on all domains."""

init_from = "out/gpu/mixed"
out_dir = "out/gpu/btx"
data_dir = "out/gpu/data"
domain = "code,math,wiki"

max_steps = 1300  # 85 M tokens
batch_size = 64
micro_batch_size = 64  # 15 GiB, counted by --dry_run=True
sequence_length = 1024
learning_rate = 5e-4
warmup_steps = 50
eval_interval = 100
eval_windows = 64
save_interval = 250

device = "cuda"  # a wheel that does not fit the driver is an error, not a run on the CPU
