# Sourced by run.sh: a published model as the seed, public text by name, and who reads what.
# A copy on this disk takes the model's place: SEED_MODEL=FOLDER bash run.sh llama2-7b
published=${SEED_MODEL:-hf:meta-llama/Llama-2-7b-hf}
domains=${DOMAINS:-code finemath wikipedia fineweb-edu}
generalist=fineweb-edu  # the seed's own kind of text: read in the finetuning, without a branch
mixture=code:40.31,finemath:30.16,wikipedia:10.30,fineweb-edu:19.23  # the paper's
