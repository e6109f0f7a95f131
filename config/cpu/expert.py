"""A branch of the seed; --domain and --out_dir choose which one, --init_from the seed."""

init_from = "out/cpu/seed"
out_dir = "out/cpu/expert-code"
data_dir = "out/cpu/data"
domain = "code"
freeze = "embeddings,attention,norms"  # then averaging what branches share does no harm (docs/mixing.md)

max_steps = 400
batch_size = 8
micro_batch_size = 8
sequence_length = 256
learning_rate = 1.2e-2
min_learning_rate = 0.02
warmup_steps = 25
eval_interval = 100
save_interval = 200
