"""BTX against dense training, sparse upcycling and Branch-Train-Merge, at equal tokens and at equal FLOPs."""

branch_flags = "--learning_rate=3e-3"
merge_flags = "--learning_rate=3e-3"
paper_flags = "--learning_rate=1.5e-3 --router_learning_rate=1.0 --router_aux_loss_coef=0.01"
even_flags = "--learning_rate=2e-3"
settings = "--learning_rate=7e-4|--learning_rate=1.5e-3|--learning_rate=3e-3|--learning_rate=6e-3"
