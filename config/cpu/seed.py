"""The seed: a quarter of a million parameters, five minutes on two cores."""

out_dir = "out/cpu/seed"
data_dir = "out/cpu/data"
domain = "code,math,wiki"

hidden_size = 64
intermediate_size = 176  # 8/3 of the width, as in Llama
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 4
max_position_embeddings = 256
tie_word_embeddings = True  # the embedding is a quarter of the model

max_steps = 6000  # long beside the branches, as in the paper: what they share is settled when they part
batch_size = 8  # 2,048 tokens: models this small learn more from many small steps
micro_batch_size = 8
sequence_length = 256
learning_rate = 1.5e-2
warmup_steps = 100
eval_interval = 500
save_interval = 500
