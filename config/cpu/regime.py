"""BTX minus dense training at several widths and budgets."""

widths = "32,64"
scales = "0.125,0.25,0.5"
largest = 16.0  # larger runs take longest; config/cpu itself is width 64 at scale 1, in compare.json
dense_learning_rate = 3e-3
