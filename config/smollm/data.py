"""Public text in the seed's own tokens, 1.1 B of each domain; run.sh names the sources."""

out_dir = "out/smollm/data"
tokens = 1.1e9
