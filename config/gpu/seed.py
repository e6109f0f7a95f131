"""The seed: 12.6 M parameters, as many as 0.6 B tokens of offline text can feed, for one CUDA GPU of 24 GB.

Shape, shares of the stages and what is frozen are config/cpu's. A larger card is only faster here: more parameters
would want more text than a Python installation holds.
"""

out_dir = "out/gpu/seed"
data_dir = "out/gpu/data"
domain = "code,math,wiki"

hidden_size = 320
intermediate_size = 1920  # 6 times the width: feed-forwards are all that branches train and experts keep
num_hidden_layers = 5
num_attention_heads = 5
num_key_value_heads = 5
max_position_embeddings = 1024
tie_word_embeddings = True

max_steps = 5850  # 383 M tokens, config/cpu's share; 48 a parameter in all, beyond docs/regime.md's crossing
batch_size = 64  # 65,536 tokens a step
micro_batch_size = 64  # 9.4 GiB, counted at commit c3efc85
sequence_length = 1024
learning_rate = 3e-3  # config/cpu's, over how much wider this is; nobody has swept it
min_learning_rate = 0.02  # annealed, or else half of what comes after is the annealing that it lacks
warmup_steps = 100
splice = 0.5  # half of the windows change their subject, as ordinary text does
eval_interval = 500
eval_windows = 64
save_interval = 500

device = "cuda"  # a wheel that does not fit the driver is an error, not a run on the CPU
