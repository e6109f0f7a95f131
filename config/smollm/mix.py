"""The mixture of the three branches and the seed; its routers start from the branches' text (docs/real.md)."""

experts = "out/smollm/expert-code,out/smollm/expert-finemath,out/smollm/expert-wikipedia,hf:HuggingFaceTB/SmolLM2-135M"
out_dir = "out/smollm/mixed"
data_dir = "out/smollm/data"
router_init = "ridge"
