"""Which groups are trained on."""

import numpy as np
import pytest

from peergrad.algo.sampling import selects
from peergrad.config import FlatGroups, SamplingConfig

KEEP, DROP = SamplingConfig(), SamplingConfig(flat_groups=FlatGroups.drop)
DYNAMIC = SamplingConfig(dynamic=True)
BETWEEN = SamplingConfig(mean_low=0.25, mean_high=0.75)


@pytest.mark.parametrize(
    ("sampling", "rewards", "expected"),
    [
        (KEEP, [1, 1, 1], True),
        (KEEP, [0], True),
        (DROP, [1, 1, 1], False),
        (DROP, [0, 0, 0], False),
        (DROP, [0.1, 0.1, 0.1], False),  # equal values whose mean is not theirs
        (DROP, [1], False),  # a group of one is flat
        (DROP, [1, 0, 1], True),
        (DYNAMIC, [1, 1], False),
        (DYNAMIC, [1, 1 - 1e-6], True),
        (DYNAMIC, [0.1 + 0.2, 0.3], False),  # flat but for rounding
        (SamplingConfig(mean_high=1.0), [0.7 + 0.2 + 0.1] * 2, False),  # and 1 but for rounding
        (BETWEEN, [1, 0], True),
        (BETWEEN, [1, 0, 0, 0], False),  # .25: strictly above
        (BETWEEN, [1, 1, 1, 0], False),  # .75: strictly below
        (BETWEEN, [0, 0], False),
        (BETWEEN, [1, 1], False),
        (BETWEEN, [0.5, 0.5], True),  # flat, and bounds alone do not mind
        (SamplingConfig(mean_low=0.25), [1, 1], True),
        (SamplingConfig(mean_low=0.25), [0, 0], False),
        (SamplingConfig(mean_high=0.75), [0, 0], True),
        (SamplingConfig(mean_high=0.75), [1, 1], False),
        (SamplingConfig(mean_low=0.0), [0, 0], False),  # a bound of 0 is a bound
        (SamplingConfig(dynamic=True, mean_high=0.75), [0.5, 0.5], False),  # both must hold
        (SamplingConfig(dynamic=True, mean_high=0.75), [1, 1, 1, 0], False),
        (SamplingConfig(dynamic=True, mean_high=0.75), [1, 0], True),
    ],
)
def test_selects(sampling: SamplingConfig, rewards: list[float], expected: bool) -> None:
    for dtype in (np.float64, np.float32):
        assert selects(np.array(rewards, dtype), sampling) is expected
    if not sampling.selects:  # then nothing may ever be turned away
        assert expected
