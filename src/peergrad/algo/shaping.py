"""From the rewards that answers earned to the rewards they are graded by."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


def overlong_penalty(
    lengths: Int[Tensor, " B"], *, max_tokens: int, cache: int, factor: float
) -> Float[Tensor, " B"]:
    """DAPO's soft overlong punishment, added to the reward; float64, in ``[-factor, 0]``.

    With L_max = ``max_tokens`` and L_cache = ``cache``: 0 up to L_max - L_cache tokens, then
    linear, ``-factor`` at L_max (arXiv:2503.14476).

    Example:
        L_max 10, L_cache 4, factor 1: lengths 6, 7, 10 cost 0, .25, 1.
    """
    over = (lengths.double() - (max_tokens - cache)).clamp(0, cache)
    return -factor * over / cache


def shape_reward(
    reward: Float[Tensor, " B"], *, bias: float, scale: float, clip: float | None
) -> Float[Tensor, " B"]:
    """``clip((r + bias) * scale, -clip, clip)``: the order of AReaL's actor.

    Example:
        bias -.5, scale 10, clip 4: reward 1 gives 4, reward 0 gives -4.
    """
    shaped = (reward + bias) * scale
    return shaped if clip is None else shaped.clamp(-clip, clip)


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of all rewards of a run so far.

    Example:
        ``Moments().merge(torch.tensor([1., 3.]))`` is ``Moments(count=2, mean=2., squares=2.)``
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def merge(self, values: Float[Tensor, " B"]) -> "Moments":
        """With ``values`` added; the same in any division of the data (Chan et al. 1979)."""
        if not values.numel():
            return self
        values = values.double()
        count, first = values.numel(), float(values[0])
        mean = first + float((values - first).mean())  # exact where all are equal
        squares = float(((values - mean) ** 2).sum())
        total, delta = self.count + count, mean - self.mean
        return Moments(
            count=total,
            mean=self.mean + delta * (count / total),
            squares=self.squares + squares + delta**2 * self.count * count / total,
        )

    def std(self, *, unbiased: bool) -> float:
        """Standard deviation; 0 for a single value."""
        degrees = self.count - unbiased
        return (self.squares / degrees) ** 0.5 if degrees > 0 else 0.0


def discounted_sum(reward: Float[Tensor, " R"], *, discount: float) -> Float[Tensor, " R"]:
    """``sum_{u >= t} discount^(u - t) reward_u`` of the tokens t of one answer; float64.

    The undiscounted form is the credit of a token for what came after it (REINFORCE++,
    arXiv:2501.03262).

    Example:
        rewards (0, 0, 1), discount .5: (.25, .5, 1).
    """
    if discount == 1:
        return reward.double().flip(0).cumsum(0).flip(0)
    total, found = 0.0, []
    for value in reward.double().flip(0).tolist():
        total = value + discount * total
        found.append(total)
    return torch.tensor(found[::-1], dtype=torch.float64)


def adapted_coef(coef: float, kl: float, *, target: float, horizon: int, rollouts: int) -> float:
    """The KL coefficient after ``rollouts`` answers whose mean KL per token was ``kl``.

    ``coef * (1 + clip(kl / target - 1, -0.2, 0.2) * rollouts / horizon)`` (Ziegler et al.,
    arXiv:1909.08593, section 2.2), at least half of it: a product cannot leave 0
    again. ``kl`` that is not finite changes nothing.

    Example:
        coef .1, kl .05, target .1, 1000 of 10000: error -.5, held at -.2; .1 * .98 = .098.
    """
    if not math.isfinite(kl):
        return coef  # a broken step must not turn the penalty off for good
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * max(0.5, 1 + error * rollouts / horizon)
