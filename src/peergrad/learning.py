"""The optimizer steps of a training step: old policy, mini-batches, denominators, reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from peergrad.algo.grading import AlgoState
from peergrad.algo.objective import Objective
from peergrad.algo.packing import pack
from peergrad.algo.plan import Old, Plan
from peergrad.algo.samples import Sample, mini_batches, weigh, with_logp, with_proximal
from peergrad.config import Config, Denominator

if TYPE_CHECKING:
    from peergrad.parallel.policy import Policy, Scorer, Scores, Update


def old_policy(
    samples: Sequence[Sample], plan: Plan, policy: Policy, *, version: int
) -> tuple[list[Sample], Scores | None]:
    """The samples with the logprobs that ratios are taken to, and what the policy said of them if
    that took a pass. Collective. ``version``: of the policy's weights."""
    if plan.old is Old.recompute:
        scores = policy.score(samples, with_entropy=True)  # the gap to the engine is judged by it
        return with_logp(samples, "logp_old", scores.logp), scores
    if plan.old is Old.engine:
        return with_logp(samples, "logp_old", [s.logp_engine for s in samples]), None
    if plan.old is Old.loglinear:
        return with_proximal(samples, version=version), None
    return list(samples), None  # the one optimizer step's own forward: see Objective


def learn(
    config: Config,
    plan: Plan,
    objective: Objective,
    policy: Policy,
    samples: Sequence[Sample],
    *,
    step: int,
) -> list[Update]:
    """All optimizer steps of training step ``step``, in order. Collective."""
    algo, updates = config.algo, []
    kept = algo.denominator is Denominator.kept and algo.correction.drops
    for epoch in range(algo.epochs):
        order = np.unique([sample.group for sample in samples])
        if algo.shuffle:
            np.random.default_rng((config.run.seed, step, epoch)).shuffle(order)
        for part in mini_batches(samples, algo.minibatches, order.tolist()):
            if kept:
                before = [sample.logp_before for sample in part]
                now = policy.score(part).logp if plan.score_each else before
                part = drop(part, objective, now)
            weighed = weigh(part, algo, max_tokens=config.rollout.max_new_tokens)
            updates.append(policy.update(weighed, objective))
    return updates


def drop(
    samples: Sequence[Sample], objective: Objective, logp: Sequence[np.ndarray]
) -> list[Sample]:
    """Weight 0 for the tokens that the objective's correction drops, so that they do not count in
    denominators; ``logp`` are the present policy's."""
    now = np.concatenate([x[s.scored] for x, s in zip(logp, samples, strict=True)])
    keep = objective.kept(torch.from_numpy(now).float(), pack(samples)).numpy()
    ends = np.cumsum([s.scored.size for s in samples])[:-1]
    found = []
    for sample, kept in zip(samples, np.split(keep, ends), strict=True):
        weight = sample.weight.copy()
        weight[sample.scored] *= kept
        found.append(sample.having(weight=weight))
    return found


def renew_reference(
    config: Config, reference: Scorer | None, policy: Policy, state: AlgoState, *, step: int
) -> AlgoState:
    """Make the policy the reference when that is due (R1)."""
    every = config.algo.kl.reset_every
    if reference is None or not every or step % every:
        return state
    reference.become(policy)
    return replace(state, reference_step=step)
