"""The mixture's finetuning on all domains, in the paper's shares."""

init_from = "out/smollm/mixed"
out_dir = "out/smollm/btx"
data_dir = "out/smollm/data"
domain = "code:40.31,finemath:30.16,wikipedia:10.30,fineweb-edu:19.23"

max_steps = 2120  # 0.56 B tokens: 80 for every 453 of the branches, as in the paper
batch_size = 128
micro_batch_size = 16
sequence_length = 2048
learning_rate = 1e-4  # the experts are already good: a higher rate makes them forget (LOG.md)
warmup_steps = 100
eval_interval = 500
eval_windows = 32
save_interval = 500
