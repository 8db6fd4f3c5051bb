"""Exact match: the whole answer, nothing else."""

from peergrad.data import Prompt, Rollout


def reward(prompt: Prompt, rollout: Rollout) -> float:
    """1 if the rollout ended by itself and its text is the answer, else 0.

    Example:
        answer "42": the texts "42" and " 42\\n" earn 1; "42!", "042", "4<pad>2" and a "42" that was
        cut off by the length limit earn 0.
    """
    return float(rollout.finish == "stop" and rollout.text.strip() == prompt.answer.strip())
