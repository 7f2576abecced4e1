#!/usr/bin/env bash
# Usage: tools/integrations.sh PYTHON IMAGENETTE
# Runs benchmarks/integrations.py for each tool in an environment of its own, in .cache/integrations, with the newest
# versions that fit together. IMAGENETTE is a folder with train/ and val/.
set -euo pipefail
python=$1
imagenette=$(realpath "$2")
export NNCF_EXTENSION_LOAD_TIMEOUT=0 # no limit: the extension of NNCF is compiled when it is first used

run() { # TOOL "PACKAGE..." [ARGUMENT...]
    local tool=$1 packages=$2
    local folder=.cache/integrations/$tool
    "$python" -m venv "$folder"
    # shellcheck disable=SC2086 # several packages
    "$folder/bin/python" -m pip install --quiet -e . tqdm $packages
    echo "## $tool"
    "$folder/bin/python" benchmarks/integrations.py "$tool" "${@:3}"
}

run openvino 'nncf openvino' "$imagenette"
run nncf nncf
run executorch executorch
run litert litert-torch
