"""The seed: 12.6 M parameters, as many as 0.6 B tokens of offline text can train, for one CUDA GPU with 24 GB.

Its proportions, each stage's share of the tokens, and what is frozen are config/cpu's. A larger GPU is only faster
here: more parameters would need more text than a Python installation has.
"""

out_dir = "out/gpu/seed"
data_dir = "out/gpu/data"
domain = "code,math,wiki"

hidden_size = 320
intermediate_size = 1920  # 6 times the width: feed-forwards are all that branches train
num_hidden_layers = 5
num_attention_heads = 5
num_key_value_heads = 5
max_position_embeddings = 1024
tie_word_embeddings = True

max_steps = 5850  # 383 M tokens, config/cpu's share; 48 per parameter in total, beyond docs/regime.md's crossing
batch_size = 64  # 65,536 tokens per step
micro_batch_size = 64  # 9.4 GiB, counted at commit c3efc85
sequence_length = 1024
learning_rate = 3e-3  # config/cpu's, scaled down for the larger width; nobody has swept it
min_learning_rate = 0.02  # annealed: otherwise half of the later gains would be annealing that it lacks
warmup_steps = 100
splice = 0.5  # half of the windows change the subject, as ordinary text does
eval_interval = 500
eval_windows = 64
save_interval = 500

device = "cuda"  # if torch does not fit the driver, fail instead of running on the CPU
