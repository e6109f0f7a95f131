"""The seed: GPT-2's size with a vocabulary of our own, for one CUDA GPU."""

out_dir = "out/gpu/seed"
data_dir = "out/gpu/data"
domain = "all"

hidden_size = 768
intermediate_size = 2048
num_hidden_layers = 12
num_attention_heads = 12
num_key_value_heads = 12
max_position_embeddings = 1024

max_steps = 1500
batch_size = 64  # 65,536 tokens a step
micro_batch_size = 32
sequence_length = 1024
learning_rate = 6e-4
warmup_steps = 100
eval_interval = 100
eval_windows = 64
save_interval = 250

device = "cuda"  # a wheel that does not fit the driver is an error, not a run on the CPU
