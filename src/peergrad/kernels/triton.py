"""The three stages as Triton kernels. Same names, arguments and numbers as ``reference``.

No atomics and a fixed order of every addition; offsets of rows are 64 bits wide; logits are read
once per stage. Why the loops look as they do, and how many instructions that is: README.md.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from peergrad.kernels import reference
from peergrad.kernels import shard as constants
from peergrad.kernels.shard import Shard

FLOOR = tl.constexpr(reference.FLOOR)
LOG2E = tl.constexpr(constants.LOG2E)
LN2 = tl.constexpr(constants.LN2)
NAN = tl.constexpr(float("nan"))
ALL = tl.constexpr(tl.PropagateNan.ALL)
# How a program is cut: benchmarks/logprob.py --sweep tries others. Results change in the last bits.
LANES, TILES, WARPS = 256, 4, 4
VECTOR = tl.constexpr(8)  # neighbouring bfloat16 of one thread: 16 bytes, one load or store


@triton.jit
def _fold(x, m, d, s, k, ENTROPY: tl.constexpr):
    """Take ``x`` ``[lanes, n]`` into the (m, d, s) of each lane."""
    x = tl.maximum(x.to(tl.float32), FLOOR, propagate_nan=ALL)
    peak = tl.maximum(m, tl.max(x, axis=1))
    z = (x - peak[:, None]) * k
    e = tl.exp2(z)
    move = (m - peak) * k
    a = tl.exp2(move)
    if ENTROPY:
        s = a * (s + move * d) + tl.sum(e * z, axis=1)
    d = a * d + tl.sum(e, axis=1)
    return peak, d, s


@triton.jit
def _merge_lanes(m, d, s, k):
    """One (m, d, s) of those of all lanes."""
    peak = tl.max(m, axis=0)
    move = (m - peak) * k
    a = tl.exp2(move)
    return peak, tl.sum(a * d, axis=0), tl.sum(a * (s + move * d), axis=0)


@triton.jit
def partials_kernel(
    logits, targets, temperature, out,
    stride, rows, first, width, valid,
    BLOCKS: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr, ENTROPY: tl.constexpr,
    LANES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A program reduces one block of one row. Every lane keeps an (m, d, s) of its own, so that the
    loop has neither a barrier nor a shuffle; the lanes are merged once, at the end. WIDE neighbours
    are 16 bytes: a lane's elements must be one thread's."""
    row = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    step = width // BLOCKS
    start = block * step
    end = tl.minimum(start + step, valid)
    if EVEN:
        end = tl.multiple_of(end, 8)
    k = LOG2E / tl.load(temperature + row)
    target = tl.load(targets + row)
    ignored = target < 0
    target = (target - first).to(tl.int32)
    origin = row.to(tl.int64) * stride + start
    if ALIGNED:  # without it the loads are narrow
        origin = tl.multiple_of(origin, 8)
    logits += origin
    here = (target >= start) & (target < end) & (not ignored)
    t = tl.load(logits + (target - start), mask=here, other=-float("inf")).to(tl.float32)

    m = tl.full([LANES], FLOOR, tl.float32)
    d = tl.zeros([LANES], tl.float32)
    s = tl.zeros([LANES], tl.float32)
    columns = tl.arange(0, LANES)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
    n = tl.where(ignored, 0, tl.maximum(end - start, 0))
    tile: tl.constexpr = LANES * WIDE
    whole = n // tile * tile
    for at in range(0, whole, tile):
        m, d, s = _fold(tl.load(logits + at + columns), m, d, s, k, ENTROPY)
    if whole < n:
        mask = whole + columns < n
        x = tl.load(logits + whole + columns, mask=mask, other=-float("inf"))
        m, d, s = _fold(x, m, d, s, k, ENTROPY)
    m, d, s = _merge_lanes(m, d, s, k)

    out += (block.to(tl.int64) * rows + row) * 4
    tl.store(out, m)
    tl.store(out + 1, d)
    tl.store(out + 2, s)
    tl.store(out + 3, t)


