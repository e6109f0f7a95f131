"""The mixture's finetuning on all domains."""

init_from = "out/gpu/mixed"
out_dir = "out/gpu/btx"
data_dir = "out/gpu/data"
domain = "code,math,wiki"

max_steps = 490  # 32 M tokens, a seventh of those after the seed, as in the paper
batch_size = 64
micro_batch_size = 64  # 16 GiB, counted at commit c3efc85
sequence_length = 1024
learning_rate = 1.4e-4  # the experts are already good: a higher rate makes them forget
router_learning_rate = 10.0
router_aux_loss_coef = 0.0  # three domains in equal shares balance themselves
min_learning_rate = 0.02
warmup_steps = 20
splice = 0.5
eval_interval = 100
eval_windows = 64
save_interval = 250

device = "cuda"  # if torch does not fit the driver, fail instead of running on the CPU
