"""The matrix products of a head, added up in float32 whatever the dtypes are."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """``left @ right`` into ``out``, added up in float32 and rounded once, to its dtype."""
    with _float32_sums():
        if left.is_cuda and left.dtype != out.dtype:
            return torch.mm(left, right, out_dtype=out.dtype, out=out)
        if left.dtype == right.dtype == out.dtype:
            return torch.mm(left, right, out=out)
    left, right = left.float(), right.float()
    return torch.mm(left, right, out=out) if out.dtype == torch.float32 else out.copy_(left @ right)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right`` in one product; ``total`` is float32."""
    with _float32_sums():
        if total.is_cuda and left.dtype != torch.float32:
            torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, left.float(), right.float(), out=total)


@contextmanager
def _float32_sums() -> Iterator[None]:
    """cuBLAS may otherwise add up the parts of a long product in the dtype of its result, as torch
    allows by default. That of the hidden states' gradient is as long as the vocabulary."""
    settings = torch.backends.cuda.matmul
    before = (
        settings.allow_bf16_reduced_precision_reduction,
        settings.allow_fp16_reduced_precision_reduction,
    )
    settings.allow_bf16_reduced_precision_reduction = False
    settings.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        (
            settings.allow_bf16_reduced_precision_reduction,
            settings.allow_fp16_reduced_precision_reduction,
        ) = before
