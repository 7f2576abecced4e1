#!/usr/bin/env bash
# Usage: [TESTS=1] tools/try_wheel.sh PYTHON [PIP-INSTALL-ARGUMENT...]
# Installs the wheel in dist/ into an empty environment and runs `timm-sknet predict` there, in another folder. With
# TESTS set, it also runs the fast tests.
set -euo pipefail
python=$1
shift
root=$PWD
wheel=$(echo "$root"/dist/*.whl)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "$@" "$wheel${TESTS:+[test]}"
cd "$folder"
venv/bin/python -c '
import sys, timm, timm_sknet, torch
assert timm_sknet.__file__.startswith(sys.prefix), timm_sknet.__file__
print("Python", sys.version.split()[0], "torch", torch.__version__, "timm", timm.__version__)
'
venv/bin/timm-sknet predict
if [ -n "${TESTS:-}" ]; then
    venv/bin/pytest -m 'not slow' "$root/tests"
fi
