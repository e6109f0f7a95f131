"""A branch of the seed; --domain, --out_dir and --init_from say which one."""

init_from = "out/cpu/seed"
out_dir = "out/cpu/expert-code"
data_dir = "out/cpu/data"
domain = "code"

max_steps = 400
batch_size = 8
micro_batch_size = 8
sequence_length = 256
learning_rate = 3e-3  # a fifth of the seed's peak: branches that drift too far cannot be averaged (LOG.md)
warmup_steps = 50
eval_interval = 100
save_interval = 200
