"""Everything that the built-in domains have, with GPT-2's tokenizer replaced by one that fits this text."""

out_dir = "out/gpu/data"
vocab_size = 4096
max_bytes = 100_000_000
