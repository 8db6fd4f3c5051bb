"""Which groups are worth training on. Numpy alone: the collector process asks, too."""

import numpy as np

from peergrad.config import FlatGroups, SamplingConfig


def selects(rewards: np.ndarray, sampling: SamplingConfig) -> bool:
    """Whether a group of these raw rewards ``[G]`` is trained on.

    Not a flat one (all right or all wrong) with dynamic sampling (DAPO, arXiv:2503.14476)
    or ``flat_groups=drop``, and only with a mean strictly between the bounds. Shaping of rewards
    plays no part: a length penalty would make every group differ.
    """
    mean = float(rewards.mean())
    drop_flat = sampling.dynamic or sampling.flat_groups is FlatGroups.drop
    low = -np.inf if sampling.mean_low is None else sampling.mean_low
    high = np.inf if sampling.mean_high is None else sampling.mean_high
    return not (drop_flat and np.ptp(rewards) == 0) and bool(low < mean < high)
