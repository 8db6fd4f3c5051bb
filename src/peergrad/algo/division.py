"""Who computes what: every rank finds the same division of a step's work without asking."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heapreplace
from math import ceil, inf

import numpy as np

from peergrad.algo.packing import by_prompt
from peergrad.algo.samples import Sample, contexts

KEYS = 4
"""How many keys may be attended to per packed token. Every answer of a family attends to a copy of
the prompt's, which each layer keeps for the backward pass."""

GRAINS = (1, 2, 4, 8)
"""Parts of a rank's share that large families are tried to be cut down to."""


@dataclass(frozen=True)
class Cost:
    """What there is to compute beside a token's way through the matrices of all layers, which is 1.

    Example:
        of Qwen3-0.6B ``Cost(pair=1 / 3840, scored=.35)``: of 3840 keys attention is half the work.
    """

    pair: float = 0.0  # a query that meets a key, in all layers
    scored: float = 0.0  # a token's logits


@dataclass(frozen=True)
class Family:
    """Answers to one prompt that are computed together, with the prompt once.

    Example:
        ``Family(prompt=8, members=((3, 4), (5,)), longer=(2, 4))`` takes 14 tokens: two samples
        have the same answer of 2.
    """

    prompt: int  # tokens
    members: tuple[tuple[int, ...], ...]  # indices of the samples with each of the answers
    longer: tuple[int, ...]  # tokens of each answer that are needed
    scored: tuple[int, ...] = ()  # scored tokens of all samples with each answer; (): none

    def work(self, cost: Cost) -> float:
        """What it takes to compute it; a query meets the keys before it, and its own.

        Example:
            a prompt of 8 with answers of 2 and 4: 14 tokens and 36 + (9 + 10) + (9 + ... + 12) =
            97 pairs.
        """
        tokens, prompt = self.prompt + sum(self.longer), self.prompt
        pairs = prompt * (prompt + 1) / 2 + sum(n * prompt + n * (n + 1) / 2 for n in self.longer)
        return tokens + cost.pair * pairs + cost.scored * sum(self.scored)

    @cached_property
    def size(self) -> int:
        """Its tokens, or those that may bring as many keys as it attends to, where they are more.

        Example:
            a prompt of 8 with four answers of 1: 12, and 36 keys; with forty: 90 for 360 keys.
        """
        keys = sum(self.prompt + n for n in self.longer if n)
        return max(self.prompt + sum(self.longer), ceil(keys / KEYS))

    def cut(self, limit: float, budget: int) -> list["Family"]:
        """In as many near-equal parts as ``limit`` goes into its size, and at least so many that
        each is within the budget, if a single answer is."""
        if self.size <= min(limit, budget):
            return [self]
        most = len(self.members)
        room = budget - self.prompt  # of a part, for answers
        fewest = max(self.size / limit, sum(self.longer) / room) if limit and room > 0 else most
        for count in range(ceil(fewest), most):
            parts = [self._part(one) for one in balance(self.longer, count) if one]
            if max(part.size for part in parts) <= budget:
                return parts
        return [self._part([i]) for i in range(most)]

    def _part(self, which: Sequence[int]) -> "Family":
        members = tuple(self.members[i] for i in which)
        scored = tuple(self.scored[i] for i in which) if self.scored else ()
        return Family(self.prompt, members, tuple(self.longer[i] for i in which), scored)


@dataclass(frozen=True)
class Division:
    """Who computes which samples.

    Example:
        ``Division(bins=[[[0, 2], [1]], [[3], []]], loads=[30., 26.])``: rank 0 has samples 0 and 2
        in its first micro-batch.
    """

    bins: list[list[list[int]]]  # of each rank, of each of its micro-batches
    loads: list[float]  # of each rank, as ``Family.work`` counts

    @property
    def imbalance(self) -> float:
        """The most that a rank has, over what each would have if all had the same; 1 at best."""
        mean = sum(self.loads) / len(self.loads)
        return max(self.loads) / mean if mean else 1.0


