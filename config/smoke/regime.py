"""BTX, upcycling and dense training at two widths and one budget, one more share and one more set of domains."""

widths = "16,32"
scales = "0.2"
seeds = "1"
sets = "code+math+wiki,code+math"
shares = "0.5"
axis_width = 16
axis_scale = 0.2
btx_rates = "2e-3"
upcycle_rates = "2e-3"
dense_rates = "2e-3"
