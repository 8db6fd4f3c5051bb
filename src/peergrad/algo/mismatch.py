"""How far trainer and engine disagree on the sampled tokens of a step, and why.

The gap is ``logp_trainer - logp_engine`` in nats. On-policy, with equal weights, temperature and
precision, only rounding is left: about 1e-6 in float32. Legend: ``N`` scored tokens of a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64

from peergrad.algo.samples import Sample
from peergrad.data import Group

USUAL_NOISE = {"float32": 1e-5, "bfloat16": 0.03}
"""Usual rms of the gap that comes from rounding, by the dtype of the weights; nats."""

CAUSES = ("version", "ends", "temperature", "truncation", "precision", "unexplained")
"""In the order in which they take their shares."""

FEWEST = 50  # tokens to fit a line to, or to judge by
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
        gap: np.ndarray = self.logp - self.logp_engine
        return gap


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
    rms rounding, nats: usual of the dtype, measured of 8-bit products. No tokens: no numbers.

    ``logprob_gap/mean``, ``p99`` and ``max`` are of ``|gap|`` over all tokens, ``fresh`` the mean
    over those of lag 0. The shares ``logprob_gap/share_*`` sum to 1 (all are 0 if there is no gap;
    left out if a number is not finite) and are taken in this order, each from what is left:

    1. ``version``: of lagged tokens, above the level of the fresh; all if there are no fresh ones.
    2. ``ends``: of fresh first and last tokens, each above the level of the inner ones.
       What is left of 1 and 2 is at the level of the inner fresh tokens and divided as theirs.
    3. ``temperature``: see ``_slope``; ``temperature_ratio`` is ``T_trainer / T_engine``.
    4. ``truncation``: see ``_kept_mass``; ``kept_mass`` is top-p's or top-k's.
    5. ``precision``, of dtype and 8-bit products: up to ``noise^2`` a token, of which one token
       counts ``9 noise^2`` at most.
    6. ``unexplained``.

    An effect within three standard errors (in 1 and 2 of the mean; of fewer than 50 suspects, of
    the rank sum as well), or in 3 and 4 one of fewer than 50 tokens, is chance: estimate 1, and the
    energy is left to 5 and 6. Errors are estimated from the tokens' own deviations, so one wild
    token among many is about one error whatever its size.
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
        row |= _shares(tokens, fresh, noise)
    return {f"logprob_gap/{key}": value for key, value in row.items()}


def freshest(tokens: Tokens) -> tuple[int, float] | None:
    """The least lag that ``FEWEST`` tokens do not exceed (of fewer tokens: none), and the mean
    ``|gap|`` of the tokens up to it, nats; None if there are no tokens."""
    count = min(FEWEST, tokens.lag.size)
    if not count:
        return None
    lag = int(np.partition(tokens.lag, count - 1)[count - 1])
    return lag, float(np.abs(tokens.gap[tokens.lag <= lag]).mean())


def _shares(tokens: Tokens, fresh: np.ndarray, noise: float) -> dict[str, float]:
    gap, last = tokens.gap, tokens.last
    inner = fresh & ~tokens.first & ~last
    if not inner.any():
        inner = fresh  # answers of one or two tokens: the ends have nothing to be compared with
    ends = fresh & ~inner
    lagged = _above("version", gap[~fresh], gap[fresh], noise)
    outer = [_above("ends", gap[ends & at], gap[inner], noise) for at in (last, ~last)]
    causes, estimates = _causes(tokens, inner, noise)
    total, of_fresh, of_inner = (_energy(gap[at]) for at in (slice(None), fresh, inner))
    like_fresh = _ratio(total - sum(lagged.values()), of_fresh)
    like_inner = _ratio(of_fresh - sum(sum(x.values()) for x in outer), of_inner) * like_fresh
    parts = [(1.0, lagged), *((like_fresh, x) for x in outer), (like_inner, causes)]
    return estimates | {
        f"share_{cause}": _ratio(sum(scale * x.get(cause, 0.0) for scale, x in parts), total)
        for cause in CAUSES
    }


def _above(cause: str, suspects: np.ndarray, others: np.ndarray, noise: float) -> dict[str, float]:
    """Energy of the suspects' gaps above the level of the others, by cause. What may be chance is
    not the level's either: it may come from one wild token."""
    a, b = suspects**2, others**2
    if not a.size or not b.size:
        return {cause: float(a.sum())}
    above = float(a.size * max(a.mean() - b.mean(), 0.0))
    beyond_chance = above > a.size * _ERRORS * np.sqrt(a.var() / a.size + b.var() / b.size)
    # Of many suspects the mean would tell, unless all its excess is a wild token's.
    if beyond_chance or (a.size < FEWEST and _rank_higher(a, b)):
        return {cause: above}
    rounding = min(above, _rounding(suspects, noise))
    return {"precision": rounding, "unexplained": above - rounding}


