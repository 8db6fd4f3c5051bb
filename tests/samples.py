"""Samples by hand and at random, for tests."""

import itertools
from collections.abc import Sequence

import numpy as np

from peergrad.algo.samples import Sample


def new_sample(
    prompt: list[int], answer: list[int], weight: float | list[float] = 0.5, group: int = 0
) -> Sample:
    logprobs = -np.array(answer, np.float32) / 10
    return Sample(
        tokens=np.array([*prompt, *answer], np.int32),
        prompt_length=len(prompt),
        logp_engine=logprobs,
        advantage=np.array(answer, np.float32) * 10,
        weight=np.full(len(answer), weight, np.float32),
        version=np.zeros(len(answer), np.int32),
        group=group,
    )


def random_samples(count: int, seed: int, longest: int = 12, peers: int = 3) -> list[Sample]:
    """Groups of ``peers`` answers of 0 to ``longest`` tokens to prompts of 1 to ``longest - 1``; no
    two answer tokens of all samples are the same, and one token in five has no weight. Some prompts
    are other prompts' beginnings, some are of equal length."""
    rng = np.random.default_rng(seed)
    names = itertools.count(1000)
    samples = []
    for i in range(count):
        if i % peers == 0:
            prompt = list(range(1 + rng.integers(0, 2), 1 + rng.integers(2, longest + 1)))
            prompt = prompt or [1]
        answer = list(itertools.islice(names, int(rng.integers(0, longest + 1))))
        weight = rng.uniform(0.1, 1, len(answer)) * (rng.random(len(answer)) < 0.8)
        samples.append(new_sample(prompt, answer, weight.tolist(), group=i // peers))
    return samples


def scored_tokens(samples: Sequence[Sample]) -> list[int]:
    answers = [s.tokens[s.prompt_length :] for s in samples]
    return [int(t) for a, s in zip(answers, samples, strict=True) for t in a[s.weight != 0]]


def context(sample: Sample) -> list[int]:
    """Everything before the last scored token."""
    scored = [i for i, w in enumerate(sample.weight) if w != 0]
    return sample.tokens[: sample.prompt_length + scored[-1]].tolist() if scored else []
