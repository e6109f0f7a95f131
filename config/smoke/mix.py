"""The mixture of the three experts and the seed."""

experts = "out/smoke/expert-code,out/smoke/expert-math,out/smoke/expert-wiki,out/smoke/seed"
out_dir = "out/smoke/mixed"
data_dir = "out/smoke/data"
