"""Public text, tokenized for the seed, 1.1 B tokens per domain; run.sh names the sources."""

out_dir = "out/smollm/data"
tokens = 1.1e9
