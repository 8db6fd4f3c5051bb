"""The three stages in plain PyTorch, float32 throughout: what the Triton kernels compute.

R rows, w columns of this rank's shard. With raw logits x, temperature T, k = log2(e) / T and the
block's largest logit m, a block is reduced to four numbers per row:

    z_j = (x_j - m) k,    d = sum 2^z,    s = sum 2^z z,    t = x_target if it is here, else -inf

and two blocks are merged by moving both to the common m:

    d(m') = 2^((m - m') k) d(m),    s(m') = 2^((m - m') k) (s(m) + (m - m') k d(m))
    log p_target = (t - m) / T - log2 d ln 2,    H = (log2 d - s / d) ln 2

Logits only ever enter as differences to a logit: a common offset, however large, costs nothing.
"""

import torch
from torch import Tensor

from peergrad.kernels.shard import LN2, LOG2E, Shard

FLOOR = -1e30
"""Stands for -inf: ``-inf - -inf`` would be NaN, and ``0 * -inf`` too."""


def partials(
    logits: Tensor, targets: Tensor, temperature: Tensor, shard: Shard, *, entropy: bool
) -> Tensor:
    """(m, d, s, t) of every block: ``[blocks, R, 4]`` float32.

    ``logits`` ``[R, w]`` in any floating dtype, ``targets`` ``[R]`` global ids (negative: ignored),
    ``temperature`` ``[R]`` float32. Without ``entropy`` s is 0.
    """
    x = logits.float().clamp(min=FLOOR)
    x[:, shard.valid :] = FLOOR
    x = x.reshape(len(x), shard.blocks, shard.width // shard.blocks)
    m = x.amax(2)
    z = x.sub_(m[:, :, None]).mul_((LOG2E / temperature)[:, None, None])
    e = z.exp2()
    d = e.sum(2)
    s = e.mul_(z).sum(2) if entropy else torch.zeros_like(d)
    column = targets - shard.first
    here = (column >= 0) & (column < shard.valid)
    column = column.clamp(0, shard.width - 1)[:, None]
    mine = torch.where(here[:, None], logits.gather(1, column).float(), -torch.inf)
    block = column // (shard.width // shard.blocks)
    t = torch.full_like(m, -torch.inf).scatter(1, block, mine)
    return torch.stack((m, d, s, t), -1).transpose(0, 1).contiguous()


def merge(
    parts: Tensor, targets: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """logp ``[R]``, entropy ``[R]`` and what the backward stage needs, ``(m, log2 d)``, from all
    blocks ``[B, R, 4]``, merged in order. Ignored rows get 0; a row of nothing but -inf gets NaN.
    """
    scale = LOG2E / temperature
    m, d, s, t = parts[0].unbind(1)
    for part in parts[1:]:
        other = part.unbind(1)
        peak = torch.maximum(m, other[0])
        mine, theirs = ((x - peak) * scale for x in (m, other[0]))
        a, b = mine.exp2(), theirs.exp2()
        s = a * (s + mine * d) + b * (other[2] + theirs * other[1])
        d = a * d + b * other[1]
        m, t = peak, torch.maximum(t, other[3])
    d = torch.where(m <= FLOOR, torch.nan, d)
    log2d = d.log2()
    scored = targets >= 0
    logp = torch.where(scored, (t - m) / temperature - log2d * LN2, 0.0)
    entropy = torch.where(scored, (log2d - s / d) * LN2, 0.0)
    return logp, entropy, (m, log2d)


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
    """``p_j (c0 + c1 log2 p_j) + c2 [j = target]`` into ``out`` ``[A, w]``; ``factors`` is (c0, c1,
    c2), each ``[A]``, as is everything but ``logits``.

    Without ``entropy`` c1 is taken as 0. Row i of ``out`` belongs to row ``source[i]`` of
    ``logits`` (None: i); ``out`` may be the first rows of ``logits`` itself if ``source`` is as
    ``active_first`` makes it. Padding columns and rows with factors 0 get 0, whatever their logits.
    """
    c0, c1, c2 = (factor[:, None] for factor in factors)
    x = logits if source is None else logits.index_select(0, source)
    x = x.float().clamp(min=FLOOR)
    log2p = x.sub_(saved[0][:, None]).mul_((LOG2E / temperature)[:, None]).sub_(saved[1][:, None])
    gradient = log2p.exp2().mul_(c0 + c1 * log2p if entropy else c0)
    column = targets - shard.first
    here = (column >= 0) & (column < shard.valid)
    at = column.clamp(0, shard.width - 1)[:, None]
    gradient.scatter_add_(1, at, torch.where(here[:, None], c2, 0.0))
    gradient[:, shard.valid :] = 0.0
    gradient[((c0 == 0) & (c1 == 0) & (c2 == 0))[:, 0]] = 0.0
    return out.copy_(gradient)
