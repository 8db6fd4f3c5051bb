"""What failures do: counted, logged, and when they are enough."""

import asyncio
import logging
from collections import Counter

import numpy as np
import pytest

from peergrad.config import OnError, RewardConfig, RewardKind
from peergrad.data import Prompt, Rollout
from peergrad.grades import Failure, Grade, RewardError
from peergrad.rollout.engine import Sampling
from peergrad.rollout.evaluation import evaluate
from peergrad.rollout.scoring import HANGS, Scoring

HANG = Failure("timeout", "took longer than 10 s")
RAISES = Failure("error", "raised KeyError: 'x' (mine.py:7)")
PROMPT = Prompt("train-17", np.zeros(1, np.int32), "1+2=", "3")
ROLLOUT = Rollout(np.zeros(1, np.int32), np.zeros(1, np.float32), ((0, 0, 1),), "stop", "a\nb")


class Given:
    """These grades, one after the other."""

    def __init__(self, *results: Grade | Failure) -> None:
        self.results = list(results)

    async def score(self, prompt: Prompt, rollout: Rollout) -> Grade | Failure:
        return self.results.pop(0)

    def close(self) -> None: ...


def new_scoring(*results: Grade | Failure, answers: int = 8, **options: OnError) -> Scoring:
    config = RewardConfig(kind=RewardKind.function, function="mine:score", **options)
    return Scoring(Given(*results), config, what="a step", answers=answers)


def score(scoring: Scoring, times: int) -> list[float | None]:
    return [asyncio.run(scoring(PROMPT, ROLLOUT)) for _ in range(times)]


@pytest.mark.parametrize(
    ("action", "instead", "effect"),
    [(OnError.zero, 0.0, "count as 0"), (OnError.drop, None, "are left out")],
)
def test_failures_are_counted_by_kind_and_warned_of_once(
    action: OnError, instead: float | None, effect: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    scoring = new_scoring(Grade(1.5), RAISES, HANG, RAISES, on_error=action)
    assert score(scoring, 4) == [1.5, instead, instead, instead]
    assert scoring.numbers("step 3") == {
        "reward/failed": 0.75,
        "reward/failed_error": 0.5,
        "reward/failed_timeout": 0.25,
        "reward/failed_value": 0.0,
        "reward/failed_crash": 0.0,
    }
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warning == (
        f"step 3: 3 of 4 rewards failed (error 2, timeout 1) and {effect}: that of a rollout of "
        r"train-17 raised KeyError: 'x' (mine.py:7); its text ends 'a\nb'; all are in "
        "collector.log"
    )
    assert caplog.text.count("reward failed: that of a rollout of train-17") == 3
    caplog.clear()
    assert set(scoring.numbers("step 4").values()) == {0.0} and not caplog.records


def test_parts_of_rewards_become_metrics() -> None:
    grades = [Grade(1.0, {"format": 1.0}), Grade(0.0, {"format": 0.5, "long": 3.0})]
    scoring = new_scoring(*grades)
    score(scoring, 2)
    numbers = scoring.numbers("step 1")
    assert numbers["reward_part/format"] == 0.75 and numbers["reward_part/long"] == 3.0


def test_a_step_of_failures_is_the_end() -> None:
    scoring = new_scoring(*[RAISES] * 8, answers=8)
    score(scoring, 7)
    with pytest.raises(RewardError) as error:
        score(scoring, 1)
    assert str(error.value) == (
        "reward.function = 'mine:score': all 8 rewards of a step failed (error 8), that of a "
        r"rollout of train-17 raised KeyError: 'x' (mine.py:7); its text ends 'a\nb'; correct it, "
        "all failures are in collector.log"
    )


def test_one_that_works_now_and_then_is_not() -> None:
    scoring = new_scoring(*([RAISES] * 7 + [Grade(0.0)]) * 3, answers=8)
    score(scoring, 24)
    assert scoring.numbers("step 1")["reward/failed"] == 21 / 24


def test_one_that_always_hangs_ends_before_the_step_does() -> None:
    scoring = new_scoring(*[HANG] * HANGS, answers=512)
    score(scoring, HANGS - 1)
    with pytest.raises(RewardError, match=f"the first {HANGS} of 512 rewards of a step failed"):
        score(scoring, 1)
    scoring = new_scoring(Grade(1.0), *[HANG] * HANGS, answers=512)  # but if it has worked
    score(scoring, HANGS + 1)


def test_a_failure_can_be_the_end() -> None:
    with pytest.raises(RewardError) as error:
        score(new_scoring(RAISES, on_error=OnError.stop), 1)
    assert str(error.value) == (
        "reward.on_error = 'stop': a reward failed, that of a rollout of train-17 raised KeyError: "
        r"'x' (mine.py:7); its text ends 'a\nb'; correct the reward, or set reward.on_error=zero "
        "or drop"
    )


class Twice:
    async def generate(
        self, prompt_tokens: np.ndarray, sampling: Sampling, *, request_id: str
    ) -> list[Rollout]:
        return [ROLLOUT] * sampling.n


@pytest.mark.parametrize(
    ("reward", "passes"), [(0.7 + 0.2 + 0.1, 1.0), (1.0, 1.0), (1 - 1e-8, 0.0), (0.9, 0.0)]
)
def test_an_answer_passes_but_for_rounding(reward: float, passes: float) -> None:
    async def score(prompt: Prompt, rollout: Rollout) -> float:
        return reward

    sampling = Sampling(n=2, max_new_tokens=1)
    options = {"version": 1, "pass_reward": 1.0, "answered": Counter()}
    result = asyncio.run(evaluate(Twice(), [PROMPT], score, sampling, **options))
    assert result.pass_rate == passes


@pytest.mark.parametrize(
    ("action", "pass_rate", "mean"), [(OnError.zero, 1 / 4, -1 / 4), (OnError.drop, 1 / 3, -1 / 3)]
)
def test_a_failure_never_passes(action: OnError, pass_rate: float, mean: float) -> None:
    """Not even where it counts as 0 and that would be enough."""
    scoring = new_scoring(Grade(-1.0), RAISES, Grade(1.0), Grade(-1.0), on_error=action)
    result = asyncio.run(
        evaluate(
            Twice(), [PROMPT], scoring.graded, Sampling(n=4, max_new_tokens=1), version=1,
            pass_reward=-0.5, answered=Counter(), count_failed=action is OnError.zero,
        )
    )  # fmt: skip
    assert result.pass_rate == pytest.approx(pass_rate)
    assert result.mean_reward == pytest.approx(mean)
