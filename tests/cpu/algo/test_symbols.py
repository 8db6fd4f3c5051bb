"""Every symbol of an explanation is explained in it, whatever the objective."""
# ruff: noqa: RUF001 - the explanation is mathematics

import random
import re
from dataclasses import replace
from enum import Enum
from typing import Any

import pytest
from omegaconf import OmegaConf

from peergrad.algo.explain import explain
from peergrad.config import (
    Aggregation,
    AlgoConfig,
    Config,
    CorrectionKind,
    CorrectionLevel,
    Denominator,
    KlEstimator,
    KlPlace,
    Level,
    OldPolicy,
    RolloutConfig,
    SurrogateKind,
    TokenLevel,
)
from peergrad.running.keys import groups
from peergrad.running.preset import read_preset

SYMBOL = re.compile(
    r"π_old|π_engine|π_ref|KL_u|N_g|KL|[πρτλ]|\b[A-Zcdkrnwut]\b|\(x\)₊|const(?=[ (])"
)
COUNTED = re.compile(r"[:,] (N_g|[BNPn]) (?:tokens|answers|groups)\b")
GIVEN = re.compile(r"(?:; |, )\s*(KL_u|λ|τ|[tTu]|\(x\)₊|const) = ")
ARTICLES = ("PPO",)

VALUES: dict[str, list[Any]] = {
    "sampling.dynamic": [True],
    "sampling.mean_low": [0.1],
    "shaping.overlong_tokens": [24],
    "shaping.overlong_filter": [True],
    "shaping.bias": [-0.5],
    "shaping.scale": [10.0],
    "shaping.clip": [20.0],
    "shaping.discount": [0.9],
    "advantage.mean": list(Level),
    "advantage.std": list(Level),
    "advantage.leave_one_out": [True],
    "advantage.unbiased": [False],
    "advantage.token_mean": list(TokenLevel),
    "advantage.token_std": list(TokenLevel),
    "advantage.token_unbiased": [False, True],
    "advantage.clip": [2.0],
    "surrogate.kind": list(SurrogateKind),
    "surrogate.dual_clip": [3.0],
    "surrogate.log_ratio_low": [-20.0],
    "surrogate.unified_mask": [True],
    "surrogate.max_mean_ratio": [5.0],
    "correction.kind": list(CorrectionKind),
    "correction.level": list(CorrectionLevel),
    "correction.high": [4.0],
    "correction.dppo": [0.2],
    "correction.opsm": [1e-4],
    "correction.m2po": [0.04],
    "kl.coef": [0.0, 0.1],
    "kl.place": list(KlPlace),
    "kl.estimator": list(KlEstimator),
    "kl.clamp": [10.0],
    "kl.clamp_log_ratio": [20.0],
    "kl.target": [0.1],
    "kl.reset_every": [400],
    "entropy_coef": [0.01],
    "aggregation": list(Aggregation),
    "denominator": list(Denominator),
    "old_policy": list(OldPolicy),
    "epochs": [2],
    "minibatches": [4],
}


def drawn(seed: int) -> Config:
    """A valid configuration with many keys set at random."""
    rng, algo = random.Random(seed), AlgoConfig()
    for key in rng.sample(sorted(VALUES), len(VALUES)):
        if rng.random() < 0.4:
            section, _, name = key.rpartition(".")
            value = {name: rng.choice(VALUES[key])}
            try:
                inner = replace(getattr(algo, section), **value) if section else None
                algo = replace(algo, **({section: inner} if section else value))
            except ValueError:
                pass
    return Config(algo=algo, rollout=RolloutConfig(max_staleness=rng.choice([0, 2])))


def formula(config: Config) -> dict[str, str]:
    """Name -> text of the rows, those of one name behind each other."""
    rows: dict[str, str] = {}
    for line in explain(config).splitlines():
        if line.startswith(("effective (", "off (", "forced (")):
            break
        row = re.match(r"  (?!- )(\S+(?: A)?)  +(\S.*)", line)
        if row:
            rows[row[1]] = f"{rows.get(row[1], '')}; {row[2]}"
    return rows


def undefined(config: Config) -> set[str]:
    rows = formula(config)
    text = "\n".join(rows.values())
    for word in ARTICLES:
        text = text.replace(word, "")
    found = {name for row in (COUNTED, GIVEN) for name in row.findall(text)}
    found |= {"u"} if "Σ_(u=t…T)" in text else set()
    return set(SYMBOL.findall(text)) - found - set(rows)


@pytest.mark.parametrize("part", range(4))
def test_every_symbol_is_defined(part: int) -> None:
    seen: set[str] = set()
    for seed in range(100 * part, 100 * (part + 1)):
        config = drawn(seed)
        assert undefined(config) == set(), explain(config)
        seen |= set(SYMBOL.findall("\n".join(formula(config).values())))
    everything = {*"πρτλABNPTcdkrnwut", "S", "H", "KL", "KL_u", "N_g", "(x)₊", "const"}
    assert everything | {"π_old", "π_engine", "π_ref"} == seen | {"w"}


@pytest.mark.parametrize("preset", sorted(groups()["algo"]))
def test_every_symbol_of_the_presets_is_defined(preset: str) -> None:
    algo = OmegaConf.to_object(read_preset(preset))
    assert isinstance(algo, AlgoConfig)
    assert undefined(Config(algo=algo)) == set()


def test_values_are_of_every_kind() -> None:
    """A new member of a choice is drawn, too."""
    members = {type(v) for values in VALUES.values() for v in values if isinstance(v, Enum)}
    for kind in members:
        drawn_of = {v for values in VALUES.values() for v in values if isinstance(v, kind)}
        assert drawn_of == set(kind)


@pytest.mark.parametrize(
    ("old", "policy"),
    [
        (OldPolicy.auto, "π_old"),
        (OldPolicy.recompute, "π_old"),
        (OldPolicy.engine, "π_engine"),
        (OldPolicy.loglinear, "π_engine"),
    ],
)
def test_whose_kl_is_in_the_reward(old: OldPolicy, policy: str) -> None:
    """That of the policy whose logprobs the rewards are computed from, not of the present one."""
    algo = AlgoConfig(old_policy=old)
    config = Config(algo=replace(algo, kl=replace(algo.kl, place=KlPlace.reward)))
    assert formula(config)["d"] == f"; log {policy} − log π_ref"
    assert formula(Config())["d"] == "; log π − log π_ref"


def test_k_is_defined_for_m2po_alone() -> None:
    algo = AlgoConfig()
    rows = formula(Config(algo=replace(algo, correction=replace(algo.correction, m2po=0.04))))
    assert rows["k"] == "; π_old / π_engine of the token, constant" and "c" not in rows


def test_the_outcome_is_counted_once() -> None:
    algo = AlgoConfig()
    shaping = replace(algo.shaping, discount=0.5)
    text = formula(Config(algo=replace(algo, shaping=shaping)))["then A"]
    assert text == "; 0.5^(T−t) · A;  t = this token, T = the answer's last token"
