"""The seed at toy size: every stage in seconds, to see that all of them work."""

out_dir = "out/smoke/seed"
data_dir = "out/smoke/data"
domain = "code,math,wiki"

hidden_size = 32
intermediate_size = 96
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
max_position_embeddings = 256

max_steps = 40
batch_size = 8
micro_batch_size = 8
sequence_length = 128
learning_rate = 3e-3
warmup_steps = 5
eval_interval = 20
eval_windows = 4
save_interval = 20
