"""The seed: 40 thousand parameters, a minute on a laptop, with many steps compared with its branches."""

out_dir = "out/lesson/seed"
data_dir = "out/lesson/data"
domain = "code,math,wiki"

hidden_size = 32
intermediate_size = 96
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 2
max_position_embeddings = 256
tie_word_embeddings = True

max_steps = 2000
batch_size = 16
micro_batch_size = 16
sequence_length = 128
learning_rate = 1.5e-2
warmup_steps = 50
eval_interval = 500
eval_windows = 8
save_interval = 1000
