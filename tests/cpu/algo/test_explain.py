"""What is said of an objective is what it does: formula, statuses, refusals."""
# ruff: noqa: RUF001 - the explanation is mathematics

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch

from peergrad.algo.explain import explain
from peergrad.algo.grading import AlgoState, grade
from peergrad.algo.knobs import Status, forced_values, knobs, refuse, show
from peergrad.algo.objective import Objective
from peergrad.algo.packing import pack
from peergrad.algo.plan import make_plan
from peergrad.algo.samples import make_samples, with_logp
from peergrad.algo.sampling import selects
from peergrad.config import (
    Aggregation,
    AlgoConfig,
    Config,
    CorrectionKind,
    CorrectionLevel,
    Denominator,
    FlatGroups,
    KlEstimator,
    KlPlace,
    Level,
    OldPolicy,
    SurrogateKind,
    TokenLevel,
)
from peergrad.data import Group, Prompt, Rollout
from peergrad.learning import learn, old_policy, renew_reference
from peergrad.running.compose import chosen_keys, compose_config, config_dir

ROOT = Path(__file__).parents[3]
PRESETS = sorted(path.stem for path in (config_dir() / "algo").glob("*.yaml"))
KL = ["algo.kl.coef=0.1"]
REWARD = [*KL, "algo.kl.place=reward", "algo.kl.estimator=k1"]
ONE_STEP = ["areal", "deepseekmath", "dr_grpo", "rloo", "roll"]


def composed(*overrides: str) -> Config:
    return compose_config(["model.path=m", *overrides])[0]


def leaves(section: Any, prefix: str = "algo") -> list[str]:
    found = []
    for field in fields(section):
        value, key = getattr(section, field.name), f"{prefix}.{field.name}"
        found += leaves(value, key) if is_dataclass(value) else [key]
    return found


# --- what is printed -----------------------------------------------------------------------------


