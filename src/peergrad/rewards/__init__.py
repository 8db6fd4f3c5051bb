"""Rewards: a prompt and a rollout in, a float out."""

from peergrad.rewards.pool import RewardError, RewardPool

__all__ = ["RewardError", "RewardPool"]
