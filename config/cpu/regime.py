"""BTX, upcycling and dense training at equal FLOPs, over widths, budgets, shares of the branches and domains.

The budgets took 100 minutes of a shared core; shares and sets of domains come on top. Small chains first.
"""

widths = "32,64"
scales = "0.125,0.25,0.5"  # config/cpu itself is width 64 at scale 1: --comparison=results/cpu/compare.json
seeds = "1,2,3"
repeated = 16.0  # longer chains get one random seed
sets = "code+math+wiki,code+math,code+math+prose+wiki"
shares = "0.5,0.2"
axis_width = 32
axis_scale = 0.125
btx_rates = "7e-4,2e-3"  # longer finetunings may want more
upcycle_rates = "3e-3"
dense_rates = "3e-3"
