"""What grading gives: a grade or a failure, and when two rewards are one.

Numpy and torch are not imported: the processes that run rewards are as light as their functions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

ROUNDING = 1e-9
"""Relative to the larger of 1 and their size, rewards closer than this are equal: 0.1 + 0.2 is 0.3.
Sums of float64 err by 1e-15, and no reward means anything by its ninth digit."""

KINDS = ("error", "value", "timeout", "crash")
"""How a reward fails: it raised; it returned no usable number; it took too long; its process
ended."""


@dataclass(frozen=True)
class Grade:
    """What an answer earned; ``parts`` are further numbers of it, for the metrics alone.

    Example:
        ``Grade(1.5, {"format": 0.5, "right": 1.0})``
    """

    reward: float
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """Why an answer has no grade.

    Example:
        ``Failure(kind="error", reason="raised ZeroDivisionError: division by zero (mine.py:7)")``
    """

    kind: str  # one of KINDS
    reason: str


class RewardError(RuntimeError):
    """Rewards fail and the run cannot go on."""


def tolerance(size: float) -> float:
    """How far two rewards of about ``size`` may be apart and yet be equal.

    Example:
        >>> 0.7 + 0.2 + 0.1 >= 1, 0.7 + 0.2 + 0.1 >= 1 - tolerance(1)
        (False, True)
    """
    return ROUNDING * max(1.0, abs(size))
