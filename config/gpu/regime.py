"""BTX minus dense training at several widths and budgets."""

widths = "192,384"
scales = "0.25,0.5,1"
largest = 192.0  # larger runs take longest
dense_learning_rate = 5e-4
