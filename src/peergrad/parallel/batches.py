"""Which queries of a packed row meet which keys: its sequences as few dense batches.

A prompt, and a sequence that shares none, attends to itself. An answer that shares its prompt
attends to a copy of the prompt's keys with its own behind them, from position P on. Either way a
query sees the keys at its own position and before, so batches may be padded on the right, and on
the left of the queries: what is added is seen by no token, or is never looked at. A small family is
attended to as a whole under a mask, which takes a fraction of the time of many tiny answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from peergrad.parallel.context import pieces_of, shares

PADDING = 64
"""Tokens of padding that are cheaper than one more call of the attention kernel, and no more are
ever added for one shape."""

SMALL = 64
"""Tokens of the largest family that is attended to as a whole."""

Families = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Unit:
    """Tokens whose queries stand at positions ``prompt`` to ``prompt + tokens - 1``, with keys
    from position 0 on.

    Example:
        an answer of 2 at row 7 to the prompt of 3 at row 0: ``Unit(False, 3, 2, 0, 7)``
    """

    family: bool  # a whole one, which needs a mask
    prompt: int  # tokens of keys before its own
    tokens: int
    lead: int  # where the prompt lies in the row
    start: int  # where its own tokens lie

    @property
    def places(self) -> tuple[int, int, int, int]:
        return self.prompt, self.tokens, self.lead, self.start

    def shape(self) -> tuple[bool, int, int]:
        """What units are sorted by: of one prompt's length the longest first."""
        return self.family, self.prompt, -self.tokens


@dataclass(frozen=True)
class Batch:
    """``sequences`` with keys at positions 0 to ``width - 1`` and queries from ``first`` on.

    Example:
        answers of 2 and 1 to prompts of 3: ``Batch(sequences=2, first=3, width=5, mask=None)``
    """

    sequences: int
    first: int
    width: int
    mask: Tensor | None  # [sequences, 1, width, width] float32, added to scores; None: causal


@dataclass(frozen=True)
class Layout:
    """All batches of a row, and where their queries and keys come from. None: from the row as it
    lies.

    Example:
        of sequences of 3 and 2: ``Layout(batches=[Batch(2, 0, 3, None)], queries=tensor([0, 1, 2,
        3, 4, 4]), keys=tensor([0, 1, 2, 3, 4, 4]), slots=tensor([0, 1, 2, 3, 4]))``
    """

    batches: list[Batch]
    queries: Tensor | None  # int64, the row's token at each place of the batches, one after another
    keys: Tensor | None  # int64
    slots: Tensor | None  # [T] int64, of each token's query among all


def lay_out(families: Families, device: torch.device, *, rank: int = 0, ranks: int = 1) -> Layout:
    """The batches of a row of ``families`` (see ``MicroBatch``), on ``device``. If the row is
    divided over context ``ranks``, those of ``rank``: queries and slots are of its part, and keys
    of the parts of all, one behind the other."""
    batches: list[Batch] = []
    queries, keys, total = [], [], sum(map(sum, families))
    slots, at = np.zeros(total, np.int64), 0
    for run in alike(_units(families) if ranks == 1 else _pieces(families, rank, ranks)):
        # Columns of the units, to be broadcast over positions.
        prompt, tokens, lead, start = np.array([unit.places for unit in run]).T[:, :, None]
        first, end = int(prompt.min()), prompt + tokens
        position = np.arange(end.max())
        rows = np.where(position < prompt, lead, start - prompt) + np.minimum(position, end - 1)
        mask = _mask(families, rows, position < end).to(device) if run[0].family else None
        batches.append(Batch(len(run), first, position.size, mask))
        queries.append(rows[:, first:].ravel())
        keys.append(rows.ravel())
        own = ((position >= prompt) & (position < end))[:, first:].ravel()
        slots[queries[-1][own]] = at + np.flatnonzero(own)
        at += own.size
    plain = at == total // ranks  # without padding
    indices = (np.concatenate(queries), np.concatenate(keys), slots)
    if ranks > 1:
        indices = _in_parts(families, *indices, rank=rank, ranks=ranks)
    return Layout(batches, *(_unless_in_order(index, plain, device) for index in indices))


def _in_parts(
    families: Families,
    queries: np.ndarray,
    keys: np.ndarray,
    slots: np.ndarray,
    *,
    rank: int,
    ranks: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices into the row as ones into the part of ``rank`` (those of other parts, which only pad,
    as 0), and of keys into the parts of all."""
    parts = shares(np.array([n for (n,) in families]), ranks)
    own, every = np.zeros((2, parts.size), np.int64)
    own[parts[rank]] = np.arange(parts.shape[1])
    every[parts.ravel()] = np.arange(parts.size)
    return own[queries], every[keys], slots[parts[rank]]


def _pieces(families: Families, rank: int, ranks: int) -> list[Unit]:
    """What ``rank`` holds of each sequence; a piece sees all that is before it."""
    found, start = [], 0
    for (length,) in families:
        size = length // (2 * ranks)
        for piece in pieces_of(rank, ranks):
            found.append(Unit(False, piece * size, size, start, start + piece * size))
        start += length
    return found


def alike(units: Sequence[Unit]) -> list[list[Unit]]:
    """The units sorted and divided into runs of near-equal shape.

    Example:
        sequences of 3, 90, 2, 2, 3: runs (90,) and (3, 3, 2, 2), for 4 * 87 are more than PADDING.
    """
    runs: list[list[Unit]] = []
    first = end = 0
    for (family, prompt, less), same in groupby(sorted(units, key=Unit.shape), key=Unit.shape):
        more = list(same)
        low, high = min(first, prompt), max(end, prompt - less)
        if runs and runs[-1][0].family == family:
            before = len(runs[-1]) * (end - first) + len(more) * -less
            if (len(runs[-1]) + len(more)) * (high - low) - before <= PADDING:
                runs[-1] += more
                first, end = low, high
                continue
        runs.append(more)
        first, end = prompt, prompt - less
    return runs


def _units(families: Families) -> list[Unit]:
    found, start = [], 0
    for prompt, *answers in families:
        whole = prompt + sum(answers)
        if not answers or whole <= SMALL:
            found.append(Unit(bool(answers), 0, whole, start, start))
        else:
            found.append(Unit(False, 0, prompt, start, start))
            places = start + np.cumsum([prompt, *answers[:-1]])
            pairs = zip(answers, places.tolist(), strict=True)
            found += [Unit(False, prompt, tokens, start, place) for tokens, place in pairs]
        start += whole
    return found


def _mask(families: Families, rows: np.ndarray, real: np.ndarray) -> Tensor:
    """``[n, 1, width, width]``: 0 where a token of the row sees another, that of the prompt or its
    own piece which comes no later, else -inf. ``rows``, ``real`` ``[n, width]``."""
    counts, lengths = [len(one) for one in families], [n for one in families for n in one]
    piece = np.repeat(np.arange(len(lengths)), lengths)
    prompt = np.repeat(np.repeat(np.cumsum(counts) - counts, counts), lengths)
    query, key = rows[:, :, None], rows[:, None, :]
    seen = (piece[key] == piece[query]) | (piece[key] == prompt[query])
    seen &= (key <= query) & real[:, None, :]
    return torch.from_numpy(np.where(seen, np.float32(0), np.float32(-np.inf))[:, None])


def _unless_in_order(index: np.ndarray, plain: bool, device: torch.device) -> Tensor | None:
    if plain and np.array_equal(index, np.arange(index.size)):
        return None
    return torch.from_numpy(index).to(device)
