"""BTX, upcycling and dense training at equal FLOPs, over widths and budgets. Nobody has run this."""

widths = "192,384"
scales = "0.1,0.3"
seeds = "1"
