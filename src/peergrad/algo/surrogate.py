"""Policy-gradient surrogates, per token and not reduced."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Clipped(NamedTuple):
    """A clipped surrogate's per-token loss and where the clips bite (gradient zero)."""

    loss: Float[Tensor, " S"]
    low: Bool[Tensor, " S"]
    high: Bool[Tensor, " S"]


def clipped_token_ratio(
    logp: Float[Tensor, " S"],
    logp_old: Float[Tensor, " S"],
    advantage: Float[Tensor, " S"],
    *,
    clip_low: float,
    clip_high: float,
) -> Clipped:
    """``-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)``, ``rho = exp(logp - logp_old)``.

    PPO's clip on each token's ratio (DeepSeekMath, arXiv:2402.03300, eq. 3); separate bounds are
    DAPO's clip-higher (arXiv:2503.14476). ``logp_old`` and ``advantage`` are constants. The
    gradient is ``-A rho`` where the unclipped term is the smaller one or both are equal, else 0.

    Example:
        rho = 1.5, A = 1, clips .2: loss -1.2, clipped high. rho = 1.5, A = -1: loss 1.5, not
        clipped.
    """
    log_ratio = logp - logp_old
    least, most = math.log1p(-clip_low), math.log1p(clip_high)
    low = (advantage < 0) & (log_ratio < least)
    high = (advantage > 0) & (log_ratio > most)
    # Held before exp: a ratio that overflows would otherwise turn 0 * inf into a NaN gradient.
    held = torch.where(low, least, torch.where(high, most, log_ratio))
    ratio = torch.where(advantage == 0, 0.0, held).exp()
    return Clipped(-ratio * advantage, low, high)
