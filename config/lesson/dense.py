"""Dense training from the same seed, for as many tokens as all branches and the finetuning together (data-matched)."""

init_from = "out/lesson/seed"
out_dir = "out/lesson/dense"
data_dir = "out/lesson/data"
domain = "code,math,wiki"

max_steps = 2400  # 3 * 600 + 600
batch_size = 16
micro_batch_size = 16
sequence_length = 128
learning_rate = 6e-3  # the best of 3e-3, 6e-3 and 1e-2 on validation text; the finetuning's was not searched
warmup_steps = 50
eval_interval = 600
eval_windows = 8
save_interval = 1200
