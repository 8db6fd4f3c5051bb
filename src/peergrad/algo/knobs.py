"""Which knobs of the objective are in force, which are forced to a value, which have no effect."""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

from peergrad.algo.plan import Old, Plan, make_plan
from peergrad.config import (
    SEQUENCE_RATIO,
    AlgoConfig,
    Config,
    CorrectionKind,
    FlatGroups,
    KlConfig,
    KlEstimator,
    KlPlace,
    Level,
    OldPolicy,
    SurrogateKind,
    TokenLevel,
)

Status = Enum("Status", ["effective", "off", "forced", "inapplicable"])
ROLLOUT = ("batch_size", "group_size", "temperature", "top_p", "top_k", "max_new_tokens")
ONE = "one optimizer step per batch (algo.minibatches, algo.epochs): every ratio is exactly 1"


@dataclass(frozen=True)
class Knob:
    """One key of the configuration and what it does in this run.

    Example:
        ``Knob("algo.surrogate.tau_positive", "1.0", Status.inapplicable, "only kind=sapo has it")``
    """

    key: str
    value: str
    status: Status
    note: str = ""


def knobs(config: Config) -> list[Knob]:
    """Every knob of ``algo`` and what of ``rollout`` the objective depends on, in order."""
    plan = make_plan(config)
    idle, forced = inapplicable(config, plan), forced_values(config, plan)
    found = []
    usual = dict(_leaves("algo", AlgoConfig()))
    for key, value in _leaves("algo", config.algo):
        status, note = Status.effective, _default(key, config)
        idle_anyway = key in idle and not _is_off(key, usual[key])
        if not note and _is_off(key, value) and not idle_anyway:
            status = Status.off
        elif key in idle:
            status, note = Status.inapplicable, idle[key]
        elif key in forced and forced[key][0] != show(value):
            status, note = Status.forced, "to {}: {}".format(*forced[key])
        found.append(Knob(key, show(value), status, note))
    for name in (*ROLLOUT, "max_staleness"):
        value = getattr(config.rollout, name)
        status = Status.forced if name in ("top_p", "top_k") else Status.effective
        note = "to the full vocabulary: ratios would be biased" if status is Status.forced else ""
        found.append(Knob(f"rollout.{name}", show(value), status, note))
    return found


def _is_off(key: str, value: object) -> bool:
    says = key.rpartition(".")[2] in ("mean_low", "mean_high", "token_unbiased")  # by 0 and false
    return value is None or show(value) == "none" or (value in (False, 0) and not says)


def refuse(config: Config, chosen: Collection[str]) -> None:
    """Raise ValueError if one of the keys that the user has ``chosen`` has no effect, or not the
    one that was asked for."""
    for knob in knobs(config):
        if knob.key in chosen and knob.status is Status.inapplicable:
            raise ValueError(f"{knob.key} = {knob.value}: has no effect: {knob.note}; remove it")
        if knob.key in chosen and knob.status is Status.forced and knob.value != "auto":
            raise ValueError(f"{knob.key} = {knob.value}: is forced {knob.note}; remove it")


def inapplicable(config: Config, plan: Plan) -> dict[str, str]:
    """Key -> why it has no effect, whatever its value."""
    return {
        f"algo.{key}": why
        for part in (_sampling_and_reward, _surrogate, _correction, _kl_and_weights)
        for keys, idle, why in part(config, plan)
        if idle
        for key in keys.split()
    }


Rule = tuple[str, bool, str]  # keys, whether they have no effect, why


def _sampling_and_reward(config: Config, _: Plan) -> Iterator[Rule]:
    algo = config.algo
    adv, shaping = algo.advantage, algo.shaping
    no_std, no_token_std = adv.std is Level.none, adv.token_std is TokenLevel.none
    again = "only sampling.dynamic=true draws again"
    yield "sampling.limit", not algo.sampling.dynamic, again
    yield "sampling.limit", config.rollout.replay is not None, "recorded groups are as they are"
    yield "shaping.overlong_factor", shaping.overlong_tokens == 0, "shaping.overlong_tokens is 0"
    yield "shaping.bias", _shift_cancels(algo), "subtracting a mean cancels it"
    yield "shaping.scale", _scale_cancels(config), "dividing by a standard deviation cancels it"
    yield "advantage.eps", no_std, "advantage.std is none"
    own = no_token_std or adv.token_unbiased is not None
    yield "advantage.unbiased", no_std and own, "no standard deviation divides by it"
    yield (
        "advantage.token_eps advantage.token_unbiased",
        no_token_std,
        "advantage.token_std is none",
    )


def _shift_cancels(algo: AlgoConfig) -> bool:
    """Whether a constant added to all rewards is gone from the advantages."""
    adv, shaping = algo.advantage, algo.shaping
    own_std = adv.std is Level.group and adv.token_mean is not TokenLevel.group
    # Divided by deviations of one's group, the constant differs from group to group.
    late = adv.token_mean is not TokenLevel.none and not own_std and shaping.discount == 1
    return shaping.clip is None and (adv.mean is not Level.none or late)


def _scale_cancels(config: Config) -> bool:
    """Whether a factor of all rewards is gone from the advantages, but for a share of 1e-3 of a
    deviation that rewards around 1 may have: what an epsilon, unscaled, may still tell."""
    algo = config.algo
    adv, scale = algo.advantage, algo.shaping.scale
    first = adv.std is not Level.none
    late = adv.token_std is not TokenLevel.none and not _kl_in_reward(config)
    eps = adv.eps if first else adv.token_eps
    return algo.shaping.clip is None and (first or late) and eps * max(1, 1 / scale) <= 1e-3


