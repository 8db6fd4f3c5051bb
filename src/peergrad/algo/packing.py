"""From samples to packed micro-batches, where answers to one prompt may share it.

Attention to a prompt's tokens and all that is computed for them is the same before every answer:
once is enough, and the gradients of its copies add up in it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from peergrad.algo.samples import Sample, contexts


@dataclass(frozen=True)
class Held:
    """What one rank holds of a micro-batch that is divided over several.

    Example:
        rank 0 of two, of a sequence of 4 of which rows 0, 1 and 2 predict: ``Held(tokens=[0, 3],
        scored=[0], rows=[0])``.
    """

    tokens: Int[Tensor, " L"]  # int64, which of the row's, in its order
    scored: Int[Tensor, " H"]  # int64, which scored tokens its part of the row predicts
    rows: Int[Tensor, " H"]  # int64, where in its part


@dataclass(frozen=True)
class Members:
    """Every token that a sample's scored ones are predicted from, as often as it belongs to one.

    Example:
        answers of 2 tokens to one prompt of 2, which share it: ``Members(rows=[0, 1, 2, 0, 1, 3],
        samples=[0, 0, 0, 1, 1, 1])``.
    """

    rows: Int[Tensor, " C"]  # int64, where it lies
    samples: Int[Tensor, " C"]  # int64, whose it is of those packed
    experts: Integer[Tensor, "L T K"] | None = None  # uint8 or int16, those that the engine chose


@dataclass(frozen=True)
class MicroBatch:
    """Several sequences in one row. Only scored tokens have targets, advantages and logprobs.

    A family ``(P, R1, R2, ...)`` is a prompt of ``P`` tokens with the different answers that
    continue it, one behind the other; none of them sees another. ``(n,)`` is a whole sequence.

    ``rows[s]`` is the packed position whose output predicts scored token ``s``: that of the token
    before it, for the first tokens of answers that share a prompt the prompt's last. Prompt and
    padding rows never reach the vocabulary projection, and what no scored token is predicted from
    (the last token above all) is not there at all.

    Example:
        prompt (5, 3), answer (7, 1): tokens (5, 3, 7), rows (1, 2), targets (7, 1), families
        ((3,),). With the answer (2, 4) beside, sharing: tokens (5, 3, 7, 2), positions (0, 1, 2,
        2), rows (1, 2, 1, 3), targets (7, 1, 2, 4), families ((2, 1, 1),).
    """

    tokens: Int[Tensor, " T"]  # int64
    positions: Int[Tensor, " T"]  # int64, of each token in prompt and answer
    cu_seqlens: Int[Tensor, " N1"]  # int32, N + 1 boundaries of the families
    families: tuple[tuple[int, ...], ...]  # lengths; together T
    max_seqlen: int  # of prompt and answer together
    rows: Int[Tensor, " S"]  # int64
    targets: Int[Tensor, " S"]  # int64
    sequence: Int[Tensor, " S"]  # int64, whose answer of those packed
    sequences: int  # answers packed, those without scored tokens, too
    advantage: Float[Tensor, " S"]
    weight: Float[Tensor, " S"]
    logp_engine: Float[Tensor, " S"]
    logp_old: Float[Tensor, " S"] | None = None
    logp_ref: Float[Tensor, " S"] | None = None
    proximal: Float[Tensor, " S"] | None = None
    held: Held | None = None  # None: all of it
    members: Members | None = None  # for the routers of a mixture of experts

    @property
    def here(self) -> "MicroBatch":
        """With the scored tokens that this rank predicts, and their rows in its part."""
        if self.held is None:
            return self
        return replace(self.part(self.held.scored), rows=self.held.rows)

    def part(self, of: slice | Tensor) -> "MicroBatch":
        """The same row with only some of its scored tokens."""
        named = {name: getattr(self, name) for name in _PER_SCORED_TOKEN}
        some = {name: value[of] for name, value in named.items() if value is not None}
        return replace(self, **some)


_PER_SCORED_TOKEN = (
    *("rows", "targets", "sequence", "advantage", "weight"),
    *("logp_engine", "logp_old", "logp_ref", "proximal"),
)


def pack(
    samples: Sequence[Sample],
    *,
    share: bool = False,
    multiple: int = 1,
    each: int = 1,
    routed: bool = False,
) -> MicroBatch:
    """Put samples into one row, padded with one sequence of zeros to a ``multiple`` of tokens; if
    ``share``, with each prompt once and equal answers to it once. ``each``: of what number of
    tokens every sequence is a multiple, padded with zeros behind; not of those that share.
    ``routed``: with what routers of experts are told.

    Sequence parallelism divides the row over the tensor ranks, hence ``multiple``; context
    parallelism divides every sequence, hence ``each``. No samples give a row of padding without
    scored tokens.
    """
    assert not (share and each > 1)
    row = _lay_out(samples, share=share, multiple=multiple, each=each)
    answers = np.array([s.weight.size for s in samples], np.int64)
    sequence = np.repeat(np.arange(len(samples)), answers)
    place = ranges(answers)  # of every answer token in its answer
    before = np.where(place == 0, row.ends[sequence], row.answers[sequence] + place - 1)
    kept = np.flatnonzero(_flat(s.weight for s in samples))

    def scored(values: Iterable[np.ndarray], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(_flat(values)[kept]).to(dtype)

    def optional(field: str) -> Tensor | None:
        values = [getattr(s, field) for s in samples]
        return None if any(v is None for v in values) else scored(values, torch.float32)

    return MicroBatch(
        tokens=torch.from_numpy(np.concatenate(row.pieces)).long(),
        positions=torch.from_numpy(row.positions),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *map(sum, row.families)])).int(),
        families=row.families,
        max_seqlen=int(row.positions.max()) + 1,
        rows=torch.from_numpy(before[kept]),
        targets=scored((s.tokens[s.prompt_length :] for s in samples), torch.int64),
        sequence=torch.from_numpy(sequence[kept]),
        sequences=len(samples),
        advantage=scored((s.advantage for s in samples), torch.float32),
        weight=scored((s.weight for s in samples), torch.float32),
        logp_engine=scored((s.logp_engine for s in samples), torch.float32),
        logp_old=optional("logp_old"),
        logp_ref=optional("logp_ref"),
        proximal=optional("proximal"),
        members=_members(samples, row) if routed else None,
    )


def _members(samples: Sequence[Sample], row: "_Row") -> Members:
    sizes = contexts(samples)
    owner, place = np.repeat(np.arange(len(samples)), sizes), ranges(sizes)
    prompts = np.array([s.prompt_length for s in samples], np.int64)[owner]
    begins = (row.ends[owner] - prompts + 1, row.answers[owner] - prompts)
    rows = np.where(place < prompts, *begins) + place
    found = Members(torch.from_numpy(rows), torch.from_numpy(owner))
    given = [s.experts for s in samples if s.experts is not None]
    if not given or len(given) < len(samples):
        return found
    chosen = np.concatenate([one[:size] for one, size in zip(given, sizes, strict=True)])
    whole = np.empty((row.positions.size, *chosen.shape[1:]), chosen.dtype)
    whole[:] = np.arange(chosen.shape[2])  # of padding: any that differ
    whole[rows] = chosen
    return replace(found, experts=torch.from_numpy(whole.transpose(1, 0, 2).copy()))


@dataclass(frozen=True)
class _Row:
    """Where every token lies.

    Example:
        prompt (5, 3) with answers (7, 1) and (2, 4): pieces (5, 3), (7), (2); ends (1, 1), answers
        (2, 3).
    """

    pieces: list[np.ndarray]  # in order, T tokens together
    positions: np.ndarray  # [T] int64
    families: tuple[tuple[int, ...], ...]
    ends: np.ndarray  # [samples] int64, where each one's prompt ends
    answers: np.ndarray  # [samples] int64, where each one's answer begins, or would


def _lay_out(samples: Sequence[Sample], *, share: bool, multiple: int, each: int) -> _Row:
    ends, answers, total = [0] * len(samples), [0] * len(samples), 0
    pieces: list[np.ndarray] = []
    begins: list[int] = []  # the position of each piece's first token
    families: list[tuple[int, ...]] = []
    context = contexts(samples).tolist()
    active = [i for i, tokens in enumerate(context) if tokens]
    for members in by_prompt(samples, active) if share else [[i] for i in active]:
        prompt = samples[members[0]].prompt_length
        parts, at = [samples[members[0]].tokens[:prompt]], total + prompt
        places: dict[bytes, int] = {}  # of each different answer
        for i in members:
            answer = samples[i].tokens[prompt : context[i]]
            ends[i], answers[i] = total + prompt - 1, places.setdefault(answer.tobytes(), at)
            if answer.size and answers[i] == at:
                parts.append(answer)
                at += answer.size
        if len(parts) == 2:  # a prompt and its only answer are a plain sequence
            parts = [np.concatenate(parts)]
        if odd := -(at - total) % each:
            parts = [np.concatenate([*parts, np.zeros(odd, np.int32)])]
            at += odd
        pieces += parts
        begins += [0] + [prompt] * (len(parts) - 1)
        families.append(tuple(part.size for part in parts))
        total = at
    padding = -total % multiple if total else multiple
    if padding:
        pieces.append(np.zeros(padding, np.int32))
        begins.append(0)
        families.append((padding,))
    sizes = np.array([piece.size for piece in pieces])
    positions = ranges(sizes) + np.repeat(begins, sizes)
    found = (np.array(rows, np.int64) for rows in (ends, answers))
    return _Row(pieces, positions, tuple(families), *found)


def by_prompt(samples: Sequence[Sample], which: Iterable[int]) -> list[list[int]]:
    """The indices ``which``, those of one prompt together, in order of appearance. What counts are
    the prompt's tokens, not whose group it is."""
    found: dict[bytes, list[int]] = {}
    for i in which:
        sample = samples[i]
        found.setdefault(sample.tokens[: sample.prompt_length].tobytes(), []).append(i)
    return list(found.values())


def ranges(lengths: np.ndarray) -> np.ndarray:
    """``0, 1, ..., n - 1`` for every n of ``lengths``, one after the other."""
    ends = np.cumsum(lengths)
    found: np.ndarray = np.arange(lengths.sum()) - np.repeat(ends - lengths, lengths)
    return found


def _flat(values: Iterable[np.ndarray]) -> np.ndarray:
    """In one row; of nothing an empty one."""
    parts = list(values)
    return np.concatenate(parts) if parts else np.zeros(0)
