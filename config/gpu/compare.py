"""BTX against dense training, sparse upcycling and Branch-Train-Merge, at equal tokens and at equal FLOPs."""

# config/cpu's rates, scaled down for the larger width; nobody has swept them at this size
branch_flags = "--learning_rate=6e-4"
merge_flags = "--learning_rate=6e-4"
paper_flags = "--learning_rate=3e-4 --router_learning_rate=1.0 --router_aux_loss_coef=0.01"
even_flags = "--learning_rate=4e-4"
settings = "--learning_rate=1.4e-4|--learning_rate=3e-4|--learning_rate=6e-4|--learning_rate=1.2e-3"
