#!/usr/bin/env bash
# The whole pipeline, one plain command a stage; each also works when typed alone.
#
#   bash run.sh          config/cpu: 10 minutes on 2 CPU cores
#   bash run.sh gpu      config/gpu: one CUDA GPU; gpu80 for a card of 80 GB and text of your own
#   bash run.sh smoke    every stage at toy size, half a minute
#   bash run.sh lesson   the course's size, 2 minutes: exercises/lesson.sh
#   bash run.sh smollm   from a published model: config/smollm, config/llama2-7b (a README.md in each)
#   bash run.sh cpu chain     stop after the finetuning: nothing is evaluated
#   bash run.sh cpu ablate    after that, every variant of the paper: an hour more
#   bash run.sh cpu compare   the paper's comparison: three random seeds, dense training and upcycling beside them
#   bash run.sh gpu check     what only a GPU can tell: three parts of at most ten minutes, into results/gpu
#   bash run.sh cpu regime    when does branching pay? Smaller chains of their own, at many budgets
#
# Finished stages are skipped and killed ones go on from their last checkpoint. What may be set in front of it:
#
#   DOMAINS="code poems=~/poems"    the domains
#   SEED=2, SEEDS="1 2"             the random seed of all training; those of compare
#   OUT=out/trial                   the folder of the checkpoints and the report, instead of out/SIZE or out/SIZE/seed2
#   SEED_FLAGS, EXPERT_FLAGS, FINETUNE_FLAGS    more flags for that stage, such as SEED_FLAGS="--max_steps=100"
#   FLAGS="--same_code=True"        more flags for every stage that trains, mixes or evaluates
#   LAUNCH="torchrun --nproc_per_node=8"    what starts train.py and finetune.py
#   PYTHON=python3                  an environment of your own instead of .venv
set -euo pipefail
cd "$(dirname "$0")"
size=${1:-cpu} task=${2:-}
domains=${DOMAINS:-code math wiki}
config=config/$size
random_seed=${SEED:-1}
data=out/$size/data
published="" generalist="" mixture=""
if [ -e "$config/published.sh" ]; then source "$config/published.sh"; fi  # sets these three and $domains
names=()
for domain in $domains; do names+=("${domain%%=*}"); done
all=$(printf '%s\n' "${names[@]}" | sort | paste -sd, -)  # these domains and no others that the data folder may hold
chain() { if [ "$1" = 1 ]; then echo "out/$size"; else echo "out/$size/seed$1"; fi; }  # the folder of a random seed
out=${OUT:-$(chain "$random_seed")}
seed=${published:-$out/seed}
case $task in
    "" | chain | ablate | compare | regime | check) ;;
    *) echo "error: '$task' is no task; choose chain, ablate, compare, regime or check" >&2; exit 2 ;;
esac
[ -d "$config" ] || { echo "error: no $config; choose one of: $(cd config && echo *)" >&2; exit 2; }
source setup.sh
launch=${LAUNCH:-$python}

# with `regime`: no pipeline, but smaller chains of their own, on data of their own
if [ "$task" = regime ]; then
    $python -m study.regime --size="$size"
    exit
fi

# 1. data: text, tokenizer, token files
if [ -n "$published" ]; then
    for domain in $domains; do
        $python -m data.public "$config/data.py" --source="${domain#*=}" --domain="${domain%%=*}" --tokenizer="$seed"
    done
else
    $python -m data.prepare "$config/data.py" --domains="${domains// /,}"
fi

# with `check`: no pipeline, but measurements
if [ "$task" = check ]; then
    for part in correct fast whole; do
        $python -m study.gpu_check --part=$part --config="$config" --data_dir="$data" --run_dir="out/$size/check"
    done
    exit
fi

# 2. seed: one small language model for all domains, unless someone has trained it
[ -n "$published" ] || $launch train.py "$config/seed.py" --domain="$all" --seed="$random_seed" --out_dir="$seed" \
    ${SEED_FLAGS:-} ${FLAGS:-}

