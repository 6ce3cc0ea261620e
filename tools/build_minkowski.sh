#!/usr/bin/env bash
# Build MinkowskiEngine 0.5.4 for the CPU against the PyTorch of a virtual environment, install it there and try it.
#
#   tools/build_minkowski.sh [VENV]        default .venv; `make minkowski` calls it
#
# Needs Linux, g++ and Python's headers; no root, no system BLAS, no CUDA.  Takes 10 to 30 minutes and 2 GB of memory.
# Does nothing where MinkowskiEngine already works, so running it again after an upgrade of PyTorch builds it anew.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=$(realpath -m "${1:-.venv}")
PY=$VENV/bin/python
CXX=${CXX:-g++}
# The last release, of 2021.  The hash is that of the source package on PyPI; pip checks it.
ENGINE="MinkowskiEngine==0.5.4 --hash=sha256:b1879c00d0b0b1d30ba622cce239886a7e3c78ee9da1064cdfe2f64c2ab15f94"
# OpenBLAS with headers in a wheel: MinkowskiEngine needs a BLAS with the C interface, and PyTorch exports none.  It stays
# in the environment, as the built extension loads it.
BLAS="scipy-openblas32==0.3.34.481.3"

fail() {
    echo "error: $*" >&2
    exit 1
}

check_needs() {
    [ "$(uname -s)" = Linux ] || fail "MinkowskiEngine builds here on Linux only; use model.backend=packed"
    [ -x "$PY" ] || fail "there is no Python at $PY; run 'make install' first"
    "$PY" -c 'import torch' 2>/dev/null || fail "PyTorch cannot be imported by $PY; run 'make install' first"
    "$PY" -c 'import pip; exit(tuple(map(int, pip.__version__.split(".")[:2])) < (23, 1))' 2>/dev/null ||
        fail "pip of at least 23.1 is needed in $VENV; run '$PY -m pip install --upgrade pip'"
    command -v "$CXX" >/dev/null || fail "no C++ compiler '$CXX' was found; install g++ (Debian: apt-get install g++) or set CXX"
    local include
    include=$("$PY" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
    [ -e "$include/Python.h" ] || fail "$include/Python.h is missing; install Python's headers (Debian: apt-get install python3-dev)"
    echo '#include <omp.h>' | "$CXX" -fopenmp -x c++ -fsyntax-only - 2>/dev/null ||
        fail "'$CXX' knows no OpenMP (omp.h); use g++, or install OpenMP for it"
}

# Exits with 0 where MinkowskiEngine can be imported and convolves as this project's own encoder does.
try_engine() {
    "$PY" - <<'PYTHON'
import torch
from mmearth_ray.model.layers import PackedLayout
from mmearth_ray.model.minkowski import MinkowskiLayout, require_minkowski

require_minkowski()
torch.manual_seed(0)
visible, image = torch.tensor([[0, 2, 3]]), torch.randn(1, 2, 16, 16)
weight = torch.randn(4, 2, 3, 3, requires_grad=True)
found = [layout(visible, (2, 2)).convolve(image, weight, None) for layout in (PackedLayout, MinkowskiLayout)]
slopes = [torch.autograd.grad(x.square().sum(), weight)[0] for x in found]
torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-4, atol=1e-4)
PYTHON
}

build() {
    local blas_include blas_library
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    echo "installing $BLAS into $VENV"
    "$PY" -m pip install --quiet --disable-pip-version-check "$BLAS" || fail "pip could not install $BLAS"
    # PyTorch's build helper compiles one file at a time without ninja; needed for the build only.
    "$PY" -m pip install --quiet --disable-pip-version-check --target "$work/ninja" ninja || fail "pip could not install ninja"

    # That OpenBLAS carries the prefix scipy_ on its names, and another name on disk than -lopenblas looks for.
    blas_include=$("$PY" -c 'import scipy_openblas32 as b; print(b.get_include_dir())')
    blas_library=$("$PY" -c 'import scipy_openblas32 as b; print(b.get_lib_dir() + "/" + b.get_library(fullname=True))')
    mkdir "$work/include" "$work/lib"
    ln -s "$blas_library" "$work/lib/libopenblas.so"
    {
        echo "#include \"$blas_include/cblas.h\""
        for name in sgemm dgemm saxpy daxpy; do echo "#define cblas_$name scipy_cblas_$name"; done
    } >"$work/include/cblas.h"

    # --cpu_only: no CUDA; builds for CUDA 12 and 13 fail, and a GPU in this machine must not start one.
    # --blas=openblas: otherwise setup.py searches a BLAS by numpy.distutils, which Python 3.12 no longer has.
    # Its own --blas_include_dirs and --blas_library_dirs do not reach the linker, so CPATH and LIBRARY_PATH name them.
    echo "$ENGINE --config-settings=\"--global-option=--cpu_only --blas=openblas\"" >"$work/requirements.txt"
    echo "compiling MinkowskiEngine against PyTorch $("$PY" -c 'import torch; print(torch.__version__)') with $CXX (minutes)"
    # PATH: setup.py calls 'pip uninstall', which must mean this environment's.     MAX_JOBS: each takes up to 1 GB.
    # LDFLAGS: the extension finds OpenBLAS beside itself, wherever the environment is moved.
    # --no-build-isolation: setup.py imports torch.     --require-hashes: what is compiled is what was checked here.
    # --no-cache-dir: pip would offer an extension again that it had compiled against another PyTorch.
    PATH="$VENV/bin:$work/ninja/bin:$PATH" CXX="$CXX" MAX_JOBS="${MAX_JOBS:-2}" \
        CPATH="$work/include${CPATH:+:$CPATH}" LIBRARY_PATH="$work/lib${LIBRARY_PATH:+:$LIBRARY_PATH}" \
        LDFLAGS="${LDFLAGS:-} -Wl,-rpath,'\$ORIGIN/../scipy_openblas32/lib'" \
        "$PY" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-binary :all: --no-cache-dir \
        --require-hashes -r "$work/requirements.txt" -w "$work" >"$work/log" 2>&1 ||
        { tail -n 40 "$work/log" >&2; fail "MinkowskiEngine could not be fetched or compiled; the end of the log is above"; }
    "$PY" -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall "$work"/*.whl ||
        fail "pip could not install the built package"
}

check_needs
if try_engine 2>/dev/null; then
    echo "MinkowskiEngine already works in $VENV"
    exit 0
fi
build
try_engine || fail "MinkowskiEngine was built, but does not work: see above"
echo "MinkowskiEngine works in $VENV: use model.backend=minkowski"
