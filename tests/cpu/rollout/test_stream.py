"""The stream against a fake engine: staleness bound, order, dropped groups, errors, restore."""

import asyncio
import pickle
import random
from dataclasses import replace
from itertools import count

import numpy as np
import pytest

from peergrad.data import Group, Prompt, Rollout
from peergrad.grades import RewardError
from peergrad.rollout.engine import Sampling
from peergrad.rollout.stream import Stream, StreamState, Taken
from tests.waiting import until

SAMPLING = Sampling(n=2, max_new_tokens=4)


class Counting:
    """Prompts 0, 1, 2, ... without end."""

    def __init__(self) -> None:
        self.position = 0

    def __next__(self) -> Prompt:
        self.position += 1
        return Prompt(f"p{self.position - 1}", np.array([1], np.int32), "", "")

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class FakeEngine:
    """Takes a random time and notes which version each group started under."""

    slowest = 0.003

    def __init__(self, seed: int) -> None:
        self.version = 0
        self.started: dict[str, int] = {}
        self._random = random.Random(seed)

    async def generate(self, prompt_tokens, sampling, *, request_id):
        self.started[request_id] = version = self.version
        await asyncio.sleep(self._random.random() * self.slowest)
        tokens = np.array([1], np.int32)
        rollout = Rollout(tokens, tokens * np.float32(-1), ((version, 0, 1),), "stop", request_id)
        return [rollout] * sampling.n


async def score(prompt: Prompt, rollout: Rollout) -> float:
    await asyncio.sleep(0)
    return 1.0


async def luck(prompt: Prompt, rollout: Rollout) -> float:
    """All wrong, all right or in between, as chance has it for this prompt."""
    await asyncio.sleep(0)
    return random.Random(prompt.id).choice([0.0, 0.5, 1.0])


def graded(rewards: list[float]):
    """These rewards for the first prompts, 0.5 for the rest."""

    async def score(prompt: Prompt, rollout: Rollout) -> float:
        return dict(enumerate(rewards)).get(int(prompt.id[1:]), 0.5)

    return score


def in_between(group: Group) -> bool:
    return 0 < group.rewards.mean() < 1


def one_by_one(batches: list[int], score=luck) -> list[Taken]:
    """What ``in_between`` leaves of prompts that are answered one after the other."""

    async def step(batch: int) -> tuple[list[str], tuple[float, ...]]:
        kept, dropped = [], []
        while len(kept) < batch:
            index = next(indices)
            reward = await score(Prompt(f"p{index}", np.array([1], np.int32), "", ""), None)
            if 0 < reward < 1:
                kept.append(f"{index}/p{index}")
            else:
                dropped.append(reward)
        return kept, tuple(dropped)

    indices = count()
    return [asyncio.run(step(batch)) for batch in batches]


def new_stream(engine, prompts, *, score=score, batch=4, eta=0, **options) -> Stream:
    return Stream(engine, prompts, score, SAMPLING, batch=batch, max_staleness=eta, **options)


async def train(stream: Stream, engine: FakeEngine, steps: range) -> list[Taken]:
    taken = []
    for step in steps:
        engine.version = step
        stream.set_version(step)
        taken.append(await stream.take(step))
    return taken


def groups_of(taken: list[Taken]) -> list[Group]:
    return [group for each in taken for group in each.groups]


def summary(taken: list[Taken]) -> list[tuple[list[str], tuple[float, ...]]]:
    return [([group.id for group in each.groups], each.dropped) for each in taken]