BLOCKWISE = ["parallel.fp8=blockwise", "parallel.spec=te"]


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ([], "weights and products in bfloat16, logits in float32"),
        (
            [*KL, *BLOCKWISE],
            "weights in bfloat16, products in 8 bits (e4m3, blockwise: a scale for a block of 128) "
            "in updates, reference; else in bfloat16, logits in float32",
        ),
        (
            [
                *(*KL, *BLOCKWISE, "parallel.fp8_params=true", "parallel.fp8_reference=false"),
                *("algo.minibatches=2", "parallel.fp8_first_layers_bf16=1"),
                "rollout.servers.fp8=block",
            ],
            "weights in 8 bits, products in 8 bits (e4m3, blockwise: a scale for a block of 128) "
            "in updates, old policy; not the first 1 and the last 0 layers; else in bfloat16, "
            "logits in float32; the engine in FP8 (block)",
        ),
        (
            ["algo.kl.coef=0", "parallel.fp8=delayed", "parallel.fp8_format=hybrid"],
            "weights in bfloat16, products in 8 bits (hybrid, delayed: a scale for a whole tensor) "
            "in updates; else in bfloat16, logits in float32",
        ),
    ],
)
def test_what_is_computed_in_which_precision(overrides: list[str], text: str) -> None:
    given = ["algo=deepseekmath", "model.dtype=bfloat16", *overrides]
    (said,) = (line for line in explain(composed(*given)).splitlines() if "  precision" in line)
    assert said.split(maxsplit=1) == ["precision", text]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_explains_itself(preset: str) -> None:
    config = composed(f"algo={preset}")
    lines = explain(config).splitlines()
    assert lines[0] == config.algo.source and len(config.algo.source) > 20
    differences = [line.removeprefix("  - ") for line in lines if line.startswith("  - ")]
    assert differences == config.algo.differences and all(len(text) > 20 for text in differences)
    assert ("deliberate differences" in lines) == bool(differences)
    changed = explain(composed(f"algo={preset}", "algo.entropy_coef=0.01"))  # may undo one
    assert ("\ndeliberate differences before what was changed\n" in changed) == bool(differences)
    # every key is in one table, under its status, and once
    keys = [k for k in leaves(config.algo) if k not in ("algo.source", "algo.differences")]
    listed = [line.split()[0] for line in lines if line.startswith("  algo.")]
    assert Counter(listed) == Counter(keys)
    counted = {
        name: int(line.removeprefix(f"{name} (").rstrip(")"))
        for name in Status.__members__
        for line in lines
        if line.startswith(f"{name} (")
    }
    assert counted == {k.name: n for k, n in Counter(k.status for k in knobs(config)).items()}


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["algo=deepseekmath"],
            [
                "w · ( S + 0.04 · KL )",
                "clip(ρ, 0.8, 1.2)",
                "exp(−d) + d − 1",
                "std_(group) + 1e-06",
            ],
        ),
        (["algo=dr_grpo"], ["r − mean_(group)", "1/(B · 1024)", "w · ( S )"]),
        (["algo=rloo"], ["mean_(others of the group)", "1/B: B answers sampled"]),
        (
            ["algo=dapo"],
            [
                *("clip(ρ, 0.8, 1.28)", "1/N: N tokens kept", "16 optimizer step(s)"),
                "rewards are not all equal; the others are replaced by other prompts'",
                *("cut off at 1024 tokens are dropped", "forward only: old policy"),
            ],
        ),
        (["algo=gspo"], ["mean over the answer's tokens", "clip(ρ, 0.9997, 1.0004)"]),
        (["algo=cispo"], ["−const(clip(ρ, 0, 5)) · A · log π"]),
        (
            ["algo=areal"],
            ["c · S", "k where it lies in [0, 5]", "clip(10 · (reward -0.5), ±20)", "0.6, 1.4"],
        ),
        (["algo=roll"], ["at most −1.4 A", "the estimate within ±10", "held within ±2"]),
        (["algo=r1"], ["π_ref becomes π every 400 steps", "0.001 · KL", "in random order"]),
        (["algo=rlinf"], ["a mini-batch of mean above 5 is dropped", "std_(batch) + 1e-05"]),
        (
            ["algo.surrogate.kind=sapo", "algo.entropy_coef=0.01", "algo.minibatches=2"],
            ["τ = 1 where A > 0, 1.05 where A < 0", "− 0.01 · H", "full vocabulary"],
        ),
        (
            [
                *("algo.kl.place=reward", "algo.kl.estimator=k1", "algo.kl.target=0.3"),
                *("algo.shaping.discount=0.9", "algo.shaping.overlong_tokens=24"),
            ],
            [
                *("in the reward, weight 0.04, adapted towards 0.3 a token over 10000 answers",),
                *("0.9^(T−t) · A − 0.04 · Σ_(u=t…T) 0.9^(u−t) · KL_u", "(length − 1000)₊/24"),
                "log π_old − log π_ref",
            ],
        ),
        (
            ["algo.correction.kind=tis", "algo.correction.level=geometric"],
            ["clip(geometric mean of k, 0, 2)"],
        ),
        (["algo.correction.kind=seq_mask_tis"], ["lies outside [0, 2] are dropped"]),
        (["algo.correction.dppo=0.15", "algo.correction.m2po=0.04"], ["> 0.15", "< 0.04"]),
        (["algo.correction.opsm=1e-4", "algo.epochs=2"], ["> 0.0001", "2 pass(es) over 1"]),
        (["rollout.max_staleness=3"], ["the engine's logprobs", "at most 3 version(s) old"]),
        (["algo.sampling.mean_low=0.1", "algo.sampling.mean_high=0.9"], ["> 0.1 and", "< 0.9;"]),
    ],
)
def test_the_formula_has_its_numbers(overrides: list[str], parts: list[str]) -> None:
    text = explain(composed(*overrides))
    assert [part for part in parts if part not in text] == []


