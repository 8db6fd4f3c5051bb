"""Which groups are worth training on. Numpy alone: the collector process asks, too."""

import numpy as np

from peergrad.config import FlatGroups, SamplingConfig
from peergrad.grades import tolerance


def flat(rewards: np.ndarray) -> bool:
    """Whether all rewards of a group are equal, but for rounding: 0.1 + 0.2 and 0.3 are."""
    return bool(np.ptp(rewards) <= tolerance(np.abs(rewards).max()))


def selects(rewards: np.ndarray, sampling: SamplingConfig) -> bool:
    """Whether a group of these raw rewards ``[G]`` is trained on.

    Not a flat one (all right or all wrong) with dynamic sampling (DAPO, arXiv:2503.14476)
    or ``flat_groups=drop``, and only with a mean strictly between the bounds. Shaping of rewards
    plays no part: a length penalty would make every group differ.
    """
    mean = float(rewards.mean())
    drop_flat = sampling.dynamic or sampling.flat_groups is FlatGroups.drop
    low, high = sampling.mean_low, sampling.mean_high
    above = low is None or mean > low + tolerance(low)
    below = high is None or mean < high - tolerance(high)
    return not (drop_flat and flat(rewards)) and above and below
