"""From groups to packed micro-batches.

Every rank holds all groups of a step, so every rank computes the same global weights and the same
division of the work, and no collective is needed to agree on denominators.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from peergrad.algo.advantage import group_advantage
from peergrad.algo.aggregate import token_weights
from peergrad.config import Aggregation
from peergrad.data import Group


@dataclass(frozen=True)
class Sample:
    """One rollout ready to be packed: prompt and answer in one row, with its scalars.

    Example:
        ``Sample(tokens=[5, 3, 9, 7, 1], prompt_length=3, logprobs=[-.1, -.2], advantage=.8,
        weight=.05)``
    """

    tokens: np.ndarray  # [P + R] int32
    prompt_length: int
    logprobs: np.ndarray  # [R] float32, the engine's
    advantage: float
    weight: float  # of each of its tokens in the loss


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
    max_seqlen: int
    rows: Int[Tensor, " S"]  # int64
    targets: Int[Tensor, " S"]  # int64
    advantage: Float[Tensor, " S"]
    weight: Float[Tensor, " S"]
    logp_engine: Float[Tensor, " S"]
    logp_old: Float[Tensor, " S"] | None = None
    logp_ref: Float[Tensor, " S"] | None = None


def make_samples(
    groups: Sequence[Group],
    *,
    scale_by_std: bool,
    std_eps: float,
    aggregation: Aggregation,
    max_tokens: int,
) -> list[Sample]:
    """Grade all rollouts of one optimizer step against their peers and weigh their tokens.

    ``groups`` must be everything the step trains on, over all ranks: the weights' denominators are
    taken from it. Rollouts without a token stay in the count of rollouts.
    """
    rollouts = [(group.prompt, rollout) for group in groups for rollout in group.rollouts]
    advantages = torch.cat(
        [
            group_advantage(torch.from_numpy(g.rewards), scale_by_std=scale_by_std, eps=std_eps)
            for g in groups
        ]
    )
    lengths = torch.tensor([rollout.tokens.size for _, rollout in rollouts])
    weights = token_weights(lengths, mode=aggregation, max_tokens=max_tokens)
    return [
        Sample(
            tokens=np.concatenate([prompt.tokens, rollout.tokens]),
            prompt_length=prompt.tokens.size,
            logprobs=rollout.logprobs,
            advantage=float(advantage),
            weight=float(weight),
        )
        for (prompt, rollout), advantage, weight in zip(rollouts, advantages, weights, strict=True)
    ]


def balance(samples: Sequence[Sample], parts: int) -> list[list[Sample]]:
    """Divide samples over ``parts`` ranks with near-equal token counts: longest first, each to the
    part with the fewest tokens. Deterministic; parts may be empty."""
    shares: list[list[Sample]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for sample in sorted(samples, key=lambda s: -s.tokens.size):
        target = loads.index(min(loads))
        shares[target].append(sample)
        loads[target] += sample.tokens.size
    return shares


def fill(samples: Sequence[Sample], budget: int) -> list[list[Sample]]:
    """Divide samples into bins of at most ``budget`` tokens: longest first, each into the first bin
    with room. A sample beyond the budget gets a bin of its own."""
    bins: list[list[Sample]] = []
    loads: list[int] = []
    for sample in sorted(samples, key=lambda s: -s.tokens.size):
        size = sample.tokens.size
        target = next((i for i, load in enumerate(loads) if load + size <= budget), None)
        if target is None:
            bins.append([sample])
            loads.append(size)
        else:
            bins[target].append(sample)
            loads[target] += size
    return bins


def micro_batches(
    samples: Sequence[Sample], *, rank: int, ranks: int, budget: int, multiple: int = 1
) -> list[MicroBatch]:
    """The micro-batches of data-parallel rank ``rank`` of ``ranks``, on the CPU.

    All ranks get the same number: those with less work end with empty ones, because schedules and
    expert-parallel layers need every rank to take part in every collective. ``multiple``: see
    ``pack``.
    """
    shares = [fill(share, budget) for share in balance(samples, ranks)]
    count = max(1, *(len(share) for share in shares))
    mine = shares[rank] + [[]] * (count - len(shares[rank]))
    return [pack(part, multiple=multiple) for part in mine]


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
        parts = [values(start, s) for start, s in zip(starts, samples, strict=False)]
        return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0)).to(dtype)

    return MicroBatch(
        tokens=torch.from_numpy(np.concatenate(sequences)).long(),
        positions=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])).long(),
        cu_seqlens=torch.from_numpy(starts).int(),
        max_seqlen=max(lengths),
        rows=scored(
            lambda start, s: start + np.arange(s.prompt_length, s.tokens.size) - 1, torch.int64
        ),
        targets=scored(lambda _, s: s.tokens[s.prompt_length :], torch.int64),
        advantage=scored(lambda _, s: np.full(s.logprobs.size, s.advantage), torch.float32),
        weight=scored(lambda _, s: np.full(s.logprobs.size, s.weight), torch.float32),
        logp_engine=scored(lambda _, s: s.logprobs, torch.float32),
    )


def with_logprobs(
    batches: Sequence[MicroBatch], field: str, logprobs: Sequence[Tensor | None]
) -> list[MicroBatch]:
    """The micro-batches with ``field`` (``logp_old`` or ``logp_ref``) filled in."""
    return [
        replace(batch, **{field: values})  # type: ignore[arg-type]
        for batch, values in zip(batches, logprobs, strict=True)
    ]
