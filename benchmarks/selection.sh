#!/usr/bin/env bash
# Usage: TIMM_SCRIPTS=FOLDER [SEEDS='42 43 44'] [NETWORKS='sum|one'] benchmarks/selection.sh DATA RESULTS.jsonl
# Trains sknet12 and the networks below with timm's train.py and RECIPE (default: the recipe sknet12_cifar10), with
# several seeds, and adds a line for each run to RESULTS.jsonl. DATA contains CIFAR-10 or CIFAR-100, stored as that
# recipe describes. Checkpoints and logs are written to RESULTS.jsonl.runs. selection.py prints the table.
#
# The script trains JOBS networks at a time (default: 2), with one thread each, on DEVICE (default: cpu). On two cores
# with bfloat16 instructions, two take 60 to 90 minutes and all 18 take 9 to 14 hours. If you interrupt the script and
# start it again, it skips the finished runs and continues the others after their last complete epoch.
set -euo pipefail
if [ $# != 2 ] || [ -z "${TIMM_SCRIPTS:-}" ]; then
    sed -n '2s/^# //p' "$0" >&2
    exit 2
fi
data=$(realpath -e "$1")
results=$(realpath "$2")
recipe=$(realpath -e "${RECIPE:-$(timm-sknet recipe sknet12_cifar10)}")
classes=$(ls "$data/val" | wc -l)
export recipe data results classes OMP_NUM_THREADS=1

# NETWORK SEED [MODEL_KWARG...]
run() {
    local network=$1 seed=$2 folder=$results.runs/$1-$2
    shift 2
    grep -qs "\"network\": \"$network\", \"seed\": $seed," "$results" && return
    mkdir -p "$folder"
    if [ ! -e "$folder/last.pth.tar" ]; then
        local recovery # the latest checkpoint; timm writes one after each epoch, which has 390 batches of 128
        recovery=$(find "$folder" -name 'recovery-*.pth.tar' | sort -V | tail -n 1)
        python "$TIMM_SCRIPTS/train.py" -c "$recipe" --data-dir "$data" \
            --num-classes "$classes" --device "${DEVICE:-cpu}" --seed "$seed" --model-kwargs "$@" \
            --output "${folder%/*}" --experiment "${folder##*/}" --recovery-interval 390 \
            ${recovery:+--resume "$recovery"} &>>"$folder/train.log" || fail "$folder/train.log"
    fi
    python "$TIMM_SCRIPTS/validate.py" --model sknet12 --num-classes "$classes" --model-kwargs "$@" --data-dir "$data" \
        --split val --device "${DEVICE:-cpu}" --checkpoint "$folder/last.pth.tar" --results-file "$folder/result.json" \
        --results-format json &>"$folder/validate.log" || fail "$folder/validate.log"
    python - "$network" "$seed" "$classes" "$folder" "$@" >>"$results" <<'END'
import csv, json, sys, timm, torch
network, seed, classes, folder, *kwargs = sys.argv[1:]
top1 = json.load(open(f'{folder}/result.json'))['top1']
last = list(csv.DictReader(open(f'{folder}/summary.csv')))[-1]
losses = {name: round(float(last[name]), 4) for name in ('train_loss', 'eval_loss')}
versions = {'torch': torch.__version__, 'timm': timm.__version__}
run = {'network': network, 'seed': int(seed), 'classes': int(classes), 'kwargs': kwargs, 'top1': top1}
print(json.dumps({**run, **losses, **versions}))
END
}
# LOG
fail() {
    tail -n 1 "$1" >&2
    echo "See $1" >&2
    return 1
}
export -f run fail

for seed in ${SEEDS:-42 43 44}; do
    echo "selection $seed"
    echo "sum $seed attention=False"
    echo "one $seed branches=[[3,1,1]]"
    echo "wide $seed branches=[[3,1,1]] mid_widths=[22,44,140]"
    echo "same $seed branches=[[3,1,1],[3,1,1]]"
    echo "same_sum $seed branches=[[3,1,1],[3,1,1]] attention=False"
done | grep -E "^(${NETWORKS:-.*}) " | xargs -P "${JOBS:-2}" -I LINE bash -feuc 'run LINE'
