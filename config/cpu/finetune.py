"""The mixture's finetuning on all domains."""

init_from = "out/cpu/mixed"
out_dir = "out/cpu/btx"
data_dir = "out/cpu/data"
domain = "code,math,wiki"

max_steps = 1200
batch_size = 8
micro_batch_size = 8
sequence_length = 256
learning_rate = 3e-3
warmup_steps = 50
eval_interval = 100
save_interval = 300
