"""From samples to packed micro-batches: every rank computes the same division of the work."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from peergrad.algo.samples import Sample


@dataclass(frozen=True)
class MicroBatch:
    """Several sequences in one row. Only scored tokens have targets, advantages and logprobs.

    ``rows[s]`` is the packed position whose output predicts scored token ``s``: the position just
    before it. Prompt and padding rows never reach the vocabulary projection, and what no scored
    token is predicted from (the last token above all) is not there at all.

    Example:
        prompt (5, 3), answer (7, 1): tokens (5, 3, 7), rows (1, 2), targets (7, 1).
    """

    tokens: Int[Tensor, " T"]  # int64
    positions: Int[Tensor, " T"]  # int64, restart at 0 for every sequence
    cu_seqlens: Int[Tensor, " N1"]  # int32, N + 1 boundaries
    lengths: tuple[int, ...]  # of the N sequences
    max_seqlen: int
    rows: Int[Tensor, " S"]  # int64
    targets: Int[Tensor, " S"]  # int64
    sequence: Int[Tensor, " S"]  # int64, which of the row's sequences
    sequences: int
    advantage: Float[Tensor, " S"]
    weight: Float[Tensor, " S"]
    logp_engine: Float[Tensor, " S"]
    logp_old: Float[Tensor, " S"] | None = None
    logp_ref: Float[Tensor, " S"] | None = None
    proximal: Float[Tensor, " S"] | None = None

    def part(self, of: slice | Tensor) -> "MicroBatch":
        """The same row with only some of its scored tokens."""
        named = {name: getattr(self, name) for name in _PER_SCORED_TOKEN}
        some = {name: value[of] for name, value in named.items() if value is not None}
        return replace(self, **some)


_PER_SCORED_TOKEN = (
    *("rows", "targets", "sequence", "advantage", "weight"),
    *("logp_engine", "logp_old", "logp_ref", "proximal"),
)


def balance(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Divide samples over ``parts`` ranks with near-equal token counts: longest first, each to the
    part with the fewest tokens. Indices into ``sizes``; deterministic; parts may be empty."""
    shares: list[list[int]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        target = loads.index(min(loads))
        shares[target].append(i)
        loads[target] += sizes[i]
    return shares


def fill(sizes: Sequence[int], share: Sequence[int], budget: int) -> list[list[int]]:
    """Divide the samples of ``share`` into bins of at most ``budget`` tokens: longest first, each
    into the first bin with room. A sample beyond the budget gets a bin of its own."""
    bins: list[list[int]] = []
    loads: list[int] = []
    for i in sorted(share, key=lambda i: -sizes[i]):
        size = sizes[i]
        target = next((b for b, load in enumerate(loads) if load + size <= budget), None)
        if target is None:
            bins.append([i])
            loads.append(size)
        else:
            bins[target].append(i)
            loads[target] += size
    return bins


def divide(samples: Sequence[Sample], *, ranks: int, budget: int) -> list[list[list[int]]]:
    """Which samples each data-parallel rank puts into each of its micro-batches, as indices.

    All ranks get the same number of micro-batches: those with less work end with empty ones,
    because schedules and expert-parallel layers need every rank to take part in every collective.
    Samples that bring nothing to the loss are left out.
    """
    sizes = [sample.context for sample in samples]
    active = [i for i, size in enumerate(sizes) if size]
    shares = balance([sizes[i] for i in active], ranks)
    bins = [fill(sizes, [active[i] for i in share], budget) for share in shares]
    count = max(1, *(len(part) for part in bins))
    return [part + [[]] * (count - len(part)) for part in bins]


def pack(samples: Sequence[Sample], *, multiple: int = 1) -> MicroBatch:
    """Put samples into one row, padded with one sequence of zeros to a ``multiple`` of tokens.

    Sequence parallelism divides the row over the tensor ranks, hence ``multiple``. No samples give
    a row of padding without scored tokens.
    """
    sequences = [s.tokens[: s.context] for s in samples]
    total = sum(s.size for s in sequences)
    padding = -total % multiple if total else multiple
    if padding:
        sequences.append(np.zeros(padding, np.int32))
    lengths = np.array([s.size for s in sequences])
    starts = np.cumsum([0, *lengths])
    answers = np.array([s.weight.size for s in samples], np.int64)
    sequence = np.repeat(np.arange(len(samples)), answers)
    place = ranges(answers)  # of every answer token in its answer
    before = starts[: len(samples)] + np.array([s.prompt_length - 1 for s in samples], np.int64)
    kept = np.flatnonzero(_flat(s.weight for s in samples))

    def scored(values: Iterable[np.ndarray], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(_flat(values)[kept]).to(dtype)

    def optional(field: str) -> Tensor | None:
        values = [getattr(s, field) for s in samples]
        return None if any(v is None for v in values) else scored(values, torch.float32)

    return MicroBatch(
        tokens=torch.from_numpy(np.concatenate(sequences)).long(),
        positions=torch.from_numpy(ranges(lengths)),
        cu_seqlens=torch.from_numpy(starts).int(),
        lengths=tuple(lengths.tolist()),
        max_seqlen=int(lengths.max()),
        rows=torch.from_numpy((before[sequence] + place)[kept]),
        targets=scored((s.tokens[s.prompt_length :] for s in samples), torch.int64),
        sequence=torch.from_numpy(sequence[kept]),
        sequences=len(samples),
        advantage=scored((s.advantage for s in samples), torch.float32),
        weight=scored((s.weight for s in samples), torch.float32),
        logp_engine=scored((s.logp_engine for s in samples), torch.float32),
        logp_old=optional("logp_old"),
        logp_ref=optional("logp_ref"),
        proximal=optional("proximal"),
    )


def ranges(lengths: np.ndarray) -> np.ndarray:
    """``0, 1, ..., n - 1`` for every n of ``lengths``, one after the other."""
    ends = np.cumsum(lengths)
    found: np.ndarray = np.arange(lengths.sum()) - np.repeat(ends - lengths, lengths)
    return found


def _flat(values: Iterable[np.ndarray]) -> np.ndarray:
    """In one row; of nothing an empty one."""
    parts = list(values)
    return np.concatenate(parts) if parts else np.zeros(0)