def balance(sizes: Sequence[int | float], parts: int) -> list[list[int]]:
    """Divide the work over ``parts`` ranks near-equally: largest first, each to the part that has
    the least. Indices into ``sizes``; deterministic; parts may be empty."""
    shares: list[list[int]] = [[] for _ in range(parts)]
    loads = [(0.0, part) for part in range(parts)]  # a heap
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        load, part = loads[0]
        shares[part].append(i)
        heapreplace(loads, (load + sizes[i], part))
    return shares


def fill(sizes: Sequence[int], share: Sequence[int], budget: int) -> list[list[int]]:
    """Divide the work of ``share`` into bins of at most ``budget`` tokens: largest first, each
    into the first bin with room. What is beyond the budget gets a bin of its own."""
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


def divide(
    samples: Sequence[Sample],
    *,
    ranks: int,
    budget: int,
    share: bool = False,
    multiple: int = 1,
    each: int = 1,
    cost: Cost = Cost(),
) -> Division:
    """Which samples each data-parallel rank puts into each of its micro-batches, as indices. With
    ``share`` answers to one prompt stay together, as far as that makes less work.

    All ranks get the same number of micro-batches, a multiple of ``multiple``: those with less work
    end with empty ones, because schedules and expert-parallel layers need every rank to take part
    in every collective. Samples that bring nothing to the loss are left out. ``each``: of what
    number of tokens every sequence will be a multiple (``pack``), which counts for the budget.
    """
    context = contexts(samples).tolist()
    active = [i for i, tokens in enumerate(context) if tokens]
    scored = [int(np.count_nonzero(sample.weight)) for sample in samples]
    if share:
        whole = _families(samples, active, context, scored)
        families = _cut(whole, ranks=ranks, budget=budget, cost=cost)
    else:
        families = [Family(context[i], ((i,),), (0,), (scored[i],)) for i in active]
    work, sizes = ([f.work(cost) for f in families], [-(-f.size // each) * each for f in families])
    parts = balance(work, ranks)
    bins = [fill(sizes, part, budget) for part in parts]
    count = ceil(max(1, *(len(part) for part in bins)) / multiple) * multiple
    samples_of = [[i for same in family.members for i in same] for family in families]
    flat = [[[i for f in one for i in samples_of[f]] for one in part] for part in bins]
    loads = [float(sum(work[i] for i in part)) for part in parts]
    return Division([part + [[]] * (count - len(part)) for part in flat], loads)


def _families(
    samples: Sequence[Sample],
    active: Sequence[int],
    context: Sequence[int],
    scored: Sequence[int],
) -> list[Family]:
    """One for each prompt."""
    whole = []
    for members in by_prompt(samples, active):
        equal: dict[bytes, list[int]] = {}
        for i in members:
            equal.setdefault(samples[i].tokens[: context[i]].tobytes(), []).append(i)
        prompt = samples[members[0]].prompt_length
        longer = tuple(context[same[0]] - prompt for same in equal.values())
        counts = tuple(sum(scored[i] for i in same) for same in equal.values())
        whole.append(Family(prompt, tuple(map(tuple, equal.values())), longer, counts))
    return whole


def _cut(whole: Sequence[Family], *, ranks: int, budget: int, cost: Cost) -> list[Family]:
    """Several of one where it is beyond the budget or too large a part of a rank's share: of some
    ways to cut them that whose busiest rank has the least to do."""
    largest = max((family.size for family in whole), default=0)
    share = sum(family.size for family in whole) / ranks
    limits = [share / grain for grain in GRAINS if largest > share / grain]
    ways = [
        [part for family in whole for part in family.cut(limit, budget)]
        for limit in (inf, *limits, *([0.0] if limits else []))
    ]
    return min(ways, key=lambda way: _busiest([family.work(cost) for family in way], ranks))


def _busiest(sizes: Sequence[int | float], ranks: int) -> int | float:
    """What the rank has that has most."""
    return max(sum(sizes[i] for i in part) for part in balance(sizes, ranks))
