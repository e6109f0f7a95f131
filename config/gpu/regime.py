"""BTX, upcycling and dense training at equal FLOPs, over widths, budgets and shares of the branches."""

widths = "192,384"
scales = "0.25,0.5,1"
seeds = "1"
shares = "0.5,0.2"
axis_width = 192
axis_scale = 0.25
btx_rates = "2e-4,5e-4"
upcycle_rates = "2e-4,5e-4"
dense_rates = "2e-4,5e-4"
