"""What every rank sees: who drains the weights, where errors go, recording and replay."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from peergrad.data import Group, Prompt, Rollout
from peergrad.recording import read_groups
from peergrad.rollout.errors import LoadAgain
from peergrad.rollout.proof import Proof
from peergrad.rollout.rollouts import LiveRollouts, ReplayRollouts, recorded
from peergrad.rollout.stream import Taken
from peergrad.storage import StorageError

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
    def __init__(self, fail_after=None, error=None, begun=lambda: None, times=1):
        self.fail_after = fail_after
        self.error = error or RuntimeError("http://one answered 400")
        self.begun = begun
        self.times = times
        self.urls = ["http://two"]

    def load(self, named, version):
        self.begun()
        for i, _ in enumerate(named):
            if i == self.fail_after and self.times:
                self.times -= 1
                raise self.error
        return PROOF


class FakeCollector:
    def __init__(self, groups=()):
        self.groups = list(groups)
        self.versions = []

    def expect(self, version):
        self.expected = version

    def set_version(self, version, urls):
        assert self.expected == version
        self.versions.append(version)
        self.urls = urls

    def take(self, version, until):
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
    assert live(collector=collector, sync=FakeSync()).load_weights(lambda: weights(log), 3) is PROOF
    assert collector.versions == [3] and log == [0, 1, 2, 3]


def test_answers_with_the_new_weights_may_come_before_the_sync_is_over():
    collector = FakeCollector()
    begun = lambda: collector.versions.append(f"expects {collector.expected}")  # noqa: E731
    live(collector=collector, sync=FakeSync(begun=begun)).load_weights(lambda: weights([]), 3)
    assert collector.versions == ["expects 3", 3]


def test_ranks_without_an_engine_drain_the_weights_too():
    log = []
    assert live(share=from_rank_zero(PROOF)).load_weights(lambda: weights(log), 3) is PROOF
    assert log == [0, 1, 2, 3]


def test_a_failing_server_leaves_no_rank_behind_in_a_collective():
    collector, log = FakeCollector(), []
    with pytest.raises(RuntimeError, match="http://one answered 400"):
        live(collector=collector, sync=FakeSync(fail_after=1)).load_weights(lambda: weights(log), 3)
    assert log == [0, 1, 2, 3]
    assert collector.versions == []


def test_weights_are_loaded_again_without_a_server_that_was_lost():
    collector, log = FakeCollector(), []
    sync = FakeSync(fail_after=1, error=LoadAgain("http://one was lost"))
    assert live(collector=collector, sync=sync).load_weights(lambda: weights(log), 3) is PROOF
    assert log == [0, 1, 2, 3] * 2  # every rank drains both, for each is collective
    assert (collector.versions, collector.urls) == ([3], ["http://two"])


def test_servers_that_come_and_go_do_not_hold_a_run_for_ever():
    sync = FakeSync(fail_after=0, error=LoadAgain("http://one was away"), times=1000)
    with pytest.raises(LoadAgain, match="http://one was away"):
        live(collector=FakeCollector(), sync=sync).load_weights(lambda: weights([]), 3)


def test_a_recorded_step_is_replayed_as_it_was(tmp_path):
    group = new_group()
    rollouts = live(collector=FakeCollector([group]), run_dir=tmp_path, dump=True)
    taken = rollouts.take(11)
    assert (taken.groups, taken.dropped) == ([group], (0.0, 1.0))
    assert set(taken.grading) == {"time/rollout/wait", "time/rollout/record"}
    assert rollouts.state() == b"state"
    assert (tmp_path / "rollouts/step_000012.parquet").exists()
    replayed = ReplayRollouts(tmp_path).take(11)
    (again,) = replayed.groups
    assert replayed.dropped == ()
    assert again.id == group.id
    assert again.rollouts[0].logprobs.tobytes() == group.rollouts[0].logprobs.tobytes()


class Gate:
    """``write_groups`` that waits until it may, and then perhaps fails."""

    def __init__(self, monkeypatch, error=None):
        self.open, self.error, self.written = threading.Event(), error, []
        monkeypatch.setattr("peergrad.rollout.recorder.write_groups", self)

    def __call__(self, path, groups, *, step):
        assert self.open.wait(10)
        if self.error is not None:
            raise self.error
        self.written.append((path.name, step))


def test_training_does_not_wait_for_the_recording_but_a_checkpoint_does(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    rollouts = live(collector=FakeCollector([new_group()]), run_dir=tmp_path, dump=True)
    rollouts.take(0)
    assert gate.written == []
    threading.Timer(0.1, gate.open.set).start()
    rollouts.take(1)  # one file at a time
    assert gate.written[0] == ("step_000001.parquet", 1)
    rollouts.state()
    assert gate.written == [("step_000001.parquet", 1), ("step_000002.parquet", 2)]


@pytest.mark.parametrize("ask", ["take", "state", "dump"])
def test_a_recording_that_failed_is_told_by_whatever_comes_next(tmp_path, monkeypatch, ask):
    line = "rollouts = 'x': cannot be written, the disk has too little space; free some space"
    gate = Gate(monkeypatch, StorageError(line))
    gate.open.set()
    rollouts = live(collector=FakeCollector([new_group()]), run_dir=tmp_path, dump=True)
    taken = rollouts.take(0)
    asked = {"take": (1,), "state": (), "dump": (taken.groups, 0)}[ask]
    with pytest.raises(StorageError) as error:
        getattr(rollouts, ask)(*asked)
    assert str(error.value) == line


def test_closing_finishes_the_recording_and_hides_no_other_error(tmp_path, monkeypatch, caplog):
    rollouts = live(collector=FakeCollector([new_group()]), run_dir=tmp_path, dump=True)
    rollouts.take(0)
    rollouts.close()
    assert len(read_groups(recorded(tmp_path, 0))) == 1
    rollouts.close()
    gate = Gate(monkeypatch, StorageError("rollouts = 'x': cannot be written"))
    gate.open.set()
    rollouts = live(collector=FakeCollector([new_group()]), run_dir=tmp_path, dump=True)
    rollouts.take(0)
    rollouts.close()
    assert [r.getMessage() for r in caplog.records] == ["rollouts = 'x': cannot be written"]


def test_recordings_of_an_earlier_peergrad_are_named(tmp_path):
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "step_000001.jsonl.zst").touch()
    with pytest.raises(ValueError) as error:
        ReplayRollouts(tmp_path).take(0)
    assert str(error.value) == (
        f"rollout.replay = {str(tmp_path)!r}: has step_000001.jsonl.zst of an earlier peergrad, "
        "which this one does not read; lower run.steps, or replay it with that version, or record "
        "the run again"
    )


def test_groups_are_recorded_on_demand_even_if_steps_are_not(tmp_path):
    rollouts = live(collector=FakeCollector([new_group()]), run_dir=tmp_path)
    groups = rollouts.take(0).groups
    assert not (tmp_path / "rollouts").exists()
    assert rollouts.dump(groups, 0).exists()


def test_replay_gathers_no_weights_and_names_what_is_missing(tmp_path):
    rollouts, log = ReplayRollouts(tmp_path), []
    rollouts.load_weights(lambda: weights(log), 1)
    assert log == []
    assert rollouts.evaluate(1) is None and rollouts.state() is None
    with pytest.raises(ValueError, match=r"rollout\.replay = .* has no record of step 1"):
        rollouts.take(0)
