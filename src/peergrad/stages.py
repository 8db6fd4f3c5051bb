"""What surrounds the learning in a step: sync, evaluation, and the checks of what it did."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from peergrad.algo.grading import AlgoState
from peergrad.algo.mismatch import (
    FEWEST,
    USUAL_NOISE,
    attribute,
    freshest,
    gap_tokens,
    worst_tokens,
)
from peergrad.config import Config, Dtype, OnGap, OnNonfinite
from peergrad.data import Group
from peergrad.observing.metrics import Metrics
from peergrad.observing.parts import Parts
from peergrad.rounding import Rounding
from peergrad.running.stopping import Stopped

if TYPE_CHECKING:
    from peergrad.parallel.checkpoint import Checkpoints
    from peergrad.parallel.policy import Policy, Scorer, Scores, Update
    from peergrad.rollout.rollouts import Rollouts

log = logging.getLogger(__name__)

USUAL_CANARY_GAP = {Dtype.float32: 1e-3, Dtype.bfloat16: 0.5}
"""|logprob difference| in nats on random text above which something is wrong, not just rounded."""
USUAL_GAP = {Dtype.float32: 1e-3, Dtype.bfloat16: 0.1}
"""The same for the mean over a step's tokens that were sampled with the present weights."""
USUAL_LAGGED_GAP = 0.1
"""The same where too few tokens are of the present weights: what updates change is in it."""
WORST = 32
"""Tokens recorded of a step whose gap is too large."""


class Keep:
    """Checkpoints of a run, by schedule or because it is to stop."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        policy: Policy,
        reference: Scorer | None,
        rollouts: Rollouts,
        metrics: Metrics,
        *,
        start: int,
        last: int,
    ) -> None:
        """``start``: the step that the run goes on from; ``last``: its last one."""
        self._checkpoints, self._policy, self._reference = checkpoints, policy, reference
        self._rollouts, self._metrics = rollouts, metrics
        self._aside = checkpoints.config.async_save
        self._saved, self._last = start, last
        self._row: dict[str, float] | None = None  # of a checkpoint that is being written

    def if_due(self, state: AlgoState, step: int) -> None:
        """The checkpoint after ``step``, if there is to be one; it is written beside the steps that
        follow, but for the last. Collective."""
        if self._row is not None and self._checkpoints.written():
            self._finish()
        if self._checkpoints.due(step, self._last):
            self._begin(state, step)
        if step == self._last or not self._aside:
            self._finish()

    def and_stop(self, state: AlgoState, step: int, why: str | None) -> NoReturn:
        """Raise Stopped, with a checkpoint after ``step``, the last one trained. Collective."""
        if self._saved < step:
            self._begin(state, step)
        self._finish()
        raise Stopped(why or "a signal")

    def _begin(self, state: AlgoState, step: int) -> None:
        self._finish()
        renewed = self._reference if state.reference_step else None
        self._row = {}
        with self._metrics.part_of("checkpoint", step, self._row):
            self._checkpoints.begin(
                self._policy,
                self._rollouts.state(),
                state.to_json(),
                renewed,
                step=step,
                aside=self._aside,
            )
        self._saved = step

    def _finish(self) -> None:
        row, self._row = self._row, None
        if row is None:
            return
        with self._metrics.part_of("checkpoint", self._saved, row):
            saved = self._checkpoints.finish()
        row |= {"checkpoint/seconds": saved.seconds, "checkpoint/bytes": float(saved.size)}
        self._metrics.write("checkpoint", self._saved, row)


def sync_weights(
    config: Config, rollouts: Rollouts, policy: Policy, *, version: int
) -> dict[str, float]:
    """Give the engine the policy's weights and check that it has them. Collective.

    Raises RuntimeError if the canary text's logprobs differ by more than
    ``rollout.max_canary_gap``; without that limit a large difference is a warning.
    """
    proof = rollouts.load_weights(policy.weights, version)
    if proof is None:
        return {}
    numbers = {
        "version/engine": float(version),
        "sync/verified": float(proof.verified),
        "sync/unverified": float(proof.unverified),
        "sync/servers": float(proof.servers),
    }
    parts = Parts(proof.seconds)
    if proof.canary is not None:
        with parts.time("trainer_canary"):
            gap = numbers["sync/canary_gap"] = policy.canary_gap(proof.canary)
        message = f"trainer and engine differ by {gap:.2e} nats on the canary text (step {version})"
        limit = config.rollout.max_canary_gap
        if limit is not None and not gap <= limit:
            raise RuntimeError(
                f"rollout.max_canary_gap = {limit}: {message}; check precision, quantisation and "
                "kernels of the engine, or raise the limit"
            )
        if not gap <= USUAL_CANARY_GAP[config.model.dtype]:
            log.warning("%s", message)
    return numbers | parts.row("sync")


def evaluate(rollouts: Rollouts, metrics: Metrics, *, step: int) -> None:
    """Answer the held-out prompts and log the result apart, unless the run is to stop while they
    are being answered. Collective."""
    with suppress(Stopped), metrics.event("eval", step) as row:
        result = rollouts.evaluate(step)
        if result is None:
            log.warning("the evaluation after step %d was given up: the run is to stop", step)
            raise Stopped
        row |= {
            "pass@1": result.pass_rate,
            "reward": result.mean_reward,
            "length": result.mean_length,
            "truncated": result.truncated,
            **result.grading,
        }


def warn_of_lost_step(config: Config, numbers: Mapping[str, float], *, step: int) -> None:
    """Say so if a step's rollouts, described by ``numbers``, can teach nothing, and where to
    look."""
    rollout, file = config.rollout, f"rollouts/step_{step:06d}.parquet"
    where = f"look at {file}" if rollout.dump else "record them"
    if rollout.replay is not None:
        where = f"look at {rollout.replay}/{file}"
    if numbers["reward/flat_groups"] == 1:
        log.warning(
            "step %d: the answers of each group have equal rewards (mean %.3g), so there is "
            "nothing to learn; %s: is the reward right, are the prompts too hard or too easy?",
            step, numbers["reward/mean"], where,
        )  # fmt: skip
    if numbers["response/truncated"] == 1:
        log.warning(
            "step %d: every answer was cut off at rollout.max_new_tokens = %d; raise it, or %s: "
            "does the model end its answers with its end token?",
            step, config.rollout.max_new_tokens, where,
        )  # fmt: skip


def mean_metrics(updates: Sequence[Update]) -> dict[str, float]:
    """Means over a step's optimizer steps, and the share of them that was not made."""
    means = {
        key: float(np.mean([update.metrics[key] for update in updates]))
        for key in updates[0].metrics
    }
    refused = [update.refusal for update in updates if update.refusal is not None]
    if refused:
        log.warning("%d of %d updates not made: %s", len(refused), len(updates), refused[0])
    return {**means, "optim/refused": len(refused) / len(updates)}


