#!/usr/bin/env bash
# Usage: benchmarks/gpu.sh [--rehearse] check|measure|train OUT
# Tests, measurements and a training on a GPU. timm_sknet, pytest, pytest-timeout, pytest-xdist and tqdm must be
# installed. The results are written to the folder OUT. report.py makes RESULTS_GPU.md from its results.json. Two tables
# of this page are not measured here: the page shows their commands. Each command has a time limit. A command that fails
# does not stop the others.
#   check    compares the networks on the GPU with float64 on the CPU. Took 1 minute on an H100 with 16 CPU cores.
#   measure  speed, memory and the parts of an SK unit, in bfloat16, with batches of 256. At most 10 minutes.
#   train    trains sknet29_16x32d with the recipe cifar_modern, for SECONDS_LEFT, and continues after the last complete
#            epoch if OUT has one. The last call validates and writes the weights. Needs TIMM_SCRIPTS, CIFAR (the folder
#            that the recipe describes), CLASSES (10 or 100) and EPOCHS. KWARGS are model arguments, for other networks.
# --rehearse runs the same commands on the CPU, with small networks and images.
set -uo pipefail
rehearse=
[ "$1" = --rehearse ] && rehearse=1 && shift
part=$1
mkdir -p "$2"
out=$(realpath "$2")
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
failed=0
exec > >(tee -a "$out/$part.log") 2>&1

limit() { # SECONDS COMMAND...
    local began=$SECONDS
    echo "+ ${*:2}"
    timeout "$1" "${@:2}" || { echo "! exit code $?, after $((SECONDS - began)) of $1 s" && failed=1; }
}

measure() { limit "$1" "$python" "benchmarks/$2" --out "$out/results.json" "${@:3}"; }

case $part in
check)
    options=(--device cuda -n 7)
    [ "$rehearse" ] && options=(-k 'sknet12 and float32 or predict')
    OMP_NUM_THREADS=2 limit 170 "$python" -m pytest -q tests/test_device.py --durations 5 "${options[@]}"
    ;;
measure)
    size=(--batch 256) smaller=(--batch 64)
    networks=(timm_sknet 'timm ResNeXt' 'timm SK')
    model=()
    [ "$rehearse" ] && size=(--batch 2 --size 32) smaller=("${size[@]}") networks=(timm_sknet) model=(--model sknet12)
    measure 60 speed.py "${size[@]}" --rounds 8 "${model[@]}" --only "${networks[@]}" attention-free
    measure 40 speed.py "${size[@]}" --rounds 8 "${model[@]}" --layout NCHW --only "${networks[@]}"
    measure 40 parts.py "${size[@]}" --rounds 8
    measure 90 speed.py "${size[@]}" --rounds 5 "${model[@]}" --case train --only "${networks[@]}" attention-free \
        'timm_sknet memory-efficient'
    measure 40 parts.py "${size[@]}" --rounds 8 --case train
    measure 30 convolutions.py "${size[@]:0:2}"
    measure 90 memory.py "${smaller[@]}" "${model[@]}" --only "${networks[@]}" 'timm_sknet memory-efficient'
    measure 200 speed.py "${size[@]}" --rounds 8 "${model[@]}" --case compiled --only "${networks[@]}"
    ;;
train)
    model=(--model sknet29_16x32d --num-classes "$CLASSES" --model-kwargs ${KWARGS:-})
    options=(--workers 14)
    [ "$rehearse" ] && model[1]=sknet12 options=(--device cpu --batch-size 8 --workers 1)
    recovery=$(find "$out" -name 'recovery-*.pth.tar' | sort -V | tail -n 1)
    limit "$SECONDS_LEFT" "$python" "$TIMM_SCRIPTS/train.py" -c timm_sknet/recipes/cifar_modern.yaml "${model[@]}" \
        --data-dir "$CIFAR" --epochs "$EPOCHS" --output "$(dirname "$out")" --experiment "$(basename "$out")" \
        "${options[@]}" --recovery-interval 390 ${recovery:+--resume "$recovery"}
    if [ -e "$out/last.pth.tar" ]; then
        limit 60 "$python" "$TIMM_SCRIPTS/validate.py" "${model[@]}" --checkpoint "$out/last.pth.tar" --use-ema \
            --data-dir "$CIFAR" --split val "${options[@]}" --results-file "$out/result.json" --results-format json
        [ "${KWARGS:-}" ] ||
            limit 60 "$python" -m timm_sknet convert "$out/last.pth.tar" "$out/weights" --arch "${model[1]}" \
                --dtype float16
    fi
    ;;
esac
exit $failed
