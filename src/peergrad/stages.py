"""The stages of the loop that take more than one call."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from peergrad.algo.packing import Sample, make_samples
from peergrad.config import AlgoConfig, Config, Dtype, OnNonfinite
from peergrad.data import Group
from peergrad.metrics import Metrics

if TYPE_CHECKING:
    from peergrad.parallel.policy import Policy, Update
    from peergrad.rollout.rollouts import Rollouts

log = logging.getLogger(__name__)

USUAL_CANARY_GAP = {Dtype.float32: 1e-3, Dtype.bfloat16: 0.5}
"""|logprob difference| in nats on random text above which something is wrong, not just rounded."""


def split(groups: Sequence[Group], parts: int) -> list[list[Group]]:
    """Divide a step's groups into ``parts`` mini-batches of equal size, in order."""
    size, rest = divmod(len(groups), parts)
    assert rest == 0, "checked with the configuration"
    return [list(groups[i * size : (i + 1) * size]) for i in range(parts)]


def grade(groups: Sequence[Group], algo: AlgoConfig, *, max_tokens: int) -> list[Sample]:
    """Samples of one optimizer step, with the configured advantages and token weights."""
    return make_samples(
        groups,
        scale_by_std=algo.scale_by_std,
        std_eps=algo.std_eps,
        aggregation=algo.aggregation,
        max_tokens=max_tokens,
    )


def sync_weights(
    config: Config, rollouts: Rollouts, policy: Policy, *, version: int
) -> dict[str, float]:
    """Give the engine the policy's weights and check that it has them. Collective.

    Raises RuntimeError if the canary text's logprobs differ by more than
    ``rollout.max_canary_gap``; without that limit a large difference is a warning.
    """
    proof = rollouts.load_weights(policy.weights(), version)
    if proof is None:
        return {}
    numbers = {
        "version/engine": float(version),
        "sync/verified": float(proof.verified),
        "sync/unverified": float(proof.unverified),
    }
    if proof.canary is not None:
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
    return numbers


def evaluate(rollouts: Rollouts, metrics: Metrics, *, step: int) -> None:
    """Answer the held-out prompts, if there are any, and log the result apart. Collective."""
    result = rollouts.evaluate(step)
    if result is not None:
        row = {
            "pass@1": result.pass_rate,
            "reward": result.mean_reward,
            "length": result.mean_length,
            "truncated": result.truncated,
        }
        metrics.log_evaluation(step, row)


def mean_metrics(updates: Sequence[Update]) -> dict[str, float]:
    """Means over a step's optimizer steps."""
    return {
        key: float(np.mean([update.metrics[key] for update in updates]))
        for key in updates[0].metrics
    }


def stop_if_nonfinite(
    config: Config,
    rollouts: Rollouts,
    groups: Sequence[Group],
    updates: Sequence[Update],
    step: int,
) -> None:
    """Dump the groups of a step whose loss or gradient was not finite; warn or raise as configured.

    The weights are those before the offending update in any case.
    """
    bad = [update.metrics for update in updates if not update.applied]
    if not bad:
        return
    where = rollouts.dump(groups, step - 1)
    message = (
        f"step {step}: loss {bad[0]['loss/total']} with gradient norm {bad[0]['optim/grad_norm']} "
        f"is not finite; the update was not applied; the rollouts are in {where}"
    )
    if config.optim.on_nonfinite is OnNonfinite.stop:
        raise RuntimeError(f"{message}; set optim.on_nonfinite=skip to go on without it")
    log.warning("%s", message)
