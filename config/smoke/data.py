"""A few seconds of preparation, for tests."""

out_dir = "out/smoke/data"
vocab_size = 512
max_bytes = 300_000
