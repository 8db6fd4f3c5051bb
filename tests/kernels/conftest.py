"""These tests run twice: as they are, on the PyTorch stages, and with TRITON_INTERPRET=1 on the
Triton kernels under their interpreter. That needs a process of its own: kernels are decorated for
one or the other when they are imported. On a machine with a GPU they run there, compiled."""

import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = torch.cuda.is_available() and not INTERPRETED
TRITON = INTERPRETED or COMPILED

# Four fifths of the interpreter's time. Every kernel is at work in the others, too.
LONG_WHEN_INTERPRETED = (
    *("test_linear.py::test_equals_float64", "test_linear.py::test_matrix_products"),
    *("test_linear.py::test_main_gradient", "test_linear.py::test_what_lies_between_rows"),
    *("test_linear.py::test_scoring_and_training", "test_linear.py::test_real_ranks"),
    *("test_logits.py::test_bits_are_equal", "test_logits.py::test_real_ranks"),
)

if INTERPRETED:
    from tests.kernels.bfloat16 import mend

    mend()


@pytest.hookimpl(tryfirst=True)  # before `-m` looks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items if INTERPRETED else []:
        if any(long in item.nodeid for long in LONG_WHEN_INTERPRETED):
            item.add_marker(pytest.mark.slow)
    for item in items if COMPILED else []:
        if "::test_real_ranks" in item.nodeid:
            item.add_marker(pytest.mark.skip(reason="these ranks have no GPU to compare with"))


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Memory that is allocated and not filled holds NaN: what a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    if COMPILED:
        torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)
