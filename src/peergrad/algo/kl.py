"""Estimators of KL(policy || reference) from sampled tokens, with d = log(pi / pi_ref).

As a *loss* an estimator's gradient counts, not its value: under the policy's own samples that of k1
is zero on average, that of k2 and of the unbiased k3 is the gradient of KL(policy || reference),
that of k3 is the gradient of KL(reference || policy).
Source: http://joschu.net/blog/kl-approx.html and the derivatives of its formulas.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from peergrad.config import KlEstimator


def k1(d: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
    """``d``: unbiased, of either sign."""
    return d


def k2(d: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
    """``d^2 / 2``: biased, small variance."""
    return d**2 / 2


def k3(d: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
    """``exp(-d) + d - 1``: unbiased, never negative ("low_var_kl"; DeepSeekMath, arXiv:2402.03300,
    eq. 4).

    Example:
        logp = log .5, logp_ref = log .25: d = log 2, k3 = .5 + .6931 - 1 = .1931.
    """
    # expm1 keeps the small values that matter near the reference: exp(x) - 1 - x cancels there.
    return (-d).expm1() + d.clamp(min=torch.finfo(d.dtype).min)  # inf, not NaN, at -inf


def absolute(d: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
    """``|d|``."""
    return d.abs()


def k3_unbiased(d: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
    """k3 by value, ``d`` by gradient: that of ``w k3`` with ``w = pi / sg(pi)``, which is
    ``k3 + (1 - exp(-d)) = d``, written down at once: the two would cancel."""
    fixed = d.detach()
    return torch.where(fixed.isinf(), k3(fixed), k3(fixed) + fixed * (d - fixed))


ESTIMATORS = {
    KlEstimator.k1: k1,
    KlEstimator.k2: k2,
    KlEstimator.k3: k3,
    KlEstimator.abs: absolute,
    KlEstimator.k3_unbiased: k3_unbiased,
}


class Kl(NamedTuple):
    value: Float[Tensor, " S"]
    clamped: Bool[Tensor, " S"]  # where a clamp bites: the gradient is zero there


def estimate_kl(
    logp: Float[Tensor, " S"],
    logp_ref: Float[Tensor, " S"],
    estimator: KlEstimator,
    *,
    clamp_log_ratio: float | None,
    clamp: float | None,
) -> Kl:
    """The estimate per token, and where a clamp silences it.

    ``d`` is held within plus and minus ``clamp_log_ratio``, then the estimate within plus and minus
    ``clamp`` (20 and 10 in several frameworks). Without clamps nothing is dropped.
    """
    d = logp - logp_ref
    clamped = torch.zeros_like(d, dtype=torch.bool)
    if clamp_log_ratio is not None:
        clamped = d.abs() > clamp_log_ratio
        d = d.clamp(-clamp_log_ratio, clamp_log_ratio)
    estimate = ESTIMATORS[estimator]
    if clamp is None:
        return Kl(estimate(d), clamped)
    free = estimate(d.detach())
    beyond = free.abs() > clamp
    # Replaced before the estimate: one that overflows would turn the gradient 0 into NaN.
    value = torch.where(beyond, free.clamp(-clamp, clamp), estimate(torch.where(beyond, 0.0, d)))
    return Kl(value, clamped | beyond)
