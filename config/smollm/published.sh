# Sourced by run.sh: a published model as the seed, public text by name, and who reads what.
# A copy on this disk takes the model's place: SEED_MODEL=FOLDER bash run.sh smollm
published=${SEED_MODEL:-hf:HuggingFaceTB/SmolLM2-135M}
domains=${DOMAINS:-code finemath wikipedia fineweb-edu}
generalist=fineweb-edu  # the seed's own kind of text: read in the finetuning, without a branch
mixture=code:40.31,finemath:30.16,wikipedia:10.30,fineweb-edu:19.23  # the paper's
