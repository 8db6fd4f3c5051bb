"""The three stages as Triton kernels. Same names, arguments and numbers as ``reference``.

No atomics and a fixed order of every addition; offsets of rows are 64 bits wide; logits are read
once per stage. Why the loops look as they do, and how many instructions that is: README.md.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from peergrad.kernels import reference
from peergrad.kernels import shard as constants
from peergrad.kernels.gradient import Scores
from peergrad.kernels.shard import Shard

FLOOR = tl.constexpr(reference.FLOOR)
LEAST = tl.constexpr(reference.LEAST)
LOG2E = tl.constexpr(constants.LOG2E)
LN2 = tl.constexpr(constants.LN2)
ALL = tl.constexpr(tl.PropagateNan.ALL)
VECTOR = tl.constexpr(8)  # neighbouring bfloat16 of one thread: 16 bytes, one load or store
# How a program is cut: benchmarks/logprob.py --sweep tries others. Results change in the last bits.
VECTORS, TILES, WARPS = 256, 4, 4
# No kernel depends on the sizes, nor on where a chunk's rows begin: for every number of ranks, and
# for every real vocabulary, the same one runs, and adds up in the same order.
SIZES = ["stride", "out_stride", "rows", "first", "blocks", "step", "width", "valid", "programs"]
PER_ROW = [
    *("targets", "temperature", "logp", "entropy", "peak", "log2d", "source"),
    *("upstream_logp", "upstream_entropy"),
]
jit = triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PER_ROW)


@triton.jit
def _moved(m, d, s, peak, k):
    """d and s, taken at the maximum m, as they are at ``peak``."""
    move = tl.maximum((m - peak) * k, LEAST, propagate_nan=ALL)
    a = tl.exp2(move)
    return a * d, a * (s + move * d)


@triton.jit
def _fold(x, m, d, s, k, ENTROPY: tl.constexpr):
    """Take ``x`` ``[vectors, n]`` into the (m, d, s) of each vector."""
    x = x.to(tl.float32)
    peak = tl.maximum(m, tl.max(x, axis=1))
    z = (x - peak[:, None]) * k
    if ENTROPY:
        z = tl.maximum(z, LEAST, propagate_nan=ALL)
    e = tl.exp2(z)
    d, s = _moved(m, d, s, peak, k)
    if ENTROPY:
        s += tl.sum(e * z, axis=1)
    return peak, d + tl.sum(e, axis=1), s


@jit
def partials_kernel(
    logits, targets, temperature, out,
    stride, rows, first, blocks, step, valid,
    UNIT: tl.constexpr, ENTROPY: tl.constexpr, VECTORS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A program reduces one block of one row. Every vector has an (m, d, s) of its own, so that the
    loop has neither a barrier nor a shuffle; they are merged once, at the end. WIDE neighbours are
    16 bytes, one thread's. ``stride`` and ``step`` count UNITs: the compiler sees what they are
    multiples of, without a promise that it could lose."""
    row = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    step *= UNIT
    start = block * step
    k = LOG2E / tl.load(temperature + row)
    target = tl.load(targets + row)
    ignored = target < 0
    target = (target - first).to(tl.int32)
    n = tl.where(ignored, 0, tl.minimum(valid - start, step))  # real columns of this block
    logits += row.to(tl.int64) * stride * UNIT + start
    target -= start
    here = (target >= 0) & (target < n)
    t = tl.load(logits + target, mask=here, other=-float("inf")).to(tl.float32)

    m = tl.full([VECTORS], FLOOR, tl.float32)
    d = tl.zeros([VECTORS], tl.float32)
    s = tl.zeros([VECTORS], tl.float32)
    columns = tl.arange(0, VECTORS)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
    tile: tl.constexpr = VECTORS * WIDE
    whole = tl.maximum(n, 0) // tile * tile
    for at in range(0, whole, tile):
        m, d, s = _fold(tl.load(logits + at + columns), m, d, s, k, ENTROPY)
    if whole < n:
        # Read to the end of the block, which is aligned; what is real may end anywhere.
        x = tl.load(logits + whole + columns, mask=whole + columns < step, other=-float("inf"))
        x = tl.where(whole + columns < n, x.to(tl.float32), -float("inf"))
        m, d, s = _fold(x, m, d, s, k, ENTROPY)
    peak = tl.max(m, axis=0)
    d, s = _moved(m, d, s, peak, k)

    out += (block.to(tl.int64) * rows + row) * 4
    tl.store(out, peak)
    tl.store(out + 1, tl.sum(d, axis=0))
    tl.store(out + 2, tl.sum(s, axis=0))
    tl.store(out + 3, t)


