"""The mixture's finetuning on all domains."""

init_from = "out/gpu/mixed"
out_dir = "out/gpu/btx"
data_dir = "out/gpu/data"
domain = "code,math,wiki"

max_steps = 490  # 32 M tokens, a seventh of what follows the seed, as in the paper
batch_size = 64
micro_batch_size = 64  # 16 GiB, counted at commit c3efc85
sequence_length = 1024
learning_rate = 1.4e-4  # the experts are good already, a higher rate forgets them
router_learning_rate = 10.0
router_aux_loss_coef = 0.0  # three domains in even shares balance themselves
min_learning_rate = 0.02
warmup_steps = 20
splice = 0.5
eval_interval = 100
eval_windows = 64
save_interval = 250

device = "cuda"  # a wheel that does not fit the driver is an error, not a run on the CPU
