"""Products of matrices, plain or quantised, one or as many as there are experts.

cuBLAS counts columns first: of ``A [m, k]`` and ``B [n, k]``, as torch has them, the layout TN is
``B @ A.t()``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.te.enums import TORCH, DType
from tests.te.quantisation import quantize, value_of


def generic_gemm(
    A: Any,
    transA: bool,
    B: Any,
    transB: bool,
    D: Tensor | None,
    quantizer: Any,
    output_dtype: DType | None,
    bias: Tensor | None,
    bias_type: DType,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> list[Any]:
    """(product, gradient of the bias, None, None), the product into ``D`` if there is one, to
    which ``accumulate`` adds it. ``grad``: the bias is a place for its gradient."""
    assert comm_overlap is None and not gelu
    right = value_of(B, rows=not transB)
    result = _product(A, transA, right, transB) * alpha
    of_bias = None
    if bias is not None and grad:
        of_bias = right.reshape(-1, right.shape[-1]).float().sum(0).to(bias.dtype)
    elif bias is not None:
        result = result + bias.float()
    if not transB:
        result = result.view(*right.shape[:-1], result.shape[-1])
    if D is not None:
        return [_put(D, result, accumulate), of_bias, None, extra_output]
    output = result.to(TORCH[output_dtype] if output_dtype is not None else torch.bfloat16)
    return [quantize(output, quantizer), of_bias, None, extra_output]


def te_general_grouped_gemm(
    A: Sequence[Any],
    transA: bool,
    B: Sequence[Any],
    transB: bool,
    D: Sequence[Tensor] | None,
    D_type: DType,
    m_splits: Sequence[int],
    bias: Sequence[Tensor],
    bias_type: DType,
    single_output: bool,
    gelu_in: Sequence[Tensor],
    grad: bool,
    workspace: Sequence[Tensor],
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    sms: int,
    /,
) -> Sequence[Tensor]:
    """One product for each of ``A``, into ``D``, or with ``single_output`` into parts of it of
    ``m_splits`` rows. An expert without tokens has an empty product, and a gradient of 0."""
    assert D is not None
    outputs = torch.split(D[0], list(m_splits)) if single_output else D
    for a, b, own, out in zip(A, B, bias, outputs, strict=True):
        if out.numel() == 0:
            continue
        right = value_of(b, rows=not transB)
        result = _product(a, transA, right, transB)
        if own.numel() and grad:
            own.copy_(right.reshape(-1, right.shape[-1]).float().sum(0))
        elif own.numel():
            result = result + own.float()
        _put(out, result, accumulate)
    return bias


def _product(a: Any, turn_a: bool, right: Tensor, turn_b: bool) -> Tensor:
    left = value_of(a, rows=turn_a)
    left, right = (x.reshape(-1, x.shape[-1]).float() for x in (left, right))
    return (right.t() if turn_b else right) @ (left.t() if turn_a else left)


def _put(out: Tensor, result: Tensor, accumulate: bool) -> Tensor:
    result = result.view(out.shape)
    return out.add_(result.to(out.dtype)) if accumulate else out.copy_(result)