def _rank_higher(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether the ``a`` are larger than the ``b`` as a whole: Mann and Whitney's rank sum, 1947.

    The errors of a mean are blind where gaps are as uneven as they are large: eight lagged tokens
    with gaps up to 1 among fresh ones at 1e-6. To ranks a wild token is one token; but when the
    others are higher, its energy goes with theirs.
    """
    ordered = np.sort(b)
    wins = (np.searchsorted(ordered, a, "left") + np.searchsorted(ordered, a, "right")).sum() / 2
    deviation = np.sqrt(a.size * b.size * (a.size + b.size + 1) / 12)
    return bool(wins - a.size * b.size / 2 > _ERRORS * deviation)


def _causes(
    tokens: Tokens, inner: np.ndarray, noise: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Energy of the inner tokens by cause, and the estimates."""
    gap, logp, entropy = tokens.gap[inner], tokens.logp[inner], tokens.entropy[inner]
    middle = logp - gap / 2 + entropy
    slope, kept, rest = 0.0, 1.0, gap
    if _comparable(logp, logp - gap, entropy):
        slope = _slope(gap, middle, entropy)
        rest = gap - slope * middle
        kept = _kept_mass(gap, rest)
    energies = [_energy(gap)]  # what is left after each cause
    energies.append(min(energies[0], _energy(rest)))
    # Kept mass varies with the context. As its log is never positive and other gaps fall on both
    # sides, all that the negative side has more than the positive is its, but for wild tokens.
    tame = rest[_tame(rest)]
    one_sided = -float((tame * np.abs(tame)).sum()) if kept < 1 else 0.0
    energies.append(energies[1] - min(max(one_sided, 0.0), energies[1]))
    energies.append(energies[2] - min(_rounding(rest, noise), energies[2]))
    taken = [before - after for before, after in pairwise([*energies, 0.0])]
    ratio = (2 - slope) / (2 + slope)
    return dict(zip(CAUSES[2:], taken, strict=True)), {
        "temperature_ratio": ratio,
        "kept_mass": kept,
    }


def _comparable(logp: np.ndarray, logp_engine: np.ndarray, entropy: np.ndarray) -> bool:
    """Whether trainer and engine rank the tokens alike: with other weights they do not, and then
    a line through ``logp`` is at work in both sides of the fit and explains nothing.

    ``r^2`` of one on the other, at equal entropy, must exceed 1/2. It is above .97 for
    temperatures a factor 2 apart and above .94 for top-5 of 50, .6 for logits with noise of
    standard deviation 1 and about 0 for other weights.
    """
    if logp.size < FEWEST:
        return False
    given = np.stack([np.ones_like(entropy), entropy], axis=1)
    a, b = (y - given @ (np.linalg.pinv(given) @ y) for y in (logp, logp_engine))
    return bool((a @ b) ** 2 > 0.5 * (a @ a) * (b @ b))


def _slope(gap: np.ndarray, middle: np.ndarray, entropy: np.ndarray) -> float:
    """Slope of ``gap`` over ``middle`` at equal entropy; 0 if that may be chance.

    With ``x = logp + entropy``, the token's scaled logit minus its expectation, and
    ``t = T_trainer / T_engine``, ``logp_engine = t x + (a number of the context)``, so the gap is
    ``(1 - t) x`` and a number. The predictor is the mean of ``x`` of both sides, ``x - gap / 2``:
    noise in the trainer's logp alone would tilt a line over ``x``, while equal noise on both sides
    does not tilt this one. Its slope is ``2 (1 - t) / (1 + t)``, ``t = (2 - slope) / (2 + slope)``,
    about ``-ln t``. Entropy stands for the number of the context.

    The worst residuals are left out and the line fitted again. Noise differs between tokens, so
    errors are White's (HC1, 1980).
    """
    columns = np.stack([middle, np.ones_like(gap), entropy - entropy.mean()], axis=1)
    tame = _tame(gap - columns @ (np.linalg.pinv(columns) @ gap))
    columns, gap = columns[tame], gap[tame]
    weights = np.linalg.pinv(columns)[0]
    slope = float(weights @ gap)
    residual = gap - columns @ (np.linalg.pinv(columns) @ gap)
    error = np.sqrt(((weights * residual) ** 2).sum() * gap.size / (gap.size - 3))
    return slope if abs(slope) > _ERRORS * error else 0.0


def _kept_mass(gap: np.ndarray, rest: np.ndarray) -> float:
    """The mass that the engine's truncated distribution keeps of the trainer's; 1 if less may be
    chance. ``rest``: the gap without the effect of the temperature.

    An engine that renormalises over the kept tokens reports ``logp - log(kept mass)``. Over its
    own samples ``mean(exp(gap)) = sum_kept p_trainer``: 1 without truncation whatever the noise
    and temperatures, although the mean gap is negative (minus a KL). Noise of few tokens can hide
    there, so the mean of ``rest`` must be negative as well.
    """
    change = np.expm1(gap)
    low = [x.mean() + _ERRORS * x.std() / np.sqrt(x.size) < 0 for x in (change, rest)]
    return float(1 + change.mean()) if all(low) else 1.0


def _tame(residual: np.ndarray) -> np.ndarray:
    """Indices of all but the largest ``|residual|``."""
    return np.argsort(np.abs(residual))[: -int(np.ceil(_TRIM * residual.size))]


def _rounding(gap: np.ndarray, noise: float) -> float:
    """The most of the energy that may be rounding."""
    return min(gap.size * noise**2, _energy(np.minimum(np.abs(gap), 3 * noise)))


def _energy(gap: np.ndarray) -> float:
    return float((gap**2).sum())


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def worst_tokens(
    tokens: Tokens, groups: Sequence[Group], samples: Sequence[Sample], *, count: int
) -> list[dict[str, Any]]:
    """The ``count`` tokens of largest ``|gap|``, NaN first, as records for JSON. ``samples`` as
    given to ``gap_tokens``, the rollouts of each group in order; numbers that are not finite stay.

    Example:
        ``{"group": "3/train-17", "rollout": 1, "position": 41, "of": 42, "token": 2, "lag": 0,
        "logp_trainer": -9.2, "logp_engine": -.1, "gap": -9.1, "entropy": .3, "first": False,
        "last": True}``: the end of the second rollout's answer of 42 tokens.
    """
    size = np.abs(tokens.gap)
    order = np.lexsort((-size, ~np.isnan(size)))[:count]
    before: dict[int, int] = {}
    rollout = []
    for s in samples:
        rollout.append(before.get(s.group, 0))
        before[s.group] = rollout[-1] + 1

    def record(i: int) -> dict[str, Any]:
        at, position = int(tokens.sample[i]), int(tokens.position[i])
        sample = samples[at]
        return {
            "group": groups[sample.group].id,
            "rollout": rollout[at],
            "position": position,
            "of": sample.logp_engine.size,
            "token": int(sample.tokens[sample.prompt_length + position]),
            "lag": int(tokens.lag[i]),
            "logp_trainer": float(tokens.logp[i]),
            "logp_engine": float(tokens.logp_engine[i]),
            "gap": float(tokens.gap[i]),
            "entropy": float(tokens.entropy[i]),
            "first": bool(tokens.first[i]),
            "last": bool(tokens.last[i]),
        }

    return [record(int(i)) for i in order]