def _surrogate(config: Config, plan: Plan) -> Iterator[Rule]:
    surrogate = config.algo.surrogate
    kind = surrogate.kind
    clips = kind not in (SurrogateKind.sapo, SurrogateKind.reinforce)
    one = _ratio_is_one(config, plan)
    yield "surrogate.clip_low surrogate.clip_high", not clips, f"kind={kind.name} clips nothing"
    yield "surrogate.clip_low surrogate.clip_high", one and clips, ONE
    yield "surrogate.max_mean_ratio surrogate.dual_clip surrogate.unified_mask", one, ONE
    yield "surrogate.log_ratio_low surrogate.log_ratio_high", one, ONE
    taus = "surrogate.tau_positive surrogate.tau_negative"
    yield taus, kind is not SurrogateKind.sapo, "only surrogate.kind=sapo has it"
    yield taus, kind is SurrogateKind.sapo and one, ONE
    whole = kind not in (SurrogateKind.clip, *SEQUENCE_RATIO)
    yield "surrogate.dual_clip", whole, "only the clipped ratio has it"
    yield "surrogate.unified_mask", kind is not SurrogateKind.cispo, "only kind=cispo has it"
    correction = config.algo.correction
    asked = correction.weighs_engine or correction.opsm is not None or _kl_in_reward(config)
    yield "old_policy", kind is SurrogateKind.reinforce and not asked, "nothing asks for it"


def _ratio_is_one(config: Config, plan: Plan) -> bool:
    """Whether the old policy is the very one that the only optimizer step starts from."""
    once = config.algo.epochs * config.algo.minibatches == 1
    return plan.old is Old.current or (plan.old is Old.recompute and once)


def _kl_in_reward(config: Config) -> bool:
    return config.algo.kl.coef > 0 and config.algo.kl.place is KlPlace.reward


def _draws_again(config: Config) -> bool:
    """Recorded groups are taken as they are."""
    return config.algo.sampling.dynamic and config.rollout.replay is None


def _correction(config: Config, plan: Plan) -> Iterator[Rule]:
    correction = config.algo.correction
    none = correction.kind is CorrectionKind.none
    yield "correction.level correction.low correction.high", none, "correction.kind is none"
    yield "correction.opsm", _ratio_is_one(config, plan), ONE


def _kl_and_weights(config: Config, _: Plan) -> Iterator[Rule]:
    algo = config.algo
    shape = "kl.place kl.estimator kl.clamp_log_ratio kl.clamp kl.reset_every kl.target"
    yield shape, algo.kl.coef == 0, "algo.kl.coef is 0"
    yield "kl.clamp", _clamp_is_idle(algo.kl), "algo.kl.clamp_log_ratio keeps the estimate within"
    yield "kl.horizon", algo.kl.target is None, "algo.kl.target is not set: the weight is constant"
    yield "kl.target", algo.kl.place is KlPlace.loss, "only the KL in the reward adapts"
    dropping = algo.sampling.selects and not _draws_again(config)
    anything = dropping or algo.shaping.overlong_filter or algo.correction.drops
    yield "denominator", not anything, "nothing is dropped"
    yield "shuffle", algo.minibatches == 1, "there is one mini-batch"


def _clamp_is_idle(kl: KlConfig) -> bool:
    """Whether no estimate from a log ratio that is held can leave the bounds of the estimate."""
    most = kl.clamp_log_ratio
    if most is None or kl.clamp is None:
        return False
    if kl.estimator is KlEstimator.k2:
        return kl.clamp >= most**2 / 2
    if kl.estimator in (KlEstimator.k3, KlEstimator.k3_unbiased):
        return most < 700 and kl.clamp >= math.exp(most) - most - 1
    return kl.clamp >= most


def forced_values(config: Config, plan: Plan) -> dict[str, tuple[str, str]]:
    """Key -> (the value in force, why) where another knob decides."""
    algo = config.algo
    found = {}
    if algo.sampling.dynamic:
        why = "dynamic sampling replaces groups of equal rewards"
        found["algo.sampling.flat_groups"] = (FlatGroups.drop.name, why)
    if algo.correction.kind in (CorrectionKind.icepop, CorrectionKind.seq_mask_tis):
        icepop = algo.correction.kind is CorrectionKind.icepop
        why = f"that is what kind={algo.correction.kind.name} means"
        found["algo.correction.level"] = ("token" if icepop else "geometric", why)
    if algo.surrogate.kind is SurrogateKind.icepop:
        found["algo.old_policy"] = ("engine", "its ratio is to the engine")
    elif plan.old is Old.engine and algo.old_policy is OldPolicy.auto:
        why = "rollouts may be older than the weights, and the clip must act on who sampled"
        found["algo.old_policy"] = ("engine", why)
    return found


def _default(key: str, config: Config) -> str:
    """What stands behind a value that says little."""
    correction = config.algo.correction
    if key == "algo.old_policy":
        return f"in force: {make_plan(config).old.name}"
    if correction.kind is not CorrectionKind.none and key.startswith("algo.correction."):
        bounds = dict(zip(("low", "high"), correction.bounds, strict=True))
        name = key.rpartition(".")[2]
        return f"in force: {bounds[name]}" if name in bounds else ""
    return ""


def _leaves(prefix: str, section: Any) -> Iterator[tuple[str, Any]]:
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield from _leaves(f"{prefix}.{field.name}", value)
        elif field.name not in ("source", "differences"):
            yield f"{prefix}.{field.name}", value


def show(value: Any) -> str:
    """As it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return value.name if isinstance(value, Enum) else str(value)
