"""The rivals of BTX. Of 3e-3, 6e-3 and 1e-2, dense training's rate is the best on validation text."""

dense_flags = "--learning_rate=6e-3"
upcycle_flags = "--learning_rate=6e-3"
