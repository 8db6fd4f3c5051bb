"""From samples to packed micro-batches: every rank computes the same division of the work."""

from collections.abc import Callable, Sequence
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
    before it. Prompt and padding rows never reach the vocabulary projection.

    Example:
        prompt (5, 3), answer (7, 1): tokens (5, 3, 7, 1), rows (1, 2), targets (7, 1).
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
    active = [i for i, sample in enumerate(samples) if sample.scored.size]
    sizes = [sample.tokens.size for sample in samples]
    shares = balance([sizes[i] for i in active], ranks)
    bins = [fill(sizes, [active[i] for i in share], budget) for share in shares]
    count = max(1, *(len(part) for part in bins))
    return [part + [[]] * (count - len(part)) for part in bins]


def pack(samples: Sequence[Sample], *, multiple: int = 1) -> MicroBatch:
    """Put samples into one row, padded with one sequence of zeros to a ``multiple`` of tokens.

    Sequence parallelism divides the row over the tensor ranks, hence ``multiple``. No samples give
    a row of padding without scored tokens.
    """
    sequences = [s.tokens for s in samples]
    total = sum(s.size for s in sequences)
    padding = -total % multiple if total else multiple
    if padding:
        sequences.append(np.zeros(padding, np.int32))
    lengths = [s.size for s in sequences]
    starts = np.cumsum([0, *lengths])

    def scored(values: Callable[[int, Sample], np.ndarray], dtype: torch.dtype) -> Tensor:
        parts = [values(i, s)[s.scored] for i, s in enumerate(samples)]
        return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0)).to(dtype)

    def optional(field: str) -> Tensor | None:
        missing = any(getattr(s, field) is None for s in samples)
        return None if missing else scored(lambda _, s: getattr(s, field), torch.float32)

    return MicroBatch(
        tokens=torch.from_numpy(np.concatenate(sequences)).long(),
        positions=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])).long(),
        cu_seqlens=torch.from_numpy(starts).int(),
        lengths=tuple(lengths),
        max_seqlen=max(lengths),
        rows=scored(
            lambda i, s: starts[i] + np.arange(s.prompt_length, s.tokens.size) - 1, torch.int64
        ),
        targets=scored(lambda _, s: s.tokens[s.prompt_length :], torch.int64),
        sequence=scored(lambda i, s: np.full(s.weight.size, i), torch.int64),
        sequences=len(samples),
        advantage=scored(lambda _, s: s.advantage, torch.float32),
        weight=scored(lambda _, s: s.weight, torch.float32),
        logp_engine=scored(lambda _, s: s.logp_engine, torch.float32),
        logp_old=optional("logp_old"),
        logp_ref=optional("logp_ref"),
        proximal=optional("proximal"),
    )
