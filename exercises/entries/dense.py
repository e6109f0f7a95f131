"""Dense training: the seed model goes on with all text that our recipe reads, for as many FLOPs."""

method = "dense"
train_flags = "--max_steps=2340"
