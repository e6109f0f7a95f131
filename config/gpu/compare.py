"""BTX against dense training, sparse upcycling and Branch-Train-Merge, at equal tokens and at equal FLOPs."""

dense_flags = "--learning_rate=5e-4"  # as the branches and the finetuning; nobody has swept them at this size
upcycle_flags = "--learning_rate=5e-4"
rates = "2.5e-4,5e-4,1e-3"
