"""The stream against a fake engine: staleness bound, order, errors, restore."""

import asyncio
import pickle
import random

import numpy as np
import pytest

from peergrad.data import Group, Prompt, Rollout
from peergrad.rollout.engine import Sampling
from peergrad.rollout.stream import Stream

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

    def __init__(self, seed: int) -> None:
        self.version = 0
        self.started: dict[str, int] = {}
        self._random = random.Random(seed)

    async def generate(self, prompt_tokens, sampling, *, request_id):
        self.started[request_id] = version = self.version
        await asyncio.sleep(self._random.random() * 0.003)
        tokens = np.array([1], np.int32)
        rollout = Rollout(tokens, tokens * np.float32(-1), ((version, 0, 1),), "stop", request_id)
        return [rollout] * sampling.n


async def score(prompt: Prompt, rollout: Rollout) -> float:
    await asyncio.sleep(0)
    return 1.0


def new_stream(engine, prompts, *, batch=4, eta=0, state=None) -> Stream:
    return Stream(engine, prompts, score, SAMPLING, batch=batch, max_staleness=eta, state=state)


async def train(stream: Stream, engine: FakeEngine, steps: range) -> list[Group]:
    groups = []
    for step in steps:
        engine.version = step
        stream.set_version(step)
        groups += await stream.take(step)
    return groups


@pytest.mark.parametrize("eta", [0, 1, 2])
def test_groups_come_in_prompt_order_and_never_staler_than_allowed(eta):
    async def main():
        engine = FakeEngine(seed=eta)
        stream = new_stream(engine, Counting(), eta=eta)
        groups = await train(stream, engine, range(6))
        await stream.aclose()
        return engine, groups

    engine, groups = asyncio.run(main())
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


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("eta", [0, 2])
def test_a_restored_stream_loses_and_repeats_nothing(eta, seed):
    """A run cut at a random point and resumed trains on the very prompts of an uncut one."""
    cut = random.Random(seed).randrange(1, 6)

    async def first():
        engine = FakeEngine(seed)
        stream = new_stream(engine, Counting(), eta=eta)
        groups = await train(stream, engine, range(cut))
        stream.set_version(cut)
        await asyncio.sleep(random.Random(seed).random() * 0.003)
        state = pickle.dumps(stream.state())
        await stream.aclose()
        return groups, state

    async def second(state):
        engine = FakeEngine(seed + 1)
        stream = new_stream(engine, Counting(), eta=eta, state=pickle.loads(state))
        await asyncio.sleep(0.01)
        assert not engine.started  # nothing before the engine has the weights
        groups = await train(stream, engine, range(cut, 8))
        await stream.aclose()
        return groups

    groups, state = asyncio.run(first())
    groups += asyncio.run(second(state))
    assert [g.id for g in groups] == [f"{i}/p{i}" for i in range(32)]


def test_resuming_with_another_batch_size_or_staleness_neither_stalls_nor_skips():
    async def first():
        engine = FakeEngine(0)
        stream = new_stream(engine, Counting(), batch=4, eta=2)
        await train(stream, engine, range(3))
        return stream.state()

    async def second(state):
        engine = FakeEngine(0)
        stream = new_stream(engine, Counting(), batch=3, eta=0, state=state)
        return await train(stream, engine, range(3, 10))

    groups = asyncio.run(second(asyncio.run(first())))
    assert [g.id for g in groups] == [f"{i}/p{i}" for i in range(12, 12 + 7 * 3)]


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
                await asyncio.wait_for(stream.take(0), timeout=1)
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
