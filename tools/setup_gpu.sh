#!/usr/bin/env sh
# Install everything for NVIDIA GPUs into the environment of a Python, 3.11 or 3.12:
#
#   python3.12 -m venv .venv && tools/setup_gpu.sh .venv/bin/python
#
# Needs CUDA 13's toolkit (CUDA_HOME), a C++ compiler and Python's headers; no GPU. Transformer Engine's
# part for PyTorch is on the package index as source alone: it is compiled against the torch that is here,
# in MAX_JOBS processes. Without NVTE_PYTORCH_FORCE_BUILD its setup would first look elsewhere for a wheel.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${1:?usage: tools/setup_gpu.sh PYTHON, of a virtual environment}
export CUDA_HOME="${CUDA_HOME:-/usr/local/cuda}"
[ -e "$CUDA_HOME/include/cuda_runtime.h" ] || {
    echo "error: CUDA_HOME = $CUDA_HOME: holds no include/cuda_runtime.h; install CUDA 13's toolkit, or name it" >&2
    exit 1
}

install() {
    "$PYTHON" -m pip install --constraint requirements-gpu.lock "$@"
}

install setuptools wheel ninja
install --editable .   # torch first
site=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
for part in cu13 cudnn nccl; do   # what is not in the toolkit came with torch
    CPATH="$site/nvidia/$part/include${CPATH:+:$CPATH}"
done
export CPATH NVTE_PYTORCH_FORCE_BUILD=TRUE
install --no-build-isolation --editable '.[gpu]'
"$PYTHON" -c 'import transformer_engine.pytorch'
echo "ready: python tools/preflight.py says whether a node's GPUs are"
