"""Grading as the collector sees it: what a failure does, how many there are, when it is enough."""

import logging
from collections import Counter
from typing import Protocol

from peergrad.config import OnError, RewardConfig
from peergrad.data import Prompt, Rollout
from peergrad.grades import KINDS, Failure, Grade, RewardError

log = logging.getLogger(__name__)

HANGS = 16
"""Rewards that take too long are enough if none has ever come: each costs ``reward.timeout``."""
PARTS = 64  # names of a reward's parts; more are data, not metrics
EFFECTS = {OnError.zero: "count as 0", OnError.drop: "are left out"}


class Scorer(Protocol):
    """Grades answers; several at a time."""

    async def score(self, prompt: Prompt, rollout: Rollout) -> Grade | Failure: ...

    def close(self) -> None: ...


class Scoring:
    """Grades the answers of training steps, or of an evaluation, and counts.

    Failures are logged one by one, and warned of once per ``numbers``. When as many in a row as a
    step or the evaluation has answers fail, the reward cannot work: RewardError.
    """

    def __init__(self, scorer: Scorer, config: RewardConfig, *, what: str, answers: int) -> None:
        """``what``: a step, or an evaluation, of ``answers`` answers."""
        self._scorer = scorer
        self._config = config
        self._what, self._answers = what, answers
        self._worked = False
        self._in_a_row = Counter[str]()
        self._forget()

    def _forget(self) -> None:
        self._graded = 0
        self._failed = Counter[str]()
        self._example = ""
        self._parts: dict[str, list[float]] = {}

    async def __call__(self, prompt: Prompt, rollout: Rollout) -> float | None:
        """The answer's reward; None if it failed and is to be left out of its group."""
        reward = await self.graded(prompt, rollout)
        return 0.0 if reward is None and self._config.on_error is OnError.zero else reward

    async def graded(self, prompt: Prompt, rollout: Rollout) -> float | None:
        """The answer's reward; None if it failed."""
        result = await self._scorer.score(prompt, rollout)
        self._graded += 1
        if isinstance(result, Failure):
            self._fail(result, prompt, rollout)
            return None
        self._worked = True
        self._in_a_row.clear()
        for name, value in result.parts.items():
            if name in self._parts or len(self._parts) < PARTS:
                self._parts.setdefault(name, []).append(value)
        return result.reward

    def _fail(self, failure: Failure, prompt: Prompt, rollout: Rollout) -> None:
        self._failed[failure.kind] += 1
        self._in_a_row[failure.kind] += 1
        tail = rollout.text[-80:]
        self._example = f"that of a rollout of {prompt.id} {failure.reason}; its text ends {tail!r}"
        log.info("reward failed: %s", self._example)
        if self._config.on_error is OnError.stop:
            raise RewardError(
                f"reward.on_error = 'stop': a reward failed, {self._example}; correct the reward, "
                "or set reward.on_error=zero or drop"
            )
        hangs = not self._worked and self._in_a_row["timeout"] >= HANGS
        if hangs or self._in_a_row.total() >= self._answers:
            raise self._hopeless()

    def _hopeless(self) -> RewardError:
        config, count = self._config, self._in_a_row.total()
        key, value = "function", config.function
        if value is None:
            key, value = "kind", config.kind.name
        all_of = "all" if count >= self._answers else f"the first {count} of"
        return RewardError(
            f"reward.{key} = {value!r}: {all_of} {self._answers} rewards of {self._what} failed "
            f"({_by_kind(self._in_a_row)}), {self._example}; correct it, all failures are in "
            "collector.log"
        )

    def numbers(self, name: str) -> dict[str, float]:
        """Metrics of what was graded since the last call, and a warning if some of it failed:
        ``reward/failed``, the share that failed, the same by kind, and ``reward_part/NAME``, the
        mean of each part. ``name``: of the step or evaluation."""
        graded, failed = max(self._graded, 1), self._failed
        if failed:
            log.warning(
                "%s: %d of %d rewards failed (%s) and %s: %s; all are in collector.log",
                name, failed.total(), graded, _by_kind(failed), EFFECTS[self._config.on_error],
                self._example,
            )  # fmt: skip
        found = {"reward/failed": failed.total() / graded}
        found |= {f"reward/failed_{kind}": failed[kind] / graded for kind in KINDS}
        found |= {f"reward_part/{k}": sum(v) / len(v) for k, v in self._parts.items()}
        self._in_a_row.clear()
        self._forget()
        return found


def _by_kind(failed: Counter[str]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in failed.most_common())
