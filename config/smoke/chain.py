"""The rivals at toy size."""

dense_flags = "--learning_rate=2e-3"
upcycle_flags = "--learning_rate=2e-3"