def test_an_objective_of_your_own_says_so() -> None:
    assert explain(Config()).startswith("an objective of your own\n")


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["algo.surrogate.tau_positive=2"],
            "algo.surrogate.tau_positive = 2.0: has no effect: only surrogate.kind=sapo has it; "
            "remove it",
        ),
        (
            ["algo.surrogate.clip_high=0.28"],
            "algo.surrogate.clip_high = 0.28: has no effect: one optimizer step per batch "
            "(algo.minibatches, algo.epochs): every ratio is exactly 1; remove it",
        ),
        (
            ["algo=dapo", "algo.sampling.flat_groups=keep"],
            "algo.sampling.flat_groups = keep: is forced to drop: dynamic sampling replaces "
            "groups of equal rewards; remove it",
        ),
        (
            ["algo.correction.kind=icepop", "algo.correction.level=sequence"],
            "algo.correction.level = sequence: is forced to token: that is what kind=icepop "
            "means; remove it",
        ),
        (
            ["algo.correction.kind=seq_mask_tis", "algo.correction.level=token"],
            "algo.correction.level = token: is forced to geometric: that is what "
            "kind=seq_mask_tis means; remove it",
        ),
        (
            [
                *("algo.advantage.mean=none", "algo.advantage.std=none"),
                *("algo.advantage.token_mean=batch", "algo.shaping.bias=-0.5"),
            ],
            "algo.shaping.bias = -0.5: has no effect: subtracting a mean cancels it; remove it",
        ),
        (
            ["algo.shaping.bias=-0.5"],
            "algo.shaping.bias = -0.5: has no effect: subtracting a mean cancels it; remove it",
        ),
        (
            [
                *("algo.advantage.mean=none", "algo.advantage.std=batch"),
                *("algo.advantage.token_mean=group", "algo.shaping.bias=-0.5"),
            ],
            "algo.shaping.bias = -0.5: has no effect: subtracting a mean cancels it; remove it",
        ),
        (
            ["algo.shaping.scale=10"],
            "algo.shaping.scale = 10.0: has no effect: dividing by a standard deviation cancels "
            "it; remove it",
        ),
        (
            ["algo=dr_grpo", "algo.advantage.token_std=batch", "algo.shaping.scale=10"],
            "algo.shaping.scale = 10.0: has no effect: dividing by a standard deviation cancels "
            "it; remove it",
        ),
        (
            ["algo=dr_grpo", "algo.advantage.eps=0.1"],
            "algo.advantage.eps = 0.1: has no effect: advantage.std is none; remove it",
        ),
        (
            ["algo.advantage.token_unbiased=false"],
            "algo.advantage.token_unbiased = false: has no effect: advantage.token_std is none; "
            "remove it",
        ),
        (
            ["algo.denominator=kept"],
            "algo.denominator = kept: has no effect: nothing is dropped; remove it",
        ),
        (
            ["algo.sampling.limit=5"],
            "algo.sampling.limit = 5: has no effect: only sampling.dynamic=true draws again; "
            "remove it",
        ),
        (
            ["algo.correction.level=sequence"],
            "algo.correction.level = sequence: has no effect: correction.kind is none; remove it",
        ),
        (
            ["algo=dr_grpo", "algo.kl.estimator=k2"],
            "algo.kl.estimator = k2: has no effect: algo.kl.coef is 0; remove it",
        ),
        (
            ["algo.kl.estimator=k2", "algo.kl.clamp_log_ratio=4", "algo.kl.clamp=8"],
            "algo.kl.clamp = 8.0: has no effect: algo.kl.clamp_log_ratio keeps the estimate "
            "within; remove it",
        ),
        (
            ["algo.kl.horizon=7"],
            "algo.kl.horizon = 7: has no effect: algo.kl.target is not set: the weight is "
            "constant; remove it",
        ),
    ],
)
def test_chosen_keys_without_effect_are_refused(overrides: list[str], message: str) -> None:
    overrides = ["model.path=m", *overrides]
    with pytest.raises(ValueError) as caught:
        refuse(compose_config(overrides)[0], chosen_keys(overrides))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "overrides",
    [
        ["algo=dr_grpo", "algo.shaping.scale=10"],  # nothing divides
        ["algo.shaping.scale=10", "algo.shaping.clip=20"],
        ["algo.shaping.scale=10", "algo.advantage.eps=0.1"],  # eps is not scaled
        ["algo.shaping.scale=1e-6"],
        ["algo.kl.clamp_log_ratio=20", "algo.kl.clamp=10"],
        ["algo=dr_grpo", "algo.advantage.token_std=batch", "algo.shaping.scale=10", *REWARD],
        ["algo.advantage.mean=none", "algo.advantage.token_mean=batch", "algo.shaping.bias=-0.5"],
    ],
)
def test_what_something_is_left_of_is_accepted(overrides: list[str]) -> None:
    overrides = ["model.path=m", *overrides]
    refuse(compose_config(overrides)[0], chosen_keys(overrides))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("more", [[], ["rollout.max_staleness=2"], ["algo.minibatches=4"]])
