"""Pass rate on held-out prompts."""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from peergrad.data import Prompt, Rollout
from peergrad.grades import tolerance
from peergrad.rollout.engine import Sampling
from peergrad.rollout.stream import Answers, Score


@dataclass(frozen=True)
class EvaluationResult:
    """Means over all answers to the held-out prompts; with ``reward.on_error=drop`` those of
    rewards over answers that have one.

    Example:
        ``EvaluationResult(version=40, prompts=256, pass_rate=0.62, mean_reward=0.64,
        mean_length=117.0, truncated=0.02)``
    """

    version: int
    prompts: int
    pass_rate: float  # share of answers whose reward reaches evaluation.pass_reward: pass@1
    mean_reward: float
    mean_length: float  # tokens
    truncated: float  # share of answers cut off at max_new_tokens
    grading: Mapping[str, float] = field(default_factory=dict)  # metrics: failures, parts


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

    async def answer(prompt: Prompt) -> list[tuple[Rollout, float | None]]:
        request = f"evaluation/{version}/{prompt.id}"
        rollouts = await engine.generate(prompt.tokens, sampling, request_id=request)
        rewards = await asyncio.gather(*(score(prompt, rollout) for rollout in rollouts))
        answered[prompt.id] += 1
        return list(zip(rollouts, rewards, strict=True))

    answers = await asyncio.gather(*map(answer, prompts))
    graded = [pair for pairs in answers for pair in pairs]
    rewards = np.array([reward for _, reward in graded if reward is not None])
    counted = len(graded) if count_failed else len(rewards)
    return EvaluationResult(
        version=version,
        prompts=len(prompts),
        pass_rate=np.count_nonzero(rewards >= pass_reward - tolerance(pass_reward)) / counted,
        mean_reward=float(np.sum(rewards)) / counted,
        mean_length=float(np.mean([len(rollout.tokens) for rollout, _ in graded])),
        truncated=float(np.mean([rollout.finish == "length" for rollout, _ in graded])),
    )
