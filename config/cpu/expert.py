"""A branch of the seed; --domain, --out_dir and --init_from say which one."""

init_from = "out/cpu/seed"
out_dir = "out/cpu/expert-code"
data_dir = "out/cpu/data"
domain = "code"

max_steps = 800
batch_size = 8
micro_batch_size = 8
sequence_length = 256
learning_rate = 6e-3  # below the seed's peak; lower still keeps experts closer together, and learns less (LOG.md)
warmup_steps = 50
eval_interval = 200
save_interval = 200
