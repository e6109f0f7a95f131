"""Public text, a folder of .jsonl or .txt for each domain; four passes over 1 B tokens feed config/gpu80.

DOMAINS="code=DIR math=DIR wiki=DIR" bash run.sh gpu80
"""

out_dir = "out/gpu80/data"
vocab_size = 16384
max_bytes = 0  # all there is
