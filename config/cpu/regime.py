"""BTX, upcycling and dense training at equal FLOPs, over widths and budgets."""

widths = "32,64"
scales = "0.25,0.5,1"
seeds = "1,2,3"
