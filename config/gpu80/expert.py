"""A branch of the seed; --domain, --out_dir and --init_from say which one."""

init_from = "out/gpu80/seed"
out_dir = "out/gpu80/expert-code"
data_dir = "out/gpu80/data"
domain = "code"
freeze = "embeddings,attention,norms"  # averaging what branches share then harms nothing (docs/mixing.md)

max_steps = 1560  # 409 M tokens
batch_size = 256
micro_batch_size = 64
sequence_length = 1024
learning_rate = 5e-4  # as config/cpu's, over how much wider this is
min_learning_rate = 0.02
warmup_steps = 50
eval_interval = 200
eval_windows = 64
save_interval = 250

device = "cuda"  # a wheel that does not fit the driver is an error, not a run on the CPU
