"""The same three domains as config/cpu, less of them."""

out_dir = "out/lesson/data"
vocab_size = 512
max_bytes = 3_000_000
