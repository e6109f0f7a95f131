"""Dense training: the seed model, trained further on all text that our recipe reads, for as many FLOPs. Its rate is the
best of three on random seed 100."""

method = "dense"
train_flags = "--max_steps=2340 --learning_rate=6e-3"
