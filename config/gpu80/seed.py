"""The seed: 116 M parameters and, in all stages, 4 B tokens of public text, for one CUDA GPU of 80 GB.

3.1e18 FLOPs in all, 2.2 hours on an H100 at an assumed 40 % of its bf16 peak (--dry_run=True says so stage by stage);
nobody has run it. Shape, shares of the stages and what is frozen are config/cpu's.
"""

out_dir = "out/gpu80/seed"
data_dir = "out/gpu80/data"
domain = "code,math,wiki"

hidden_size = 768
intermediate_size = 4608  # 6 times the width: feed-forwards are all that branches train and experts keep
num_hidden_layers = 8
num_attention_heads = 12
num_key_value_heads = 12
max_position_embeddings = 1024
tie_word_embeddings = True

max_steps = 9750  # 2,556 M tokens, config/cpu's share; 34 a parameter in all
batch_size = 256  # 262,144 tokens a step
micro_batch_size = 64  # 35 GiB, counted by --dry_run=True
sequence_length = 1024
learning_rate = 1.25e-3  # config/cpu's, over how much wider this is; nobody has swept it
min_learning_rate = 0.02  # annealed, or else half of what comes after is the annealing that it lacks
warmup_steps = 100
splice = 0.5  # half of the windows change their subject, as ordinary text does
eval_interval = 500
eval_windows = 64
save_interval = 500

device = "cuda"  # a wheel that does not fit the driver is an error, not a run on the CPU
