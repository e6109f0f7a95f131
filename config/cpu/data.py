"""Three domains for a model of about a million parameters on a CPU."""

out_dir = "out/cpu/data"
vocab_size = 2048
max_bytes = 12_000_000