def test_presets_as_they_are_are_accepted(preset: str, more: list[str]) -> None:
    overrides = ["model.path=m", f"algo={preset}", *more]
    refuse(compose_config(overrides)[0], chosen_keys(overrides))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_set_no_knob_in_vain(preset: str) -> None:
    """Except the clips, which are there for whoever takes several optimizer steps, and what ROLL
    divides by once something is dropped."""
    config, default = composed(f"algo={preset}"), AlgoConfig()
    text = (config_dir() / f"algo/{preset}.yaml").read_text()
    vain = (Status.inapplicable, Status.forced)
    idle = {k.key for k in knobs(config) if k.status in vain and k.key.startswith("algo.")}
    named = {key for key in idle if f"{key.rpartition('.')[2]}:" in text}
    changed = {key for key in idle if value_of(config.algo, key) != value_of(default, key)}
    clips = {f"algo.surrogate.{name}" for name in ("clip_low", "clip_high", "dual_clip")}
    allowed = clips & named if preset in ONE_STEP else set()
    allowed |= {"algo.denominator"} if preset == "roll" else set()
    shared = {  # the same name in another section
        *("algo.shaping.clip", "algo.advantage.clip", "algo.correction.level"),
        *("algo.advantage.eps", "algo.kl.place", "algo.kl.estimator"),
    }
    assert named - shared <= allowed and changed <= allowed
    assert (allowed != set()) == (preset in ONE_STEP)


# --- what is in force ----------------------------------------------------------------------------

MAX_TOKENS, VERSION = 10, 7
CHANGES: dict[str, list[Any]] = {
    "sampling.dynamic": [True, False],
    "sampling.flat_groups": list(FlatGroups),
    "sampling.mean_low": [0.3],
    "sampling.mean_high": [0.6],
    "shaping.overlong_tokens": [6],
    "shaping.overlong_factor": [3.0],
    "shaping.overlong_filter": [True, False],
    "shaping.bias": [3.0],
    "shaping.scale": [100.0],
    "shaping.clip": [0.3],
    "shaping.discount": [0.8],
    "advantage.mean": list(Level),
    "advantage.std": list(Level),
    "advantage.leave_one_out": [True, False],
    "advantage.unbiased": [False],
    "advantage.eps": [0.5],
    "advantage.token_mean": list(TokenLevel),
    "advantage.token_std": list(TokenLevel),
    "advantage.token_unbiased": [False, True],
    "advantage.token_eps": [0.5],
    "advantage.clip": [0.2],
    "surrogate.kind": list(SurrogateKind),
    "surrogate.clip_low": [0.01, 0.5],
    "surrogate.clip_high": [0.01, 0.5],
    "surrogate.dual_clip": [1.05],
    "surrogate.log_ratio_low": [-0.05],
    "surrogate.log_ratio_high": [0.05],
    "surrogate.unified_mask": [True],
    "surrogate.tau_positive": [3.0],
    "surrogate.tau_negative": [3.0],
    "surrogate.max_mean_ratio": [1.0001],
    "correction.kind": list(CorrectionKind),
    "correction.level": list(CorrectionLevel),
    "correction.low": [0.9],
    "correction.high": [1.1],
    "correction.dppo": [0.01],
    "correction.opsm": [1e-4, 0.2],
    "correction.m2po": [0.01],
    "kl.coef": [0.5, 0.0],
    "kl.place": list(KlPlace),
    "kl.estimator": list(KlEstimator),
    "kl.clamp_log_ratio": [0.05],
    "kl.clamp": [0.01],
    "kl.target": [0.01, 50.0],
    "kl.horizon": [3],
    "kl.reset_every": [1],
    "entropy_coef": [0.1],
    "aggregation": list(Aggregation),
    "denominator": list(Denominator),
    "old_policy": [OldPolicy.engine, OldPolicy.recompute],
    "epochs": [2],
    "minibatches": [4, 2],
    "shuffle": [True, False],
}

