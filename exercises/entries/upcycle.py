"""Sparse upcycling: four copies of the seed model as the experts, finetuned for as many FLOPs as our recipe takes."""

method = "upcycle"
finetune_flags = "--max_steps=1780 --learning_rate=6e-3"
