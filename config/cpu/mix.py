"""The mixture of the three experts and the seed, which joins as a generalist."""

experts = "out/cpu/expert-code,out/cpu/expert-math,out/cpu/expert-wiki,out/cpu/seed"
out_dir = "out/cpu/mixed"
data_dir = "out/cpu/data"
router_init = "ridge"  # the paper's random start needs a longer finetuning than this budget allows (LOG.md)
