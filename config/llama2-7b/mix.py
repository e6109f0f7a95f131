"""The mixture of the three branches and the seed, with random routers."""

experts = (
    "out/llama2-7b/expert-code,out/llama2-7b/expert-finemath,out/llama2-7b/expert-wikipedia,hf:meta-llama/Llama-2-7b-hf"
)
out_dir = "out/llama2-7b/mixed"
data_dir = "out/llama2-7b/data"
