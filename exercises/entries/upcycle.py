"""Sparse upcycling: four copies of the seed model as the experts, finetuned for as many FLOPs as our recipe takes. Its
rate is the best of four on random seed 100."""

method = "upcycle"
finetune_flags = "--max_steps=1780 --learning_rate=1e-2"
