"""The mixture's finetuning: 80 B tokens in the paper's shares, top-2, with load balancing."""

init_from = "out/llama2-7b/mixed"
out_dir = "out/llama2-7b/btx"
data_dir = "out/llama2-7b/data"
domain = "code:40.31,finemath:30.16,wikipedia:10.30,fineweb-edu:19.23"

max_steps = 19073
batch_size = 1024  # 4 M tokens
micro_batch_size = 1
sequence_length = 4096
learning_rate = 1e-4
min_learning_rate = 0.1
warmup_steps = 100
weight_decay = 0.1
router = "topk"
num_experts_per_tok = 2
router_aux_loss_coef = 0.01
balance = "gates"
checkpoint_activations = True
shard_size = 0  # all torchrun processes share one copy of weights and optimizer
eval_interval = 500
eval_windows = 32
save_interval = 500

device = "cuda"  # if torch does not fit the driver, fail instead of running on the CPU
