"""Rows of each expert padded to what products in 8 bits take, and back."""

from torch import Tensor


def fused_multi_row_padding(rows: Tensor, out: Tensor, held: list[int], made: list[int], /) -> None:
    """``out`` ``[sum(made), K]`` takes ``held[i]`` rows for each i, and zeros up to ``made[i]``."""
    out.zero_()
    for to, part in zip(out.split(made), rows.split(held), strict=True):
        to[: len(part)] = part


def fused_multi_row_unpadding(
    rows: Tensor, out: Tensor, made: list[int], held: list[int], /
) -> None:
    """The other way."""
    for to, part in zip(out.split(held), rows.split(made), strict=True):
        to.copy_(part[: len(to)])
