"""From groups to samples: versions, logprobs, weights in the loss, mini-batches."""

from collections import Counter

import numpy as np
import pytest

from peergrad.algo.samples import (
    Sample,
    make_samples,
    mini_batches,
    weigh,
    with_logp,
    with_proximal,
)
from peergrad.config import Aggregation, AlgoConfig, Denominator
from peergrad.data import Group, Prompt, Rollout


def new_group(name: str, prompt: list[int], answers: list[list[int]]) -> Group:
    rollouts = tuple(
        Rollout(
            np.array(answer, np.int32),
            -np.array(answer, np.float32) / 10,
            ((4, 0, len(answer)),),
            "stop",
            "",
            reward=float(i),
        )
        for i, answer in enumerate(answers)
    )
    return Group(name, Prompt(name, np.array(prompt, np.int32), "", ""), rollouts)


def test_make_samples() -> None:
    groups = [new_group("a", [5, 3], [[7, 1], []]), new_group("b", [9], [[2]])]
    samples = make_samples(groups)
    assert [s.tokens.tolist() for s in samples] == [[5, 3, 7, 1], [5, 3], [9, 2]]
    assert [s.prompt_length for s in samples] == [2, 2, 1]
    assert [s.group for s in samples] == [0, 0, 1]
    engine = [np.array(x, np.float32).tolist() for x in ([-0.7, -0.1], [], [-0.2])]
    assert [s.logp_engine.tolist() for s in samples] == engine
    assert [s.weight.tolist() for s in samples] == [[1, 1], [], [1]]  # ungraded: all are scored
    assert [s.advantage.tolist() for s in samples] == [[0, 0], [], [0]]
    assert all(s.logp_old is None and s.logp_ref is None and s.proximal is None for s in samples)


def test_tokens_have_the_version_that_they_were_drawn_with() -> None:
    """An answer that a weight sync interrupted, twice in the same token."""
    tokens, logprobs = np.arange(5, dtype=np.int32), np.zeros(5, np.float32)
    rollout = Rollout(tokens, logprobs, ((3, 0, 2), (4, 2, 2), (5, 2, 5)), "stop", "")
    prompt = Prompt("p", np.array([1], np.int32), "", "")
    (sample,) = make_samples([Group("g", prompt, (rollout,))])
    assert sample.version.tolist() == [3, 3, 5, 5, 5]
    (sample,) = with_proximal([sample], version=5)
    # lag / (lag + 1): two versions behind 2/3, present 0
    assert sample.proximal is not None and sample.proximal.dtype == np.float32
    assert sample.proximal.tolist() == pytest.approx([2 / 3, 2 / 3, 0, 0, 0])


@pytest.mark.parametrize(("age", "expected"), [(0, 0.0), (1, 1 / 2), (2, 2 / 3), (9, 0.9)])
def test_the_proximal_policy_by_age(age: int, expected: float) -> None:
    """Of version v - age, v and v + 1, v lies age / (age + 1) of the way."""
    samples = with_proximal(make_samples([new_group("a", [1], [[2]])]), version=4 + age)
    assert samples[0].proximal == pytest.approx([expected])


@pytest.mark.parametrize("field", ["logp_old", "logp_ref"])
def test_with_logp(field: str) -> None:
    samples = make_samples([new_group("a", [5], [[7, 1], [2]])])
    values = [np.array([-1, -2], np.float32), np.array([-3], np.float32)]
    filled = with_logp(samples, field, values)
    assert [getattr(s, field).tolist() for s in filled] == [[-1, -2], [-3]]
    assert all(getattr(s, field) is None for s in samples)  # the old ones are as they were
    with pytest.raises(ValueError):
        with_logp(samples, field, values[:1])


def weighed(algo: AlgoConfig) -> list[list[float]]:
    """Groups of 2 and 2 answers of 2, 4 and 3, 1 tokens; of the second answer two tokens are
    dropped, the fourth as a whole."""
    samples = make_samples(
        [new_group("a", [5], [[1] * 2, [1] * 4]), new_group("b", [5], [[1] * 3, [1]])]
    )
    samples[1].weight[1:3] = 0
    samples[3].weight[:] = 0
    found = weigh(samples, algo, max_tokens=8)
    assert [s.weight.dtype for s in found] == [np.dtype(np.float32)] * 4
    assert samples[0].weight.tolist() == [1, 1]  # as it was
    return [s.weight.tolist() for s in found]


@pytest.mark.parametrize(
    ("mode", "denominator", "expected"),
    [  # weight of a kept token of each answer: all of 4 answers, 10 tokens, groups of 6 and 4 ...
        ("seq_mean_token_mean", "all", [1 / 8, 1 / 16, 1 / 12]),
        ("token_mean", "all", [1 / 10] * 3),
        ("group_token_mean", "all", [1 / 12, 1 / 12, 1 / 8]),
        ("seq_mean_token_sum", "all", [1 / 4] * 3),
        ("token_sum_const", "all", [1 / 32] * 3),
        # ... kept 3 answers, 7 tokens, groups of 4 and 3
        ("seq_mean_token_mean", "kept", [1 / 6, 1 / 6, 1 / 9]),
        ("token_mean", "kept", [1 / 7] * 3),
        ("group_token_mean", "kept", [1 / 8, 1 / 8, 1 / 6]),
        ("seq_mean_token_sum", "kept", [1 / 3] * 3),
        ("token_sum_const", "kept", [1 / 24] * 3),
    ],
)
def test_weigh(mode: str, denominator: str, expected: list[float]) -> None:
    algo = AlgoConfig(aggregation=Aggregation[mode], denominator=Denominator[denominator])
    a, b, c = np.array(expected, np.float32).tolist()
    assert weighed(algo) == [[a, a], [b, 0, 0, b], [c, c, c], [0]]


@pytest.mark.parametrize("denominator", Denominator)
@pytest.mark.parametrize("mode", Aggregation)
def test_nothing_kept_weighs_nothing(mode: Aggregation, denominator: Denominator) -> None:
    samples = make_samples([new_group("a", [5], [[1, 2], []])])
    samples[0].weight[:] = 0
    found = weigh(samples, AlgoConfig(aggregation=mode, denominator=denominator), max_tokens=8)
    assert [s.weight.tolist() for s in found] == [[0, 0], []]  # not NaN


def grouped(counts: list[int]) -> list[Sample]:
    return make_samples([new_group(str(g), [g], [[1]] * n) for g, n in enumerate(counts)])


@pytest.mark.parametrize(
    ("parts", "order", "expected"),
    [
        (1, [0, 1, 2, 3], [[0, 1, 2, 3]]),
        (2, [0, 1, 2, 3], [[0, 1], [2, 3]]),
        (2, [3, 0, 2, 1], [[3, 0], [2, 1]]),
        (4, [2, 3, 1, 0], [[2], [3], [1], [0]]),
        (3, [0, 1, 2, 3], [[0, 1], [2], [3]]),  # the rest goes to the first
    ],
)
def test_mini_batches_keep_order_and_groups(
    parts: int, order: list[int], expected: list[list[int]]
) -> None:
    samples = grouped([2, 3, 1, 2])
    found = mini_batches(samples, parts, order)
    assert [list(dict.fromkeys(s.group for s in part)) for part in found] == expected
    # every answer once, those of a group together and in order
    assert Counter(id(s) for part in found for s in part) == Counter(map(id, samples))
    for part in found:
        for group in {s.group for s in part}:
            assert [s for s in part if s.group == group] == [s for s in samples if s.group == group]
