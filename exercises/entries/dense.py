"""Dense training: the seed model, trained further on all text that our recipe reads, for as many FLOPs."""

method = "dense"
train_flags = "--max_steps=2340"
