"""The algorithm, in order. Every rank runs this same code.

Step s trains on groups sampled under weight version s - 1 (at most ``rollout.max_staleness``
versions older) and makes version s. The order that must not change: weights reach the engine
before the next groups are asked for, and a checkpoint is taken after that, when trainer, engine
and collector stand at the same version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peergrad.algo.objective import Grpo
from peergrad.algo.packing import with_logprobs
from peergrad.algo.report import gap_statistics, rollout_statistics
from peergrad.config import Config
from peergrad.metrics import Metrics
from peergrad.stages import evaluate, grade, mean_metrics, split, stop_if_nonfinite, sync_weights

if TYPE_CHECKING:
    from peergrad.parallel.checkpoint import Checkpoints
    from peergrad.parallel.policy import Policy, Scorer
    from peergrad.rollout.rollouts import Rollouts


def train(
    config: Config,
    *,
    start: int,
    rollouts: Rollouts,
    policy: Policy,
    reference: Scorer | None,
    checkpoints: Checkpoints,
    metrics: Metrics,
) -> None:
    """Run steps ``start + 1`` to ``run.steps``. ``reference`` is there iff ``algo.kl_coef > 0``."""
    algo, last = config.algo, config.run.steps
    objective = Grpo(clip_low=algo.clip_low, clip_high=algo.clip_high, kl_coef=algo.kl_coef)
    sync_weights(config, rollouts, policy, version=start)
    if start == 0 and config.evaluation.every:
        evaluate(rollouts, metrics, step=0)
    for step in range(start + 1, last + 1):
        with metrics.step(step):
            with metrics.time("rollout"):
                groups = rollouts.take(step - 1)
            metrics.log(rollout_statistics(groups, version=step - 1))
            with metrics.time("pack"):
                minibatches = [
                    policy.pack(grade(part, algo, max_tokens=config.rollout.max_new_tokens))
                    for part in split(groups, algo.minibatches)
                ]
            if reference is not None:
                with metrics.time("reference"):
                    minibatches = [
                        with_logprobs(batches, "logp_ref", reference.logprobs(batches))
                        for batches in minibatches
                    ]
            if config.rollout.max_staleness:  # the clip must act on the policy that sampled
                minibatches = [
                    with_logprobs(batches, "logp_old", [batch.logp_engine for batch in batches])
                    for batches in minibatches
                ]
            elif len(minibatches) > 1:  # a single step is its own old policy: see Grpo
                with metrics.time("old_logprobs"):
                    minibatches = [
                        with_logprobs(batches, "logp_old", policy.logprobs(batches))
                        for batches in minibatches
                    ]
            with metrics.time("update"):
                updates = [policy.update(batches, objective) for batches in minibatches]
            metrics.log(mean_metrics(updates))
            metrics.log(gap_statistics(updates[0].gap))  # taken before the first step
            stop_if_nonfinite(config, rollouts, groups, updates, step)
            with metrics.time("sync"):
                metrics.log(sync_weights(config, rollouts, policy, version=step))
        if config.evaluation.every and (step % config.evaluation.every == 0 or step == last):
            evaluate(rollouts, metrics, step=step)
        if checkpoints.due(step, last):
            checkpoints.save(policy, rollouts.state(), step=step)
