"""Public text in the seed's own tokens: as much of each domain as its largest reader takes, or all there is."""

out_dir = "out/llama2-7b/data"
tokens = 2.1e11
