"""BTX against dense training, sparse upcycling and Branch-Train-Merge, at equal tokens and at equal FLOPs."""

dense_flags = "--learning_rate=2e-3"
upcycle_flags = "--learning_rate=2e-3"