SEVERAL, STALE = "algo.minibatches=2", "rollout.max_staleness=2"
SITUATIONS: dict[str, list[str]] = {
    **{name: [f"algo={name}"] for name in ONE_STEP},
    **{f"{name}, several steps": [f"algo={name}", SEVERAL] for name in ONE_STEP},
    # 16 mini-batches would be one group each
    **{
        name: [f"algo={name}", *(["algo.minibatches=4"] if name in ("r1", "dapo", "cispo") else [])]
        for name in PRESETS
        if name not in ONE_STEP
    },
    "stale": ["algo=deepseekmath", STALE],
    "stale areal": ["algo=areal", STALE, SEVERAL],
    "loglinear": ["algo=areal", STALE, "algo.old_policy=loglinear"],
    "engine": ["algo=dr_grpo", SEVERAL, "algo.old_policy=engine"],
    "sapo": ["algo=dr_grpo", "algo.surrogate.kind=sapo", SEVERAL, "algo.correction.kind=tis"],
    "sapo, one step": ["algo=dr_grpo", "algo.surrogate.kind=sapo", "algo.correction.kind=tis"],
    "gspo_token": [
        *("algo=gspo", "algo.surrogate.kind=gspo_token", *KL, "algo.kl.place=reward"),
        *("algo.kl.estimator=k2", "algo.kl.target=0.02"),
        *("algo.correction.kind=seq_mask_tis", "algo.correction.low=0.9"),
        *("algo.denominator=kept", "algo.shaping.discount=0.9"),
    ],
    "icepop": ["algo=deepseekmath", "algo.surrogate.kind=icepop", SEVERAL],
    "reinforce": ["algo=dr_grpo", "algo.surrogate.kind=reinforce", SEVERAL],
    "reinforce, one step": ["algo=dr_grpo", "algo.surrogate.kind=reinforce"],
    "a KL in the reward, one step": ["algo=dr_grpo", *REWARD],
    "reinforce with a KL": ["algo=dr_grpo", "algo.surrogate.kind=reinforce", *REWARD],
    "reinforce with opsm": [
        *("algo=dr_grpo", "algo.surrogate.kind=reinforce", SEVERAL, "algo.correction.opsm=0.01")
    ],
    "mis": ["algo=dr_grpo", "algo.correction.kind=mis", "algo.correction.dppo=0.05", SEVERAL],
    "drops": [
        *("algo=dr_grpo", SEVERAL, "algo.sampling.flat_groups=drop", "algo.denominator=kept"),
        *("algo.shaping.overlong_tokens=6", "algo.entropy_coef=0.01"),
    ],
    "no mean": ["algo=dr_grpo", SEVERAL, "algo.advantage.mean=none"],
    "running": ["algo=dr_grpo", "algo.advantage.mean=running", "algo.advantage.std=running"],
}