def check_gap(
    config: Config,
    groups: Sequence[Group],
    scores: Scores,
    metrics: Metrics,
    rounding: Rounding,
    *,
    step: int,
) -> None:
    """Log how far trainer and engine disagree on the sampled tokens, and why.

    Judged are the tokens that were sampled with the present weights; if they are too few to prove
    anything, the freshest that there are. Above ``rollout.max_logprob_gap`` (or the usual gap and
    that of ``rounding``) the worst tokens are recorded; then a warning, or a RuntimeError if so
    configured.
    """
    tokens = gap_tokens(scores.samples, scores.logp, scores.entropy, version=step - 1)
    noise = math.hypot(USUAL_NOISE[config.model.dtype.name], rounding.rms)
    row = attribute(tokens, noise=noise)
    judged = freshest(tokens)
    if judged is None:
        return  # no token takes part, so nothing is learned from any
    lag, gap = judged
    metrics.log({**row, "logprob_gap/judged": gap, "logprob_gap/judged_lag": float(lag)})
    limit = config.rollout.max_logprob_gap
    usual = USUAL_GAP[config.model.dtype] if lag == 0 else USUAL_LAGGED_GAP
    if gap <= (usual + rounding.mean if limit is None else limit):
        return
    worst = worst_tokens(tokens, groups, scores.samples, count=WORST)
    where = metrics.record(f"logprob_gap/step_{step:06d}.jsonl", worst)
    shares = {k.rpartition("share_")[2]: v for k, v in row.items() if "share_" in k}
    cause = max(shares, key=lambda k: shares[k]) if shares else "not finite"
    fresh = ""
    if lag:
        few = f"fewer than {FEWEST} tokens are of the present weights, version {step - 1}"
        fresh = f" ({few}: these lag up to {lag})"
    message = (
        f"step {step}: trainer and engine differ by {gap:.2e} nats a token{fresh}, mostly by "
        f"{cause}; the worst tokens are in {where}"
    )
    if limit is not None and config.rollout.on_logprob_gap is OnGap.stop:
        raise RuntimeError(
            f"rollout.max_logprob_gap = {limit}: {message}; raise the limit, or set "
            "rollout.on_logprob_gap=warn"
        )
    log.warning("%s", message)


def stop_if_nonfinite(
    config: Config,
    rollouts: Rollouts,
    groups: Sequence[Group],
    updates: Sequence[Update],
    step: int,
) -> None:
    """Dump the groups of a step whose loss or gradient was not finite; warn or raise as configured.

    The weights are those before the offending update in any case. If these are at fault, no other
    batch would do better, and the run stops whatever is configured.
    """
    bad = [update for update in updates if not update.finite]
    if not bad:
        return
    where = rollouts.dump(groups, step - 1)
    numbers = bad[0].metrics
    message = (
        f"step {step}: loss {numbers['loss/total']} with gradient norm "
        f"{numbers['optim/grad_norm']} is not finite; the update was not applied; the rollouts are "
        f"in {where}"
    )
    if not _scores_anything(bad[0]):
        raise RuntimeError(
            f"{message}; no token has a finite logprob, so the weights themselves are broken: "
            "lower optim.lr, and start from the model or from an earlier checkpoint"
        )
    if config.optim.on_nonfinite is OnNonfinite.stop:
        raise RuntimeError(f"{message}; set optim.on_nonfinite=skip to go on without it")
    log.warning("%s", message)


def _scores_anything(update: Update) -> bool:
    """Whether the policy gives any answer token a finite logprob."""
    return any(np.isfinite(logp).any() for logp in update.scores.logp)
