"""The mixture of the three experts and the seed, which joins as a generalist."""

experts = "out/gpu/expert-code,out/gpu/expert-math,out/gpu/expert-wiki,out/gpu/seed"
out_dir = "out/gpu/mixed"
data_dir = "out/gpu/data"
router_init = "ridge"  # as in config/cpu