# 3. branch: one expert a domain (but for that of the seed's own text), processes that share nothing; side by side where
#    each has a GPU of its own
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || true
[ -z "${LAUNCH:-}" ] || gpus=1  # a branch takes all of them
experts=() jobs=() failed=()
for i in "${!names[@]}"; do
    [ "${names[i]}" != "$generalist" ] || continue
    expert=$out/expert-${names[i]} settings=$config/expert-${names[i]}.py
    [ -e "$settings" ] || settings=$config/expert.py
    experts+=("$expert")
    branch="$launch train.py $settings --domain=${names[i]} --init_from=$seed --out_dir=$expert"
    branch+=" --seed=$random_seed ${EXPERT_FLAGS:-} ${FLAGS:-}"
    if [ "$gpus" -gt 1 ]; then
        CUDA_VISIBLE_DEVICES=$((i % gpus)) $branch & jobs+=($!)
    else
        $branch || failed+=("$expert")
    fi
done
for i in "${!jobs[@]}"; do wait "${jobs[i]}" || failed+=("${experts[i]}"); done
[ ${#failed[@]} -eq 0 ] || { echo "error: these branches failed: ${failed[*]}; run again to resume them" >&2; exit 1; }
experts=$(IFS=,; echo "${experts[*]}")

# 4. mix: feed-forward sublayers become a mixture of experts, the rest is averaged; soup averages everything
$python mix.py "$config/mix.py" --experts="$experts,$seed" --out_dir="$out/mixed" --data_dir="$data" \
    --seed="$random_seed" ${FLAGS:-}
$python mix.py --experts="$experts,$seed" --out_dir="$out/soup" --method=soup ${FLAGS:-}

# 5. finetune: all domains together, so that the routers learn
$launch finetune.py "$config/finetune.py" --init_from="$out/mixed" --out_dir="$out/btx" --domain="${mixture:-$all}" \
    --seed="$random_seed" ${FINETUNE_FLAGS:-} ${FLAGS:-}
[ "$task" != chain ] || exit 0

# 6. evaluate every model on the same windows and problems, look at the routing, then draw
models=$seed,$experts,$out/soup,$out/mixed,$out/btx
scores="$config/eval.py --domains=$all --out_dir=$out/report"
$python eval.py $scores --model="$models" ${FLAGS:-}
ensemble=$experts,$seed
[ -z "$published" ] || ensemble=$experts  # an ensemble asks who has read what; of a published seed nobody knows
$python -m study.btm $scores --experts="$ensemble" ${FLAGS:-}
$python -m study.route --model="$out/btx" --data_dir="$data" --domains="$all" --out_dir="$out/report"
$python -m study.report --report="$out/report"
if [ "$out" = out/cpu ] && [ "$all" = code,math,wiki ]; then $python -m study.expected "$out"; fi  # as expected.json says?

# 7. ablate, when asked to: the paper's questions about routing and mixing, a row each
if [ "$task" = ablate ]; then
    $python -m study.ablate --size="$size" --experts="$experts,$seed"
    $python -m study.route --model="$out/ablate/top-2-seed1,$out/ablate/balancing-seed1" --data_dir="$data" \
        --domains="$all" --out_dir="$out/report/balancing"
fi

# 8. compare, when asked to: more random seeds of all the above, then the baselines of every seed
if [ "$task" = compare ]; then
    chains=()
    for other in ${SEEDS:-1 2 3}; do
        if [ "$other" = "$random_seed" ]; then
            chains+=("$out")
        else
            SEED=$other OUT=$(chain "$other") bash run.sh "$size"
            chains+=("$(chain "$other")")
        fi
    done
    chains=$(IFS=,; echo "${chains[*]}")
    times=$out/report/step_times.json  # how long a step of each model takes here: rows matched by device time need it
    [ -e "$times" ] || $python -m study.clock --size="$size" --out_dir="$out"
    $python -m study.compare --size="$size" --chains="$chains" --step_times="$times"
fi