@triton.jit
def merge_kernel(
    parts, targets, temperature, logp, entropy, peak, log2d, rows, step,
    ALL_BLOCKS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A lane merges one row's blocks, in order."""
    row = tl.program_id(0) * LANES + tl.arange(0, LANES)
    mask = row < rows
    tau = tl.load(temperature + row, mask=mask, other=1.0)
    k = LOG2E / tau
    scored = tl.load(targets + row, mask=mask, other=-1) >= 0
    at = parts + row.to(tl.int64) * 4
    m = tl.load(at, mask=mask, other=0.0)
    d = tl.load(at + 1, mask=mask, other=1.0)
    s = tl.load(at + 2, mask=mask, other=0.0)
    t = tl.load(at + 3, mask=mask, other=0.0)
    for _ in range(1, ALL_BLOCKS):
        at += step
        other_m = tl.load(at, mask=mask, other=0.0)
        other_d = tl.load(at + 1, mask=mask, other=1.0)
        other_s = tl.load(at + 2, mask=mask, other=0.0)
        other_t = tl.load(at + 3, mask=mask, other=0.0)
        m_new = tl.maximum(m, other_m, propagate_nan=ALL)
        mine = (m - m_new) * k
        theirs = (other_m - m_new) * k
        a = tl.exp2(mine)
        b = tl.exp2(theirs)
        s = a * (s + mine * d) + b * (other_s + theirs * other_d)
        d = a * d + b * other_d
        m = m_new
        t = tl.maximum(t, other_t, propagate_nan=ALL)
    d = tl.where(m <= FLOOR, NAN, d)
    bits = tl.log2(d)
    natural = tl.div_rn(t - m, tau) - bits * LN2
    tl.store(logp + row, tl.where(scored, natural, 0.0), mask=mask)
    tl.store(entropy + row, tl.where(scored, (bits - s / d) * LN2, 0.0), mask=mask)
    tl.store(peak + row, m, mask=mask)
    tl.store(log2d + row, bits, mask=mask)


@triton.jit
def _gradient(x, columns, target, m, bits, k, c0, c1, c2, ENTROPY: tl.constexpr):
    x = tl.maximum(x.to(tl.float32), FLOOR, propagate_nan=ALL)
    log2p = (x - m) * k - bits
    g = tl.exp2(log2p) * (c0 + c1 * log2p if ENTROPY else c0)
    return g + tl.where(columns == target, c2, 0.0)


@triton.jit
def dlogits_kernel(
    logits, out, source, targets, temperature, peak, log2d, factor0, factor1, factor2,
    stride, out_stride, first, width, valid, parts,
    COMPACT: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr, ENTROPY: tl.constexpr,
    LANES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A program writes TILES tiles of one row. It reads nothing that another one writes."""
    row = tl.program_id(0) // parts
    start = tl.program_id(0) % parts * (TILES * LANES * VECTOR)
    if EVEN:
        valid = tl.multiple_of(valid, 8)
    c0 = tl.load(factor0 + row)
    c1 = tl.load(factor1 + row)
    c2 = tl.load(factor2 + row)
    m = tl.load(peak + row)
    bits = tl.load(log2d + row)
    k = LOG2E / tl.load(temperature + row)
    target = (tl.load(targets + row) - first).to(tl.int32)
    origin = row.to(tl.int64)
    if COMPACT:
        origin = tl.load(source + row)
    origin *= stride
    place = row.to(tl.int64) * out_stride
    if ALIGNED:
        origin = tl.multiple_of(origin, 8)
        place = tl.multiple_of(place, 8)
        width = tl.multiple_of(width, 8)
    logits += origin
    out += place
    lanes = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    idle = (c0 == 0) & (c1 == 0) & (c2 == 0)
    # An idle row is not even read: what is NaN there stays there.
    readable = tl.where(idle, 0, valid)
    tile: tl.constexpr = LANES * VECTOR
    for i in tl.static_range(TILES):
        at = start + i * tile
        columns = at + lanes
        if at + tile <= readable:
            x = tl.load(logits + columns)
            g = _gradient(x, columns, target, m, bits, k, c0, c1, c2, ENTROPY)
            tl.store(out + columns, g.to(out.dtype.element_ty))
        elif at < width:
            real = columns < readable
            x = tl.load(logits + columns, mask=real, other=-float("inf"))
            g = _gradient(x, columns, target, m, bits, k, c0, c1, c2, ENTROPY)
            g = tl.where(real, g, 0.0)
            tl.store(out + columns, g.to(out.dtype.element_ty), mask=columns < width)


def _promises(shard: Shard, *tensors: Tensor) -> dict[str, bool]:
    """Whether every block of every row starts on a multiple of a thread's vector, and whether the
    real columns end on one."""
    sizes = (shard.width // shard.blocks, *(t.stride(0) for t in tensors))
    addresses = all(t.data_ptr() % 16 == 0 for t in tensors)
    aligned = addresses and all(size % VECTOR.value == 0 for size in sizes)
    return {"ALIGNED": aligned, "EVEN": aligned and shard.valid % VECTOR.value == 0}


def partials(
    logits: Tensor, targets: Tensor, temperature: Tensor, shard: Shard, *, entropy: bool
) -> Tensor:
    """See ``reference.partials``; the last dimension of ``logits`` must be dense."""
    rows = logits.shape[0]
    out = logits.new_empty(shard.blocks, rows, 4, dtype=torch.float32)
    if rows:
        partials_kernel[(rows * shard.blocks,)](
            logits, targets, temperature, out,
            logits.stride(0), rows, shard.first, shard.width, shard.valid,
            BLOCKS=shard.blocks, ENTROPY=entropy, **_promises(shard, logits),
            LANES=LANES, WIDE=16 // logits.element_size(), num_warps=WARPS,
        )  # fmt: skip
    return out


def merge(
    parts: Tensor, targets: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """See ``reference.merge``."""
    blocks, rows, _ = parts.shape
    logp, entropy, peak, log2d = parts.new_empty(4, rows)
    if rows:
        merge_kernel[(triton.cdiv(rows, 128),)](
            parts, targets, temperature, logp, entropy, peak, log2d, rows, parts.stride(0),
            ALL_BLOCKS=blocks, LANES=128, num_warps=4,
        )  # fmt: skip
    return logp, entropy, (peak, log2d)


def dlogits(
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    saved: tuple[Tensor, Tensor],
    factors: tuple[Tensor, Tensor, Tensor],
    shard: Shard,
    *,
    out: Tensor,
    source: Tensor | None = None,
    entropy: bool,
) -> Tensor:
    """See ``reference.dlogits``; last dimensions must be dense."""
    rows, parts = out.shape[0], triton.cdiv(shard.width, LANES * VECTOR.value * TILES)
    if rows:
        dlogits_kernel[(rows * parts,)](
            logits, out, source, targets, temperature, *saved, *factors,
            logits.stride(0), out.stride(0), shard.first, shard.width, shard.valid, parts,
            COMPACT=source is not None, ENTROPY=entropy, **_promises(shard, logits, out),
            LANES=LANES, TILES=TILES, num_warps=WARPS,
        )  # fmt: skip
    return out
