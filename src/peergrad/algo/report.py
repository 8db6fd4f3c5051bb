"""Numbers that describe the rollouts of a step."""

from collections.abc import Sequence

import numpy as np

from peergrad.algo.sampling import flat
from peergrad.data import Group


def rollout_statistics(
    groups: Sequence[Group], *, dropped: Sequence[float] = (), version: int
) -> dict[str, float]:
    """Reward, length and age of one step's rollouts; ``version`` is the trainer's weight version.

    ``dropped`` are the mean rewards of the groups that dynamic sampling turned away: ``sampling/*``
    counts them too, everything else is about what is trained on.

    A flat group (all rewards equal) teaches nothing; their fraction says how much of the batch is
    wasted. Lengths are in tokens, staleness in weight versions, of the oldest token of each
    rollout.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = np.array([r.reward for r in rollouts])
    lengths = np.array([r.tokens.size for r in rollouts])
    oldest = np.array([min((v for v, _, _ in r.versions), default=version) for r in rollouts])
    prompts = sum(g.prompt.tokens.size * len(g.rollouts) for g in groups)
    drawn = [float(group.rewards.mean()) for group in groups] + list(dropped)
    return {
        "sampling/groups": float(len(drawn)),
        "sampling/reward": float(np.mean(drawn)),
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/flat_groups": float(np.mean([flat(g.rewards) for g in groups])),
        "response/length": float(lengths.mean()),
        "response/length_max": float(lengths.max()),
        "response/truncated": float(np.mean([r.finish == "length" for r in rollouts])),
        "tokens/response": float(lengths.sum()),
        "tokens/total": float(lengths.sum() + prompts),
        "version/trainer": float(version),
        "version/staleness": float((version - oldest).mean()),
    }
