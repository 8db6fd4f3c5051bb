# make train · make test · make test-all · make test-slurm · make check · make bench
#
# Needs Python 3.11; everything else goes into .venv. Options:
#   make train NAME=second               a new run beside the first
#   make train RESUME=1                  continue an interrupted run
#   make train ARGS="optim.lr=2e-4"      any override of conf/
#   make PYTHON=/opt/python3.11/bin/python3
#   make TORCH_INDEX=/srv/wheels         index or folder with the CPU build of torch, asked where
#                                        pip looks by default has none
PYTHON ?= python3.11
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
NAME ?= quickstart_cpu
RANKS ?= 2
ARGS ?=

comma := ,
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MODEL := models/tiny
RUN := experiment=quickstart_cpu run.name=$(NAME) $(if $(RESUME),run.resume=true) $(ARGS)

# One thread a process: the ranks and the server share the cores.
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false
export TORCH_CPP_LOG_LEVEL := ERROR
# A laptop's host name need not resolve.
export GLOO_SOCKET_IFNAME := lo

# The lock's torchvision is older than its torch, see there; nothing here reads images.
train bench: export PYTHONWARNINGS := $(if $(PYTHONWARNINGS),$(PYTHONWARNINGS)$(comma))ignore:Failed to load image Python extension

# What make check reads with shellcheck, and with them what they source.
SCRIPTS := .ci/run benchmarks/gpu.sh $(wildcard slurm/*.sbatch tests/slurm/emulator/*.sh) slurm/task.sh slurm/watch.sh

.PHONY: train test test-all test-slurm test-alone test-together test-runs check bench clean

train: $(READY) $(MODEL)
	@$(BIN)/python -m peergrad.launch --nproc-per-node $(RANKS) $(RUN)

# Every area, with one whole run; the rest is in test-all. The parts run beside each other, as most
# tests keep one core busy, and those of Slurm half of one; where make can, each prints when it is done.
PARTS := $(MAKE) --no-print-directory $(if $(filter output-sync,$(.FEATURES)),-O)

test: $(READY)
	@$(PARTS) -j 2 test-alone test-together test-runs TESTS="not slow and not slurm"

test-all: $(READY)
	@$(PARTS) -j 3 test-runs test-slurm test-together test-alone TESTS="slow"

# A real Slurm of emulated nodes, for root alone: skipped, and why, where it cannot run.
test-slurm: $(READY)
	$(BIN)/python -m pytest -q -rs -m slurm tests/slurm

test-alone: $(READY)
	$(BIN)/python -m pytest -q -m "$(TESTS)" tests/cpu

# Whole runs.
test-runs: $(READY)
	$(BIN)/python -m pytest -q -m "$(TESTS)" tests/e2e

# Ranks, servers, kernels. Triton's are decorated for the interpreter or for a GPU when imported: two
# processes.
test-together: $(READY)
	$(BIN)/python -m pytest -q -m "$(TESTS)" --ignore tests/cpu --ignore tests/e2e
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -m "$(TESTS)" tests/kernels

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck -xa $(SCRIPTS)

bench: $(READY) $(MODEL)
	$(BIN)/python benchmarks/step.py

$(READY): requirements-cpu.lock pyproject.toml
	@PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" sh tools/setup_venv.sh $(VENV)

$(MODEL): | $(READY)
	$(BIN)/python tools/make_tiny_model.py --out $@

clean:
	rm -rf $(VENV) models
