"""How many rows a chunk has: as many as a budget of memory holds."""

import torch
from torch import Tensor

BUDGET = {"cuda": 4096, "cpu": 128}
"""MiB for a chunk's buffers. A GPU's holds 4096 rows and more of 151 936 columns, so that the
head's float32 gradient is read and written seldom; a CPU's, by measurement, is the best of a small
vocabulary and of a large one: README.md."""
MULTIPLE = 256
"""Of rows, where there are as many: the tiles of a product are full."""
COLUMNS = 16
"""Every row of a buffer begins on a multiple of so many elements, see ``Projection.buffer``."""


def rows_that_fit(weight: Tensor, logits: torch.dtype, *, megabytes: int | None = None) -> int:
    """Rows whose logits may exist at a time within ``megabytes`` (MiB; None: ``BUDGET``), 1 at
    least, for the head ``weight`` ``[w, H]`` of this rank and logits of that dtype.

    A row takes ``row_bytes``. Scores and training have the same chunks, whether or not there is a
    gradient to hold, and so the same bits. A pass of fewer rows allocates no more than it has.

    Example:
        151 936 columns of bfloat16, H = 4096, 4096 MiB on a GPU: 919 808 bytes a row with float32
        logits, 4669 rows, 4608; 312 064 with bfloat16, 13 763 rows, 13 568.
    """
    budget = BUDGET["cuda" if weight.is_cuda else "cpu"] if megabytes is None else megabytes
    rows = budget * 2**20 // row_bytes(weight, logits)
    return max(1, rows - rows % MULTIPLE if rows >= MULTIPLE else rows)


def row_bytes(weight: Tensor, logits: torch.dtype) -> int:
    """What a row of a chunk needs, in bytes, by its width in columns and in hidden states:

    - its logits;
    - their gradient in the products' dtype (the weight's; float32 on a CPU), in place of the logits
      if that is theirs;
    - its hidden states, or their gradient, gathered among the rows that have one;
    - on a CPU the float32 copies that its products make of bfloat16 logits and hidden states.
    """
    (columns, hidden), size = weight.shape, weight.element_size()
    product = weight.dtype if weight.is_cuda else torch.float32
    width = -(-columns // COLUMNS) * COLUMNS
    of_logits = [logits] if logits == product else [logits, product]
    total = width * sum(dtype.itemsize for dtype in of_logits) + hidden * size
    if product != weight.dtype:
        total += hidden * product.itemsize
    if not weight.is_cuda and logits != torch.float32:
        total += width * torch.float32.itemsize
    return total
