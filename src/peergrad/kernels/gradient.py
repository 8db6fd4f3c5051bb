"""What the gradient of a row's logits is made from, and which rows have one."""

from typing import NamedTuple

import torch
from torch import Tensor


class Scores(NamedTuple):
    """What is known of rows when something flows into their log probabilities and entropies."""

    targets: Tensor  # [R] int64, as all others are [R] float32
    temperature: Tensor
    largest: Tensor  # logit, m
    log2d: Tensor
    entropy: Tensor
    d_logp: Tensor
    d_entropy: Tensor | None  # None: nothing flows into it

    def at(self, rows: Tensor | slice) -> "Scores":
        """Of some of the rows."""
        return Scores(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]

    def active(self) -> Tensor:
        """Which rows have a gradient: not the ignored ones, nor those that nothing flows into."""
        flows = self.d_logp != 0
        if self.d_entropy is not None:
            flows |= self.d_entropy != 0
        return flows & (self.targets >= 0)


class ActiveRows:
    """Which rows of a chunk have a gradient, told chunk by chunk.

    How many decides the sizes of what follows, so the host must know it. It waits for the first
    chunk's number, and for those of later ones while rows are left out. Where none were, it looks
    at the number of the chunk before, which has arrived while this one was queued, and takes all
    rows: the device never runs dry, at the price of one whole chunk when idle rows begin.
    """

    def __init__(self) -> None:
        self._before: Arriving | None = None

    def of(self, active: Tensor) -> Tensor | None:
        """Rows as ``active_first`` orders them; None: take all."""
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
