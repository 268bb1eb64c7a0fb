# Needs make and Python >= 3.10 with venv; everything else is installed into $(VENV).
PYTHON         ?= python3
VENV           ?= .venv
TORCH_VERSION  ?= 2.13.0
TRITON_VERSION ?= 3.7.1
PIP_FLAGS      ?=
DEMO_FLAGS     ?=
BENCH_FLAGS    ?= --out benchmark_output
PYTEST_FLAGS   ?= -n logical --maxprocesses 4 --dist worksteal

VENV_PYTHON := $(VENV)/bin/python
PIP_INSTALL := $(VENV_PYTHON) -m pip install --disable-pip-version-check $(PIP_FLAGS)

# OpenMP's threads spin while they wait for each other; on a core that another program uses, that makes a step of
# training several times as long.
DEMO_THREADS := OMP_WAIT_POLICY=passive

# One stamp for each thing installed, so that a second run installs nothing.
VENV_READY    := $(VENV)/.ready-venv
TORCH_READY   := $(VENV)/.ready-torch-$(TORCH_VERSION)-triton-$(TRITON_VERSION)
PACKAGE_READY := $(VENV)/.ready-package
BENCH_READY   := $(VENV)/.ready-bench
DEV_READY     := $(VENV)/.ready-dev

.DEFAULT_GOAL := help
.PHONY: help venv install demo bench test lint types sanitize clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  PYTHON=python3.12     the interpreter that creates $(VENV)"
	@echo "  IDM_FAST_BUILD=cpu    auto, cpu, cuda or python: what the native extension must have (README)"
	@echo "  PIP_FLAGS='...'       added to every pip install, for example another package index"
	@echo "  DEMO_FLAGS='...'      for example --seconds 60"
	@echo "  BENCH_FLAGS='...'     for example '--quick --device cpu --out quick' (replaces: $(BENCH_FLAGS))"
	@echo "  PYTEST_FLAGS='...'    for example '-x -k coupling' (replaces: $(PYTEST_FLAGS))"

venv: $(VENV_READY) ## create the virtual environment
install: $(PACKAGE_READY) ## install idm-fast into it (editable), with PyTorch; says what was built
	@$(VENV)/bin/idm-fast doctor | sed -n '/^native extension/,/^$$/p'

demo: $(PACKAGE_READY) ## train a tiny network on photographs, reconstruct others, show the result (5 minutes)
	$(DEMO_THREADS) $(VENV_PYTHON) -m idm_fast.demo $(DEMO_FLAGS)

bench: $(BENCH_READY) ## run the benchmark suite: on a GPU if there is one, on a CPU in an hour (BENCH_FLAGS=--quick: in minutes)
	$(VENV_PYTHON) -m benchmarks $(BENCH_FLAGS)

test: $(DEV_READY) ## run all tests
	OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest $(PYTEST_FLAGS)

lint: $(DEV_READY) ## ruff
	$(VENV_PYTHON) -m ruff check .

types: $(DEV_READY) ## mypy on the package
	$(VENV_PYTHON) -m mypy

sanitize: $(DEV_READY) ## all tests of the C++ kernels but opcheck, with AddressSanitizer and UBSan (minutes)
	OMP_NUM_THREADS=1 $(VENV_PYTHON) tests/native/sanitized.py

clean: ## remove the virtual environment, build leftovers and caches (demo_output/ stays)
	rm -rf $(VENV) build dist *.egg-info .ruff_cache .mypy_cache .pytest_cache .hypothesis
	rm -f idm_fast/_C.*.so idm_fast/_cuda.so idm_fast/_build.json
	find idm_fast tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV_READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is missing or older than Python 3.10; name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "$(PYTHON) has no venv; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Before the package: it asks for torch>=2.10 only, and would take the newest there is.
$(TORCH_READY): $(VENV_READY)
	$(PIP_INSTALL) "torch==$(TORCH_VERSION)" "triton==$(TRITON_VERSION); platform_system == 'Linux'"
	@touch $@

$(PACKAGE_READY): $(TORCH_READY) pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
	$(PIP_INSTALL) --editable .
	@touch $@

$(BENCH_READY): $(PACKAGE_READY)
	$(PIP_INSTALL) --editable ".[bench]"
	@touch $@

$(DEV_READY): $(PACKAGE_READY)
	$(PIP_INSTALL) --editable ".[dev]"
	@touch $@
