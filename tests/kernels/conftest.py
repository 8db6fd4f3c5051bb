"""These tests run twice: as they are, on the PyTorch stages, and with TRITON_INTERPRET=1 on the
Triton kernels under their interpreter. That needs a process of its own: kernels are decorated for
one or the other when they are imported. On a machine with a GPU they run there, compiled."""

import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON = INTERPRETED or torch.cuda.is_available()

if INTERPRETED:
    from tests.kernels.bfloat16 import mend

    mend()


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Memory that is allocated and not filled holds NaN: what a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    if torch.cuda.is_available() and not INTERPRETED:
        torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)
