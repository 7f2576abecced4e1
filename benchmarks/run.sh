#!/usr/bin/env bash
# Usage: benchmarks/run.sh [ROUNDS]
# Runs all benchmarks and writes RESULTS.md. Takes 40 minutes on two cores; the machine must be idle. Requires the extra
# `bench`. The first step installs pylocron into a separate folder, without its dependencies, because it requires old
# versions of huggingface_hub and pillow.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-../.venv/bin/python}
[ -x "$python" ] || python=python
rounds=${1:-8}
out=(--out results.json)

"$python" -m pip install -q --no-deps --target ../.cache/pylocron pylocron==0.3.0 fastprogress==1.0.3
export PYTHONPATH=../.cache/pylocron PYTHONWARNINGS=ignore

alike=(timm_sknet attention-free 'timm SK' 'timm ResNeXt')  # compiling each other network would take a minute

speed() { "$python" speed.py "${out[@]}" --rounds "$rounds" "$@"; }

for layout in channels_last NCHW; do
    speed --layout $layout
    speed --layout $layout --batch 1 --repeats 4
    speed --layout $layout --case train
    speed --layout $layout --case compiled --only "${alike[@]}"
    speed --layout $layout --case 'compiled train' --only "${alike[@]}"
done
speed --case bf16
for batch in 8 1; do
    speed --case onnx --layout NCHW --batch $batch
    speed --case openvino --layout NCHW --batch $batch
done
speed --model sknet101
speed --model sk_resnet18_timm
speed --model sk_shufflenetv2_x1_0
speed --model sknet29_16x32d --size 32
"$python" memory.py "${out[@]}"
"$python" scaling.py "${out[@]}"
"$python" convolutions.py "${out[@]}"
"$python" convolutions.py "${out[@]}" --batch 1 --repeats 40
"$python" report.py results.json RESULTS.md
