"""Pass rate on held-out prompts."""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import comb, nan

import numpy as np

from peergrad.data import Group, Prompt, Rollout
from peergrad.grades import tolerance
from peergrad.rollout.engine import Sampling
from peergrad.rollout.stream import Answers, Score

Graded = list[tuple[Rollout, float | None]]
"""Answers to one prompt with their rewards; None: that failed."""


@dataclass(frozen=True)
class EvaluationResult:
    """Means over all answers to the held-out prompts; with ``reward.on_error=drop`` those of
    rewards over answers that have one.

    Example:
        ``EvaluationResult(version=40, prompts=256, pass_rate=0.62, mean_reward=0.64,
        mean_length=117.0, truncated=0.02, error=0.024, pass_at={2: 0.71, 4: 0.78})``
    """

    version: int
    prompts: int
    pass_rate: float  # share of answers whose reward reaches evaluation.pass_reward: pass@1
    mean_reward: float
    mean_length: float  # tokens
    truncated: float  # share of answers cut off at max_new_tokens
    error: float = nan  # standard error of pass_rate; NaN of one prompt
    pass_at: Mapping[int, float] = field(default_factory=dict)  # k -> pass@k: 2, 4, ..., samples
    grading: Mapping[str, float] = field(default_factory=dict)  # metrics: failures, parts
    groups: Sequence[Group] = ()  # the answers that count, for a recording


async def evaluate(
    engine: Answers,
    prompts: Sequence[Prompt],
    score: Score,
    sampling: Sampling,
    *,
    version: int,
    pass_reward: float,
    answered: Counter[str],
    count_failed: bool = False,
) -> EvaluationResult:
    """Answer and grade all prompts at once; ``answered`` gets the id of each that is done.

    An answer passes if its reward reaches ``pass_reward`` but for rounding: 0.7 + 0.2 + 0.1 is 1.
    One whose reward failed, ``score`` gave None, never does; ``count_failed``: it counts as 0.
    """

    async def answer(prompt: Prompt) -> Graded:
        request = f"evaluation/{version}/{prompt.id}"
        rollouts = await engine.generate(prompt.tokens, sampling, request_id=request)
        rewards = await asyncio.gather(*(score(prompt, rollout) for rollout in rollouts))
        answered[prompt.id] += 1
        return list(zip(rollouts, rewards, strict=True))

    answers = await asyncio.gather(*map(answer, prompts))
    least = pass_reward - tolerance(pass_reward)
    passed = np.array([sum(r is not None and r >= least for _, r in pairs) for pairs in answers])
    counting = [_counting(pairs, count_failed) for pairs in answers]
    counted = np.array([len(rollouts) for rollouts in counting])
    drawn = [rollout for pairs in answers for rollout, _ in pairs]
    rewards = [rollout.reward for rollouts in counting for rollout in rollouts]
    return EvaluationResult(
        version=version,
        prompts=len(prompts),
        pass_rate=float(passed.sum() / counted.sum()),
        mean_reward=float(np.mean(rewards)),
        mean_length=float(np.mean([len(rollout.tokens) for rollout in drawn])),
        truncated=float(np.mean([rollout.finish == "length" for rollout in drawn])),
        error=standard_error(passed, counted),
        pass_at=pass_at_all(passed, counted, sampling.n),
        groups=[
            Group(f"{place}/{prompt.id}", prompt, rollouts)
            for place, (prompt, rollouts) in enumerate(zip(prompts, counting, strict=True))
        ],
    )


def _counting(pairs: Graded, count_failed: bool) -> tuple[Rollout, ...]:
    """The answers that count, with their rewards."""
    counted = [(rollout, reward) for rollout, reward in pairs if reward is not None or count_failed]
    return tuple(replace(rollout, reward=reward or 0.0) for rollout, reward in counted)


def standard_error(passed: np.ndarray, counted: np.ndarray) -> float:
    """Of the rate ``passed.sum() / counted.sum()``; both [P], of each prompt's answers.

    Prompts are the sample: answers to one of them are alike. With as many answers to each it is the
    standard deviation of the P rates over sqrt(P); in general, with rate p of all N answers, that
    of a ratio of means, ``sqrt(P / (P - 1) * sum (passed - p counted)^2) / N``. NaN of one prompt.
    """
    prompts, answers = len(passed), counted.sum()
    if prompts == 1:
        return nan
    off = passed - passed.sum() / answers * counted
    return float(np.sqrt(prompts / (prompts - 1) * np.sum(off**2)) / answers)


def pass_at_all(passed: np.ndarray, counted: np.ndarray, samples: int) -> dict[int, float]:
    """pass@k of k = 2, 4, 8, ... up to ``samples``, and of ``samples``: the chance that one of k
    answers to a prompt passes, the mean over prompts that have as many.

    Of n answers, c of which pass, ``1 - C(n - c, k) / C(n, k)``, which is unbiased
    (arXiv:2107.03374, eq. 1).
    """
    found = {}
    for k in sorted({*(2**power for power in range(1, samples.bit_length())), samples} - {1}):
        tallies = [(int(c), int(n)) for c, n in zip(passed, counted, strict=True) if n >= k]
        if tallies:
            solved = [1 - comb(n - c, k) / comb(n, k) for c, n in tallies]
            found[k] = float(np.mean(solved))
    return found
