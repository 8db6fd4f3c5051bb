"""Rewards: a prompt and a rollout in, a number out."""

from peergrad.rewards.check import check_answers, check_function
from peergrad.rewards.pool import RewardPool

__all__ = ["RewardPool", "check_answers", "check_function"]
