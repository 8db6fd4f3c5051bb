"""Grading by hand: from rewards to the advantage of every token, and what is left out."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from peergrad.algo.grading import AlgoState, grade
from peergrad.algo.samples import Sample, make_samples, with_logp
from peergrad.algo.shaping import Moments
from peergrad.config import (
    AdvantageConfig,
    AlgoConfig,
    CorrectionConfig,
    FlatGroups,
    KlConfig,
    KlEstimator,
    KlPlace,
    Level,
    SamplingConfig,
    ShapingConfig,
    TokenLevel,
)
from peergrad.data import Group, Prompt, Rollout

START = AlgoState(kl_coef=0.0)
ROOT3 = math.sqrt(3)


def new_groups(
    *rewards: list[float], lengths: list[int] | None = None, cut: tuple[int, ...] = ()
) -> list[Group]:
    """A group for each list of rewards; answers of one token unless ``lengths`` says otherwise.
    ``cut``: which answers, counted over all groups, ended at the limit."""
    count = sum(map(len, rewards))
    sizes, groups, at = lengths or [1] * count, [], 0
    for g, values in enumerate(rewards):
        rollouts = []
        for reward in values:
            n, finish = sizes[at], "length" if at in cut else "stop"
            tokens, logprobs = np.full(n, 7, np.int32), np.zeros(n, np.float32)
            rollouts.append(Rollout(tokens, logprobs, ((0, 0, n),), finish, "", reward))
            at += 1
        prompt = Prompt(str(g), np.array([3], np.int32), "", "")
        groups.append(Group(str(g), prompt, tuple(rollouts)))
    return groups


def graded(
    groups: list[Group], state: AlgoState = START, max_tokens: int = 10, **sections: Any
) -> tuple[list[Sample], AlgoState, dict[str, float]]:
    algo = AlgoConfig(**{"kl": KlConfig(coef=0.0), **sections})
    return grade(groups, make_samples(groups), algo, state, max_tokens=max_tokens)


def advantages(samples: list[Sample]) -> list[float]:
    """Of all tokens in a row."""
    return np.concatenate([s.advantage for s in samples]).tolist()


def kept(samples: list[Sample]) -> list[list[float]]:
    return [s.weight.tolist() for s in samples]


def plain(**changes: Any) -> AdvantageConfig:
    """Rewards as they are, unless something is changed."""
    return AdvantageConfig(**{"mean": Level.none, "std": Level.none, "eps": 0.0, **changes})


def approx(values: list[float]) -> Any:
    return pytest.approx(values, rel=1e-6, abs=1e-7)


# --- rewards -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shaping", "expected"),
    [
        ({}, [1.0, 0.0, 0.5]),
        ({"bias": -0.5}, [0.5, -0.5, 0.0]),
        ({"bias": -0.5, "scale": 4.0}, [2.0, -2.0, 0.0]),  # the bias first
        ({"bias": -0.5, "scale": 4.0, "clip": 1.5}, [1.5, -1.5, 0.0]),  # the clip last
        # lengths 10, 8, 6 of 10 with 4 to punish: 1, 1/2 and 0 of the factor
        ({"overlong_tokens": 4}, [0.0, -0.5, 0.5]),
        ({"overlong_tokens": 4, "overlong_factor": 0.5}, [0.5, -0.25, 0.5]),
        # before bias, scale and clip: (1 - 1 + 1) 2, (0 - .5 + 1) 2, (.5 + 1) 2 -> 2.5
        ({"overlong_tokens": 4, "bias": 1.0, "scale": 2.0, "clip": 2.5}, [2.0, 1.0, 2.5]),
    ],
)
def test_shaping_in_order(shaping: dict[str, float], expected: list[float]) -> None:
    groups = new_groups([1, 0, 0.5], lengths=[10, 8, 6])
    samples, state, metrics = graded(groups, shaping=ShapingConfig(**shaping), advantage=plain())
    assert [s.advantage.tolist() for s in samples] == [
        [value] * n for value, n in zip(expected, (10, 8, 6), strict=True)
    ]
    assert metrics["reward/shaped"] == pytest.approx(sum(expected) / 3)
    assert state.rewards.mean == pytest.approx(sum(expected) / 3)  # shaped ones are remembered


# --- one number per answer -----------------------------------------------------------------------

# Rewards (1, 0, 0, 1) and (3, 1). Means 1/2, 2, of the batch 1. Squared deviations: 1 and 2 in
# the groups; 0, 1, 1, 0, 4, 0 = 6 in the batch.
S_A, S_B, S = math.sqrt(1 / 3), math.sqrt(2), math.sqrt(6 / 5)  # over n - 1


@pytest.mark.parametrize(
    ("mean", "std", "expected"),
    [
        ("none", "none", [1, 0, 0, 1, 3, 1]),
        ("none", "group", [1 / S_A, 0, 0, 1 / S_A, 3 / S_B, 1 / S_B]),
        ("none", "batch", [1 / S, 0, 0, 1 / S, 3 / S, 1 / S]),
        ("group", "none", [0.5, -0.5, -0.5, 0.5, 1, -1]),
        ("group", "group", [ROOT3 / 2, -ROOT3 / 2, -ROOT3 / 2, ROOT3 / 2, 1 / S_B, -1 / S_B]),
        ("group", "batch", [0.5 / S, -0.5 / S, -0.5 / S, 0.5 / S, 1 / S, -1 / S]),
        ("batch", "none", [0, -1, -1, 0, 2, 0]),
        ("batch", "group", [0, -1 / S_A, -1 / S_A, 0, 2 / S_B, 0]),
        ("batch", "batch", [0, -1 / S, -1 / S, 0, 2 / S, 0]),
        # in the first step "so far" is the batch
        ("running", "none", [0, -1, -1, 0, 2, 0]),
        ("running", "running", [0, -1 / S, -1 / S, 0, 2 / S, 0]),
        ("group", "running", [0.5 / S, -0.5 / S, -0.5 / S, 0.5 / S, 1 / S, -1 / S]),
    ],
)
def test_levels_of_mean_and_standard_deviation(mean: str, std: str, expected: list[float]) -> None:
    advantage = plain(mean=Level[mean], std=Level[std])
    samples, _, metrics = graded(new_groups([1, 0, 0, 1], [3, 1]), advantage=advantage)
    assert advantages(samples) == approx(expected)
    assert kept(samples) == [[1]] * 6 and metrics["sampling/kept"] == 1.0
    assert all(s.advantage.dtype == s.weight.dtype == np.float32 for s in samples)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # biased: 1/2; and 1/2 + 1/2
        ({"unbiased": False}, [1.0, -1.0, -1.0, 1.0]),
        ({"unbiased": False, "eps": 0.5}, [0.5, -0.5, -0.5, 0.5]),
        ({"eps": 1 - S_A}, [0.5, -0.5, -0.5, 0.5]),
        # 1 - mean(0, 0, 1), 0 - mean(1, 0, 1); the standard deviation stays that of all
        ({"leave_one_out": True, "std": Level.none}, [2 / 3, -2 / 3, -2 / 3, 2 / 3]),
        ({"leave_one_out": True, "unbiased": False}, [4 / 3, -4 / 3, -4 / 3, 4 / 3]),
        ({"clip": 0.25}, [0.25, -0.25, -0.25, 0.25]),
    ],
)
def test_options_of_one_group(options: dict[str, Any], expected: list[float]) -> None:
    advantage = plain(**{"mean": Level.group, "std": Level.group, **options})
    samples, _, _ = graded(new_groups([1, 0, 0, 1]), advantage=advantage)
    assert advantages(samples) == approx(expected)


def test_leave_one_out_of_the_batch() -> None:
    # 6 in all: 1 - 5/5, 0 - 6/5, 0 - 6/5, 1 - 5/5, 3 - 3/5, 1 - 5/5
    advantage = plain(mean=Level.batch, leave_one_out=True)
    samples, _, _ = graded(new_groups([1, 0, 0, 1], [3, 1]), advantage=advantage)
    assert advantages(samples) == approx([0, -1.2, -1.2, 0, 2.4, 0])


@pytest.mark.parametrize("unbiased", [True, False])
def test_running_moments_are_carried_over_the_steps(unbiased: bool) -> None:
    advantage = plain(mean=Level.running, std=Level.running, unbiased=unbiased)
    steps = [[1.0, 0.0, 0.5, 4.0], [2.0, -1.0], [0.25, 0.75]]
    state, so_far = START, np.zeros(0)
    for rewards in steps:
        samples, state, _ = graded(new_groups(rewards), state, advantage=advantage)
        so_far = np.concatenate([so_far, rewards])  # this step's included
        expected = (np.array(rewards) - so_far.mean()) / so_far.std(ddof=int(unbiased))
        assert advantages(samples) == approx(expected.tolist())
    assert state.rewards.count == 8


@pytest.mark.parametrize("std", [Level.group, Level.batch, Level.running])
@pytest.mark.parametrize("mean", [Level.group, Level.batch, Level.running])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
def test_equal_rewards_are_exactly_zero(reward: float, mean: Level, std: Level) -> None:
    """The batch is one group. Three times .1 is not .3, and noise over ``eps`` is no advantage."""
    groups = new_groups([reward] * 3, lengths=[2, 1, 3])
    samples, _, _ = graded(groups, advantage=AdvantageConfig(mean=mean, std=std, eps=0.0))
    assert advantages(samples) == [0.0] * 6


def test_a_flat_group_among_others_is_exactly_zero() -> None:
    samples, _, _ = graded(new_groups([0.1] * 3, [1, 0, 0]), advantage=AdvantageConfig(eps=0.0))
    # 2/3 over sqrt(2/3 / 2)
    assert advantages(samples) == approx([0, 0, 0, 2 / ROOT3, -1 / ROOT3, -1 / ROOT3])
    assert advantages(samples)[:3] == [0.0] * 3


@pytest.mark.parametrize("std", [Level.group, Level.batch, Level.running])
@pytest.mark.parametrize("mean", [Level.group, Level.batch, Level.running])
@pytest.mark.parametrize("token_std", [TokenLevel.none, TokenLevel.batch])
def test_rounding_is_not_learned_from(mean: Level, std: Level, token_std: TokenLevel) -> None:
    """A spread of 5.6e-17, divided by itself, would be an advantage of 1."""
    groups = new_groups([0.1 + 0.2, 0.3, 0.3], lengths=[2, 1, 3])
    config = AdvantageConfig(
        mean=mean, std=std, eps=0.0, token_mean=token_std, token_std=token_std, token_eps=0.0
    )
    samples, _, _ = graded(groups, advantage=config)
    assert advantages(samples) == [0.0] * 6


@pytest.mark.parametrize("reward", [1e155, -1e10, math.nan, math.inf])
def test_what_no_reward_may_be_is_named(reward: float) -> None:
    with pytest.raises(ValueError, match=r"^reward = .*: of an answer of group 1 must be at most"):
        graded(new_groups([0.0, 1.0], [0.0, reward]))


@pytest.mark.parametrize("std", [Level.group, Level.batch, Level.running])
def test_the_largest_rewards_do_not_overflow(std: Level) -> None:
    samples, state, _ = graded(
        new_groups([1e9, -1e9], [-1e9, 1e9]),
        advantage=AdvantageConfig(std=std, unbiased=False, eps=0.0),
    )
    assert advantages(samples) == [1, -1, -1, 1]
    assert np.isfinite(np.float32(state.rewards.squares))


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_groups_need_not_be_of_one_size(leave_one_out: bool) -> None:
    """Failed answers may have been left out of some: each group is graded as if it were alone."""
    options = AdvantageConfig(leave_one_out=leave_one_out)
    rewards = [[1.0, 0.0, 0.0], [1.0, 0.0], [0.2, 0.4, 0.9, 1.0]]
    together, _, _ = graded(new_groups(*rewards), advantage=options)
    alone = [graded(new_groups(one), advantage=options)[0] for one in rewards]
    assert advantages(together) == [a for samples in alone for a in advantages(samples)]


# --- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Tokens 1 1 1 -1 of (1, -1) and 3 -1 -1 of the other; mean 1/2 and 1/3, of all 3/7.
        ({"token_mean": "group"}, [0.5, 0.5, 0.5, -1.5, 8 / 3, -4 / 3, -4 / 3]),
        ({"token_mean": "batch"}, [4 / 7] * 3 + [-10 / 7, 18 / 7, -10 / 7, -10 / 7]),
        # squared deviations 3 and 32/3; of all 4 + 11 - 7 (3/7)^2 = 96/7
        ({"token_std": "group"}, [1, 1, 1, -1, *(x / math.sqrt(16 / 3) for x in (3, -1, -1))]),
        ({"token_std": "batch"}, [x / math.sqrt(16 / 7) for x in (1, 1, 1, -1, 3, -1, -1)]),
        (
            {"token_mean": "group", "token_std": "batch", "unbiased": False, "token_eps": 1.0},
            [x / (math.sqrt(96) / 7 + 1) for x in (0.5, 0.5, 0.5, -1.5, 8 / 3, -4 / 3, -4 / 3)],
        ),
        ({"token_mean": "batch", "clip": 1.0}, [4 / 7] * 3 + [-1, 1, -1, -1]),  # the clip after
    ],
)
def test_whitening_over_tokens(options: dict[str, Any], expected: list[float]) -> None:
    levels = {k: TokenLevel[v] if isinstance(v, str) else v for k, v in options.items()}
    advantage = plain(**{"token_eps": 0.0, **levels})
    groups = new_groups([1, -1], [3, -1], lengths=[3, 1, 1, 2])
    assert advantages(graded(groups, advantage=advantage)[0]) == approx(expected)


def test_only_kept_tokens_are_whitened() -> None:
    """Of 1 1 1 and -1, the answer of three tokens was cut off; 3 and -1 -1 are the others. Over -1,
    3, -1, -1: mean 0, squares 12, over n - 1 = 3 a standard deviation of 2."""
    advantage = plain(token_mean=TokenLevel.batch, token_std=TokenLevel.batch, token_eps=0.0)
    groups = new_groups([1, -1], [3, -1], lengths=[3, 1, 1, 2], cut=(0,))
    shaping = ShapingConfig(overlong_filter=True)
    samples, _, metrics = graded(groups, shaping=shaping, advantage=advantage)
    assert kept(samples) == [[0, 0, 0], [1], [1], [1, 1]]
    assert advantages(samples) == approx([0, 0, 0, -0.5, 1.5, -0.5, -0.5])
    assert metrics["sampling/kept"] == pytest.approx(4 / 7)


@pytest.mark.parametrize(
    ("discount", "expected"),
    [(1.0, [1, 1, 1, -2, -2]), (0.5, [0.25, 0.5, 1, -1, -2])],
)
def test_discount(discount: float, expected: list[float]) -> None:
    groups = new_groups([1, -2], lengths=[3, 2])
    shaping = ShapingConfig(discount=discount)
    samples, _, _ = graded(groups, shaping=shaping, advantage=plain())
    assert advantages(samples) == expected


# --- KL in the reward ----------------------------------------------------------------------------


def graded_with_kl(
    kl: KlConfig,
    *,
    state: AlgoState,
    old: list[list[float]] | None = None,
    discount: float = 1.0,
) -> tuple[list[Sample], AlgoState, dict[str, float]]:
    """Rewards 1 and 0, answers of 2 and 1 tokens, engine 0, reference -(.2, .4) and -.6."""
    groups = new_groups([1, 0], lengths=[2, 1])
    samples = with_logp(
        make_samples(groups),
        "logp_ref",
        [np.array([-0.2, -0.4], np.float32), np.array([-0.6], np.float32)],
    )
    if old is not None:
        samples = with_logp(samples, "logp_old", [np.array(x, np.float32) for x in old])
    algo = AlgoConfig(kl=kl, advantage=plain(), shaping=ShapingConfig(discount=discount))
    return grade(groups, samples, algo, state, max_tokens=10)


def reward_kl(**options: Any) -> KlConfig:
    estimator = KlEstimator[options.pop("estimator", "k1")]
    return KlConfig(**{"coef": 0.5, **options}, place=KlPlace.reward, estimator=estimator)


@pytest.mark.parametrize(
    ("options", "old", "discount", "expected", "mean"),
    [
        # d = .2, .4 and .6 of the engine's; what follows a token counts: 1 - .5 (.2 + .4), ...
        ({}, None, 1.0, [0.7, 0.8, -0.3], 0.4),
        # the old policy's where there is one: d = .1, .1 and 0
        ({}, [[-0.1, -0.3], [-0.6]], 1.0, [0.9, 0.95, 0.0], 0.2 / 3),
        ({"estimator": "k2"}, None, 1.0, [1 - 0.05, 1 - 0.04, -0.09], 0.28 / 3),  # .02, .08, .18
        ({"clamp_log_ratio": 0.3}, None, 1.0, [0.75, 0.85, -0.15], 0.8 / 3),  # .2, .3, .3
        ({"estimator": "k2", "clamp": 0.1}, None, 1.0, [0.95, 0.96, -0.05], 0.2 / 3),
        # -.5 * .2 + .5 (1 - .5 * .4), 1 - .5 * .4
        ({}, None, 0.5, [-0.1 + 0.4, 0.8, -0.3], 0.4),
    ],
)
def test_kl_in_the_reward(
    options: dict[str, Any],
    old: list[list[float]] | None,
    discount: float,
    expected: list[float],
    mean: float,
) -> None:
    state = AlgoState(kl_coef=0.5)
    samples, after, metrics = graded_with_kl(
        reward_kl(**options), state=state, old=old, discount=discount
    )
    assert advantages(samples) == approx(expected)
    assert metrics["policy/kl_reward"] == pytest.approx(mean)
    assert metrics["policy/kl_coef"] == after.kl_coef == 0.5  # fixed without a target


@pytest.mark.parametrize(
    ("target", "after"),
    [
        # KL .4 a token, 2 of 10 answers: .5 (1 + e * .2)
        (0.1, 0.5 * 1.04),  # e = 3, held at .2
        (0.32, 0.5 * 1.04),  # .25, held
        (4 / 11, 0.5 * 1.02),  # .1
        (0.4, 0.5),
        (40.0, 0.5 * 0.96),  # -.99, held at -.2
    ],
)
def test_an_adaptive_kl_coefficient(target: float, after: float) -> None:
    kl = reward_kl(coef=0.125, target=target, horizon=10)
    samples, state, metrics = graded_with_kl(kl, state=AlgoState(kl_coef=0.5))
    assert advantages(samples) == approx([0.7, 0.8, -0.3])  # the state's, not the configured
    assert metrics["policy/kl_coef"] == 0.5
    assert state.kl_coef == pytest.approx(after)
    again = graded_with_kl(kl, state=state)[2]
    assert again["policy/kl_coef"] == state.kl_coef


@pytest.mark.parametrize("place", KlPlace)
def test_a_kl_without_weight_or_in_the_loss_is_not_in_the_reward(place: KlPlace) -> None:
    coef = 0.5 if place is KlPlace.loss else 0.0
    kl = KlConfig(coef=coef, place=place)
    samples, _, metrics = graded_with_kl(kl, state=AlgoState(kl_coef=0.5))
    assert advantages(samples) == [1, 1, 0]
    assert "policy/kl_reward" not in metrics and "policy/kl_coef" not in metrics


def test_a_kl_in_the_reward_needs_the_reference() -> None:
    with pytest.raises(AssertionError, match="reference"):
        graded(new_groups([1, 0]), kl=reward_kl())


# --- what is left out ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [  # mean rewards 0, 1/2, 1, 1/4; the first and the third are flat
        ({}, [1, 1, 1, 1]),
        ({"flat_groups": FlatGroups.drop}, [0, 1, 0, 1]),
        ({"dynamic": True}, [0, 1, 0, 1]),
        ({"mean_low": 0.25}, [0, 1, 1, 0]),  # above, not at
        ({"mean_high": 1.0}, [1, 1, 0, 1]),
        ({"mean_low": 0.0, "mean_high": 0.5}, [0, 0, 0, 1]),
    ],
)
def test_groups_that_are_left_out(sampling: dict[str, Any], expected: list[int]) -> None:
    groups = new_groups([0, 0], [1, 0], [1, 1], [0.5, 0])
    # a length penalty does not make a flat group differ: raw rewards are asked
    samples, _, metrics = graded(groups, sampling=SamplingConfig(**sampling))
    assert kept(samples) == [[k] for k in expected for _ in range(2)]
    assert metrics["sampling/kept"] == sum(expected) / 4
    shaping = ShapingConfig(overlong_tokens=10)
    groups = new_groups([0, 0], [1, 0], [1, 1], [0.5, 0], lengths=[1, 2] * 4)
    samples, _, _ = graded(groups, sampling=SamplingConfig(**sampling), shaping=shaping)
    assert kept(samples) == [[k] * n for k in expected for n in (1, 2)]


@pytest.mark.parametrize("on", [False, True])
def test_answers_that_were_cut_off(on: bool) -> None:
    groups = new_groups([1, 0, 0], lengths=[1, 2, 1], cut=(1,))
    advantage = AdvantageConfig(eps=0.0)
    shaping = ShapingConfig(overlong_filter=on)
    samples, _, _ = graded(groups, shaping=shaping, advantage=advantage)
    assert kept(samples) == [[1], [0, 0] if on else [1, 1], [1]]
    # as a peer it counts all the same: 2/3 / sqrt(1/3)
    assert samples[0].advantage.tolist() == approx([2 / ROOT3])


def test_m2po_over_all_kept_tokens_of_the_batch() -> None:
    """log k = .1, 1, -.2 and 2 of a group that is left out; the mean of .01, .04 is .025."""
    groups = new_groups([1, 0], [1, 1], lengths=[2, 1, 1, 0])
    old = [[0.1, 1.0], [-0.2], [2.0], []]
    samples = with_logp(make_samples(groups), "logp_old", [np.array(x, np.float32) for x in old])
    algo = AlgoConfig(
        kl=KlConfig(coef=0.0),
        correction=CorrectionConfig(m2po=0.04),
        sampling=SamplingConfig(flat_groups=FlatGroups.drop),
    )
    found, _, metrics = grade(groups, samples, algo, START, max_tokens=10)
    assert kept(found) == [[1, 0], [1], [0], []]
    assert metrics["sampling/kept"] == 0.5
    # with that token among them, .01 .04 1 have a mean of .35: a threshold of .36 keeps them
    algo = replace(algo, correction=CorrectionConfig(m2po=0.36))
    assert kept(grade(groups, samples, algo, START, max_tokens=10)[0]) == [[1, 1], [1], [0], []]
    with pytest.raises(AssertionError, match="old policy"):
        grade(groups, make_samples(groups), algo, START, max_tokens=10)


WHITE = {"token_mean": TokenLevel.batch, "token_std": TokenLevel.batch}


@pytest.mark.parametrize("advantage", [{}, WHITE])
def test_everything_left_out(advantage: dict[str, Any]) -> None:
    groups = new_groups([1, 1], [0, 0], lengths=[2, 1, 1, 1])
    samples, _, metrics = graded(
        groups,
        sampling=SamplingConfig(flat_groups=FlatGroups.drop),
        advantage=AdvantageConfig(**advantage),
    )
    assert kept(samples) == [[0, 0], [0], [0], [0]]
    assert advantages(samples) == [0] * 5
    assert metrics == {"reward/shaped": 0.5, "sampling/kept": 0.0}


@pytest.mark.parametrize("lengths", [[0, 2], [0, 0]])
@pytest.mark.parametrize("discount", [1.0, 0.5])
@pytest.mark.parametrize("advantage", [{}, WHITE])
def test_answers_without_tokens(
    lengths: list[int], discount: float, advantage: dict[str, Any]
) -> None:
    """They are peers with nothing to learn from."""
    groups = new_groups([1, 0], lengths=lengths)
    shaping = ShapingConfig(discount=discount)
    samples, _, _ = graded(groups, shaping=shaping, advantage=AdvantageConfig(**advantage))
    assert [s.advantage.size for s in samples] == [s.weight.size for s in samples] == lengths
    assert np.isfinite(advantages(samples)).all()
    if lengths[1] and not advantage:  # -.5 / sqrt(.5)
        assert samples[1].advantage[-1] == pytest.approx(-1 / math.sqrt(2), rel=1e-5)


@pytest.mark.parametrize(
    "state",
    [
        AlgoState(kl_coef=0.04),
        AlgoState(kl_coef=0.1 + 0.2, rewards=Moments(7, 1 / 3, 2 / 3), reference_step=400),
    ],
)
def test_the_state_survives_json(state: AlgoState) -> None:
    assert AlgoState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_tokens_may_be_whitened_over_n_beside_groups_over_n_minus_1() -> None:
    """Rewards (1, -1) of 3 and 1 tokens: std over n - 1 is sqrt 2; tokens v v v -v of v = 1/sqrt 2
    have mean v/2 and, over n, the variance (3 v^2/4 + 9 v^2/4) / 4 = 3 v^2/4."""
    levels = {"mean": Level.group, "std": Level.group, "eps": 0.0, "token_eps": 0.0}
    tokens = {"token_mean": TokenLevel.batch, "token_std": TokenLevel.batch}
    groups = new_groups([1, -1], lengths=[3, 1])
    for unbiased, factor in ((False, 1.0), (True, ROOT3 / 2), (None, ROOT3 / 2)):
        advantage = AdvantageConfig(**levels, **tokens, token_unbiased=unbiased)  # type: ignore[arg-type]
        found = advantages(graded(groups, advantage=advantage)[0])
        assert found == approx([factor / ROOT3] * 3 + [-factor * ROOT3])
