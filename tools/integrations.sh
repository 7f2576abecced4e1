#!/usr/bin/env bash
# Usage: tools/integrations.sh PYTHON IMAGENETTE
# Runs benchmarks/integrations.py for each tool in an environment of its own, in .cache/integrations, with the newest
# versions that fit together. IMAGENETTE is a folder with train/ and val/.
set -euo pipefail
python=$1
imagenette=$(realpath "$2")
export NNCF_EXTENSION_LOAD_TIMEOUT=0 # no limit: the extension of NNCF is compiled when it is first used

run() { # PACKAGE TOOL [ARGUMENT...]
    local folder=.cache/integrations/$1
    "$python" -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet -e . tqdm "$1"
    echo "## $2"
    "$folder/bin/python" benchmarks/integrations.py "${@:2}"
}

run nncf openvino "$imagenette"
run nncf nncf
run executorch executorch
run litert-torch litert
