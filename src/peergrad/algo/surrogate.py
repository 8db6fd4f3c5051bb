"""Policy-gradient surrogates, per token, not reduced. ``rho`` is a ratio, given by its logarithm.

Every function takes constants but for the log ratio (or ``logp``), and returns the loss, whose
gradient autograd takes, and where a clip bites.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Clipped(NamedTuple):
    """A surrogate's per-token loss and where its bounds bite."""

    loss: Float[Tensor, " S"]
    low: Bool[Tensor, " S"]
    high: Bool[Tensor, " S"]


def clip_log_ratio(
    log_ratio: Float[Tensor, " S"], *, low: float | None, high: float | None
) -> Float[Tensor, " S"]:
    """The log ratio held within its bounds; no gradient beyond them."""
    return log_ratio if low is None and high is None else log_ratio.clamp(low, high)


def sequence_sum(
    value: Float[Tensor, " S"], sequence: Int[Tensor, " S"], sequences: int
) -> Float[Tensor, " S"]:
    """Sum over the tokens of the sequence of each token; ``sequence[s]`` is below ``sequences``.

    In a fixed order of addition on a GPU too (``index_add`` gives other bits every time there), and
    without a wait for the host (as ``bincount``).
    """
    order, starts = _in_order(sequence, sequences)
    return _sums(value, order, starts)[sequence]


