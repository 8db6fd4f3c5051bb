"""Groups in the making: how far generation may run ahead of training, and what is in flight.

One stream serves synchronous and asynchronous training: with ``max_staleness`` 0 the engine works
on exactly the batch that the trainer waits for; with 1 also on the next one; and so on. A group
that is not worth training on may be dropped: one of the next prompt takes its place.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from peergrad.config.rules import require
from peergrad.data import Group, Prompt, Rollout
from peergrad.grades import RewardError
from peergrad.rollout.engine import Sampling

log = logging.getLogger(__name__)

Score = Callable[[Prompt, Rollout], Awaitable[float | None]]
"""An answer's reward; None leaves the answer out of its group."""
Select = Callable[[Group], bool]

PEERS = 2  # least answers of a group: one alone has no peers
PATIENCE = 10  # times the groups of a step may be left without peers before it is an error


class Answers(Protocol):
    """The part of an ``Engine`` that draws."""

    async def generate(
        self, prompt_tokens: Sequence[int] | np.ndarray, sampling: Sampling, *, request_id: str
    ) -> list[Rollout]: ...


class PromptSource(Protocol):
    """An endless iterator of prompts whose position can be saved."""

    def __next__(self) -> Prompt: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Taken:
    """What a step trains on, and the mean raw rewards of the groups that were dropped on the way:
    those of the prompts before its last one and after the last one of the step before.
    ``grading``: metrics of all that was graded since the step before, also for later steps, and
    seconds of parts of the waiting.

    Example:
        ``Taken(groups=[group_a, group_b], dropped=(0.0, 1.0, 0.0),
        grading={"reward/failed": 0.125})``
    """

    groups: list[Group]
    dropped: tuple[float, ...] = ()
    grading: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StreamState:
    """Everything a restored stream needs to lose and repeat nothing."""

    prompts: dict[str, Any]  # position of the prompt source
    started: int  # groups ever started: the next sequence number
    batches: int  # batches ever taken
    finished: dict[int, Group]  # by sequence number
    in_flight: dict[int, Prompt]  # by sequence number; sampled afresh after a restore
    dropped: dict[int, float]  # mean rewards not yet handed out, by sequence number
    made_by: object = None  # what the finished groups depend on


