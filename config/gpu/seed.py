"""The seed: 12 M parameters, as many as 0.6 B tokens of offline text can feed, for one CUDA GPU of 24 GB.

A larger card is only faster here: more parameters would want more text than a Python installation holds.
"""

out_dir = "out/gpu/seed"
data_dir = "out/gpu/data"
domain = "code,math,wiki"

hidden_size = 384
intermediate_size = 1024
num_hidden_layers = 6
num_attention_heads = 6
num_key_value_heads = 6
max_position_embeddings = 1024
tie_word_embeddings = True

max_steps = 6500  # 426 M of 0.6 B tokens, config/cpu's share; 49 a parameter in all, beyond docs/regime.md's crossing
batch_size = 64  # 65,536 tokens a step
micro_batch_size = 64  # 9.4 GiB, counted by --dry_run=True
sequence_length = 1024
learning_rate = 2.5e-3  # config/cpu's, over how much wider this is; nobody has swept it
warmup_steps = 100
eval_interval = 500
eval_windows = 64
save_interval = 500

device = "cuda"  # a wheel that does not fit the driver is an error, not a run on the CPU
