"""Rollouts as the trainer sees them: one row of tokens each, with what every answer token brings.

Every rank holds all groups of a step, and all logprobs that were computed before the update, so
every rank computes the same numbers and no collective is needed to agree on a mean or a
denominator.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from peergrad.algo.aggregate import token_weights
from peergrad.config import AlgoConfig
from peergrad.data import Group


@dataclass(frozen=True)
class Sample:
    """One rollout ready to be packed: prompt and answer in one row, and what each answer token
    brings to the loss. ``group`` says whose peer it is.

    Example:
        ``Sample(tokens=[5, 3, 9, 7, 1], prompt_length=3, logp_engine=[-.1, -.2],
        advantage=[.8, .8], weight=[.05, .05], version=[4, 4])``
    """

    tokens: np.ndarray  # [P + R] int32
    prompt_length: int
    logp_engine: np.ndarray  # [R] float32
    advantage: np.ndarray  # [R] float32
    weight: np.ndarray  # [R] float32, in the loss; a token of weight 0 takes no part at all
    version: np.ndarray  # [R] int32, of the weights that the token was drawn with
    group: int = 0
    logp_old: np.ndarray | None = None  # [R] float32
    logp_ref: np.ndarray | None = None  # [R] float32
    proximal: np.ndarray | None = None  # [R] float32, from engine (0) to present (1): loglinear
    experts: np.ndarray | None = None  # [P + R - 1, layers, K] uint8 or int16: the engine's choice

    @property
    def logp_before(self) -> np.ndarray:
        """The old policy's logprobs, the engine's where there are no others."""
        return self.logp_engine if self.logp_old is None else self.logp_old

    @cached_property
    def scored(self) -> np.ndarray:
        """Indices of the answer tokens that take part."""
        return self.weight.nonzero()[0]

    def having(self, **changed: np.ndarray) -> "Sample":
        """As ``dataclasses.replace``, in a tenth of its time: a step asks for it several times for
        every answer."""
        other = object.__new__(Sample)
        other.__dict__.update(self.__dict__)
        other.__dict__.pop("scored", None)
        other.__dict__.update(changed)
        return other


def contexts(samples: Sequence[Sample]) -> np.ndarray:
    """How many tokens of each row the scored ones are predicted from, 0 without any: nothing behind
    them, not even the last one itself, is ever computed. [samples] int64."""
    sizes = np.array([s.weight.size for s in samples], np.int64)
    prompts = np.array([s.prompt_length for s in samples], np.int64)
    ends = np.cumsum(sizes)
    scored = np.flatnonzero(np.concatenate([[1], *(s.weight for s in samples)])) - 1
    last = scored[np.searchsorted(scored, ends) - 1]  # before each end, of whichever sample
    found: np.ndarray = np.where(last < ends - sizes, 0, prompts + last - ends + sizes)
    return found


def make_samples(groups: Sequence[Group]) -> list[Sample]:
    """All rollouts of ``groups`` in order, ungraded: advantage 0, every token of weight 1."""
    sizes = [rollout.tokens.size for group in groups for rollout in group.rollouts]
    rows = [pieces(np.full(sum(sizes), x, np.float32), sizes) for x in (0, 1)]
    advantages, weights = map(iter, rows)
    experts = iter(_experts(groups))
    return [
        Sample(
            tokens=np.concatenate([group.prompt.tokens, rollout.tokens]),
            prompt_length=group.prompt.tokens.size,
            logp_engine=rollout.logprobs,
            advantage=next(advantages),
            weight=next(weights),
            version=rollout.token_versions,
            group=index,
            experts=next(experts),
        )
        for index, group in enumerate(groups)
        for rollout in group.rollouts
    ]


def _experts(groups: Sequence[Group]) -> list[np.ndarray | None]:
    """Of every rollout, in order, or none of any: passes that pack them in other ways would else
    replay other ones. For the same reason equal tokens of a group, which are computed once, have
    those of the first, though the engine may have chosen others where it computed them again."""
    every = [rollout.experts for group in groups for rollout in group.rollouts]
    if any(experts is None for experts in every):
        return [None] * len(every)
    found: list[np.ndarray | None] = []
    for group in groups:
        prompt = None
        known: dict[bytes, np.ndarray] = {}
        for rollout in group.rollouts:
            own, size = rollout.experts, group.prompt.tokens.size
            assert own is not None
            prompt = own[:size] if prompt is None else prompt
            whole = np.concatenate([prompt, own[size:]])
            found.append(known.setdefault(rollout.tokens.tobytes(), whole))
    return found


def with_logp(samples: Sequence[Sample], field: str, values: Sequence[np.ndarray]) -> list[Sample]:
    """The samples with ``logp_old`` or ``logp_ref`` filled in."""
    return [s.having(**{field: value}) for s, value in zip(samples, values, strict=True)]


def with_proximal(samples: Sequence[Sample], *, version: int) -> list[Sample]:
    """For the log-linear proximal policy: where the policy of the start of the step, ``version``,
    lies on the way from each token's own version to the one being made.

    ``a = (v_prox - v_token) / (v_new - v_token)``, ``v_new = version + 1`` (AReaL's "loglinear").

    Example:
        tokens of the present version 0; one version older 1/2; two 2/3.
    """
    lags = [version - s.version for s in samples]
    return [
        s.having(proximal=(lag / (lag + 1)).astype(np.float32))
        for s, lag in zip(samples, lags, strict=True)
    ]


def weigh(samples: Sequence[Sample], algo: AlgoConfig, *, max_tokens: int) -> list[Sample]:
    """Give every kept token its weight in the loss of one optimizer step.

    ``samples`` must be everything that the optimizer step sees, over all ranks: denominators are
    taken from it.
    """
    sizes = [s.weight.size for s in samples]
    takes_part = np.concatenate([np.zeros(0), *(s.weight for s in samples)]) != 0
    owner = np.repeat(np.arange(len(samples)), sizes)
    kept = np.bincount(owner[takes_part], minlength=len(samples))
    _, group = torch.unique(torch.tensor([s.group for s in samples]), return_inverse=True)
    weights = token_weights(
        torch.tensor(sizes),
        torch.from_numpy(kept),
        group,
        mode=algo.aggregation,
        denominator=algo.denominator,
        max_tokens=max_tokens,
    )
    found = np.where(takes_part, weights.float().numpy()[owner], np.float32(0))
    pairs = zip(samples, pieces(found, sizes), strict=True)
    return [s.having(weight=weight) for s, weight in pairs]


def pieces(values: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    """``values`` in pieces of ``sizes``, as ``np.split``, which takes 2 us for each of them."""
    ends = np.cumsum(sizes).tolist()
    return [values[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def mini_batches(samples: Sequence[Sample], parts: int, order: Sequence[int]) -> list[list[Sample]]:
    """Divide the groups, taken in ``order``, into ``parts`` runs of equal size (but for a rest)."""
    of: dict[int, list[Sample]] = {group: [] for group in order}
    for sample in samples:
        of[sample.group].append(sample)
    runs = np.array_split(np.array(order), parts)
    return [[sample for group in run for sample in of[int(group)]] for run in runs]
