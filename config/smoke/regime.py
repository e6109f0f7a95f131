"""BTX minus dense training at several widths and budgets."""

widths = "16,32"
scales = "0.2"
dense_learning_rate = 2e-3
