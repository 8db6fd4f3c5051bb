"""Reward shaping, running moments, discounted sums and the adaptive KL coefficient by hand."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from peergrad.algo.shaping import (
    Moments,
    adapted_coef,
    discounted_sum,
    overlong_penalty,
    shape_reward,
)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("max_tokens", "cache", "factor", "lengths", "expected"),
    [
        # free up to 6, then a quarter per token
        (10, 4, 1.0, [0, 5, 6, 7, 9, 10], [0, 0, 0, -0.25, -0.75, -1]),
        (10, 4, 0.5, [6, 8, 10, 11, 99], [0, -0.25, -0.5, -0.5, -0.5]),  # flat beyond the end
        (20480, 4096, 1.0, [16384, 18432, 20480], [0, -0.5, -1]),  # the paper's numbers
        (8, 8, 1.0, [0, 2, 8], [0, -0.25, -1]),  # every token costs
        (10, 4, 1.0, [], []),
    ],
)
def test_overlong_penalty(
    max_tokens: int, cache: int, factor: float, lengths: list[int], expected: list[float]
) -> None:
    found = overlong_penalty(
        torch.tensor(lengths, dtype=torch.int64), max_tokens=max_tokens, cache=cache, factor=factor
    )
    assert found.dtype == torch.float64
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("bias", "scale", "clip", "expected"),
    [
        (0.0, 1.0, None, [1.0, 0.0, -2.0]),
        (-0.5, 10.0, None, [5.0, -5.0, -25.0]),  # first the bias, then the scale
        (-0.5, 10.0, 20.0, [5.0, -5.0, -20.0]),  # the clip last of all
        (-0.5, 10.0, 5.0, [5.0, -5.0, -5.0]),
        (0.5, -1.0, 1.0, [-1.0, -0.5, 1.0]),  # -1.5, -.5, 1.5
    ],
)
def test_shape_reward(bias: float, scale: float, clip: float | None, expected: list[float]) -> None:
    assert shape_reward(f64(1, 0, -2), bias=bias, scale=scale, clip=clip).tolist() == expected


def test_moments_by_hand() -> None:
    # 1, 3: mean 2, squares 1 + 1. With 5, 7: mean 4, squares 9 + 1 + 1 + 9.
    first = Moments().merge(f64(1, 3))
    assert first == Moments(count=2, mean=2.0, squares=2.0)
    both = first.merge(f64(5, 7))
    assert both == Moments(count=4, mean=4.0, squares=20.0)
    assert both.std(unbiased=False) == math.sqrt(5)
    assert both.std(unbiased=True) == math.sqrt(20 / 3)


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("cuts", [[], [0], [1], [20], [40], [7, 7, 8, 33], [*range(41)]])
def test_moments_are_those_of_all_values_in_any_division(cuts: list[int], offset: float) -> None:
    # Sums of squares would lose the deviations of rewards around 1e6.
    values = np.random.default_rng(0).normal(size=40) + offset
    moments = Moments()
    for part in np.split(values, cuts):
        moments = moments.merge(torch.from_numpy(part))
    assert moments.count == 40
    assert moments.mean == pytest.approx(values.mean(), abs=1e-15 * max(1, offset))
    for unbiased in (False, True):
        expected = values.std(ddof=int(unbiased))
        assert moments.std(unbiased=unbiased) == pytest.approx(expected, rel=1e-9)


def test_moments_of_nothing_and_of_one_value() -> None:
    assert Moments().merge(f64()) == Moments()
    one = Moments().merge(f64(0.3))
    assert one == Moments(count=1, mean=0.3, squares=0.0)
    for moments in (Moments(), one):
        assert [moments.std(unbiased=u) for u in (False, True)] == [0.0, 0.0]


@pytest.mark.parametrize("value", [0.1, 0.7, -3.7, 1e30])
@pytest.mark.parametrize("sizes", [[3], [7], [1, 1, 1], [3, 2, 6]])
def test_moments_of_equal_values_have_no_deviation(sizes: list[int], value: float) -> None:
    moments = Moments()
    for size in sizes:
        moments = moments.merge(torch.full((size,), value, dtype=torch.float64))
    assert moments == Moments(count=sum(sizes), mean=value, squares=0.0)


@pytest.mark.parametrize(
    ("discount", "rewards", "expected"),
    [
        (0.5, [0, 0, 1], [0.25, 0.5, 1]),
        (0.5, [4, 2, 1], [5.25, 2.5, 1]),  # 2 + .5, then 4 + .5 * 2.5
        (1.0, [4, 2, 1], [7, 3, 1]),
        (0.5, [3], [3]),
        (1.0, [3], [3]),
        (0.5, [], []),
        (1.0, [], []),
    ],
)
def test_discounted_sum(discount: float, rewards: list[float], expected: list[float]) -> None:
    found = discounted_sum(torch.tensor(rewards, dtype=torch.float32), discount=discount)
    assert found.dtype == torch.float64
    assert found.tolist() == expected


@pytest.mark.parametrize("discount", [0.9, 1.0])
def test_discounted_sum_is_its_definition(discount: float) -> None:
    reward = np.random.default_rng(0).normal(size=30)
    expected = [
        sum(discount ** (u - t) * reward[u] for u in range(t, 30)) for t in range(len(reward))
    ]
    found = discounted_sum(torch.from_numpy(reward), discount=discount).tolist()
    assert found == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize(
    ("kl", "rollouts", "expected"),
    [
        (0.1, 1000, 0.1),  # on target
        (0.11, 1000, 0.1 * 1.01),  # error .1, a tenth of the horizon
        (0.09, 1000, 0.1 * 0.99),
        (0.05, 1000, 0.1 * 0.98),  # error -.5, held at -.2
        (9.0, 1000, 0.1 * 1.02),  # held at .2
        (-1.0, 1000, 0.1 * 0.98),  # estimates may be negative
        (0.11, 10_000, 0.1 * 1.1),
        (0.0, 20_000, 0.06),  # 1 - .2 * 2
        (0.0, 50_000, 0.05),  # 1 - .2 * 5 would be 0, and 0 for ever
        (0.0, 100_000, 0.05),
        (math.nan, 1000, 0.1),  # a broken step changes nothing
        (math.inf, 1000, 0.1),
    ],
)
def test_adapted_coef(kl: float, rollouts: int, expected: float) -> None:
    found = adapted_coef(0.1, kl, target=0.1, horizon=10_000, rollouts=rollouts)
    assert found == pytest.approx(expected, abs=1e-15)
