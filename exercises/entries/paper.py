"""BTX as printed: branches train all tensors, routers start at random, finetuning reads 15 % of the tokens."""

method = "btx"
train_flags = "--freeze=none --max_steps=633"
mix_flags = "--router_init=normal"
finetune_flags = "--max_steps=335"
