#!/usr/bin/env bash
# What only a GPU can tell, in at most nine minutes: the kernels' tests, compiled; their speed beside
# others'; the trainer at three sizes; NCCL on one rank. One JSON file comes out of it.
#
#   benchmarks/gpu.sh --carry       where there is a package index: gather build/gpu-wheels
#   benchmarks/gpu.sh               one H100 or H200 with PyTorch and Triton for Python 3.12,
#                                   no network; the working tree and build/gpu-wheels are all it needs
#   benchmarks/gpu.sh --only logprob sweep
#   benchmarks/gpu.sh --tiny        anywhere, two minutes: shows that all of it runs
#
# Ends with 1 if a part failed. OUT names the folder of the file, PYTHON the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

WHEELS=build/gpu-wheels
SITE=build/gpu-site
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi

if [ "${1:-}" = --carry ]; then
    exec "$PYTHON" benchmarks/gpu_carry.py
fi

# Wheels are archives: nothing of pip is needed to open them. They come before what is installed, so
# that what runs is what was tried. A virtual environment of this project has everything.
if [ "$PYTHON" != .venv/bin/python ] && [ -d "$WHEELS" ]; then
    rm -rf "$SITE"
    "$PYTHON" - "$SITE" "$WHEELS"/*.whl <<'END'
import sys, zipfile
for wheel in sys.argv[2:]:
    zipfile.ZipFile(wheel).extractall(sys.argv[1])
END
    export PYTHONPATH="$PWD/$SITE${PYTHONPATH:+:$PYTHONPATH}"
fi
exec "$PYTHON" benchmarks/gpu.py "$@"
