# Two commands on a fresh Linux machine with Python >= 3.11: `make train` and `make test`.
# Both share one environment: VENV is its directory, PYTHON the interpreter it is made from.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
ifeq ($(strip $(VENV)),)
$(error VENV is empty: name the directory of the environment)
endif
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DISK_GB := 12
# Test processes side by side; 0: in the one that was started (for a debugger).
WORKERS ?= 2

export TOKENIZERS_PARALLELISM := false

.PHONY: help train test soak flickr8k lint env clean versions gpu gpu-batch gpu-test gpu-wheels kernels-bench slurm-test data-bench batch-bench

help:
	@echo "make train   the main job: quickstart data, teachers, DALR student, table ($(VENV) is made first)"
	@echo "make test    all tests that need no GPU (WORKERS=2 files at a time, ARGS=... for pytest)"
	@echo "make slurm-test  the job scripts on a Slurm cluster of 8 nodes on this host (installs it as root)"
	@echo "make soak    long counts and full products (hours)"
	@echo "make flickr8k  the README's real-data table (DALR_DATA=DIRECTORY; about an hour on 2 cores)"
	@echo "make data-bench  the loader against stock WebDataset, and its other goals (minutes)"
	@echo "make batch-bench  memory and time of the global batch on one process (minutes to hours)"
	@echo "make lint    style, import rules and types: what CI and the pre-commit hook run first"
	@echo "make gpu-test  all tests that need a GPU; make gpu: all GPU benchmarks (< 9 minutes each;"
	@echo "             PYTHON=python3 takes that interpreter as it is and fetches nothing)"
	@echo "make gpu-batch  the largest global batch that one GPU trains (< 9 minutes)"
	@echo "make kernels-bench  the CPU benchmark of the losses (a quarter of an hour on 2 cores)"

train: $(STAMP) versions
	$(BIN)/accelerate launch -m dalr_scale.train $(ARGS)

test: $(STAMP) versions
	$(BIN)/python -m pytest -m "not soak and not slurm" -n $(WORKERS) --dist loadfile \
		--no-loadscope-reorder $(ARGS)

slurm-test: $(STAMP) versions
	$(BIN)/python -m pytest -m "slurm and not soak" tests/slurm $(ARGS)

soak: $(STAMP) versions
	$(BIN)/python -m pytest -m soak $(ARGS)

flickr8k: $(STAMP) versions
	$(BIN)/python tests/soak/flickr8k_wiki.py $(ARGS)

# GPU hosts often have no network but torch already: with PYTHON=... on the command line that
# interpreter runs as it is, beside what `make gpu-wheels` unpacked; no environment is made.
ifeq ($(origin PYTHON),command line)
GPU_PYTHON := $(PYTHON)
GPU_NEEDS :=
GPU_INSTALL := :
GPU_PATH := $(CURDIR):$(CURDIR)/kernels$(if $(wildcard wheels/site),:$(CURDIR)/wheels/site)
else
GPU_PYTHON := $(BIN)/python
GPU_NEEDS := $(STAMP)
GPU_INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[rivals]"
GPU_PATH := $(CURDIR):$(CURDIR)/kernels
endif
HAS_GPU = $(GPU_PYTHON) -c 'import torch; print(torch.cuda.is_available())'
gpu gpu-batch gpu-test: export PYTHONPATH := $(GPU_PATH)

gpu-test: $(GPU_NEEDS)
	@found=$$($(HAS_GPU)); \
	if [[ $$found != True ]]; then echo "gpu tests skipped: torch sees no CUDA device"; \
	else timeout --signal=INT 530 $(GPU_PYTHON) -m pytest -m gpu tests/gpu $(ARGS); fi

gpu: $(GPU_NEEDS)
	@$(GPU_INSTALL)
	@timeout 535 $(GPU_PYTHON) kernels/bench/run.py $(ARGS)

gpu-batch: $(GPU_NEEDS)
	@timeout 535 $(GPU_PYTHON) benchmarks/gpu_batch.py $(ARGS)

gpu-wheels:
	kernels/bench/collect_wheels.sh

kernels-bench: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[bench]"
	$(BIN)/python kernels/bench/cpu.py $(ARGS)
batch-bench: $(STAMP) versions
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,bench]"
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/global_batch.py $(ARGS)

data-bench: $(STAMP) versions
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,bench]"
	$(BIN)/python benchmarks/loader.py $(ARGS)

# What CI and the pre-commit hook run before anything else.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=.:kernels $(BIN)/lint-imports --no-logo
	$(BIN)/basedpyright --pythonpath $(BIN)/python

env: $(STAMP)

versions: $(STAMP)
	@$(BIN)/python -m dalr_scale.versions

# The stamp comes last: an interrupted installation is taken up again, a complete one is not redone.
# An environment without pip was interrupted while it was made: it is cleared and created again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is %s" % sys.version.split()[0])'
	@$(PYTHON) -c 'import os, shutil, sys; free = shutil.disk_usage(".").free / 1e9; sys.exit(None if os.path.exists("$(STAMP)") or free >= $(DISK_GB) else "$(DISK_GB) GB of free disk are needed, %.1f are free here" % free)'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(if $(wildcard $(VENV)/pyvenv.cfg),--clear) $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24" "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
