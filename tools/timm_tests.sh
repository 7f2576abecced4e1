#!/usr/bin/env bash
# Usage: tools/timm_tests.sh PYTHON FOLDER
# Downloads the sdist of the timm that PYTHON imports, and extracts its tests to FOLDER/timm-VERSION/tests. Nothing else
# is extracted: Python would import the timm beside the tests.
set -euo pipefail
version=$("$1" -c 'from timm import __version__; print(__version__)')
"$1" -m pip --disable-pip-version-check download --quiet --no-deps --no-binary timm -d "$2" "timm==$version"
tar -xzf "$2/timm-$version.tar.gz" -C "$2" "timm-$version/tests" "timm-$version/pyproject.toml"
echo "$2/timm-$version"