def wild(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Noise of which one in eight is far out, beyond a ratio of 5 or below 1/5."""
    far = rng.choice([-2.0, 2.0], shape) * (rng.random(shape) < 1 / 8)
    return rng.normal(0, 0.2, shape) + far


@cache
def recorded() -> tuple[tuple[Group, ...], dict[bytes, np.ndarray], dict[bytes, np.ndarray]]:
    """Groups of 4 answers drawn with several versions, some flat, some cut off; by the tokens of
    an answer, its logprobs under the policy and under the reference."""
    rng = np.random.default_rng(8)
    groups, policy, reference = [], {}, {}
    for g in range(16):
        prompt, rollouts = np.array([g], np.int32), []
        for _ in range(4):
            n = int(rng.integers(1, MAX_TOKENS + 1))
            tokens = rng.integers(3, 30_000, n).astype(np.int32)
            own = -rng.uniform(0.2, 2, n)
            key = np.concatenate([prompt, tokens]).tobytes()
            policy[key] = own.astype(np.float32)
            reference[key] = (own + rng.normal(0, 0.3, n)).astype(np.float32)
            cut = int(rng.integers(0, n + 1))
            spans = ((VERSION - 1, 0, cut), (VERSION, cut, n))
            engine = (own + wild(rng, (n,))).astype(np.float32)
            finish = "length" if rng.random() < 0.2 else "stop"
            reward = float(g % 8 == 1) if g % 4 == 1 else float(rng.choice([-0.5, 0.25, 1]))
            rollouts.append(Rollout(tokens, engine, spans, finish, "", reward))
        groups.append(Group(str(g), Prompt(str(g), prompt, "", ""), tuple(rollouts)))
    return tuple(groups), policy, reference


@cache
def moved(tokens: bytes) -> np.ndarray:
    """The policy's logprobs of an answer before and after each of 8 updates, [9, T]."""
    base = recorded()[1][tokens]
    moves = wild(np.random.default_rng(np.frombuffer(tokens, np.int32)), (9, base.size))
    moves[0] = 0
    return (base + moves).astype(np.float32)


class Policy:
    """Gives recorded logprobs, moved by every update; keeps each update's gradient, whether it was
    refused, and which tokens it learned from. Not the loss: it moves nothing."""

    def __init__(self) -> None:
        self.numbers: list[float] = []
        self.updates = 0

    def logp(self, sample: Any) -> np.ndarray:
        return moved(sample.tokens.tobytes())[self.updates]

    def score(self, samples: Any, **_: Any) -> Any:
        return SimpleNamespace(logp=[self.logp(s) for s in samples])

    def update(self, samples: Any, objective: Objective) -> None:
        logp = np.concatenate([self.logp(s)[s.scored] for s in samples])
        leaf = torch.from_numpy(logp).requires_grad_()
        entropy = (-leaf.detach() / 2).requires_grad_()
        loss, metrics = objective(leaf, entropy, pack(samples))
        loss.backward()
        assert leaf.grad is not None
        means = {k: v.item() / max(1, int(n)) for k, (v, n) in metrics.items()}
        refused = objective.refusal(means) is not None
        slopes = np.zeros(256)  # in an order that does not depend on the packing
        ids = np.concatenate([s.tokens[s.prompt_length :][s.scored] for s in samples])
        np.add.at(slopes, ids % 256, leaf.grad.numpy())
        entropy_slope = 0.0 if entropy.grad is None else float(entropy.grad.sum())
        self.numbers += [entropy_slope, float(refused), float(ids.sum()), *slopes]
        self.updates += 1


def outcome(config: Config) -> np.ndarray:
    """All that a step computes, as numbers."""
    algo = config.algo
    groups = list(recorded()[0])
    if algo.sampling.dynamic:  # the collector replaces what it turns away
        groups = [g for g in groups if selects(g.rewards, algo.sampling)]
    groups = groups[:8]
    plan, policy, state = make_plan(config), Policy(), AlgoState(algo.kl.coef)
    samples = make_samples(groups)
    if plan.reference:
        samples = with_logp(
            samples, "logp_ref", [recorded()[2][s.tokens.tobytes()] for s in samples]
        )
    trainer: Any = policy
    samples, _ = old_policy(samples, plan, trainer, version=VERSION)
    samples, state, _ = grade(groups, samples, algo, state, max_tokens=MAX_TOKENS)
    learn(config, plan, Objective(algo), trainer, samples, step=1)
    became: list[Any] = []
    reference: Any = SimpleNamespace(become=became.append) if plan.reference else None
    state = renew_reference(config, reference, trainer, state, step=1)
    # coefficient and reference are of no account without a KL
    memory = [state.kl_coef, float(len(became))] if plan.reference else [0.0, 0.0]
    return np.array([*memory, float(policy.updates), *policy.numbers])


def value_of(algo: AlgoConfig, key: str) -> Any:
    value: Any = algo
    for name in key.removeprefix("algo.").split("."):
        value = getattr(value, name)
    return value


def changed(algo: AlgoConfig, key: str, value: Any) -> AlgoConfig | None:
    """None where the configuration refuses it."""
    section, _, name = key.rpartition(".")
    try:
        if not section:
            return replace(algo, **{name: value})
        return replace(algo, **{section: replace(getattr(algo, section), **{name: value})})
    except ValueError:
        return None


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-5, atol=1e-7)


