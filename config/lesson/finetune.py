"""The mixture's finetuning on all domains."""

init_from = "out/lesson/mixed"
out_dir = "out/lesson/btx"
data_dir = "out/lesson/data"
domain = "code,math,wiki"

max_steps = 600
batch_size = 16
micro_batch_size = 16
sequence_length = 128
learning_rate = 2e-3
warmup_steps = 50
eval_interval = 200
eval_windows = 8
save_interval = 600
