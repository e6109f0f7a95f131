"""The mixture of the three experts and the seed."""

experts = "out/lesson/expert-code,out/lesson/expert-math,out/lesson/expert-wiki,out/lesson/seed"
out_dir = "out/lesson/mixed"
data_dir = "out/lesson/data"
router_init = "contrast"  # routers that recognise each expert's text from the first step
