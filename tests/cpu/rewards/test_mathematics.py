"""The reward ``math``, in the pool's processes, whose time limit is the only one."""

import asyncio

import numpy as np
import pytest

from peergrad.config import RewardConfig, RewardKind
from peergrad.data import Prompt, Rollout
from peergrad.grades import Failure
from peergrad.rewards import RewardPool
from peergrad.rewards.mathematics import reward

NOTHING = np.zeros(0, np.int32)


def grade(answer: str, text: str, finish: str = "stop") -> float:
    return reward(*pair(answer, text, finish))


def pair(answer: str, text: str, finish: str = "stop") -> tuple[Prompt, Rollout]:
    rollout = Rollout(NOTHING, NOTHING.astype(np.float32), (), finish, text)
    return Prompt("train-17", NOTHING, "?", answer), rollout


@pytest.mark.parametrize(
    ("answer", "text", "earned"),
    [
        (r"\frac{1}{2}", r"So \boxed{0.5}.", 1),
        (r"\frac{1}{2}", r"So \boxed{\frac12}.", 1),
        (r"\frac{1}{2}", r"so it is $\frac{2}{4}$.", 1),
        (r"\frac{1}{2}", r"\boxed{2}", 0),
        (r"$2\sqrt{3}$", r"\boxed{\sqrt{12}}", 1),
        (r"Thus \boxed{x=5}.", r"\boxed{5}", 1),
        ("9 * 2\n#### 18", r"\boxed{18}", 1),
        ("9 * 2\n#### 18", "It is 18.", 1),
        ("18", r"\boxed{17} and then \boxed{18}", 1),
        ("18", r"\boxed{18} and then \boxed{17}", 0),
        (r"\{1, 2\}", r"\boxed{\{2, 1\}}", 1),
        ("(1, 2]", r"\boxed{(1, 2]}", 1),
        ("(1, 2]", r"\boxed{[1, 2]}", 0),
        (r"x^2 + 2x + 1", r"\boxed{(x+1)^2}", 1),
        (r"\text{Friday}", r"\boxed{\text{friday}}", 1),
        ("18", r"\boxed{}", 0),
        ("18", "", 0),
    ],
)
def test_table(answer: str, text: str, earned: float) -> None:
    assert grade(answer, text) == earned


def test_only_a_finished_answer_may_be_unmarked() -> None:
    assert grade("18", "It is 18.", finish="length") == 0
    assert grade("18", r"\boxed{18} and", finish="length") == 1


def test_a_reference_that_cannot_be_read_is_an_error() -> None:
    with pytest.raises(ValueError, match="the reference answer ' ' cannot be read"):
        grade(" ", r"\boxed{18}")


def test_what_takes_for_ever_is_ended_by_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peergrad.rewards.process.FIRST_SECONDS", 60.0)

    async def both(pool: RewardPool) -> list[object]:
        right = await pool.score(*pair("18", r"\boxed{18}"))
        tower = await pool.score(*pair("18", r"\boxed{9^{9^{9^{9}}}}"))
        long = await pool.score(*pair("18", "1+" * 50_000))
        return [right, tower, long]

    with RewardPool(RewardConfig(kind=RewardKind.math, timeout=2.0)) as pool:
        right, *others = asyncio.run(both(pool))
    assert not isinstance(right, Failure) and right.reward == 1
    for other in others:  # in time, and no crash of the run
        assert isinstance(other, Failure) or other.reward == 0
