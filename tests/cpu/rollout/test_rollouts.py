"""What every rank sees: who drains the weights, where errors go, recording and replay."""

from pathlib import Path

import numpy as np
import pytest
import torch

from peergrad.data import Group, Prompt, Rollout
from peergrad.rollout.proof import Proof
from peergrad.rollout.rollouts import LiveRollouts, ReplayRollouts
from peergrad.rollout.stream import Taken

PROOF = Proof(version=3, verified=2, unverified=0, canary=None)


def on_this_rank(fn):
    """``share`` as rank 0 knows it."""
    return fn()


def from_rank_zero(result):
    """``share`` as the other ranks know it: ``fn`` is never run."""
    return lambda fn: result


def weights(log):
    for i in range(4):
        log.append(i)
        yield f"w{i}", torch.zeros(1)


class FakeSync:
    def __init__(self, fail_after=None, begun=lambda: None):
        self.fail_after = fail_after
        self.begun = begun

    def load(self, named, version):
        self.begun()
        for i, _ in enumerate(named):
            if i == self.fail_after:
                raise RuntimeError("http://one answered 400")
        return PROOF


class FakeCollector:
    def __init__(self, groups=()):
        self.groups = list(groups)
        self.versions = []

    def expect(self, version):
        self.expected = version

    def set_version(self, version):
        assert self.expected == version
        self.versions.append(version)

    def take(self, version):
        return Taken(self.groups, dropped=(0.0, 1.0))

    def state(self):
        return b"state"

    def close(self):
        pass


def new_group():
    tokens = np.array([3, 1], np.int32)
    rollout = Rollout(tokens, np.array([-0.1, -0.2], np.float32), ((0, 0, 2),), "stop", "x", 1.0)
    return Group("0/p", Prompt("p", tokens, "x", "y"), (rollout, rollout))


def live(share=on_this_rank, collector=None, sync=None, run_dir=Path("unused"), dump=False):
    return LiveRollouts(share, collector=collector, sync=sync, run_dir=run_dir, dump=dump)


def test_weights_reach_the_engine_before_the_collector_hears_of_them():
    collector, log = FakeCollector(), []
    assert live(collector=collector, sync=FakeSync()).load_weights(weights(log), 3) is PROOF
    assert collector.versions == [3] and log == [0, 1, 2, 3]


def test_answers_with_the_new_weights_may_come_before_the_sync_is_over():
    collector = FakeCollector()
    begun = lambda: collector.versions.append(f"expects {collector.expected}")  # noqa: E731
    live(collector=collector, sync=FakeSync(begun=begun)).load_weights(weights([]), 3)
    assert collector.versions == ["expects 3", 3]


def test_ranks_without_an_engine_drain_the_weights_too():
    log = []
    assert live(share=from_rank_zero(PROOF)).load_weights(weights(log), 3) is PROOF
    assert log == [0, 1, 2, 3]


def test_a_failing_server_leaves_no_rank_behind_in_a_collective():
    collector, log = FakeCollector(), []
    with pytest.raises(RuntimeError, match="http://one answered 400"):
        live(collector=collector, sync=FakeSync(fail_after=1)).load_weights(weights(log), 3)
    assert log == [0, 1, 2, 3]
    assert collector.versions == []


def test_a_recorded_step_is_replayed_as_it_was(tmp_path):
    group = new_group()
    rollouts = live(collector=FakeCollector([group]), run_dir=tmp_path, dump=True)
    assert rollouts.take(11) == Taken([group], dropped=(0.0, 1.0))
    assert rollouts.state() == b"state"
    assert (tmp_path / "rollouts/step_000012.parquet").exists()
    replayed = ReplayRollouts(tmp_path).take(11)
    (again,) = replayed.groups
    assert replayed.dropped == ()
    assert again.id == group.id
    assert again.rollouts[0].logprobs.tobytes() == group.rollouts[0].logprobs.tobytes()


def test_groups_are_recorded_on_demand_even_if_steps_are_not(tmp_path):
    rollouts = live(collector=FakeCollector([new_group()]), run_dir=tmp_path)
    groups = rollouts.take(0).groups
    assert not (tmp_path / "rollouts").exists()
    assert rollouts.dump(groups, 0).exists()


def test_replay_gathers_no_weights_and_names_what_is_missing(tmp_path):
    rollouts, log = ReplayRollouts(tmp_path), []
    rollouts.load_weights(weights(log), 1)
    assert log == []
    assert rollouts.evaluate(1) is None and rollouts.state() is None
    with pytest.raises(ValueError, match=r"rollout\.replay = .* has no record of step 1"):
        rollouts.take(0)
