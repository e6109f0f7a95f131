# Sourced by run.sh: a published model as the seed, public text by name, and what each stage reads. To use your own model
# and text: SEED_MODEL=FOLDER DOMAINS="poems=poems.jsonl law=law" bash run.sh llama2-7b
published=${SEED_MODEL:-hf:meta-llama/Llama-2-7b-hf}
domains=${DOMAINS:-code finemath wikipedia fineweb-edu}
unread=${UNREAD:-}
generalist=${GENERALIST:-fineweb-edu}  # if present: the seed's own kind of text, read only in the finetuning
if [ "$(names_of $domains)" = "$(names_of code finemath wikipedia fineweb-edu)" ]; then
    mixture=code:40.31,finemath:30.16,wikipedia:10.30,fineweb-edu:19.23  # the paper's
fi
