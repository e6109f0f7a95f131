"""Our recipe, from config/lesson: branches train only their feed-forwards, routers start from contrasts. The rates
are the best of nine pairs on random seed 100."""

method = "btx"
train_flags = "--learning_rate=2.4e-2"
finetune_flags = "--learning_rate=6e-3"
