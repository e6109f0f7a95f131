"""A branch of the seed; --domain and --out_dir choose which one, --init_from the seed."""

init_from = "out/gpu/seed"
out_dir = "out/gpu/expert-code"
data_dir = "out/gpu/data"
domain = "code"
freeze = "embeddings,attention,norms"  # then averaging what branches share does no harm (docs/mixing.md)

max_steps = 940  # 62 M tokens
batch_size = 64
micro_batch_size = 64
sequence_length = 1024
learning_rate = 1.2e-3  # config/cpu's, scaled down for the larger width
min_learning_rate = 0.02
warmup_steps = 50
eval_interval = 200
eval_windows = 64
save_interval = 250

device = "cuda"  # if torch does not fit the driver, fail instead of running on the CPU
