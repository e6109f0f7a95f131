"""BTX against dense training, sparse upcycling and Branch-Train-Merge, at equal tokens and at equal FLOPs."""

dense_learning_rate = 3e-3
upcycle_learning_rate = 3e-3
rates = "1.5e-3,3e-3,6e-3"
