"""Which implementation of the stages a tensor gets."""

import os
from importlib.util import find_spec
from types import ModuleType

import torch

from peergrad.kernels import reference


def triton_runs(device: torch.device) -> bool:
    """Whether Triton is installed and can run on ``device``: a GPU, or its interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return find_spec("triton") is not None and (device.type == "cuda" or interpreted)


def stages(device: torch.device, *, plain: bool) -> ModuleType:
    """``partials``, ``merge`` and ``dlogits`` in Triton where it runs, else (or if ``plain``) in
    PyTorch."""
    if plain or not triton_runs(device):
        return reference
    from peergrad.kernels import triton_stages  # decorates its kernels: only where they can run

    return triton_stages