@jit
def merge_kernel(
    sums, targets, temperature, logp, entropy, peak, log2d, rows, step,
    ALL_BLOCKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program merges the blocks of ROWS rows, in order."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < rows
    tau = tl.load(temperature + row, mask=mask, other=1.0)
    k = LOG2E / tau
    scored = tl.load(targets + row, mask=mask, other=-1) >= 0
    at = sums + row.to(tl.int64) * 4
    m = tl.load(at, mask=mask, other=0.0)
    d = tl.load(at + 1, mask=mask, other=1.0)
    s = tl.load(at + 2, mask=mask, other=0.0)
    t = tl.load(at + 3, mask=mask, other=0.0)
    for _ in range(1, ALL_BLOCKS):
        at += step
        other_m = tl.load(at, mask=mask, other=0.0)
        other_d = tl.load(at + 1, mask=mask, other=1.0)
        other_s = tl.load(at + 2, mask=mask, other=0.0)
        both = tl.maximum(m, other_m, propagate_nan=ALL)
        d, s = _moved(m, d, s, both, k)
        other_d, other_s = _moved(other_m, other_d, other_s, both, k)
        m, d, s = both, d + other_d, s + other_s
        t = tl.maximum(t, tl.load(at + 3, mask=mask, other=0.0), propagate_nan=ALL)
    # Written out: Triton takes a global that is not equal to itself for one that has changed.
    d = tl.where(m <= FLOOR, float("nan"), d)
    bits = tl.log2(d)
    natural = tl.div_rn(t - m, tau) - bits * LN2
    tl.store(logp + row, tl.where(scored, natural, 0.0), mask=mask)
    tl.store(entropy + row, tl.where(scored, (bits - s / d) * LN2, 0.0), mask=mask)
    tl.store(peak + row, m, mask=mask)
    tl.store(log2d + row, bits, mask=mask)


@triton.jit
def _gradient(x, columns, target, m, bits, k, c0, c1, c2, ENTROPY: tl.constexpr):
    log2p = (x.to(tl.float32) - m) * k - bits
    if ENTROPY:
        log2p = tl.maximum(log2p, LEAST, propagate_nan=ALL)
    g = tl.exp2(log2p) * (c0 + c1 * log2p if ENTROPY else c0)
    return g + tl.where(columns == target, c2, 0.0)


@jit
def dlogits_kernel(
    logits, out, source, targets, temperature, peak, log2d, entropy, upstream_logp,
    upstream_entropy,
    stride, out_stride, first, width, valid, programs,
    COMPACT: tl.constexpr, UNIT: tl.constexpr, ENTROPY: tl.constexpr,
    VECTORS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A program writes TILES tiles of one row. It reads nothing that another one writes.
    ``stride``, ``out_stride`` and ``width`` count UNITs, see ``partials_kernel``."""
    row = tl.program_id(0) // programs
    start = tl.program_id(0) % programs * (TILES * VECTORS * VECTOR)
    width *= UNIT
    origin = row.to(tl.int64)
    out += origin * out_stride * UNIT
    if COMPACT:
        origin = tl.load(source + row)
    logits += origin * stride * UNIT
    target = tl.load(targets + origin)
    tau = tl.load(temperature + origin)
    a = tl.load(upstream_logp + origin)
    idle = a == 0
    c0 = -a / tau
    c1 = 0.0
    c2 = a / tau
    if ENTROPY:
        b = tl.load(upstream_entropy + origin)
        idle = idle & (b == 0)
        c0 -= tl.where(b == 0, 0.0, b * tl.load(entropy + origin)) / tau
        c1 = -b * LN2 / tau
    idle = idle | (target < 0)
    target = (target - first).to(tl.int32)
    m = tl.load(peak + origin)
    bits = tl.load(log2d + origin)
    k = LOG2E / tau
    vectors = tl.arange(0, VECTORS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    # An idle row is not even read: what is NaN there stays there.
    real = tl.where(idle, 0, valid)
    tile: tl.constexpr = VECTORS * VECTOR
    for i in tl.static_range(TILES):
        at = start + i * tile
        columns = at + vectors
        if at + tile <= real:
            x = tl.load(logits + columns)
            g = _gradient(x, columns, target, m, bits, k, c0, c1, c2, ENTROPY)
            tl.store(out + columns, g.to(out.dtype.element_ty))
        elif at < width:
            inside = columns < width
            x = tl.load(logits + columns, mask=inside & (not idle), other=-float("inf"))
            g = _gradient(x, columns, target, m, bits, k, c0, c1, c2, ENTROPY)
            g = tl.where(columns < real, g, 0.0)
            tl.store(out + columns, g.to(out.dtype.element_ty), mask=inside)


def _unit(shard: Shard, *tensors: Tensor) -> int:
    """What the compiler may take every stride and block to be a multiple of: a thread's vector, if
    every block of every row begins on 16 bytes; else 1, and loads are narrow."""
    sizes = (shard.step, *(t.stride(0) for t in tensors))
    vectors = all(size % VECTOR.value == 0 for size in sizes)
    return VECTOR.value if vectors and all(t.data_ptr() % 16 == 0 for t in tensors) else 1


def partials(
    logits: Tensor, targets: Tensor, temperature: Tensor, shard: Shard, *, entropy: bool
) -> Tensor:
    """See ``reference.partials``; the last dimension of ``logits`` must be dense."""
    rows, unit = logits.shape[0], _unit(shard, logits)
    sums = logits.new_empty(shard.blocks, rows, 4, dtype=torch.float32)
    if rows:
        with torch.cuda.device_of(logits):
            partials_kernel[(rows * shard.blocks,)](
                logits, targets, temperature, sums, logits.stride(0) // unit, rows, shard.first,
                shard.blocks, shard.step // unit, shard.valid, UNIT=unit, ENTROPY=entropy,
                VECTORS=VECTORS, WIDE=16 // logits.element_size(), num_warps=WARPS,
            )  # fmt: skip
    return sums


def merge(
    sums: Tensor, targets: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """See ``reference.merge``."""
    blocks, rows, _ = sums.shape
    logp, entropy, peak, log2d = sums.new_empty(4, rows)
    if rows:
        with torch.cuda.device_of(sums):
            merge_kernel[(triton.cdiv(rows, 128),)](
                sums, targets, temperature, logp, entropy, peak, log2d, rows, sums.stride(0),
                ALL_BLOCKS=blocks, ROWS=128, num_warps=4,
            )  # fmt: skip
    return logp, entropy, (peak, log2d)


def dlogits(
    logits: Tensor, scores: Scores, shard: Shard, *, out: Tensor, source: Tensor | None = None
) -> Tensor:
    """See ``reference.dlogits``; last dimensions must be dense."""
    rows, unit = out.shape[0], _unit(shard, logits, out)
    programs = triton.cdiv(shard.width, VECTORS * VECTOR.value * TILES)
    if rows:
        with torch.cuda.device_of(logits):
            dlogits_kernel[(rows * programs,)](
                logits, out, source, *scores, logits.stride(0) // unit, out.stride(0) // unit,
                shard.first, shard.width // unit, shard.valid, programs, COMPACT=source is not None,
                UNIT=unit, ENTROPY=scores.d_entropy is not None, VECTORS=VECTORS, TILES=TILES,
                num_warps=WARPS,
            )  # fmt: skip
    return out
