#!/usr/bin/env bash
# The environment of the loaders that the benchmark compares with: litdata and mosaicml-streaming, and the NumPy that they pin.
#
#   tools/peers.sh [PYTHON]      default python3; `make peers` calls it
#
# The environment is .venv-peers.  PyPI's PyTorch for Linux is for CUDA and takes several GB; for a CPU build set
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=.venv-peers
STAMP=$VENV/.installed

if ! [ "$STAMP" -nt tools/peers.txt ]; then
    "${1:-python3}" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r tools/peers.txt
    touch "$STAMP"
fi
"$VENV/bin/python" -m benchmarks.loader_peers versions
