"""The same three domains as in config/cpu, with less text."""

out_dir = "out/lesson/data"
vocab_size = 512
max_bytes = 3_000_000
