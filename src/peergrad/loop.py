"""The algorithm, in order. Every rank runs this same code.

Step s trains on groups sampled under weight version s - 1 (at most ``rollout.max_staleness``
versions older) and makes version s. The order that must not change: weights reach the engine
before the next groups are asked for, and a checkpoint is taken after that, when trainer, engine
and collector stand at the same version. A run that is asked to stop does so there, too, or while
it waits for groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from peergrad.algo.grading import AlgoState, grade
from peergrad.algo.objective import Objective
from peergrad.algo.plan import make_plan
from peergrad.algo.report import rollout_statistics
from peergrad.algo.samples import make_samples, with_logp
from peergrad.config import Config
from peergrad.learning import learn, old_policy, renew_reference
from peergrad.observing.metrics import Metrics
from peergrad.rounding import Rounding
from peergrad.stages import (
    Keep,
    check_gap,
    evaluate,
    mean_metrics,
    stop_if_nonfinite,
    sync_weights,
    warn_of_lost_step,
)

if TYPE_CHECKING:
    from peergrad.parallel.checkpoint import Checkpoints
    from peergrad.parallel.policy import Policy, Scorer
    from peergrad.rollout.rollouts import Rollouts


def train(
    config: Config,
    *,
    start: int,
    state: AlgoState,
    rollouts: Rollouts,
    policy: Policy,
    reference: Scorer | None,
    checkpoints: Checkpoints,
    metrics: Metrics,
    stop: Callable[[], str | None],
) -> None:
    """Run steps ``start + 1`` to ``run.steps``. ``reference`` is there iff ``algo.kl.coef > 0``;
    the engine holds the policy's weights as version ``start``. ``stop``: why to end early, if at
    all; collective. Raises Stopped if so, once everything is saved."""
    algo, last = config.algo, config.run.steps
    plan, objective, rounding = make_plan(config), Objective(algo), Rounding(config)
    keep = Keep(checkpoints, policy, reference, rollouts, metrics, start=start, last=last)
    if start == 0 and config.evaluates:
        evaluate(rollouts, metrics, step=0)
    for step in range(start + 1, last + 1):
        if (why := stop()) is not None:
            keep.and_stop(state, step - 1, why)
        with metrics.step(step):
            with metrics.time("rollout"):
                taken = rollouts.take(step - 1)
            if taken is None:
                keep.and_stop(state, step - 1, stop())
            groups = taken.groups
            numbers = rollout_statistics(groups, dropped=taken.dropped, version=step - 1)
            metrics.log(numbers := {**numbers, **taken.grading})
            warn_of_lost_step(config, numbers, step=step)
            samples = make_samples(groups)
            if reference is not None:
                with metrics.time("reference"):
                    samples = with_logp(samples, "logp_ref", reference.score(samples).logp)
            with metrics.time("old_logprobs"):
                samples, scores = old_policy(samples, plan, policy, version=step - 1)
                metrics.log(rounding.measure(policy, samples, step=step))
            with metrics.time("grade"):
                samples, state, numbers = grade(
                    groups, samples, algo, state, max_tokens=config.rollout.max_new_tokens
                )
            metrics.log(numbers)
            with metrics.time("update"):
                updates = learn(config, plan, objective, policy, samples, step=step)
            metrics.log(mean_metrics(updates))
            stop_if_nonfinite(config, rollouts, groups, updates, step)
            # Measured before the first optimizer step, on all tokens if there was a pass.
            scores = scores or updates[0].scores
            check_gap(config, groups, scores, metrics, rounding, step=step)
            state = renew_reference(config, reference, policy, state, step=step)
            with metrics.time("sync"):
                metrics.log(sync_weights(config, rollouts, policy, version=step))
        if config.evaluates and (step % config.evaluation.every == 0 or step == last):
            evaluate(rollouts, metrics, step=step)
        keep.if_due(state, step)
