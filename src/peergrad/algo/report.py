"""Numbers that describe a step: its rollouts, and how far trainer and engine disagree on them."""

from collections.abc import Sequence

import numpy as np

from peergrad.data import Group


def rollout_statistics(groups: Sequence[Group], *, version: int) -> dict[str, float]:
    """Reward, length and age of one step's rollouts; ``version`` is the trainer's weight version.

    A flat group (all rewards equal) teaches nothing; their fraction says how much of the batch is
    wasted. Lengths are in tokens, staleness in weight versions, of the oldest token of each
    rollout.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = np.array([r.reward for r in rollouts])
    lengths = np.array([r.tokens.size for r in rollouts])
    oldest = np.array([min((v for v, _, _ in r.versions), default=version) for r in rollouts])
    prompts = sum(g.prompt.tokens.size * len(g.rollouts) for g in groups)
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/flat_groups": float(np.mean([np.ptp(g.rewards) == 0 for g in groups])),
        "response/length": float(lengths.mean()),
        "response/length_max": float(lengths.max()),
        "response/truncated": float(np.mean([r.finish == "length" for r in rollouts])),
        "tokens/response": float(lengths.sum()),
        "tokens/total": float(lengths.sum() + prompts),
        "version/trainer": float(version),
        "version/staleness": float((version - oldest).mean()),
    }


def gap_statistics(gap: np.ndarray) -> dict[str, float]:
    """Mean, 99th percentile and maximum of ``|trainer logp - engine logp|`` in nats, over all
    scored tokens of a step (``gap``: ``[N]`` float32). No tokens: no numbers.

    On-policy, with equal weights, temperature and precision, only rounding is left: about 1e-6 in
    float32. Anything larger is a fault of the sync, the mapping or the kernels.
    """
    if gap.size == 0:
        return {}
    size = np.abs(gap.astype(np.float64))
    return {
        "logprob_gap/mean": float(size.mean()),
        "logprob_gap/p99": float(np.quantile(size, 0.99)),
        "logprob_gap/max": float(size.max()),
    }
