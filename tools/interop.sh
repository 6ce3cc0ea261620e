#!/usr/bin/env bash
# Try the adapters beside the real packages: an environment with TorchGeo and TerraTorch, this package, tests/adapters.
#
#   tools/interop.sh [PYTHON]      default python3; `make interop` calls it
#
# The environment is .venv-interop; with a CPU build of PyTorch it takes 3 GB of disk and 5 minutes.  PyPI's build for Linux
# is for CUDA and takes several GB more; for a CPU build set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=.venv-interop
STAMP=$VENV/.installed

if ! [ "$STAMP" -nt tools/interop.txt ] || ! [ "$STAMP" -nt pyproject.toml ]; then
    "${1:-python3}" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r tools/interop.txt -e .
    touch "$STAMP"
fi
exec "$VENV/bin/python" -m pytest -q -rs tests/adapters
