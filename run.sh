#!/usr/bin/env bash
# The whole pipeline. study/chain.py runs its stages; each is a plain command that you can also type yourself.
#
#   bash run.sh          config/cpu: 17 minutes on two cores of an AMD EPYC
#   bash run.sh smoke    every stage at toy size: a minute
#   bash run.sh lesson   the course's size: 5 minutes
#   bash run.sh gpu      config/gpu: one or more CUDA GPUs
#   bash run.sh smollm   starts from a published model, on any machine: docs/real.md (llama2-7b: its README.md)
#   bash run.sh cpu quick     without the rivals, dense training and upcycling
#   bash run.sh cpu chain     trains only, evaluates nothing
#   bash run.sh cpu compare   the paper's comparison: several random seeds, more baselines
#   bash run.sh cpu ablate    every variant in the paper, from the same experts
#   bash run.sh cpu regime    when does branching pay? Trains smaller chains of its own, at many budgets
#
# Finished stages are skipped, and killed ones resume from their last checkpoint. Variables you can set in front of it:
#
#   DOMAINS="code poems=~/poems"    the domains
#   TOKENS=1e8                      tokens that a branch reads; steps, batches, finetuning and rivals follow from it
#   UNREAD="mail=~/mail"            text that no model is trained on, to score all of them on (smollm, llama2-7b)
#   SEED_MODEL=FOLDER               another seed in place of the published model (smollm, llama2-7b)
#   GENERALIST=web                  a domain that gets no branch, being the seed's own kind of text (the same two)
#   DATA=out/trial/data             the folder of the prepared text, instead of out/SIZE/data
#   SEED=2, SEEDS="1 2"             the random seed of all training; the random seeds of compare
#   OUT=out/trial                   the folder for checkpoints and report, instead of out/SIZE or out/SIZE/seed2
#   SEED_FLAGS, EXPERT_FLAGS, FINETUNE_FLAGS    more flags for that stage, such as SEED_FLAGS="--max_steps=100"; dense
#                                   training also gets the branches' flags, and upcycling the finetuning's
#   FLAGS="--dtype=float32"         more flags for every stage that trains or evaluates
#   JOBS=1                          how many stages run side by side; by default one for each GPU, or each core
#   LAUNCH="torchrun --nproc_per_node=8"    what starts train.py and finetune.py; stages then run one after another
#   PYTHON=python3                  an environment of your own instead of .venv
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started with sh
set -euo pipefail
cd "$(dirname "$0")"
size=${1:-cpu} task=${2:-}
domains=${DOMAINS:-code math wiki}
config=config/$size
random_seed=${SEED:-1}
published="" generalist="" mixture="" unread="" rivals="" report=True
names_of() { printf '%s\n' "${@%%=*}" | paste -sd, -; }
case $task in
    "" | quick | chain | ablate | compare | regime) ;;
    *) echo "error: there is no task '$task'; choose quick, chain, ablate, compare or regime" >&2; exit 2 ;;
esac
[ -d "$config" ] || { echo "error: no $config; choose one of: $(cd config && echo *)" >&2; exit 2; }
[ -n "${domains// /}" ] || { echo "error: DOMAINS is blank; name some domains, or leave it out" >&2; exit 2; }
if [ -e "$config/published.sh" ]; then source "$config/published.sh"; fi  # sets the first four, and $domains
all=$(names_of $domains)  # only these, whatever else the data folder may hold
out=out/$size
[ "$random_seed" = 1 ] || out=$out/seed$random_seed
out=${OUT:-$out}
source setup.sh

# data: text, tokenizer, token files
if [ -n "$published" ]; then
    for domain in $domains $unread; do
        "$python" -m data.public "$config/data.py" ${TOKENS:+--tokens="$TOKENS"} ${DATA:+--out_dir="$DATA"} \
            --source="${domain#*=}" --domain="${domain%%=*}" --tokenizer="$published"
    done
else
    "$python" -m data.prepare "$config/data.py" --domains="${domains// /,}" ${DATA:+--out_dir="$DATA"}
fi

settings=(--size="$size" --domains="$all" --data_dir="${DATA:-}" --flags="${FLAGS:-}" --launch="${LAUNCH:-}" --jobs="${JOBS:-0}")
settings+=(--seed_flags="${SEED_FLAGS:-}" --expert_flags="${EXPERT_FLAGS:-}" --finetune_flags="${FINETUNE_FLAGS:-}")
case $task in
    compare) exec "$python" -m study.compare "${settings[@]}" --out_dir="${OUT:-out/$size}" \
        ${SEEDS:+--seeds="$(echo $SEEDS | tr ' ' ,)"} ;;
    regime) exec "$python" -m study.regime "${settings[@]}" --out_dir="${OUT:-out/$size}" ;;
    quick) rivals=False ;;
    chain) report=False ;;
esac

# seed, branches, mixture and finetuning; dense training and upcycling beside them; scores and the report
"$python" -m study.chain "${settings[@]}" --seed="$random_seed" --out_dir="$out" --published="$published" \
    --generalist="$generalist" --mixture="$mixture" --unread="${unread:+$(names_of $unread)}" --tokens="${TOKENS:-0}" \
    ${rivals:+--rivals=$rivals} --report=$report
if [ "$task" = ablate ]; then
    "$python" -m study.ablate "${settings[@]}" --out_dir="$out"
    "$python" -m study.route --model="$out/ablate/top-2-seed1,$out/ablate/balancing-seed1" --domains="$all" \
        --data_dir="${DATA:-out/$size/data}" --out_dir="$out/report/balancing"
fi
