"""BTX minus dense training at several widths and budgets."""

widths = "256,512,768"
scales = "0.25,0.5,1"
largest = 768.0
dense_learning_rate = 2e-4
