"""Public text, tokenized for the seed: of each domain as much as the largest stage reads, or all there is."""

out_dir = "out/llama2-7b/data"
tokens = 2.1e11
