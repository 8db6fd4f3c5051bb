"""Advantages by hand, and over interleaved sets against numpy."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from peergrad.algo.advantage import (
    centre,
    clip_advantage,
    divide_by_std,
    group_mean,
    group_std,
    is_flat,
    leave_one_out_mean,
    running_centre,
    running_divide,
)
from peergrad.algo.shaping import Moments

VALUES = [0.0, 1.0, 0.1, 0.7, -3.7, 1e30]  # the mean of three times .1 is not .1


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def advantages(
    rewards: list[float], *, leave_one_out: bool = False, unbiased: bool = True, eps: float = 0.0
) -> list[float]:
    """Of one group: DeepSeekMath's."""
    value, of = f64(*rewards), ids(*[0] * len(rewards))
    centred = centre(value, of, leave_one_out=leave_one_out)
    return divide_by_std(centred, value, of, unbiased=unbiased, eps=eps).tolist()


HALF, THREE = math.sqrt(0.5), math.sqrt(3) / 2


@pytest.mark.parametrize(
    ("rewards", "unbiased", "expected"),
    [
        # mean .5; squares .25 + .25 = .5, over 1: std sqrt(.5); .5 / sqrt(.5) = sqrt(.5)
        ([1, 0], True, [HALF, -HALF]),
        ([1, 0], False, [1, -1]),  # over 2: std .5
        # mean .5; squares 4 * .25 = 1, over 3: .5 * sqrt(3)
        ([1, 0, 0, 1], True, [THREE, -THREE, -THREE, THREE]),
        ([1, 0, 0, 1], False, [1, -1, -1, 1]),
        # mean .25; squares .5625 + 3 * .0625 = .75, over 3: std .5
        ([1, 0, 0, 0], True, [1.5, -0.5, -0.5, -0.5]),
    ],
)
def test_by_hand(rewards: list[float], unbiased: bool, expected: list[float]) -> None:
    assert advantages(rewards, unbiased=unbiased) == pytest.approx(expected, abs=1e-15)


def test_eps_is_added_to_the_standard_deviation() -> None:
    assert advantages([1, 0, 0, 0], eps=0.25) == [1.0, -1 / 3, -1 / 3, -1 / 3]  # .75 / (.5 + .25)


def test_centre_by_hand() -> None:
    value, of = f64(4, 1, 0, 0, 0, 2), ids(0, 1, 0, 0, 0, 1)
    assert centre(value, of).tolist() == [3, -0.5, -1, -1, -1, 0.5]
    # the others of 4 are 0, those of a 0 are 4, 0, 0
    others = [4, -1, -4 / 3, -4 / 3, -4 / 3, 1]
    assert centre(value, of, leave_one_out=True).tolist() == pytest.approx(others, abs=1e-15)


def test_leave_one_out_mean_by_hand() -> None:
    assert leave_one_out_mean(f64(1, 0, 0), ids(0, 0, 0)).tolist() == [0, 0.5, 0.5]
    assert leave_one_out_mean(f64(1, 7, 3), ids(0, 1, 0)).tolist() == [3, 7, 1]  # 7 is alone


