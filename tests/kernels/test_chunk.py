"""Rows of a chunk, worked out by hand, and against the memory that a pass holds."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from peergrad.kernels.chunk import BUDGET, row_bytes, rows_that_fit
from peergrad.kernels.projection import Pass, Projection

BF16, FP32 = torch.bfloat16, torch.float32
QWEN3 = 151936


def head(device: str, columns: int, hidden: int, dtype: torch.dtype) -> Tensor:
    """Without memory."""
    with FakeTensorMode():
        return torch.empty(columns, hidden, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("device", "ranks", "weight", "logits", "size", "rows"),
    [
        # 2 bytes, gradient in place, and 2 x 4096 of hidden states; 2^32 / 312 064 = 13 763.1
        ("cuda", 1, BF16, BF16, 2 * QWEN3 + 8192, 13568),
        # 4 bytes and 2 of the gradient; 2^32 / 919 808 = 4669.4
        ("cuda", 1, BF16, FP32, 6 * QWEN3 + 8192, 4608),
        ("cuda", 1, FP32, FP32, 4 * QWEN3 + 16384, 6656),  # 2^32 / 624 128 = 6881.5
        # 18 992 columns: 2^32 / 46 176 = 93 012.9, and / 122 144 = 35 163.1
        ("cuda", 8, BF16, BF16, 2 * 18992 + 8192, 92928),
        ("cuda", 8, BF16, FP32, 6 * 18992 + 8192, 35072),
        # the products' gradient is float32, in place; hidden states as they are and as float32
        ("cpu", 1, BF16, FP32, 4 * QWEN3 + 8192 + 16384, None),
        # logits of 2 bytes, what they are rounded from, and a gradient of 4
        ("cpu", 1, BF16, BF16, 10 * QWEN3 + 8192 + 16384, None),
        ("cpu", 1, FP32, FP32, 4 * QWEN3 + 16384, None),
    ],
)
def test_rows_worked_out_by_hand(
    device: str, ranks: int, weight: torch.dtype, logits: torch.dtype, size: int, rows: int | None
) -> None:
    whole = head(device, QWEN3 // ranks, 4096, weight)
    assert row_bytes(whole, logits) == size
    assert BUDGET["cuda"] == 4096
    if rows is not None:
        assert rows_that_fit(whole, logits) == rows


@pytest.mark.parametrize(
    ("megabytes", "rows"),
    # 4 x 1008 + 4 x 16 = 4096 bytes a row: 256 of them a MiB
    [(1, 256), (3, 768), (4096, 2**20)],
)
def test_a_budget_in_whole_tiles(megabytes: int, rows: int) -> None:
    """1001 columns take the memory of 1008, where every row begins on a multiple of 16."""
    weight = head("cpu", 1001, 16, FP32)
    assert rows_that_fit(weight, FP32, megabytes=megabytes) == rows


def test_a_small_budget() -> None:
    """Of less than 256 rows, any number; one row there is always."""
    weight = head("cuda", QWEN3, 4096, BF16)
    assert rows_that_fit(weight, BF16, megabytes=64) == 215  # 2^26 / 312 064 = 215.05
    assert rows_that_fit(weight, BF16, megabytes=76) == 255  # 255.4
    assert rows_that_fit(weight, BF16, megabytes=77) == 256  # 258.7
    assert rows_that_fit(head("cuda", 2**20, 4096, BF16), FP32, megabytes=1) == 1


@pytest.mark.parametrize(("weight", "logits"), [(BF16, BF16), (BF16, FP32), (FP32, FP32)])
def test_a_pass_holds_what_was_counted(weight: torch.dtype, logits: torch.dtype) -> None:
    """But for the float32 copies that the products of a CPU make, on the way."""
    w = torch.zeros(1001, 48, dtype=weight, device="cpu")
    made = Projection.of(w, None, 1001, dtype=logits, chunk=256, plain=True)
    run = Pass(made, 500, gradient=True)
    buffers = {id(x): x for x in (run.logits, run.d_logits, run.states)}
    held = sum(x.untyped_storage().nbytes() for x in buffers.values())
    copies = 4 * 48 * (weight is BF16) + 4 * 1008 * (logits is BF16)
    assert held == 256 * (row_bytes(w, logits) - copies)
