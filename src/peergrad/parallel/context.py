"""Context parallelism: the tokens of every sequence are divided over the ranks of a group.

A sequence of ``n`` tokens is cut into ``2c`` pieces for ``c`` ranks, and rank ``r`` holds the
pieces ``r`` and ``2c - 1 - r``, as Megatron and Transformer Engine have it: under a causal mask
that is the same work for each. A token is predicted where the one before it is held.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from peergrad.algo.packing import Held, MicroBatch


def pieces_of(rank: int, ranks: int) -> tuple[int, int]:
    """Which of a sequence's ``2 * ranks`` pieces a rank holds."""
    return rank, 2 * ranks - 1 - rank


def shares(lengths: np.ndarray, ranks: int) -> np.ndarray:
    """``[ranks, T / ranks]`` int64: which tokens of a row of sequences of these ``lengths``, each a
    multiple of ``2 * ranks``, every rank holds, in its order.

    Example:
        >>> shares(np.array([4, 8]), 2)
        array([[ 0,  3,  4,  5, 10, 11],
               [ 1,  2,  6,  7,  8,  9]])
    """
    size = lengths // (2 * ranks)  # of a piece
    starts = np.cumsum(lengths) - lengths
    mine = []
    for rank in range(ranks):
        first = starts[:, None] + size[:, None] * np.array(pieces_of(rank, ranks))
        pieces = zip(first.ravel(), np.repeat(size, 2), strict=True)
        mine.append(np.concatenate([np.arange(at, at + n) for at, n in pieces]))
    return np.stack(mine)


def hold(batch: MicroBatch, rank: int, ranks: int) -> MicroBatch:
    """The micro-batch with what rank ``rank`` of ``ranks`` holds of it."""
    if ranks == 1:
        return batch
    tokens = shares(np.array([n for (n,) in batch.families]), ranks)[rank]
    place = np.full(batch.tokens.numel(), -1)
    place[tokens] = np.arange(tokens.size)
    rows = place[batch.rows.numpy()]
    scored = np.flatnonzero(rows >= 0)
    return replace(batch, held=Held(*map(torch.from_numpy, (tokens, scored, rows[scored]))))


def whole(values: Tensor, batch: MicroBatch, group: dist.ProcessGroup) -> Tensor:
    """``[S]`` of all scored tokens from those that this rank holds; on every rank of ``group``, and
    differentiable in this rank's. Collective."""
    if batch.held is None:
        return values
    found: Tensor = _Whole.apply(values, batch.held.scored, batch.targets.numel(), group)  # type: ignore[no-untyped-call]
    return found


class _Whole(torch.autograd.Function):
    """Every rank computes the same loss from the whole, so its gradient is not added up: that of
    this rank's values is what it is in its own copy."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scored: Tensor, size: int, group: Any) -> Tensor:
        ctx.save_for_backward(scored)
        found = values.new_zeros(size).index_copy_(0, scored, values)
        dist.all_reduce(found, group=group)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (scored,) = ctx.saved_tensors
        return grads[0].index_select(0, scored), None, None, None
