"""The seed: 427 thousand parameters, five minutes on two cores of an AMD EPYC."""

out_dir = "out/cpu/seed"
data_dir = "out/cpu/data"
domain = "code,math,wiki"

hidden_size = 64
intermediate_size = 384  # 6 times the width: feed-forwards are all that branches train
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 4
max_position_embeddings = 256
tie_word_embeddings = True

max_steps = 2500  # long compared with the branches, as in the paper: it first learns what they share
batch_size = 8  # 2,048 tokens: models this small learn more from many small steps
micro_batch_size = 8
sequence_length = 256
learning_rate = 1.5e-2
min_learning_rate = 0.02  # annealed: otherwise half of the later gains would be annealing that it lacks
warmup_steps = 50
splice = 0.5  # half of the windows change the subject, as ordinary text does
eval_interval = 250
save_interval = 250
