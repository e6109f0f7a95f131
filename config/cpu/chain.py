"""The rivals of BTX, each with its best settings on validation text (results/cpu/sweep.json)."""

dense_flags = "--learning_rate=6e-3"
upcycle_flags = "--learning_rate=6e-3 --router_learning_rate=1.0 --router_aux_loss_coef=0.01"
