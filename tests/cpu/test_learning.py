"""Old policy, mini-batches, denominators and reference, with small stand-ins for the trainer."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from peergrad.algo.grading import AlgoState
from peergrad.algo.objective import Objective
from peergrad.algo.plan import Old, Plan, make_plan
from peergrad.algo.samples import Sample
from peergrad.config import (
    Aggregation,
    AlgoConfig,
    Config,
    CorrectionConfig,
    CorrectionKind,
    Denominator,
    KlConfig,
    RolloutConfig,
    RunConfig,
)
from peergrad.learning import drop, learn, old_policy, renew_reference


def new_sample(group: int, engine: list[float], **fields: Any) -> Sample:
    size = len(engine)
    return Sample(
        tokens=np.arange(size + 1, dtype=np.int32),
        prompt_length=1,
        logp_engine=np.array(engine, np.float32),
        advantage=np.ones(size, np.float32),
        weight=np.ones(size, np.float32),
        version=np.full(size, 3, np.int32),
        group=group,
        **fields,
    )


class Policy:
    """Says -1 of every token, and remembers what it was asked and taught."""

    def __init__(self, logp: float = -1.0) -> None:
        self.logp = logp
        self.calls: list[tuple[str, list[Sample]]] = []
        self.asked: list[bool] = []  # for the entropy, at each pass

    def score(self, samples: Any, *, with_entropy: bool = False) -> Any:
        self.asked.append(with_entropy)
        self.calls.append(("score", list(samples)))
        logp = [np.full(s.weight.size, self.logp, np.float32) for s in samples]
        return SimpleNamespace(logp=logp, samples=samples)

    def update(self, samples: Any, objective: Any) -> int:
        self.calls.append(("update", list(samples)))
        return len(self.calls)

    @property
    def taught(self) -> list[list[Sample]]:
        return [samples for what, samples in self.calls if what == "update"]


# --- old policy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("old", Old)
def test_the_old_policy_of_each_plan(old: Old) -> None:
    """Engine -.5, version 3; the policy is at version 4."""
    samples = [new_sample(0, [-0.5, -0.5]), new_sample(1, [])]
    policy: Any = Policy()
    plan = Plan(old=old, score_each=False, reference=False)
    found, scores = old_policy(samples, plan, policy, version=4)
    expected = {Old.recompute: [[-1, -1], []], Old.engine: [[-0.5, -0.5], []]}.get(old)
    logp = [None if s.logp_old is None else s.logp_old.tolist() for s in found]
    assert logp == (expected or [None, None])
    proximal = [None if s.proximal is None else s.proximal.tolist() for s in found]
    assert proximal == ([[0.5, 0.5], []] if old is Old.loglinear else [None, None])
    # the one plan that costs a pass, whose scores the gap to the engine is judged by
    assert policy.asked == ([True] if old is Old.recompute else [])
    assert (scores is not None) == (old is Old.recompute)


# --- optimizer steps -----------------------------------------------------------------------------


def configured(seed: int = 0, **algo: Any) -> Config:
    config = Config(rollout=RolloutConfig(max_new_tokens=8), run=RunConfig(seed=seed))
    return replace(config, algo=AlgoConfig(**{"kl": KlConfig(coef=0.0), **algo}))


def taught(config: Config, samples: list[Sample], step: int = 1) -> list[list[Sample]]:
    policy: Any = Policy()
    updates: Any = learn(
        config, make_plan(config), Objective(config.algo), policy, samples, step=step
    )
    assert updates == list(range(1, len(policy.calls) + 1))  # all of them, in order
    return policy.taught


def groups_of(parts: list[list[Sample]]) -> list[list[int]]:
    return [[s.group for s in part] for part in parts]


EIGHT = [new_sample(g, [-0.5] * (g + 1)) for g in range(8) for _ in range(2)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ({"minibatches": 2}, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ({"minibatches": 4, "epochs": 2}, [[0, 1], [2, 3], [4, 5], [6, 7]] * 2),
        ({"epochs": 3}, [[0, 1, 2, 3, 4, 5, 6, 7]] * 3),
    ],
)
def test_mini_batches_and_passes(options: dict[str, Any], expected: list[list[int]]) -> None:
    parts = taught(configured(**options), EIGHT)
    assert groups_of(parts) == [[g for g in part for _ in range(2)] for part in expected]


def test_every_optimizer_step_has_its_own_denominator() -> None:
    """Tokens of groups 0 to 3: 2 (1 + 2 + 3 + 4) = 20; of 4 to 7: 2 (5 + 6 + 7 + 8) = 52."""
    config = configured(minibatches=2, aggregation=Aggregation.token_mean)
    weights = [{w for s in part for w in s.weight.tolist()} for part in taught(config, EIGHT)]
    assert weights == [{np.float32(1 / 20)}, {np.float32(1 / 52)}]


def test_the_constant_denominator_is_the_longest_answer() -> None:
    config = configured(aggregation=Aggregation.token_sum_const)
    (part,) = taught(config, EIGHT)
    assert {w for s in part for w in s.weight.tolist()} == {1 / 128}  # 16 answers of up to 8


def test_shuffling_is_a_function_of_seed_step_and_pass() -> None:
    def orders(seed: int, step: int) -> list[list[int]]:
        """Of each of two passes."""
        config = configured(seed, minibatches=4, epochs=2, shuffle=True)
        parts = groups_of(taught(config, EIGHT, step))
        assert all(a == b for part in parts for a, b in zip(part[::2], part[1::2], strict=True))
        flat = [part[::2] for part in parts]  # two answers a group, together
        return [sum(flat[:4], []), sum(flat[4:], [])]  # noqa: RUF017

    first = orders(0, 1)
    assert all(sorted(order) == list(range(8)) for order in first)
    assert orders(0, 1) == first
    found = {tuple(order) for args in ((0, 1), (0, 2), (1, 1)) for order in orders(*args)}
    assert len(found) == 6 and tuple(range(8)) not in found


def test_group_numbers_may_have_gaps() -> None:
    samples = [new_sample(g, [-0.5]) for g in (2, 7, 9, 40)]
    assert groups_of(taught(configured(minibatches=2), samples)) == [[2, 7], [9, 40]]


# --- denominators of what is dropped -------------------------------------------------------------

# k = exp(old - engine) = 1, e^2 and 1 of the first answer, e^2 of the second
DROPPED = [
    new_sample(0, [-1.0, -3.0, -1.0], logp_old=np.array([-1, -1, -1], np.float32)),
    new_sample(1, [-3.0], logp_old=np.array([-1], np.float32)),
]


@pytest.mark.parametrize(
    ("denominator", "weights"),
    [
        (Denominator.all, [[1 / 4] * 3, [1 / 4]]),  # the objective drops them itself
        (Denominator.kept, [[1 / 2, 0, 1 / 2], [0]]),
    ],
)
def test_dropped_tokens_in_denominators(
    denominator: Denominator, weights: list[list[float]]
) -> None:
    config = configured(
        correction=CorrectionConfig(kind=CorrectionKind.mis, high=2.0),
        denominator=denominator,
        aggregation=Aggregation.token_mean,
    )
    (part,) = taught(config, DROPPED)
    assert [s.weight.tolist() for s in part] == weights


def test_what_the_present_policy_drops_takes_a_pass_before_every_update() -> None:
    """The old policy stays: p = e^-1 at every pass, which moved by .32 from e^-3."""
    config = configured(
        correction=CorrectionConfig(dppo=0.2), denominator=Denominator.kept, minibatches=2
    )
    policy: Any = Policy()
    learn(config, make_plan(config), Objective(config.algo), policy, DROPPED, step=1)
    assert [what for what, _ in policy.calls] == ["score", "update"] * 2
    assert [s.weight.tolist() for _, part in policy.calls for s in part] == [
        *([1, 1, 1], [0.5, 0, 0.5]),  # of 2 kept tokens each 1/2
        *([1], [0]),
    ]
    assert DROPPED[0].weight.tolist() == [1, 1, 1]  # as it was


def test_drop_leaves_alone_what_is_left_out_already() -> None:
    """Tokens without weight have no logprob; they stay out and do not shift the others."""
    objective = Objective(
        AlgoConfig(
            kl=KlConfig(coef=0.0), correction=CorrectionConfig(kind=CorrectionKind.mis, high=2.0)
        )
    )
    nan = np.nan
    sample = replace(
        new_sample(0, [-1.0, -3.0, -1.0, -1.0], logp_old=np.array([nan, -1, -1, nan], np.float32)),
        weight=np.array([0, 0.5, 0.25, 0], np.float32),
    )
    now = np.array([nan, -1, -1, nan], np.float32)
    empty = new_sample(0, [], logp_old=np.zeros(0, np.float32))
    found = drop([empty, sample, DROPPED[1]], objective, [empty.logp_engine, now, now[1:2]])
    assert [s.weight.tolist() for s in found] == [[], [0, 0, 0.25, 0], [0]]


def test_dropping_everything_weighs_nothing() -> None:
    config = configured(
        correction=CorrectionConfig(kind=CorrectionKind.mis, high=2.0),
        denominator=Denominator.kept,
    )
    (part,) = taught(config, DROPPED[1:])
    assert [s.weight.tolist() for s in part] == [[0]]


# --- reference -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "renewed"), [(0, []), (1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [4]), (7, [])]
)
def test_the_reference_is_renewed_when_due(every: int, renewed: list[int]) -> None:
    config = configured(kl=KlConfig(coef=0.1, reset_every=every))
    became: list[str] = []
    reference: Any = SimpleNamespace(become=became.append)
    policy: Any = "policy"
    state, found = AlgoState(kl_coef=0.1), []
    for step in range(1, 7):
        before = len(became)
        after = renew_reference(config, reference, policy, state, step=step)
        if len(became) > before:
            found.append(step)
            assert after == replace(state, reference_step=step)
        else:
            assert after is state
        state = after
    assert found == renewed and set(became) <= {"policy"}


def test_without_a_reference_there_is_none_to_renew() -> None:
    config = configured(kl=KlConfig(coef=0.1, reset_every=1))
    state = AlgoState(kl_coef=0.1)
    policy: Any = "policy"
    assert renew_reference(config, None, policy, state, step=1) is state