@pytest.mark.parametrize("eta", [0, 1, 2])
def test_groups_come_in_prompt_order_and_never_staler_than_allowed(eta):
    async def main():
        engine = FakeEngine(seed=eta)
        stream = new_stream(engine, Counting(), eta=eta)
        taken = await train(stream, engine, range(6))
        await stream.aclose()
        return engine, taken

    engine, taken = asyncio.run(main())
    groups = groups_of(taken)
    assert not any(each.dropped for each in taken)
    assert [g.id for g in groups] == [f"{i}/p{i}" for i in range(24)]
    lag = [index // 4 - engine.started[group.id] for index, group in enumerate(groups)]
    assert max(lag) == eta and min(lag) >= 0
    assert all(r.reward == 1.0 for group in groups for r in group.rollouts)


@pytest.mark.parametrize("eta", [0, 1, 2])
def test_no_more_is_started_than_the_bound_allows(eta):
    async def main():
        engine = FakeEngine(seed=0)
        stream = new_stream(engine, Counting(), eta=eta)
        for version in range(3):
            engine.version = version
            stream.set_version(version)
            await asyncio.sleep(0.02)  # all that may start has started and finished
            assert len(engine.started) == (eta + version + 1) * 4
            await stream.take(version)
        assert stream.capacity(2) == 0

    asyncio.run(main())


class Watched(FakeEngine):
    """Sees at the start of every group that the bound is kept, and reached."""

    stream: Stream

    async def generate(self, prompt_tokens, sampling, *, request_id):
        assert self.stream.capacity(self.version) == 0
        return await super().generate(prompt_tokens, sampling, request_id=request_id)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("eta", [0, 1, 2])
def test_a_dropped_group_is_replaced_within_the_bound(eta, seed):
    async def main():
        engine = Watched(seed)
        options = {"score": luck, "eta": eta, "select": in_between, "limit": 10}
        engine.stream = new_stream(engine, Counting(), **options)
        taken = await train(engine.stream, engine, range(8))
        await engine.stream.aclose()
        return engine, taken

    engine, taken = asyncio.run(main())
    assert summary(taken) == one_by_one([4] * 8)  # nothing is lost, repeated or out of order
    lag = [step - engine.started[g.id] for step in range(8) for g in taken[step].groups]
    assert min(lag) >= 0 and max(lag) <= eta
    assert all(in_between(group) for group in groups_of(taken))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("eta", [0, 2])
@pytest.mark.parametrize("options", [{}, {"score": luck, "select": in_between, "limit": 10}])
def test_a_restored_stream_loses_and_repeats_nothing(options, eta, seed):
    """A run cut at a random point and resumed trains on, and drops, the very prompts of an uncut
    one."""
    cut = random.Random(seed).randrange(1, 6)

    async def first():
        engine = FakeEngine(seed)
        stream = new_stream(engine, Counting(), eta=eta, **options)
        taken = await train(stream, engine, range(cut))
        stream.set_version(cut)
        await asyncio.sleep(random.Random(seed).random() * 0.006)
        state = pickle.dumps(stream.state())
        await stream.aclose()
        return taken, state

    async def second(state):
        engine = FakeEngine(seed + 1)
        stream = new_stream(engine, Counting(), eta=eta, state=pickle.loads(state), **options)
        await asyncio.sleep(0.01)
        assert not engine.started  # nothing before the engine has the weights
        taken = await train(stream, engine, range(cut, 8))
        await stream.aclose()
        return taken

    taken, state = asyncio.run(first())
    taken += asyncio.run(second(state))
    assert summary(taken) == one_by_one([4] * 8, luck if options else graded([]))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("options", [{}, {"score": luck, "select": in_between, "limit": 10}])
def test_resuming_with_another_batch_size_or_staleness_neither_stalls_nor_skips(options, seed):
    async def first():
        engine = FakeEngine(seed)
        stream = new_stream(engine, Counting(), batch=4, eta=2, **options)
        return await train(stream, engine, range(3)), stream.state()

    async def second(state):
        engine = FakeEngine(seed)
        stream = new_stream(engine, Counting(), batch=3, eta=0, state=state, **options)
        return await train(stream, engine, range(3, 10))

    taken, state = asyncio.run(first())
    resumed = asyncio.run(second(state))
    for version, batch in enumerate(resumed, start=3):  # on policy: also what had been finished
        assert {v for group in batch.groups for v, _, _ in group.rollouts[0].versions} == {version}
    taken += resumed
    assert summary(taken) == one_by_one([4] * 3 + [3] * 7, luck if options else graded([]))


@pytest.mark.parametrize(("made_by", "kept"), [("same", 8), ("other", 0)])
def test_groups_of_another_configuration_are_sampled_again(made_by, kept):
    """Two batches had been finished for the versions to come."""

    async def first():
        engine = FakeEngine(0)
        stream = new_stream(engine, Counting(), eta=1, made_by="same")
        stream.set_version(0)
        while len(stream.state().finished) < 8:
            await asyncio.sleep(0.001)
        return pickle.loads(pickle.dumps(stream.state()))

    async def second(state):
        engine = FakeEngine(0)
        stream = new_stream(engine, Counting(), eta=1, made_by=made_by, state=state)
        taken = await train(stream, engine, range(2))
        await stream.aclose()
        return taken, engine.started

    taken, started = asyncio.run(second(asyncio.run(first())))
    names = [group.id for group in groups_of(taken)]
    assert names == [f"{i}/p{i}" for i in range(8)]
    assert sum(name not in started for name in names) == kept


@pytest.mark.parametrize("eta", [0, 1, 2])
def test_restored_groups_wait_for_their_turn(eta):
    """Prompts in flight under a laxer bound start no earlier than the stricter one allows."""

    async def main():
        engine = FakeEngine(0)
        in_flight = {n: Prompt(f"p{n}", np.array([1], np.int32), "", "") for n in range(12)}
        prompts = Counting()
        prompts.position = 12
        state = StreamState(prompts.state_dict(), 12, 0, {}, in_flight, {})
        stream = new_stream(engine, Counting(), eta=eta, state=state)
        taken = await train(stream, engine, range(4))
        await stream.aclose()
        return taken, engine.started

    taken, started = asyncio.run(main())
    assert [group.id for group in groups_of(taken)] == [f"{i}/p{i}" for i in range(16)]
    for index, group in enumerate(groups_of(taken)):
        assert max(0, index // 4 - eta) <= started[group.id] <= index // 4


def test_a_batch_that_takes_too_many_groups_is_an_error_that_names_the_limit():
    async def main():
        engine = FakeEngine(0)
        engine.slowest = 0  # so that groups finish in order
        options = {"score": graded([0.5, 0, 1, 0, 0, 1, 1, 1]), "select": in_between, "limit": 2}
        stream = new_stream(engine, Counting(), **options)
        stream.set_version(0)
        with pytest.raises(ValueError) as error:
            await stream.take(0)
        assert str(error.value) == (
            "algo.sampling.limit = 2: more than 8 groups are needed for a step of 4, as 5 were "
            "dropped (mean reward 0.4; most often 0 in 3, 1 in 2); choose easier or harder "
            "prompts, raise the limit, or set algo.sampling.dynamic=false"
        )

    asyncio.run(main())


def test_the_limit_itself_is_allowed_to_every_batch():
    rewards = [0.5, 0, 1, 0, 1, 0.5, 0.5, 0.5]  # 8 groups for a batch of 4

    async def main():
        engine = FakeEngine(0)
        options = {"score": graded(rewards * 3), "select": in_between, "limit": 2}
        stream = new_stream(engine, Counting(), **options)
        return [each.dropped for each in await train(stream, engine, range(3))]

    assert asyncio.run(main()) == [(0, 1, 0, 1)] * 3


def failing(*which: int):
    """No reward for these answers, counted over all groups of two."""
    answers = count()

    async def score(prompt: Prompt, rollout: Rollout) -> float | None:
        return None if next(answers) in which else 0.5

    return score


def test_a_failed_answer_is_left_out_of_its_group_and_a_lone_one_is_replaced():
    async def main():
        engine = FakeEngine(0)
        engine.slowest = 0
        sampling = replace(SAMPLING, n=3)
        score = failing(0, 3, 4)  # one of the first group's answers, two of the second's
        stream = Stream(engine, Counting(), score, sampling, batch=4, max_staleness=0)
        (taken,) = await train(stream, engine, range(1))
        return taken

    taken = asyncio.run(main())
    assert [g.id for g in taken.groups] == ["0/p0", "2/p2", "3/p3", "4/p4"]
    assert [g.rewards.tolist() for g in taken.groups] == [[0.5] * 2, *[[0.5] * 3] * 3]
    assert taken.dropped == ()  # those that taught nothing; this one was never graded


def test_groups_without_peers_are_not_replaced_for_ever():
    async def main():
        engine = FakeEngine(0)
        stream = new_stream(engine, Counting(), score=failing(*range(0, 1000, 2)))
        stream.set_version(0)
        with pytest.raises(RewardError) as error:
            await stream.take(0)
        assert str(error.value) == (
            "reward.on_error = 'drop': rewards failed until fewer than 2 answers were left in 41 "
            "groups, for a step of 4; correct the reward, or set reward.on_error=zero"
        )

    asyncio.run(main())


class Slow(FakeEngine):
    """Has the first group wait until so many others have been dropped."""

    stream: Stream
    dropped = 9

    async def generate(self, prompt_tokens, sampling, *, request_id):
        if request_id.startswith("0/"):
            await until(lambda: len(self.stream.state().dropped) == self.dropped)
        return await super().generate(prompt_tokens, sampling, request_id=request_id)


def test_what_is_dropped_beyond_a_batch_is_not_its_own():
    async def main():
        engine = Slow(0)
        options = {"score": graded([0.5] * 4 + [0] * 9), "select": in_between, "limit": 3}
        engine.stream = stream = new_stream(engine, Counting(), eta=1, **options)
        (taken,) = await train(stream, engine, range(1))
        assert len(stream.state().dropped) == 9 and taken.dropped == ()
        assert [group.id for group in taken.groups] == ["0/p0", "1/p1", "2/p2", "3/p3"]

    asyncio.run(main())


def test_what_a_smaller_budget_has_no_room_for_waits_for_its_turn():
    """Resumed with a smaller batch, more was in flight than may be."""
    prompts = Counting()
    in_flight = {sequence: next(prompts) for sequence in range(4)}
    state = StreamState(prompts.state_dict(), 4, 0, {}, in_flight, {})

    async def main():
        engine = FakeEngine(0)
        options = {"score": graded([0.5, 0, 0, 0]), "select": in_between, "limit": 4}
        stream = new_stream(engine, Counting(), batch=1, state=state, **options)
        taken = await train(stream, engine, range(1))
        await asyncio.sleep(0.01)
        assert list(engine.started) == ["0/p0"]  # the others would be too old when it is their turn
        return summary(taken + await train(stream, engine, range(1, 2)))

    assert asyncio.run(main()) == [(["0/p0"], ()), (["4/p4"], (0, 0, 0))]


def test_a_restored_stream_goes_on_counting_to_the_limit():
    options = {"score": graded([0] * 99), "select": in_between, "limit": 3}

    async def first():
        stream = new_stream(FakeEngine(0), Counting(), **options)
        stream.set_version(0)
        while len(stream.state().dropped) < 5:
            await asyncio.sleep(0)
        state = stream.state()
        await stream.aclose()
        return state

    async def second(state):
        stream = new_stream(FakeEngine(1), Counting(), state=state, **options)
        stream.set_version(0)
        with pytest.raises(ValueError, match="for a step of 4, as 9 were dropped"):
            await stream.take(0)

    asyncio.run(second(asyncio.run(first())))


def test_a_failing_group_is_raised_at_once_and_ends_the_others():
    class Failing(FakeEngine):
        cancelled = 0

        async def generate(self, prompt_tokens, sampling, *, request_id):
            if request_id.startswith("2/"):
                await asyncio.sleep(0)  # let the others begin
                raise ConnectionError("no route to engine")
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise

    async def main():
        engine = Failing(0)
        stream = new_stream(engine, Counting())
        stream.set_version(0)
        for _ in range(2):  # and again, if asked again
            with pytest.raises(ConnectionError, match="no route"):
                await asyncio.wait_for(stream.take(0), timeout=30)
        await asyncio.sleep(0)
        assert engine.cancelled == 3

    asyncio.run(main())


def test_a_batch_out_of_turn_is_refused():
    async def main():
        engine = FakeEngine(0)
        stream = new_stream(engine, Counting())
        await train(stream, engine, range(2))
        with pytest.raises(ValueError, match="batch 2 is next"):
            await stream.take(1)
        with pytest.raises(ValueError, match=r"set_version\(2\)"):
            await stream.take(2)

    asyncio.run(main())


@pytest.mark.parametrize("options", [{}, {"score": luck, "select": in_between, "limit": 10}])
@pytest.mark.parametrize("eta", [0, 1, 2, 5])
def test_nothing_is_started_that_no_step_trains_on(eta, options):
    async def main():
        engine = FakeEngine(seed=eta)
        stream = new_stream(engine, Counting(), eta=eta, last=3, **options)
        taken = await train(stream, engine, range(3))
        engine.version = 3
        stream.set_version(3)  # the sync after the last step
        await asyncio.sleep(0.02)
        return engine, stream, taken

    engine, stream, taken = asyncio.run(main())
    assert summary(taken) == one_by_one([4] * 3, luck if options else graded([]))
    assert len(engine.started) == 12 + sum(len(each.dropped) for each in taken)
    assert not stream.state().finished and not stream.state().in_flight


def test_a_run_that_is_extended_starts_what_it_then_needs():
    async def main():
        engine = FakeEngine(0)
        stream = new_stream(engine, Counting(), eta=2, last=2)
        taken = await train(stream, engine, range(2))
        stream.set_version(2)
        again = new_stream(engine, Counting(), eta=2, last=4, state=stream.state())
        return taken + await train(again, engine, range(2, 4))

    assert summary(asyncio.run(main())) == one_by_one([4] * 4, graded([]))


def restored(eta, sampling=SAMPLING):
    """Resumed at version 3 with ``eta``: batches of 2, of which those of steps 3 to 5 were started
    under versions 1, 2 and 3 and are finished. What is trained on, and what was asked for anew."""
    prompts = Counting()
    started = {sequence: next(prompts) for sequence in range(12)}
    finished = {}
    for sequence in range(6, 12):
        version = sequence // 2 - 2
        one = Rollout(
            np.array([1], np.int32), np.array([-1], np.float32), ((version, 0, 1),), "stop", ""
        )
        prompt = started[sequence]
        finished[sequence] = Group(f"{sequence}/{prompt.id}", prompt, (one, one))
    state = StreamState(prompts.state_dict(), 12, 3, finished, {}, {}, made_by=(SAMPLING, None))

    async def main():
        engine = FakeEngine(0)
        stream = Stream(
            engine, prompts, score, sampling, batch=2, max_staleness=eta, state=state, last=7
        )
        taken = await train(stream, engine, range(3, 7))
        return taken, [int(name.partition("/")[0]) for name in engine.started]

    return asyncio.run(main())


@pytest.mark.parametrize("eta", [0, 1, 2])
def test_restored_groups_are_not_older_than_a_smaller_staleness_allows(eta):
    """All three batches would lag two versions when it is their turn."""
    taken, asked = restored(eta)
    assert sorted(asked) == ([12, 13] if eta == 2 else [6, 7, 8, 9, 10, 11, 12, 13])
    assert [g.id for g in groups_of(taken)] == [f"{i}/p{i}" for i in range(6, 14)]
    for step, each in enumerate(taken, start=3):
        versions = [v for g in each.groups for r in g.rollouts for v, _, _ in r.versions]
        assert step - min(versions) <= eta


def test_restored_groups_of_another_size_are_asked_for_anew():
    taken, asked = restored(2, Sampling(n=3, max_new_tokens=4))
    assert sorted(asked) == list(range(6, 14))
    assert {len(g.rollouts) for g in groups_of(taken)} == {3}
