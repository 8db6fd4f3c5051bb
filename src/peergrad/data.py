"""What travels between the parts: prompts, rollouts and groups, as compact numpy arrays.

Nothing here imports torch, so that the collector process stays light. The packed tensors that the
trainer works on are ``peergrad.algo.packing.MicroBatch``.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

FINISH_REASONS = ("stop", "length", "abort")


@dataclass(frozen=True)
class Prompt:
    """One prompt, already tokenised.

    Example:
        ``Prompt(id="train-17", tokens=np.array([5, 3, 9], np.int32), text="1+2=", answer="3")``
    """

    id: str
    tokens: np.ndarray  # [P] int32
    text: str
    answer: str
    extra: dict[str, Any] = field(default_factory=dict)  # further columns of the data set


@dataclass(frozen=True)
class Rollout:
    """One sampled answer.

    ``logprobs[t]`` is the engine's log probability of ``tokens[t]`` at the sampling temperature
    over the full vocabulary. ``versions`` are half-open spans ``(weight version, start, end)``
    over the answer's tokens: a rollout that was interrupted by a weight sync has several.

    Example:
        ``Rollout(tokens=np.array([7, 1], np.int32), logprobs=np.array([-.1, -.2], np.float32),
        versions=((4, 0, 2),), finish="stop", text="3", reward=1.0)``
    """

    tokens: np.ndarray  # [R] int32
    logprobs: np.ndarray  # [R] float32
    versions: tuple[tuple[int, int, int], ...]
    finish: str  # one of FINISH_REASONS
    text: str
    reward: float = 0.0
    experts: np.ndarray | None = None
    """``[P + R - 1, layers, K]`` uint8 or int16: the experts that the engine chose for every token
    that it computed, the prompt's too. None: it did not say, or has none."""

    def __post_init__(self) -> None:
        if self.tokens.shape != self.logprobs.shape or self.tokens.ndim != 1:
            raise ValueError(
                f"a rollout needs one logprob per token, got {self.tokens.shape} tokens and "
                f"{self.logprobs.shape} logprobs"
            )
        if self.finish not in FINISH_REASONS:
            raise ValueError(f"finish must be one of {FINISH_REASONS}, got {self.finish!r}")

    @property
    def token_versions(self) -> np.ndarray:
        """Weight version that each token was drawn with, [R] int32."""
        return np.repeat(
            np.array([version for version, _, _ in self.versions], np.int32),
            [end - start for _, start, end in self.versions],
        )


@dataclass(frozen=True)
class Group:
    """All rollouts of one prompt: the peers that an answer is graded against.

    ``id`` is stable and unique within a run; a group is never inferred from position.

    Example:
        ``Group(id="3/train-17", prompt=prompt, rollouts=(rollout_a, rollout_b))``
    """

    id: str
    prompt: Prompt
    rollouts: tuple[Rollout, ...]

    @property
    def rewards(self) -> np.ndarray:
        """Rewards of the peers, [G] float64."""
        return np.array([rollout.reward for rollout in self.rollouts], np.float64)
