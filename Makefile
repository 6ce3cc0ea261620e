# Everything a fresh machine needs: Python 3.11 to 3.13, make and gcc.  The first target that needs the environment makes it.
#   make pretrain   install, then pretrain on the embedded data set     make test     the test suite (15 minutes)
#   make lint       ruff and pyright                                    make drills   kill, hang and restart real processes
#   make bench      measure training steps, then compare their ratios with the committed ones (15 minutes on two cores);
#                   in bf16 as well where the processor multiplies it, or as PRECISIONS=fp32,bf16 says
#   make bench-gpu  the same on a GPU; PYTHON=python3 takes that Python as it is, with PyTorch, NumPy and PyArrow
#   make lock       write the lock file from .venv
#   make minkowski  build MinkowskiEngine for model.backend=minkowski (needs g++; minutes)
#   make peers      litdata and mosaicml-streaming, which the loader benchmark compares with, in .venv-peers
#   make interop    the adapters beside TorchGeo and TerraTorch, in .venv-interop

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
USABLE = import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c '$(USABLE)' >/dev/null 2>&1 && echo $$p && break; done)

.PHONY: install pretrain test lint format drills drills-quick bench bench-gpu lock interop peers minkowski clean

install: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 with the venv module was found; install one, or set PYTHON=..."; exit 1; }
	@echo "installing into $(VENV), about 3.5 GB: a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

pretrain: $(STAMP)
	$(PY) -m mmearth_ray.pretrain configs/embedded.yaml

TEST_PROCESSES ?= 2

test: $(STAMP)
	$(PY) -m pytest -q -n $(TEST_PROCESSES) --dist loadfile

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

drills: $(STAMP)
	$(PY) -m pytest -q -m drill

drills-quick: $(STAMP)
	$(PY) -m pytest -q -m "drill and not long"

LOADER ?= shapes=[112/16/128] rounds=2 seconds=1 warm=0.5

PRECISIONS ?= $(shell grep -qw -e avx512_bf16 -e amx_bf16 /proc/cpuinfo 2>/dev/null && echo fp32,bf16 || echo fp32)

bench: $(STAMP)
	$(PY) -m benchmarks.bench_step rounds=4 precisions=[$(PRECISIONS)]
	$(PY) -m benchmarks.bench_step theme=step_large sizes=[tiny,base] shapes=[112/16] batch=[4,2] rounds=2 against=[plain] \
		precisions=[$(PRECISIONS)]
	$(PY) -m benchmarks.bench_loader $(LOADER)
	$(PY) -m benchmarks.gate

# A Python given by hand is used as it is: nothing is installed.
GIVEN = $(filter-out file default undefined,$(origin PYTHON))
GPU_PY = $(if $(GIVEN),$(PYTHON),$(PY))
GPU_STEP = $(GPU_PY) -m benchmarks.bench_step backends=[packed,triton]

bench-gpu: $(if $(GIVEN),,$(STAMP))
	$(GPU_PY) -m benchmarks.bench_depthwise
	$(GPU_STEP) precisions=[fp32,bf16] batch=[256]
	$(GPU_STEP) theme=step_large sizes=[tiny,base,large,huge] shapes=[112/16] precisions=[fp32,bf16] batch=[128,64,32,16]
	$(GPU_STEP) theme=step_compile sizes=[atto,base] shapes=[112/16] precisions=[bf16] batch=[256,64] compile=true \
		against=[] memory=false parts=false
	$(GPU_STEP) theme=step_largest sizes=[atto,base,huge] shapes=[112/16] precisions=[bf16] batch=[256,64,16] largest=true \
		against=[] memory=false parts=false rounds=1
	$(GPU_PY) -m benchmarks.gate

peers:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 with the venv module was found; install one, or set PYTHON=..."; exit 1; }
	tools/peers.sh $(PYTHON)

interop:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 with the venv module was found; install one, or set PYTHON=..."; exit 1; }
	tools/interop.sh $(PYTHON)

minkowski: $(STAMP)
	tools/build_minkowski.sh $(VENV)

# +cpu and the like name a local build of the same version
lock: $(STAMP)
	(echo "# Exact versions that the project is tested with: written by 'make lock', installed by 'make install'."; \
	 $(PY) -m pip freeze --exclude-editable | grep -v -i -e '^minkowski' -e '^scipy-openblas' | sed -e 's/+cpu$$//' -e '/^triton==/s/$$/; sys_platform == "linux"/') > requirements.lock

clean:
	rm -rf $(VENV) data/embedded runs
