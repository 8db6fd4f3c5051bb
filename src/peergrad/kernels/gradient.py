"""From dL/dlogp and dL/dentropy of a row to the three factors of its gradient, and which rows have
one."""

import torch
from torch import Tensor

from peergrad.kernels.shard import LN2

Factors = tuple[Tensor, Tensor, Tensor]


def row_factors(
    d_logp: Tensor | None,
    d_entropy: Tensor | None,
    entropy: Tensor,
    temperature: Tensor,
    targets: Tensor,
) -> Factors:
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


class ActiveRows:
    """Which rows of a chunk have a gradient, told chunk by chunk.

    How many decides the sizes of what follows, so the host must know it. It waits for the first
    chunk's number, and for those of later ones while rows are left out. Where none were, it looks
    at the number of the chunk before, which has arrived while this one was queued, and takes all
    rows: the device never runs dry, at the price of one whole chunk when idle rows begin.
    """

    def __init__(self) -> None:
        self._before: Arriving | None = None

    def of(self, factors: Factors) -> Tensor | None:
        """Rows as ``active_first`` orders them; None: take all."""
        active = torch.stack(factors).ne(0).any(0)
        before, count = self._before, Arriving(active.sum(), active.numel())
        self._before = count
        if (before is not None and before.complete()) or count.complete():
            return None
        return active_first(active, count.value())


class Arriving:
    """A number of rows on its way from the device to the host, out of ``whole``."""

    def __init__(self, number: Tensor, whole: int) -> None:
        self.number, self.whole = number.to("cpu", non_blocking=True), whole
        stream = torch.cuda.current_stream(number.device) if number.is_cuda else None
        self.event = stream.record_event() if stream is not None else None

    def value(self) -> int:
        """The number; waits until it is there."""
        if self.event is not None:
            self.event.synchronize()
        return int(self.number)

    def complete(self) -> bool:
        """Whether all rows are meant; waits as ``value``."""
        return self.value() == self.whole


def active_first(active: Tensor, count: int) -> Tensor:
    """Rows ``[count]`` int64 that gather the ``count`` active ones in front, without a hazard in
    place.

    Active rows below ``count`` stay, the others fill the inactive rows below: no row is both
    overwritten and read from elsewhere.

    Example:
        active 0 1 0 0 1 1: count 3, rows 4, 1, 5.
    """
    rows = torch.arange(count, device=active.device)
    if count in (0, active.numel()):
        return rows
    hole = ~active[:count]
    behind = count + torch.argsort((~active[count:]).int(), stable=True)  # the active ones first
    nth = (hole.cumsum(0) - 1).clamp(min=0)
    return torch.where(hole, behind[nth], rows)
