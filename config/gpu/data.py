"""All the code and prose there is, and as much math."""

out_dir = "out/gpu/data"
vocab_size = 4096
max_bytes = 100_000_000
