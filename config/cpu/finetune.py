"""The mixture's finetuning on all domains."""

init_from = "out/cpu/mixed"
out_dir = "out/cpu/btx"
data_dir = "out/cpu/data"
domain = "code,math,wiki"

max_steps = 210  # a seventh of the tokens after the seed, as in the paper
batch_size = 8
micro_batch_size = 8
sequence_length = 256
learning_rate = 7e-4  # the experts are already good: a higher rate makes them forget
router_learning_rate = 10.0
router_aux_loss_coef = 0.0  # three domains in equal shares balance themselves
min_learning_rate = 0.02
warmup_steps = 10
splice = 0.5
eval_interval = 70
save_interval = 105
