"""BTX, upcycling and dense training at two widths and one budget."""

widths = "16,32"
scales = "0.2"
seeds = "1"
