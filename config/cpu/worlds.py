"""How many domains? Worlds with names, facts and wordings of their own, two to six beside each other.

One seed model, of prose and all worlds, for all sets. What follows it has the same tokens for each set: more worlds get
shorter branches.
"""

out_dir = "out/cpu/worlds"
widths = "64"
scales = "0.5"
seeds = "1,2,3"
seed_domains = "prose,wiki,fleet,opera,league,court,orbit"
sets = "fleet+opera+league+court,fleet+opera,wiki+fleet+opera+league+court+orbit"
axis_width = 64
axis_scale = 0.5
problems = 100
btx_rates = "7e-4,2e-3"
upcycle_rates = "3e-3"
dense_rates = "3e-3"
