#!/usr/bin/env bash
# Usage: [CHECKS=few|all] tools/try_wheel.sh PYTHON [REQUIREMENT...]
# Installs the requirements, such as torch==2.6.*, into a new environment, and then the wheel in dist/, as a user would.
# pip must not install or replace anything else. Then runs `timm-sknet predict` there, in another folder.
#
# CHECKS=few: also exchanges weights with .venv, and runs timm's own tests of this release on one model, and our tests
#   of pretrained weights.
# CHECKS=all: also runs timm's tests on three models, the fast tests and, with TIMM_SCRIPTS, timm's scripts.
set -euo pipefail
python=$1
shift
root=$PWD
wheel=$(echo "$root"/dist/*.whl)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"$python" -m venv "$folder/venv"
cd "$folder"
pip() { venv/bin/python -m pip --disable-pip-version-check "$@" --quiet; }

if [ $# -gt 0 ]; then
    pip install "$@"
    pip freeze >environment.txt
    pip install --dry-run --report report.json "$wheel"
    venv/bin/python - <<'END'
import json
names = {item['metadata']['name'] for item in json.load(open('report.json'))['install']}
assert names <= {'timm-sknet', 'huggingface_hub', 'safetensors', 'pillow'}, f'pip would install {names}'
END
fi
pip install "$wheel"
venv/bin/python -c '
import sys, timm, timm_sknet, torch
assert timm_sknet.__file__.startswith(sys.prefix), timm_sknet.__file__
'
venv/bin/timm-sknet info
venv/bin/timm-sknet predict
[ -n "${CHECKS:-}" ] || exit 0

"$root/.venv/bin/python" "$root/tools/exchange.py" write ours
venv/bin/python "$root/tools/exchange.py" read ours
venv/bin/python "$root/tools/exchange.py" write theirs
"$root/.venv/bin/python" "$root/tools/exchange.py" read theirs

models='sknet12'
# the requirements of the tests must not change what is there either
if [ "$CHECKS" = all ]; then
    models='sknet12 or sknet26 or sk_shufflenetv2_x0_5'
    pip install -c environment.txt "$wheel[test]"
else
    pip install -c environment.txt pytest pytest-timeout
fi

suite=$("$root/tools/timm_tests.sh" venv/bin/python "$folder")
(
    cd "$suite"
    PYTHONPATH="$root/tests" "$folder/venv/bin/python" -m pytest -p timm_suite tests/test_models.py -k "$models" -q
)

if [ "$CHECKS" = all ]; then
    venv/bin/pytest -m 'not slow' "$root/tests"
    if [ -n "${TIMM_SCRIPTS:-}" ]; then
        venv/bin/pytest -m slow -k 'train_keeps or validate or benchmark or onnx_export' "$root/tests/test_contract.py"
    else
        echo "timm's scripts are not run: TIMM_SCRIPTS does not name a folder with them"
    fi
else
    weights='download_from_the_hub or no_code_of_a_file or own_weights_load'
    venv/bin/python -m pytest -k "$weights" "$root/tests/test_pretrained.py"
fi
