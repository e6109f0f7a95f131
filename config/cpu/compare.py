"""BTX against dense training, sparse upcycling and Branch-Train-Merge, at equal tokens and at equal FLOPs.

Decided before the run: five random seeds, none of them used to choose settings, and four contrasts of average bits per
byte on test text. All else is exploratory. Rates and btx-paper's share are the best in results/cpu/sweep.json (random
seed 100).
"""

seeds = "1,2,3,4,5"
contrasts = "btx:dense-cm,btx:upcycle-cm,btx:btm-top1-cm,btx-paper:dense-cm"  # top1: one model per token
branch_flags = "--learning_rate=6e-3"
merge_flags = "--learning_rate=6e-3"
paper_flags = "--learning_rate=3e-3 --router_learning_rate=1.0 --router_aux_loss_coef=0.01"
paper_share = 0.7
even_flags = "--learning_rate=1.5e-3"
settings = "--learning_rate=7e-4|--learning_rate=1.5e-3|--learning_rate=3e-3|--learning_rate=6e-3"