@pytest.mark.parametrize("unbiased", [True, False])
def test_sets_are_told_apart_by_index(unbiased: bool) -> None:
    """Uneven, interleaved sets with gaps in their numbers, against numpy one set at a time."""
    random = np.random.default_rng(0)
    of, value = random.choice([0, 2, 3, 7], size=40, p=[0.5, 0.3, 0.1, 0.1]), random.normal(size=40)
    of[-1], value[0] = 5, 9.0  # a set of one
    mean, others, std = np.zeros((3, 40))
    for i in range(40):
        mine = value[of == of[i]]
        rest = value[(of == of[i]) & (np.arange(40) != i)]
        mean[i] = mine.mean()
        others[i] = rest.mean() if rest.size else value[i]
        std[i] = mine.std(ddof=int(unbiased)) if mine.size > 1 else 0.0
    x, index = torch.from_numpy(value), torch.from_numpy(of)
    found = group_std(x, index, unbiased=unbiased)
    np.testing.assert_allclose(group_mean(x, index), mean, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(leave_one_out_mean(x, index), others, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(found, std, rtol=1e-13, atol=1e-14)
    divided = divide_by_std(centre(x, index), x, index, unbiased=unbiased, eps=0.1)
    expected = np.where(std > 0, (value - mean) / (std + 0.1), 0.0)
    np.testing.assert_allclose(divided, expected, rtol=1e-12, atol=1e-14)
    assert divided[-1].item() == 0.0


def test_mean_and_deviation_may_be_of_different_sets() -> None:
    # means 1 and 4; over all of (0, 2, 3, 5): squares 6.25 + .25 + .25 + 6.25 = 13, over 4
    value, group = f64(0, 2, 3, 5), ids(0, 0, 1, 1)
    centred = centre(value, group)
    found = divide_by_std(centred, value, torch.zeros_like(group), unbiased=False, eps=0.0)
    one = 1 / math.sqrt(13 / 4)
    assert found.tolist() == pytest.approx([-one, one, -one, one], abs=1e-15)
    # nothing subtracted: std of (0, 2) is 1; the flat set is silent though its values are not 0
    value = f64(0, 2, 3, 3)
    assert divide_by_std(value, value, group, unbiased=False, eps=0.0).tolist() == [0, 2, 0, 0]


def test_is_flat() -> None:
    value = f64(1, 0.1, 2, 0.1, 0.1, 5, 2, -1)
    of = ids(0, 3, 0, 3, 3, 4, 0, 6)
    assert is_flat(value, of).tolist() == [False, True, False, True, True, True, False, True]
    assert not is_flat(f64(1, 1 + 1e-8), ids(0, 0)).any()


@pytest.mark.parametrize(
    "rewards", [(0.1 + 0.2, 0.3), (0.7 + 0.2 + 0.1 - 1, 0), (1e9, 1e9 + 0.1), (1, 1 + 2e-16)]
)
def test_rounding_is_no_difference(rewards: tuple[float, float]) -> None:
    """Divided by its own deviation it would be an advantage of 1 to learn from."""
    value, of = f64(*rewards), ids(0, 0)
    assert is_flat(value, of).all()
    assert centre(value, of).tolist() == centre(value, of, leave_one_out=True).tolist() == [0, 0]
    assert divide_by_std(value - 5, value, of, unbiased=True, eps=0.0).tolist() == [0, 0]
    moments = Moments().merge(value)
    assert running_divide(value - 5, moments, unbiased=True, eps=0.0).tolist() == [0, 0]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
def test_equal_rewards_give_exactly_zero(size: int, value: float) -> None:
    """Alone in the batch and next to another group; else the rest would be divided by eps."""
    zeros = [0.0] * size
    for leave_one_out in (False, True):
        for eps in (0.0, 1e-20):
            assert advantages([value] * size, leave_one_out=leave_one_out, eps=eps) == zeros
        rewards = f64(*[value] * size, 1, 0)
        of = ids(*[1] * size, 0, 0)
        centred = centre(rewards, of, leave_one_out=leave_one_out)
        found = divide_by_std(centred, rewards, of, unbiased=True, eps=0.0).tolist()
        assert centred[:size].tolist() == found[:size] == zeros
        assert found[size] > 0


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("sizes", [[1], [3], [7], [3, 2, 6]])
def test_a_run_of_equal_rewards_gives_exactly_zero(sizes: list[int], value: float) -> None:
    moments = Moments()
    for size in sizes:
        moments = moments.merge(f64(*[value] * size))
    centred = running_centre(f64(*[value] * sizes[-1]), moments)
    found = running_divide(centred, moments, unbiased=True, eps=0.0)
    assert centred.tolist() == found.tolist() == [0.0] * sizes[-1]


def test_running_by_hand() -> None:
    # all so far: 1, 3, 5, 7; mean 4, squares 20
    moments = Moments().merge(f64(1, 3)).merge(f64(5, 7))
    centred = running_centre(f64(5, 7), moments)
    assert centred.tolist() == [1, 3]
    found = running_divide(centred, moments, unbiased=False, eps=0.0)
    assert found.tolist() == pytest.approx([1 / math.sqrt(5), 3 / math.sqrt(5)], rel=1e-15)
    found = running_divide(centred, moments, unbiased=True, eps=1.0)
    std = math.sqrt(20 / 3)
    assert found.tolist() == pytest.approx([1 / (std + 1), 3 / (std + 1)], rel=1e-15)


def test_scaled_advantages_ignore_shift_and_scale_of_the_reward() -> None:
    reward = np.random.default_rng(0).normal(size=16)
    assert advantages(list(5 * reward - 3)) == pytest.approx(advantages(list(reward)), abs=1e-12)
    assert sum(advantages(list(reward))) == pytest.approx(0, abs=1e-12)


def test_leave_one_out_stretches_the_advantage() -> None:
    # x - (n mean - x) / (n - 1) = n / (n - 1) (x - mean)
    value, of = torch.from_numpy(np.random.default_rng(0).normal(size=5)), ids(*[0] * 5)
    stretched = 5 / 4 * centre(value, of)
    torch.testing.assert_close(centre(value, of, leave_one_out=True), stretched)


def test_the_result_is_float64() -> None:
    value, of = torch.tensor([0.1, 0.2, 0.4]), ids(0, 0, 0)  # rewards of float32
    moments = Moments().merge(value)
    for found, exact in (
        (centre(value, of), centre(value.double(), of)),
        (centre(value, of, leave_one_out=True), centre(value.double(), of, leave_one_out=True)),
        (group_std(value, of, unbiased=True), group_std(value.double(), of, unbiased=True)),
        (running_centre(value, moments), value.double() - value.double().mean()),
    ):
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=0)


def test_no_elements() -> None:
    value, of = f64(), ids()
    for leave_one_out in (False, True):
        centred = centre(value, of, leave_one_out=leave_one_out)
        assert divide_by_std(centred, value, of, unbiased=True, eps=0.0).numel() == 0


def test_clip_advantage() -> None:
    value = f64(-3, -2, -0.5, 0, 2, 2.1, math.inf)
    assert clip_advantage(value, 2.0).tolist() == [-2, -2, -0.5, 0, 2, 2, 2]
