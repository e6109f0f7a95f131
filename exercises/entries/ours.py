"""Our recipe: config/lesson's, with branches of feed-forwards alone and routers that start from contrasts, at the rates
that were best on random seed 100 (see LOG.md)."""

method = "btx"
train_flags = "--learning_rate=2.4e-2"
finetune_flags = "--learning_rate=6e-3"
