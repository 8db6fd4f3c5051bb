"""How far trainer and engine disagree on the sampled tokens of a step, and why.

The gap is ``logp_trainer - logp_engine`` in nats. On-policy, with equal weights, temperature and
precision, only rounding is left: about 1e-6 in float32. Legend: ``N`` scored tokens of a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64

from peergrad.algo.samples import Sample
from peergrad.data import Group

USUAL_NOISE = {"float32": 1e-5, "bfloat16": 0.03}
"""Usual rms of the gap that comes from rounding, by the dtype of the weights; nats."""

_FEWEST = 50  # tokens to fit a line to
_ERRORS = 3.0  # standard errors that an effect must exceed
_TRIM = 0.001  # of the tokens, at least one, that the line may miss by any amount


@dataclass(frozen=True)
class Tokens:
    """The scored tokens of a step, sample by sample.

    Example:
        an answer of two tokens: ``logp=[-.1, -.3], logp_engine=[-.1, -.2], entropy=[.5, .4],
        lag=[1, 0], first=[True, False], last=[False, True], sample=[0, 0], position=[0, 1]``
    """

    logp: Float64[np.ndarray, " N"]  # the trainer's
    logp_engine: Float64[np.ndarray, " N"]
    entropy: Float64[np.ndarray, " N"]  # of the trainer's whole distribution at the token, nats
    lag: Int64[np.ndarray, " N"]  # the trainer's weight version minus the token's
    first: Bool[np.ndarray, " N"]  # of its answer
    last: Bool[np.ndarray, " N"]  # of its answer: the end of sequence, or the cut
    sample: Int64[np.ndarray, " N"]  # index of the sample
    position: Int64[np.ndarray, " N"]  # in the answer

    @property
    def gap(self) -> Float64[np.ndarray, " N"]:
        """``logp_trainer - logp_engine``, nats."""
        return self.logp - self.logp_engine


def gap_tokens(
    samples: Sequence[Sample],
    logp: Sequence[np.ndarray],
    entropy: Sequence[np.ndarray],
    *,
    version: int,
) -> Tokens:
    """The scored tokens of ``samples`` with the trainer's ``logp`` and ``entropy`` (``[R]`` float32
    each, nats). ``version``: of the trainer's weights when it took them.

    A token without weight is not scored. A NaN at a token that has one is a fault, and stays.
    """
    scored = [s.scored for s in samples]
    none = [np.zeros(0, np.int64)]
    position = np.concatenate(none + scored)

    def flat(rows: Sequence[np.ndarray], dtype: type) -> np.ndarray:
        parts = [row[at].astype(dtype) for row, at in zip(rows, scored, strict=True)]
        return np.concatenate([np.zeros(0, dtype), *parts])

    sample = np.repeat(np.arange(len(samples)), [at.size for at in scored])
    lengths = np.array([s.logp_engine.size for s in samples], np.int64)
    return Tokens(
        logp=flat(logp, np.float64),
        logp_engine=flat([s.logp_engine for s in samples], np.float64),
        entropy=flat(entropy, np.float64),
        lag=version - flat([s.version for s in samples], np.int64),
        first=position == 0,
        last=position == lengths[sample] - 1,
        sample=sample,
        position=position,
    )


def attribute(tokens: Tokens, *, noise: float) -> dict[str, float]:
    """Size of the gap, and what shares of its energy (sum of squares) have which cause. ``noise``:
    usual rms rounding of the dtype, nats. No tokens: no numbers.

    ``logprob_gap/mean``, ``p99`` and ``max`` are of ``|gap|`` over all tokens, ``fresh`` the mean
    over those of lag 0. The shares ``logprob_gap/share_*`` sum to 1 (all are 0 if there is no gap;
    left out if a number is not finite) and are taken in this order, each from what is left:

    1. ``version``: of lagged tokens, above the level of the fresh; all if there are no fresh ones.
    2. ``ends``: of fresh first and last tokens, each above the level of the inner ones.
       What is left of 1 and 2 is at the level of the inner fresh tokens and divided as theirs.
    3. ``temperature``: see ``_line``; ``temperature_ratio`` is ``T_trainer / T_engine``.
    4. ``truncation``: see ``_kept_mass``; ``kept_mass`` is top-p's or top-k's.
    5. ``precision``: up to ``noise^2`` a token, of which one token counts ``9 noise^2`` at most.
    6. ``unexplained``.

    An effect within three standard errors, or in 3 and 4 one of fewer than 50 tokens, is chance:
    share 0, estimate 1. Errors are estimated from the tokens' own deviations, so one wild token is
    about one error whatever its size.
    """
    gap, fresh = tokens.gap, tokens.lag == 0
    if not gap.size:
        return {}
    size = np.abs(gap)
    with np.errstate(invalid="ignore"):  # between two infinite gaps
        p99 = float(np.quantile(size, 0.99))
    row = {"mean": float(size.mean()), "p99": p99, "max": float(size.max())}
    if fresh.any():
        row["fresh"] = float(size[fresh].mean())
    if np.isfinite(gap).all() and np.isfinite(tokens.entropy).all():
        row |= _shares(tokens, gap**2, fresh, noise)
    return {f"logprob_gap/{key}": value for key, value in row.items()}


def _shares(
    tokens: Tokens, square: np.ndarray, fresh: np.ndarray, noise: float
) -> dict[str, float]:
    inner = fresh & ~tokens.first & ~tokens.last
    if not inner.any():
        inner = fresh  # answers of one or two tokens: the ends have nothing to be compared with
    ratio, slope_energy = _line(tokens, inner)
    ...
