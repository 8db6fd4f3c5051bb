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
TE := $(VENV)/te/.ready
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

# Parts of the tests. Most keep one core busy, and those of Slurm half of one: JOBS of them run
# beside each other, and where make can, each prints when it is done.
QUICK := quick-alone quick-together quick-runs quick-te
SLOW := slow-runs slow-together slow-te slow-alone
DRILL := tests/e2e/test_drill.py
JOBS ?= 2
ifneq ($(filter test%,$(MAKECMDGOALS)),)
MAKEFLAGS += -j$(JOBS) $(if $(filter output-sync,$(.FEATURES)),-O)
endif

# What make check reads with shellcheck, and with them what they source.
SCRIPTS := .ci/run benchmarks/gpu.sh $(wildcard slurm/*.sbatch tests/slurm/emulator/*.sh) slurm/task.sh slurm/watch.sh tools/setup_gpu.sh

.PHONY: train test test-all test-slurm test-drill $(QUICK) $(SLOW) check bench clean

train: $(READY) $(MODEL)
	@$(BIN)/python -m peergrad.launch --nproc-per-node $(RANKS) $(RUN)

# Every area, with one whole run; the rest is in test-all, whose longest parts come first.
test: $(QUICK)
test-all: test-drill test-slurm $(SLOW)

# A real Slurm of emulated nodes, for root alone: skipped, and why, where it cannot run.
test-slurm: $(READY)
	$(BIN)/python -m pytest -q -rs -m slurm tests/slurm

# Kills, ten of them.
test-drill: $(READY)
	$(BIN)/python -m pytest -q $(DRILL)

$(QUICK): TESTS := not slow and not slurm
$(SLOW): TESTS := slow

quick-alone slow-alone: $(READY)
	$(BIN)/python -m pytest -q -m "$(TESTS)" tests/cpu

# Whole runs.
quick-runs slow-runs: $(READY)
	$(BIN)/python -m pytest -q -m "$(TESTS)" --ignore $(DRILL) tests/e2e

# Ranks, servers, kernels. Triton's are decorated for the interpreter or for a GPU when imported: two
# processes.
quick-together slow-together: $(READY)
	$(BIN)/python -m pytest -q -m "$(TESTS)" --ignore tests/cpu --ignore tests/e2e --ignore tests/te
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -m "$(TESTS)" tests/kernels

# Ranks that have Transformer Engine's Python, which must be there before Megatron is.
quick-te slow-te: $(TE)
	$(BIN)/python -m pytest -q -m "$(TESTS)" tests/te

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

# Apart from what a run imports, and only where its lock is another.
$(TE): requirements-te.lock $(READY)
	@if cksum <$< | cmp -s - $@; then touch $@; else rm -rf $(@D) && \
	PIP_USER=0 $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-compile --target $(@D) -r $< && \
	cksum <$< >$@; fi

$(MODEL): | $(READY)
	$(BIN)/python tools/make_tiny_model.py --out $@

clean:
	rm -rf $(VENV) models
