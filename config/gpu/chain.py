"""The rivals of BTX, with config/cpu's rates scaled down for the larger width; nobody has swept them at this size."""

dense_flags = "--learning_rate=6e-4"
upcycle_flags = "--learning_rate=6e-4 --router_learning_rate=1.0 --router_aux_loss_coef=0.01"