class Stream:
    """Starts groups in prompt order and hands them out in that same order, a batch at a time.

    At weight version v, the groups started may not exceed ``(max_staleness + v + 1) * batch``: that
    is AReaL's bound (accepted + running), and since batches are handed out in starting order, a
    group trained on at version v was started at version ``v - max_staleness`` or later. The engine
    sees to it that none of its tokens is of an earlier version than that. A dropped group counts as
    neither; its replacement is the youngest, so that the same holds for it. So does one in which
    fewer than two answers could be graded. Nothing is started that no step up to the last would
    train on.
    All methods belong to one event loop.
    """

    def __init__(
        self,
        engine: Answers,
        prompts: PromptSource,
        score: Score,
        sampling: Sampling,
        *,
        batch: int,
        max_staleness: int,
        last: int | None = None,
        select: Select | None = None,
        limit: int = 0,
        state: StreamState | None = None,
        made_by: object = None,
    ) -> None:
        """``batch``: groups per training step. Nothing starts before the first ``set_version``.
        ``last``: the version after the last training step; None: there is always another.

        ``select``: whether a graded group is trained on, else it is dropped. It is an error if a
        batch would take more than ``limit`` times its groups; 0 is no limit. ``made_by``: what
        groups depend on beside ``sampling``; those that ``state`` has finished under anything else
        are asked for again.
        """
        self._engine = engine
        self._prompts = prompts
        self._score = score
        self._sampling = sampling
        self._batch = batch
        self._max_staleness = max_staleness
        self._last = last
        self._select = select
        self._limit = limit
        self._version = 0
        self._started = 0
        self._batches: int | None = None
        self._finished: dict[int, Group] = {}
        self._in_flight: dict[int, Prompt] = {}
        self._dropped: dict[int, float] = {}
        self._made_by = (sampling, made_by)
        self._lonely = 0  # groups without peers, since the last batch
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._failure: BaseException | None = None
        self._changed = asyncio.Event()
        if state is not None:
            self._restore(state)

    def set_version(self, version: int) -> None:
        """The engine now holds weights ``version``: start what that allows."""
        self._version = version
        if self._batches is None:
            self._batches = version  # a run that begins at a later version owes no earlier batches
        self._fill()

    def capacity(self, version: int) -> int:
        """Groups that may be started at weight version ``version`` beyond those that are known."""
        return self._bound(version) - len(self._finished) - len(self._in_flight)

    def _bound(self, version: int) -> int:
        """Groups, from the next batch's first, that may be running or finished."""
        batches = self._max_staleness + version + 1
        batches = batches if self._last is None else min(batches, self._last)
        return (batches - (self._batches or 0)) * self._batch

    async def take(self, version: int) -> Taken:
        """The batch that training step ``version`` trains on, in starting order.

        Raises what a group raised as soon as it does, and ValueError at the limit; the stream is
        then at its end.
        """
        if self._batches != version:
            raise ValueError(f"batch {version} was asked for, but batch {self._batches} is next")
        if len(self._wanted()) < self._batch:
            raise ValueError(f"set_version({version}) must come before take({version})")
        while self._failure is None and not self._full():
            self._changed.clear()
            await self._changed.wait()
        if self._failure is not None:
            raise self._failure
        wanted, dropped = self._wanted(), self._dropped_before()
        self._batches += 1
        self._lonely = 0
        return Taken(
            [self._finished.pop(sequence) for sequence in wanted],
            tuple(self._dropped.pop(sequence) for sequence in dropped),
        )

    def progress(self) -> str:
        """How far the next batch is, in words."""
        done = len(self._finished.keys() & set(self._wanted()))
        return f"{done} of {self._batch} groups, {len(self._tasks)} in flight"

    def state(self) -> StreamState:
        return StreamState(
            prompts=self._prompts.state_dict(),
            started=self._started,
            batches=self._batches or 0,
            finished=dict(self._finished),
            in_flight=dict(self._in_flight),
            dropped=dict(self._dropped),
            made_by=self._made_by,
        )

    async def aclose(self) -> None:
        """Cancel what is in flight."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _wanted(self) -> list[int]:
        """The next batch as far as it is known: every group that is dropped changes it."""
        return self._known()[: self._batch]

    def _full(self) -> bool:
        return self._finished.keys() >= set(self._wanted())

    def _dropped_before(self) -> list[int]:
        """What was dropped on the way to the last group of the next batch."""
        last = max(self._wanted(), default=0)
        return sorted(sequence for sequence in self._dropped if sequence < last)

    def _known(self) -> list[int]:
        return sorted([*self._finished, *self._in_flight])

    def _restore(self, state: StreamState) -> None:
        """Go on from ``state``. Finished groups that this configuration would not have made, or not
        have waited for, are asked for again."""
        self._prompts.load_state_dict(state.prompts)
        self._started, self._batches = state.started, state.batches
        self._finished, self._in_flight = dict(state.finished), dict(state.in_flight)
        self._dropped = dict(state.dropped)
        again = []
        for rank, sequence in enumerate(self._known()):
            trained = state.batches + rank // self._batch  # the version by then
            group = self._finished.get(sequence)
            stale = group is not None and trained - _oldest(group, trained) > self._max_staleness
            if group is not None and (stale or state.made_by != self._made_by):
                again.append(sequence)
        for sequence in again:
            self._in_flight[sequence] = self._finished.pop(sequence).prompt
        if again:
            log.warning(
                "%d finished groups of the checkpoint do not fit the configuration any more: they "
                "are asked for again",
                len(again),
            )

    def _fill(self) -> None:
        for sequence in self._known()[: max(self._bound(self._version), 0)]:
            if sequence not in self._finished and sequence not in self._tasks:  # restored
                self._start(sequence, self._in_flight[sequence])
        for _ in range(self.capacity(self._version)):
            self._start(self._started, next(self._prompts))
            self._started += 1

    def _start(self, sequence: int, prompt: Prompt) -> None:
        self._in_flight[sequence] = prompt
        self._tasks[sequence] = asyncio.create_task(self._run(sequence, prompt))

    async def _run(self, sequence: int, prompt: Prompt) -> None:
        """Sample and grade one group; the first failure ends all others."""
        try:
            group = await self._sample(f"{sequence}/{prompt.id}", prompt)
            lonely = len(group.rollouts) < PEERS
            selected = not lonely and (self._select is None or self._select(group))
            del self._in_flight[sequence]
            if selected:
                self._finished[sequence] = group
            elif lonely:
                self._lonely += 1
                self._fill()
                self._check_lonely()
            else:
                self._dropped[sequence] = float(group.rewards.mean())
                self._fill()
                self._check_limit()
        except Exception as error:
            if self._failure is None:
                self._failure = error
                for task in self._tasks.values():
                    task.cancel()
        finally:
            del self._tasks[sequence]
            self._changed.set()

    async def _sample(self, group_id: str, prompt: Prompt) -> Group:
        rollouts = await self._engine.generate(prompt.tokens, self._sampling, request_id=group_id)
        rewards = await asyncio.gather(*(self._score(prompt, rollout) for rollout in rollouts))
        graded = zip(rollouts, rewards, strict=True)
        peers = tuple(replace(r, reward=reward) for r, reward in graded if reward is not None)
        return Group(group_id, prompt, peers)

    def _check_lonely(self) -> None:
        allowed = PATIENCE * self._batch
        if self._lonely > allowed and not self._full():
            raise RewardError(
                f"reward.on_error = 'drop': rewards failed until fewer than {PEERS} answers were "
                f"left in {self._lonely} groups, for a step of {self._batch}; correct the reward, "
                "or set reward.on_error=zero"
            )

    def _check_limit(self) -> None:
        """Only an unfinished batch can fail; what was dropped beyond it is the next one's."""
        means = [self._dropped[sequence] for sequence in self._dropped_before()]
        allowed = self._limit * self._batch
        if not self._limit or self._full() or len(means) + self._batch <= allowed:
            return
        counts = Counter(f"{mean:.3g}" for mean in means)
        often = ", ".join(f"{mean} in {n}" for mean, n in counts.most_common(2))
        require(
            False,
            "algo.sampling.limit",
            self._limit,
            f"more than {allowed} groups are needed for a step of {self._batch}, as {len(means)} "
            f"were dropped (mean reward {sum(means) / len(means):.3g}; most often {often})",
            "choose easier or harder prompts, raise the limit, or set algo.sampling.dynamic=false",
        )


def _oldest(group: Group, present: int) -> int:
    """The oldest weights that a token of the group was drawn with; ``present`` without any."""
    versions = (version for rollout in group.rollouts for version, _, _ in rollout.versions)
    return min(versions, default=present)
