"""BTX, upcycling and dense training at equal FLOPs, over widths, budgets, shares of the branches and domains."""

widths = "32,64"
scales = "0.0625,0.125,0.25,0.5"
seeds = "1,2,3"
repeated = 16.0  # longer chains get one random seed; config/cpu itself, width 64 at scale 1, is compare.json
sets = "code+math+wiki,code+math,code+math+prose+wiki"
shares = "0.5,0.2"
axis_width = 64
axis_scale = 0.125
btx_rates = "7e-4,2e-3"
upcycle_rates = "2e-3,4e-3"
dense_rates = "2e-3,4e-3"
