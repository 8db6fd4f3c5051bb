"""A preset's keys give way to the user's; what the user sets in vain is refused."""

import random
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from peergrad.algo.knobs import refuse
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
    SurrogateKind,
    TokenLevel,
)
from peergrad.running.compose import chosen_keys, compose_config
from peergrad.running.keys import groups
from peergrad.running.preset import adapt_preset, read_preset

PRESETS = sorted(groups()["algo"])
OFF: dict[str, list[Any]] = {  # components turned off, or exchanged for another of their kind
    "kl.coef": [0.0],
    "correction.kind": [CorrectionKind.none, CorrectionKind.tis, CorrectionKind.seq_mask_tis],
    "surrogate.kind": list(SurrogateKind),
    "advantage.mean": list(Level),
    "advantage.std": list(Level),
    "advantage.token_mean": list(TokenLevel),
    "advantage.token_std": list(TokenLevel),
    "aggregation": list(Aggregation),
    "sampling.dynamic": [False],
    "shaping.overlong_filter": [False],
    "shaping.clip": [None],
    "advantage.clip": [None],
    "advantage.leave_one_out": [False],
    "surrogate.dual_clip": [None],
    "surrogate.max_mean_ratio": [None],
    "minibatches": [1],
    "shuffle": [False],
}
MORE: dict[str, list[Any]] = {  # may be in vain; but then it is the user's key that is refused
    "correction.kind": list(CorrectionKind),
    "denominator": list(Denominator),
    "old_policy": list(OldPolicy),
    "kl.place": list(KlPlace),
    "kl.estimator": list(KlEstimator),
    "correction.level": list(CorrectionLevel),
    "correction.dppo": [0.2],
    "correction.opsm": [1e-4],
    "correction.m2po": [0.04],
    "correction.high": [3.0],
    "surrogate.unified_mask": [True],
    "shaping.bias": [1.0],
    "shaping.scale": [2.0],
    "shaping.discount": [0.9],
    "advantage.unbiased": [True, False],
    "advantage.eps": [1e-4],
}


def adapted(preset: DictConfig, values: dict[str, Any]) -> Config:
    """The preset with ``values`` chosen by the user, or ValueError."""
    composed = OmegaConf.create({"algo": preset})  # a copy
    chosen = {f"algo.{key}" for key in values}
    for key, value in values.items():
        OmegaConf.update(composed, f"algo.{key}", value)
    adapt_preset(composed, preset, chosen)
    algo = OmegaConf.to_object(composed.algo)
    assert isinstance(algo, AlgoConfig)
    config = Config(algo=algo)
    refuse(config, chosen)
    return config


@pytest.mark.parametrize("name", PRESETS)
def test_any_component_of_a_preset_can_be_turned_off_or_exchanged(name: str) -> None:
    preset = read_preset(name)
    for key, values in OFF.items():
        for value in values:
            algo: Any = adapted(preset, {key: value}).algo
            for part in key.split("."):
                algo = getattr(algo, part)
            assert algo == value


@pytest.mark.parametrize("name", PRESETS)
def test_whatever_is_refused_is_a_key_of_the_user(name: str) -> None:
    """One key, and a sample of two at once."""
    preset, rng = read_preset(name), random.Random(name)
    single = [{key: value} for key, values in {**OFF, **MORE}.items() for value in values]
    pairs = [{**rng.choice(single), **rng.choice(single)} for _ in range(20)]
    for chosen in [*single[-len(MORE) :], *pairs]:
        try:
            adapted(preset, chosen)
        except ValueError as error:
            assert str(error).partition(" = ")[0].removeprefix("algo.") in chosen, (chosen, error)


@pytest.mark.parametrize(
    ("overrides", "title"),
    [
        (["algo=roll", "algo.kl.coef=0"], "ROLL's example_grpo.yaml, changed: kl.coef=0"),
        (["algo=roll", "algo.kl={coef: 0}"], "ROLL's example_grpo.yaml, changed: kl.coef=0"),
        (["algo=roll"], "ROLL's example_grpo.yaml"),
        (["algo=roll", "algo.kl.coef=0.001"], "ROLL's example_grpo.yaml"),  # as it is
        (
            ["algo=areal", "algo.surrogate.kind=gspo"],  # the mask of tokens has no place beside it
            "AReaL's gsm8k_grpo.yaml, decoupled PPO, arXiv:2505.24298, changed: "
            "surrogate.kind=gspo, correction.kind=none",
        ),
        (["algo=roll", "algo.source=mine", "algo.kl.coef=0"], "mine"),
        (["algo=roll", "algo.source=''"], "an objective of your own"),
    ],
)
def test_the_title_says_what_was_changed(overrides: list[str], title: str) -> None:
    config, text = compose_config(["model.path=m", *overrides])
    assert config.algo.title == title
    assert OmegaConf.create(text).algo.source == config.algo.source


def test_what_gave_way_is_not_in_the_configuration_that_is_kept() -> None:
    """Read back, it is accepted as it is."""
    for overrides in (["algo=roll", "algo.kl.coef=0"], ["algo=areal", "algo.old_policy=engine"]):
        config, text = compose_config(["model.path=m", *overrides])
        again = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), text_of(text)))
        assert again == config


def text_of(text: str) -> DictConfig:
    found = OmegaConf.create(text)
    assert isinstance(found, DictConfig)
    return found


@pytest.mark.parametrize(
    "overrides",
    [
        ["algo=roll", "algo.kl.coef=0", "algo.kl.clamp=10"],  # said, though the preset says it, too
        ["algo=areal", "algo.correction.kind=none", "algo.correction.high=5"],
        ["algo=roll", "algo.kl={coef: 0, clamp: 10}"],
        ["algo=gspo", "algo.correction.dppo=0.2"],
        ["algo=r1", "algo.minibatches=1", "algo.shuffle=true"],
    ],
)
def test_what_the_user_sets_in_vain_is_refused(overrides: list[str]) -> None:
    overrides = ["model.path=m", *overrides]
    with pytest.raises(ValueError, match=r"^algo\.[\w.]+ = "):
        refuse(compose_config(overrides)[0], chosen_keys(overrides))


def test_a_preset_that_is_wrong_by_itself_is_refused() -> None:
    """Whoever writes one is its user."""
    preset = read_preset("roll")
    preset.kl.coef = 0.0
    with pytest.raises(ValueError, match=r"algo\.kl\.clamp = 10\.0: has no effect without"):
        adapted(preset, {"minibatches": 2})
