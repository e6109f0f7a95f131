"""Three domains for a model of 427 thousand parameters on a CPU."""

out_dir = "out/cpu/data"
vocab_size = 1024
max_bytes = 12_000_000
