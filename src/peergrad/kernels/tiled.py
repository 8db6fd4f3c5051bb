"""Scoring without logits in memory: the projection and its reduction in one Triton kernel.

For reference passes where memory is short or float32 logits must not reach it. Its products add up
in another order than cuBLAS's: do not mix it with ``linear_logprob`` where a ratio must be exactly
1. Needs bfloat16 or float16, and H a multiple of 8 (16-byte rows).
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from peergrad.kernels.shard import Shard, per_row
from peergrad.kernels.triton import ALL, FLOOR, LOG2E, merge


@triton.jit
def _fold_half(x, columns, target, end, m, d, s, t, k):
    """Take a tile ``[rows, n]`` of logits into the rows' (m, d, s, t)."""
    t = tl.maximum(t, tl.max(tl.where(columns == target[:, None], x, -float("inf")), axis=1))
    x = tl.where(columns < end, tl.maximum(x, FLOOR, propagate_nan=ALL), FLOOR)
    peak = tl.maximum(m, tl.max(x, axis=1))
    z = (x - peak[:, None]) * k[:, None]
    e = tl.where(columns < end, tl.exp2(z), 0.0)
    move = (m - peak) * k
    a = tl.exp2(move)
    s = a * (s + move * d) + tl.sum(e * z, axis=1)
    d = a * d + tl.sum(e, axis=1)
    return peak, d, s, t


@triton.jit
def linear_partials_kernel(
    hidden, weight, targets, temperature, out,
    hidden_stride, weight_stride, rows, size, first, width, valid,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A program reduces one block of ROWS rows. The tile of logits is folded in halves: whole, it
    and its exponentials do not fit into the registers."""
    tiles = tl.cdiv(rows, ROWS)
    # Neighbouring programs share a block of the weight: it is read from memory once, then from L2.
    block = tl.program_id(0) // tiles
    top = tl.program_id(0) % tiles * ROWS
    start = block * (width // BLOCKS)
    end = tl.maximum(start, tl.minimum(start + width // BLOCKS, valid))
    left = tl.make_tensor_descriptor(hidden, [rows, size], [hidden_stride, 1], [ROWS, DEPTH])
    right = tl.make_tensor_descriptor(weight, [width, size], [weight_stride, 1], [COLUMNS, DEPTH])
    row = top + tl.arange(0, ROWS)
    mask = row < rows
    k = LOG2E / tl.load(temperature + row, mask=mask, other=1.0)
    target = tl.load(targets + row, mask=mask, other=-1)
    target = tl.where(target < 0, -1, target - first).to(tl.int32)
    target = tl.where((target >= start) & (target < end), target, -1)
    m = tl.full([ROWS], FLOOR, tl.float32)
    d = tl.zeros([ROWS], tl.float32)
    s = tl.zeros([ROWS], tl.float32)
    t = tl.full([ROWS], -float("inf"), tl.float32)
    half: tl.constexpr = COLUMNS // 2
    for at in range(start, end, COLUMNS):
        x = tl.zeros([ROWS, COLUMNS], tl.float32)
        for deep in range(0, size, DEPTH):
            a = left.load([top, deep])
            b = right.load([at, deep])
            x = tl.dot(a, b.T, x)
        one, two = tl.split(tl.permute(tl.reshape(x, [ROWS, 2, half]), [0, 2, 1]))
        columns = at + tl.arange(0, half)[None, :]
        m, d, s, t = _fold_half(one, columns, target, end, m, d, s, t, k)
        m, d, s, t = _fold_half(two, columns + half, target, end, m, d, s, t, k)
    out += (block.to(tl.int64) * rows + row) * 4
    tl.store(out, m, mask=mask)
    tl.store(out + 1, d, mask=mask)
    tl.store(out + 2, s, mask=mask)
    tl.store(out + 3, t, mask=mask)


def tiled_linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    temperature: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """As ``linear_logprob`` under ``torch.no_grad``, with float32 logits that stay in registers.

    Beyond its inputs it needs 16 bytes per row and block. Raises ValueError for dtypes and sizes
    that the tensor memory accelerator cannot load.
    """
    if hidden.dtype not in (torch.bfloat16, torch.float16) or hidden.shape[1] % 8:
        raise ValueError(
            f"tiled_linear_logprob needs bfloat16 or float16 and a hidden size that 8 divides, got "
            f"{hidden.dtype} and {hidden.shape[1]}; use linear_logprob"
        )
    rows, size = hidden.shape
    shard, tau = Shard.of(group, weight.shape[0], vocab_size), per_row(temperature, hidden)
    parts = hidden.new_empty(shard.blocks, rows, 4, dtype=torch.float32)
    tile = 128
    if rows:
        triton.set_allocator(_scratch)
        linear_partials_kernel[(triton.cdiv(rows, tile) * shard.blocks,)](
            hidden.contiguous(), weight.contiguous(), targets.contiguous(), tau, parts,
            size, size, rows, size, shard.first, shard.width, shard.valid,
            BLOCKS=shard.blocks, ROWS=tile, COLUMNS=256, DEPTH=64, num_warps=8, num_stages=4,
        )  # fmt: skip
    logp, entropy, _ = merge(shard.gather(parts), targets, tau)
    return logp, entropy


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where Triton keeps the tensor descriptors of a launch."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
