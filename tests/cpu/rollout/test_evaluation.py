"""Rates of passed answers, worked out by hand."""

import math

import numpy as np
import pytest

from peergrad.rollout.evaluation import pass_at_all, standard_error


@pytest.mark.parametrize(
    ("passed", "counted", "error"),
    [
        ([2, 0, 1], [2, 2, 2], 0.5 / math.sqrt(3)),  # rates 1, 0, 1/2: deviation 1/2
        ([1, 0, 1, 0], [1, 1, 1, 1], math.sqrt(1 / 12)),  # p (1 - p) / (P - 1)
        ([1, 0], [1, 3], 0.375),  # 3/4 and -3/4 off 1/4 of theirs: sqrt(2 * 9/8) / 4
        ([3, 3], [3, 3], 0.0),
    ],
)
def test_the_standard_error_is_that_over_prompts(
    passed: list[int], counted: list[int], error: float
) -> None:
    assert standard_error(np.array(passed), np.array(counted)) == pytest.approx(error)


def test_one_prompt_tells_no_error() -> None:
    assert math.isnan(standard_error(np.array([1]), np.array([2])))


@pytest.mark.parametrize(
    ("passed", "counted", "samples", "rates"),
    [
        ([1], [1], 1, {}),
        ([1, 0], [4, 4], 4, {2: 1 / 4, 4: 1 / 2}),  # 1 - C(3, 2) / C(4, 2) = 1/2, and never
        ([2], [6], 6, {2: 1 - 6 / 15, 4: 1 - 1 / 15, 6: 1.0}),
        ([1, 1], [3, 1], 3, {2: 2 / 3, 3: 1.0}),  # the second prompt has one answer that counts
        ([1], [1], 4, {}),
        ([500], [1000], 1000, {1000: 1.0, 2: 1 - 499 / 999 / 2, 512: 1.0}),
    ],
)
def test_pass_at_k_is_the_chance_that_one_of_k_passes(
    passed: list[int], counted: list[int], samples: int, rates: dict[int, float]
) -> None:
    found = pass_at_all(np.array(passed), np.array(counted), samples)
    assert {k: found[k] for k in rates} == pytest.approx(rates)
    assert len(found) == len(rates) or samples == 1000
