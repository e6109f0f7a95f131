"""The mixture of the three experts and the seed, which takes part as a generalist."""

experts = "out/gpu80/expert-code,out/gpu80/expert-math,out/gpu80/expert-wiki,out/gpu80/seed"
out_dir = "out/gpu80/mixed"
data_dir = "out/gpu80/data"
router_init = "ridge"  # as in config/cpu
