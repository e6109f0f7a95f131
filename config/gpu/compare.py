"""BTX against dense training, sparse upcycling and Branch-Train-Merge, at equal tokens and at equal FLOPs."""

dense_learning_rate = 2e-4  # as the branches and the finetuning; nobody has swept them at this size
upcycle_learning_rate = 2e-4
rates = "1e-4,2e-4,4e-4"
