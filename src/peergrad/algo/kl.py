"""Estimators of KL(policy || reference) from sampled tokens."""

from jaxtyping import Float
from torch import Tensor


def k3(logp: Float[Tensor, " S"], logp_ref: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
    """Per-token ``q - log q - 1`` with ``q = pi_ref / pi_theta``; never negative.

    Unbiased for KL(policy || reference) under the policy's own samples; as a loss its gradient
    ``1 - q`` is that of KL(reference || policy). Source: DeepSeekMath, arXiv:2402.03300, eq. 4, and
    http://joschu.net/blog/kl-approx.html. Not clamped: a clamp would silently drop the gradient.

    Example:
        logp = log .5, logp_ref = log .25: q = .5, k3 = .5 + .6931 - 1 = .1931.
    """
    log_q = logp_ref - logp
    # expm1 keeps the small values that matter near the reference: exp(x) - 1 - x cancels there.
    return log_q.expm1() - log_q
