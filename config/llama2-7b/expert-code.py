"""The branch for code: 210 B tokens, as in section 3.1 of the paper."""

init_from = "hf:meta-llama/Llama-2-7b-hf"
out_dir = "out/llama2-7b/expert-code"
data_dir = "out/llama2-7b/data"
domain = "code"

max_steps = 50068
batch_size = 1024  # 4 M tokens
micro_batch_size = 1
sequence_length = 4096
learning_rate = 1e-4
min_learning_rate = 0.1
warmup_steps = 100
weight_decay = 0.1
checkpoint_activations = True
shard_size = 0  # all torchrun processes share one copy of weights and optimizer
eval_interval = 500
eval_windows = 32
save_interval = 500

device = "cuda"  # if torch does not fit the driver, fail instead of running on the CPU
