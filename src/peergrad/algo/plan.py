"""Which forward passes an objective needs, and which policy its ratios are taken to."""

from dataclasses import dataclass
from enum import Enum

from peergrad.config import Config, Denominator, KlPlace, OldPolicy, SurrogateKind

Old = Enum("Old", ["current", "recompute", "engine", "loglinear"])


@dataclass(frozen=True)
class Plan:
    """What a step computes besides the update itself.

    Example:
        ``Plan(old=Old.current, score_each=False, reference=True)``: one optimizer step per batch
        with a KL in the loss.
    """

    old: Old
    """``current``: the one optimizer step's own forward, detached, so that every ratio is exactly
    1; ``recompute``: a pass before the first step; ``engine``: the rollouts' own logprobs;
    ``loglinear``: between those and the present ones, by version."""
    score_each: bool  # a pass before every optimizer step: it decides what its denominators count
    reference: bool  # a pass of the reference model


def make_plan(config: Config) -> Plan:
    """The cheapest plan that gives the objective exactly what it needs."""
    algo = config.algo
    correction, old = algo.correction, algo.old_policy
    kept = algo.denominator is Denominator.kept
    stale = config.rollout.max_staleness > 0
    kl_in_reward = algo.kl.coef > 0 and algo.kl.place is KlPlace.reward
    unaided = old is OldPolicy.auto and stale and not correction.weighs_engine
    if old is OldPolicy.engine or unaided or algo.surrogate.kind is SurrogateKind.icepop:
        chosen = Old.engine
    elif old is OldPolicy.loglinear:
        chosen = Old.loglinear
    else:
        before = correction.m2po is not None or (kept and correction.drops) or kl_in_reward
        several = algo.epochs * algo.minibatches > 1
        chosen = Old.recompute if several or before else Old.current
    moves = correction.dppo is not None or correction.opsm is not None
    return Plan(chosen, score_each=kept and moves, reference=algo.kl.coef > 0)
