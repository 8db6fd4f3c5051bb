"""The three stages in plain PyTorch, float32 throughout: what the Triton kernels compute, too.

R rows, w columns of this rank's shard. README.md derives the formulas and names the letters.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from peergrad.kernels.gradient import Scores
from peergrad.kernels.shard import LN2, LOG2E, Shard

FLOOR = -1e30
"""The least that counts as a largest logit: ``-inf - -inf`` would be NaN."""
LEAST = -1000.0
"""The least exponent: 2 to it is 0 as it is, but ``0 * -inf`` would be NaN."""
SLICE = 2**19
"""Logits worked on at a time: float32 copies of them stay in the cache, and two threads have enough
to do between two calls."""


def partials(
    logits: Tensor, targets: Tensor, temperature: Tensor, shard: Shard, *, entropy: bool
) -> Tensor:
    """(m, d, s, t) of every block: ``[blocks, R, 4]`` float32.

    ``logits`` ``[R, w]`` in any floating dtype, ``targets`` ``[R]`` global ids (negative: ignored),
    ``temperature`` ``[R]`` float32. Without ``entropy`` s is 0.
    """
    sums = logits.new_empty(shard.blocks, len(logits), 4, dtype=torch.float32)
    m, d, s = logits.new_zeros(3, len(logits), shard.blocks, dtype=torch.float32)
    k = (LOG2E / temperature)[:, None, None]
    rows = _together(len(logits), shard.width)
    room, more = logits.new_empty(2, rows, *shard.shape, dtype=torch.float32)
    for x, k_, m_, d_, s_ in _slices(logits, k, m, d, s, rows=rows):
        x, z = x.view(-1, *shard.shape), room[: len(x)]
        if x.dtype != torch.float32 or shard.valid < shard.width:
            x = z.copy_(x)
            x.flatten(1)[:, shard.valid :] = -torch.inf
        torch.amax(x, 2, out=m_).clamp_(min=FLOOR)
        torch.sub(x, m_[:, :, None], out=z).mul_(k_)
        if entropy:
            e = torch.exp2(z.clamp_(min=LEAST), out=more[: len(z)])
            torch.sum(e, 2, out=d_)
            torch.sum(e.mul_(z), 2, out=s_)
        else:
            torch.sum(z.exp2_(), 2, out=d_)
    sums[:, :, :3] = torch.stack((m, d, s)).permute(2, 1, 0)
    column = targets - shard.first
    here = (column >= 0) & (column < shard.valid)
    column = column.clamp(0, shard.width - 1)[:, None]
    mine = torch.where(here[:, None], logits.gather(1, column).float(), -torch.inf)
    sums[:, :, 3] = -torch.inf
    sums[:, :, 3].scatter_(0, column.t() // shard.step, mine.t())
    return sums


def merge(
    sums: Tensor, targets: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """logp ``[R]``, entropy ``[R]`` and what the backward stage needs, ``(m, log2 d)``, from all
    blocks ``[B, R, 4]``, merged in order. Ignored rows get 0; a row of nothing but -inf gets NaN.
    """
    scale = LOG2E / temperature
    m, d, s, t = sums[0].unbind(1)
    for block in sums[1:]:
        peak = torch.maximum(m, block[:, 0])
        mine = _moved(m, d, s, peak, scale)
        theirs = _moved(block[:, 0], block[:, 1], block[:, 2], peak, scale)
        m, d, s = peak, mine[0] + theirs[0], mine[1] + theirs[1]
        t = torch.maximum(t, block[:, 3])
    d = torch.where(m <= FLOOR, torch.nan, d)
    log2d = d.log2()
    scored = targets >= 0
    logp = torch.where(scored, (t - m) / temperature - log2d * LN2, 0.0)
    entropy = torch.where(scored, (log2d - s / d) * LN2, 0.0)
    return logp, entropy, (m, log2d)


def _moved(m: Tensor, d: Tensor, s: Tensor, peak: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """d and s, taken at the maximum m, as they are at ``peak``."""
    move = ((m - peak) * scale).clamp(min=LEAST)
    a = move.exp2()
    return a * d, a * (s + move * d)


def dlogits(
    logits: Tensor, scores: Scores, shard: Shard, *, out: Tensor, source: Tensor | None = None
) -> Tensor:
    """``p_j (c0 + c1 log2 p_j) + c2 [j = target]`` into ``out`` ``[A, w]``.

    Row i of ``out`` belongs to row ``source[i]`` of ``logits`` and ``scores`` (None: i); ``out``
    may be the first rows of ``logits`` itself if ``source`` is as ``active_first`` makes it.
    Padding columns and rows without a gradient get 0, whatever their logits.
    """
    entropy = scores.d_entropy is not None
    scores = scores if source is None else scores.at(source)
    idle = ~scores.active()
    c0, c1, c2 = (factor[:, None] for factor in _factors(scores))
    m, log2d = scores.largest[:, None], scores.log2d[:, None]
    k = (LOG2E / scores.temperature)[:, None]
    column = (scores.targets - shard.first)[:, None]
    c2_here = torch.where((column >= 0) & (column < shard.valid), c2, 0.0)
    column = column.clamp(0, shard.width - 1)
    c3 = c0 * (-log2d).exp2()
    rows = _together(len(out), shard.width)
    room, more = logits.new_empty(2, rows, shard.width, dtype=torch.float32)
    given = logits if source is None else source
    for x, o, m_, log2d_, k_, c0_, c1_, c3_, at, c2_ in _slices(
        given, out, m, log2d, k, c0, c1, c3, column, c2_here, rows=rows
    ):
        x = x if source is None else logits.index_select(0, x)
        z = o if o.dtype == torch.float32 else room[: len(x)]
        x = x if x.dtype == torch.float32 else z.copy_(x)
        torch.sub(x, m_, out=z).mul_(k_)
        if entropy:
            p = torch.exp2(z.sub_(log2d_).clamp_(min=LEAST), out=more[: len(x)])
            z.mul_(c1_).add_(c0_).mul_(p)
        else:
            z.exp2_().mul_(c3_)
        z.scatter_add_(1, at, c2_)
        if z is not o:
            o.copy_(z)
    out[:, shard.valid :] = 0.0
    out[idle.nonzero()[:, 0]] = 0.0  # out[idle] would look at every element
    return out


def _factors(scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
    """(c0, c1, c2), each ``[R]``, from d logp / dx_j = ([j = target] - p_j) / T and
    d H / dx_j = -p_j (log p_j + H) / T."""
    inverse, d_entropy = 1 / scores.temperature, scores.d_entropy
    if d_entropy is None:
        d_entropy = torch.zeros_like(inverse)
    c0 = scores.d_logp + torch.where(d_entropy == 0, 0.0, d_entropy * scores.entropy)
    return -inverse * c0, -inverse * d_entropy * LN2, inverse * scores.d_logp


def _together(rows: int, width: int) -> int:
    """How many rows are worked on at a time."""
    return max(1, min(SLICE // width, rows))


def _slices(*tensors: Tensor, rows: int) -> Iterator[tuple[Tensor, ...]]:
    """So many rows of each, one after the other; once, of none, if there are none."""
    return zip(*(torch.split(x, rows) for x in tensors), strict=True)
