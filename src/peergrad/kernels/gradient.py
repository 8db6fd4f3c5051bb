"""From dL/dlogp and dL/dentropy of a row to the three factors of its gradient."""

import torch
from torch import Tensor

from peergrad.kernels.shard import LN2


def row_factors(
    d_logp: Tensor | None,
    d_entropy: Tensor | None,
    entropy: Tensor,
    temperature: Tensor,
    targets: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(c0, c1, c2), each ``[R]`` float32, such that

        dL/dx_j = p_j (c0 + c1 log2 p_j) + c2 [j = target]

    from d logp / dx_j = ([j = target] - p_j) / T and d H / dx_j = -p_j (log p_j + H) / T. All three
    are 0 for ignored rows and for rows that nothing flows into.
    """
    scored = targets >= 0
    inverse = 1 / temperature
    zero = torch.zeros_like(temperature)
    d_logp = zero if d_logp is None else torch.where(scored, d_logp, 0.0)
    d_entropy = zero if d_entropy is None else torch.where(scored, d_entropy, 0.0)
    c0 = -inverse * (d_logp + torch.where(d_entropy == 0, 0.0, d_entropy * entropy))
    return c0, -inverse * d_entropy * LN2, inverse * d_logp


def active_first(active: Tensor) -> Tensor:
    """Rows ``[A]`` int64 that gather the active ones in front, without a hazard in place.

    Active rows below A stay, the others fill the inactive rows below A: no row is both overwritten
    and read from elsewhere. Waits for the device once, to learn A.

    Example:
        active 0 1 0 0 1 1: A = 3, rows 4, 1, 5.
    """
    count = int(active.sum())
    rows = torch.arange(count, device=active.device)
    if count in (0, active.numel()):
        return rows
    hole = ~active[:count]
    behind = count + torch.argsort((~active[count:]).int(), stable=True)  # the active ones first
    nth = (hole.cumsum(0) - 1).clamp(min=0)
    return torch.where(hole, behind[nth], rows)