def _in_order(sequence: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
    """Tokens by sequence ``[S]``, and where each sequence starts among them ``[sequences + 1]``."""
    order = torch.argsort(sequence, stable=True)
    bounds = torch.arange(sequences + 1, device=sequence.device)
    return order, torch.searchsorted(sequence[order], bounds)


def _sums(value: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    return torch.segment_reduce(value[order], "sum", offsets=starts, unsafe=True)


def sequence_mean(
    value: Float[Tensor, " S"], sequence: Int[Tensor, " S"], sequences: int
) -> Float[Tensor, " S"]:
    """Mean over the tokens of the sequence of each token; ``sequence[s]`` is below ``sequences``.

    Of log ratios it is the logarithm of GSPO's ratio, their geometric mean (arXiv:2507.18071):
    every token of a sequence gets the same value and a share of its gradient.
    """
    order, starts = _in_order(sequence, sequences)
    return _sums(value, order, starts)[sequence] / starts.diff()[sequence]


def sequence_token_log_ratio(
    log_ratio: Float[Tensor, " S"], sequence: Int[Tensor, " S"], sequences: int
) -> Float[Tensor, " S"]:
    """GSPO-token's log ratio: the value of the sequence's, the gradient of the token's own.

    ``s_it = sg(s_i) * pi(y_t) / sg(pi(y_t))`` (arXiv:2507.18071).
    """
    own = log_ratio - log_ratio.detach()
    # -inf - -inf: such a token has no gradient either way.
    own = torch.where(torch.isnan(own), 0.0, own)
    return sequence_mean(log_ratio.detach(), sequence, sequences) + own


def _bounds(clip_low: float, clip_high: float) -> tuple[float, float]:
    """Logarithms of the bounds of a ratio; ``clip_low`` of 1 and more is no lower bound."""
    return (math.log1p(-clip_low) if clip_low < 1 else -math.inf), math.log1p(clip_high)


def clipped_ratio(
    log_ratio: Float[Tensor, " S"],
    advantage: Float[Tensor, " S"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Clipped:
    """``-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)``, and at most ``-dual_clip A`` where
    A < 0.

    PPO's clip (DeepSeekMath, arXiv:2402.03300, eq. 3); separate bounds are DAPO's clip-higher
    (arXiv:2503.14476); with a sequence's ratio it is GSPO (arXiv:2507.18071);
    ``dual_clip`` above 1 bounds what a single bad token can cost (arXiv:1912.09729). The
    gradient is ``-A rho`` where the unclipped term is the smaller one or both are equal, else 0.

    Example:
        rho = 1.5, A = 1, clips .2: loss -1.2, clipped high. rho = 1.5, A = -1: loss 1.5, not
        clipped. rho = 5, A = -1, dual clip 3: loss 3, clipped high.
    """
    least, most = _bounds(clip_low, clip_high)
    worst = math.inf if dual_clip is None else math.log(dual_clip)
    low = (advantage < 0) & (log_ratio < least)
    ceiling = torch.full_like(log_ratio, worst).masked_fill(advantage > 0, most)
    high = (advantage != 0) & (log_ratio > ceiling)
    # Held before exp: a ratio that overflows would otherwise turn 0 * inf into a NaN gradient.
    held = torch.where(low, least, torch.where(high, ceiling, log_ratio))
    ratio = torch.where(advantage == 0, 0.0, held).exp()
    return Clipped(-ratio * advantage, low, high)


def cispo(
    logp: Float[Tensor, " S"],
    log_ratio: Float[Tensor, " S"],
    advantage: Float[Tensor, " S"],
    *,
    clip_low: float,
    clip_high: float,
    unified_mask: bool,
) -> Clipped:
    """``-sg(clip(rho, 1 - clip_low, 1 + clip_high)) A logp``: clipped tokens still learn.

    MiniMax-M1, arXiv:2506.13585, eq. 4-5. ``unified_mask`` (eq. 7) drops the tokens that PPO would
    clip: A > 0 above, A < 0 below.

    Example:
        rho = 2, A = 1, clips .2: gradient -1.2; with the mask 0.
    """
    least, most = _bounds(clip_low, clip_high)
    fixed = log_ratio.detach()
    low, high = fixed < least, fixed > most
    weight = fixed.clamp(least, most).exp()
    if unified_mask:
        low, high = low & (advantage < 0), high & (advantage > 0)
        weight = torch.where(low | high, 0.0, weight)
    # A token that adds nothing must not multiply a logp of -inf by 0.
    silent = (weight == 0) | (advantage == 0)
    return Clipped(-weight * advantage * torch.where(silent, 0.0, logp), low, high)


def sapo(
    log_ratio: Float[Tensor, " S"],
    advantage: Float[Tensor, " S"],
    *,
    tau_positive: float,
    tau_negative: float,
) -> Clipped:
    """``-A (4 / tau) sigmoid(tau (rho - 1))``, ``tau`` by the sign of A: a gate that closes softly.

    SAPO, arXiv:2511.20347. On policy its gradient is ``-A``; nothing is ever clipped.

    Example:
        rho = 1, A = 1, tau = 1: loss -4 * .5 = -2, gradient -1.
    """
    tau = torch.full_like(log_ratio, tau_negative).masked_fill(advantage > 0, tau_positive)
    # Beyond e^40 the gate is shut: held there, rho * sigmoid' stays 0 instead of inf * 0.
    gate = torch.sigmoid(tau * (log_ratio.clamp(max=40.0).exp() - 1))
    nowhere = torch.zeros_like(advantage, dtype=torch.bool)
    return Clipped(-advantage * (4 / tau) * gate, nowhere, nowhere)


def icepop_ratio(
    log_ratio: Float[Tensor, " S"],
    advantage: Float[Tensor, " S"],
    *,
    clip_low: float,
    clip_high: float,
) -> Clipped:
    """``-rho A`` where ``rho = pi / pi_engine`` lies within the band, else 0.

    The two-policy form of IcePop (arXiv:2512.16144): no clip that keeps a value, tokens outside the
    band are dropped; they count in the denominators.

    Example:
        band .5 to 5 (clip_low .5, clip_high 4), A = 1: rho 2 gives -2, rho 6 gives 0.
    """
    least, most = _bounds(clip_low, clip_high)
    low, high = log_ratio < least, log_ratio > most
    silent = low | high | (advantage == 0)
    ratio = torch.where(silent, 0.0, log_ratio).exp()
    return Clipped(torch.where(silent, 0.0, -ratio * advantage), low, high)


def reinforce(logp: Float[Tensor, " S"], advantage: Float[Tensor, " S"]) -> Clipped:
    """``-A logp``: the plain policy gradient (Williams 1992), no ratio."""
    nowhere = torch.zeros_like(advantage, dtype=torch.bool)
    return Clipped(-advantage * torch.where(advantage == 0, 0.0, logp), nowhere, nowhere)
