"""Advantages by hand."""

import math

import numpy as np
import pytest
import torch

from peergrad.algo.advantage import group_advantage


def advantages(rewards: list[float], *, scale_by_std: bool = True, eps: float = 0.0) -> list[float]:
    reward = torch.tensor(rewards, dtype=torch.float64)
    return group_advantage(reward, scale_by_std=scale_by_std, eps=eps).tolist()


def test_two_rollouts() -> None:
    # mean .5; std over n - 1 = 1: sqrt(.25 + .25) = sqrt(.5); .5 / sqrt(.5) = sqrt(.5)
    assert advantages([1, 0]) == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)], abs=1e-15)


def test_four_rollouts() -> None:
    # mean .5; std over n - 1 = 3: sqrt(4 * .25 / 3) = sqrt(1/3); .5 * sqrt(3) = .8660254
    half = math.sqrt(3) / 2
    assert advantages([1, 0, 0, 1]) == pytest.approx([half, -half, -half, half], abs=1e-15)
    # mean .25; squares .5625 + 3 * .0625 = .75, / 3 = .25, std .5
    assert advantages([1, 0, 0, 0]) == [1.5, -0.5, -0.5, -0.5]


def test_eps_is_added_to_the_standard_deviation() -> None:
    assert advantages([1, 0, 0, 0], eps=0.25) == [1.0, -1 / 3, -1 / 3, -1 / 3]  # .75 / (.5 + .25)


def test_without_scale_only_the_mean_is_taken_off() -> None:
    assert advantages([4, 0, 0, 0], scale_by_std=False, eps=9.0) == [3.0, -1.0, -1.0, -1.0]


@pytest.mark.parametrize("scale_by_std", [True, False])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -3.7, 1e30])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
def test_equal_rewards_give_exactly_zero(size: int, value: float, scale_by_std: bool) -> None:
    # The mean of three times .1 is not .1: without care the rest would be divided by eps.
    assert advantages([value] * size, scale_by_std=scale_by_std, eps=1e-20) == [0.0] * size


def test_scaled_advantages_ignore_shift_and_scale_of_the_reward() -> None:
    reward = np.random.default_rng(0).normal(size=16)
    assert advantages(list(5 * reward - 3)) == pytest.approx(advantages(list(reward)), abs=1e-12)
    assert sum(advantages(list(reward))) == pytest.approx(0, abs=1e-12)
