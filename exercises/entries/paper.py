"""BTX as printed: branches train all tensors, routers start at random, finetuning reads 15 % of the tokens. The rates
are the best of eight pairs on random seed 100."""

method = "btx"
train_flags = "--freeze=none --max_steps=633 --learning_rate=1.2e-2"
mix_flags = "--router_init=normal"
finetune_flags = "--max_steps=335 --learning_rate=6e-3"
