"""Correction of the mismatch between the policy that sampled and the one that ratios are taken to.

``log_k = log(pi_old / pi_engine)`` per token, constant. Weights multiply the surrogate; a token
that is not kept takes no part in the loss at all.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from peergrad.algo.surrogate import sequence_mean, sequence_sum
from peergrad.config import CorrectionLevel


def at_level(
    log_k: Float[Tensor, " S"],
    sequence: Int[Tensor, " S"],
    sequences: int,
    level: CorrectionLevel,
) -> Float[Tensor, " S"]:
    """``log_k`` of the token, summed over its sequence, or averaged (the geometric mean)."""
    if level is CorrectionLevel.token:
        return log_k
    if level is CorrectionLevel.geometric:
        return sequence_mean(log_k, sequence, sequences)
    return sequence_sum(log_k, sequence, sequences)


def within(log_k: Float[Tensor, " S"], *, low: float, high: float) -> Bool[Tensor, " S"]:
    """``low <= k <= high``; False for NaN."""
    k = log_k.exp()
    return (k >= low) & (k <= high)


def truncated(log_k: Float[Tensor, " S"], *, low: float, high: float) -> Float[Tensor, " S"]:
    """TIS: ``clip(k, low, high)`` (https://fengyao.notion.site/off-policy-rl; low is 0 there).

    Example:
        high 2: k = 5 weighs 2, k = .3 weighs .3.
    """
    return log_k.exp().clamp(low, high)


def masked(
    log_k: Float[Tensor, " S"], *, low: float, high: float
) -> tuple[Float[Tensor, " S"], Bool[Tensor, " S"]]:
    """MIS: weight ``k`` within the bounds, dropped outside. Of single tokens it is IcePop
    (arXiv:2510.18855; bounds .5 and 5)."""
    keep = within(log_k, low=low, high=high)
    return torch.where(keep, log_k, 0.0).exp(), keep


def sequence_masked(
    log_k: Float[Tensor, " S"],
    sequence: Int[Tensor, " S"],
    sequences: int,
    *,
    low: float,
    high: float,
) -> tuple[Float[Tensor, " S"], Bool[Tensor, " S"]]:
    """seq-mask-TIS: the geometric mean of k decides over the sequence, the weight is the token's k
    itself, not truncated."""
    keep = within(sequence_mean(log_k, sequence, sequences), low=low, high=high)
    return torch.where(keep, log_k, 0.0).exp(), keep


def dppo_keep(
    logp: Float[Tensor, " S"],
    logp_engine: Float[Tensor, " S"],
    advantage: Float[Tensor, " S"],
    *,
    bound: float,
) -> Bool[Tensor, " S"]:
    """Whether the probability has *not* moved from the engine's by more than ``bound`` in the
    direction that the advantage pushes: ``(p - p_engine) sign(A) <= bound`` (usually .2).

    Example:
        p = .8, p_engine = .5, bound .2: dropped for A > 0, kept for A < 0.
    """
    return (logp.exp() - logp_engine.exp()) * advantage.sign() <= bound


def opsm_keep(
    logp: Float[Tensor, " S"],
    logp_old: Float[Tensor, " S"],
    advantage: Float[Tensor, " S"],
    sequence: Int[Tensor, " S"],
    sequences: int,
    *,
    delta: float,
) -> Bool[Tensor, " S"]:
    """Off-policy sequence masking: drops sequences with ``A < 0`` whose mean ``log(pi_old / pi)``
    exceeds ``delta`` (DeepSeek-V3.2, arXiv:2512.02556; A by its mean where it varies)."""
    drift = sequence_mean(logp_old - logp, sequence, sequences)
    return ~((sequence_mean(advantage, sequence, sequences) < 0) & (drift > delta))


def m2po_keep(log_k: Float[Tensor, " N"], *, threshold: float) -> Bool[Tensor, " N"]:
    """Drops the tokens with the largest ``log_k^2`` until the mean of the rest is below
    ``threshold`` (M2PO, arXiv:2510.01161). Needs all tokens of the batch.

    Tokens of equal size are dropped in order; a NaN counts as infinitely far.

    Example:
        log_k (.1, 1, -.2), threshold .04: squares .01, 1, .04; without the 1 the mean is .025.
    """
    size = torch.where(torch.isnan(log_k), torch.inf, log_k.double() ** 2)
    order = torch.argsort(size, descending=True, stable=True)
    kept_mean = size[order].flip(0).cumsum(0) / torch.arange(1, size.numel() + 1)
    kept = int((kept_mean < threshold).sum())  # the mean only grows with every larger square
    keep = torch.zeros_like(size, dtype=torch.bool)
    keep[order[size.numel() - kept :]] = True
    return keep
