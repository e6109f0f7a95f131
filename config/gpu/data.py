"""All the code there is, and as much text for each generated domain."""

out_dir = "out/gpu/data"
vocab_size = 4096
max_bytes = 100_000_000
