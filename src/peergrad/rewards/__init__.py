"""Rewards: a prompt and a rollout in, a float out."""

from peergrad.rewards.check import check_answers, check_function
from peergrad.rewards.pool import RewardError, RewardPool

__all__ = ["RewardError", "RewardPool", "check_answers", "check_function"]