def complaints(config: Config, key: str, values: list[Any], before: np.ndarray) -> list[str]:
    """What is wrong with what is said of the knob."""
    wrong, idle, works = [], False, False
    for value in values:
        algo = changed(config.algo, key, value)
        if algo is None or value == value_of(config.algo, key):
            continue
        now = replace(config, algo=algo)
        plan, name = make_plan(now), f"algo.{key}"
        if forced_values(now, plan).get(name, ("", ""))[0] == show(value):
            continue  # it says what is the case: neither an effect nor a refusal is due
        if key == "old_policy" and plan == make_plan(config):
            continue
        try:
            refuse(now, {name})
        except ValueError as error:
            if not same(outcome(now), before):
                wrong.append(f"{error}: but it has")
        else:
            works = works or not same(outcome(now), before)
            idle = not works
    return [
        *wrong,
        *([f"algo.{key}: choosing it is accepted, but changes nothing"] if idle else []),
    ]


EXCUSED = {
    # a factor for all, which dividing by the standard deviation over tokens takes out
    "advantage.leave_one_out": ("areal", "rlinf", "loglinear", "roll"),
    "advantage.unbiased": ("rlinf",),
    # with one optimizer step, and the advantage of a whole answer, they have one gradient
    "surrogate.kind": ("roll", "areal"),
    # a bad answer that has lost that much is beyond so small a clip already
    "correction.opsm": ("gspo",),
}


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Every other test checks shapes; here that is half of the time."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_knob_that_may_be_chosen_does_something_and_no_other_does(situation: str) -> None:
    """For every knob of the objective and values that would bite if they could: where choosing it
    is refused, every number of the step stays; otherwise some value must change one."""
    config = composed(*SITUATIONS[situation], f"rollout.max_new_tokens={MAX_TOKENS}")
    before = outcome(config)
    assert np.isfinite(before).all()
    wrong: list[str] = []
    for key, values in CHANGES.items():
        if not any(name in situation for name in EXCUSED.get(key, ())):
            wrong += complaints(config, key, values, before)
    assert "\n".join(wrong) == ""


def test_every_knob_is_put_to_the_proof() -> None:
    """But for the number of prompts drawn, which is the collector's."""
    rest = {"algo.source", "algo.differences", "algo.sampling.limit"}
    assert {f"algo.{key}" for key in CHANGES} == set(leaves(AlgoConfig())) - rest
    assert all(isinstance(v, Enum | int | float) for values in CHANGES.values() for v in values)


# --- the command line ----------------------------------------------------------------------------


def run_tool(*overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/explain.py", *overrides],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )


def test_the_tool_prints_the_explanation() -> None:
    done = run_tool("algo=roll")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == explain(composed("algo=roll"))


def test_the_tool_refuses_an_idle_knob_in_one_line() -> None:
    done = run_tool("algo=dr_grpo", "algo.surrogate.clip_low=0.1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: algo.surrogate.clip_low = 0.1: has no effect: ")
    assert done.stderr.count("\n") == 1
