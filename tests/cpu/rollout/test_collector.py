"""The collector process against a local stand-in for SGLang."""

import logging
import os
import re
import signal
import threading
import time
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
from fake_sglang import FakeServer, Hanging, answer_generate, sample

from peergrad.config import Config, FlatGroups, OnError, RewardConfig, SamplingConfig
from peergrad.data import Prompt
from peergrad.grades import Failure, Grade
from peergrad.rollout import collector as module
from peergrad.rollout.collector import Collector, Parts
from tests.waiting import until, wait_until


class Counting:
    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        return new_prompt(self.position - 1)

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class LastDigit:
    """Rewards answers whose prompt ends in an even token."""

    async def score(self, prompt, rollout):
        if prompt.id == "p666":
            raise ValueError("no grade for p666")
        return Grade(float(prompt.tokens[-1] % 2 == 0))

    def close(self):
        pass


class OddDiffer(LastDigit):
    """Rewards one answer of two if the prompt ends in an odd token, else both."""

    def __init__(self):
        self.graded = count()

    async def score(self, prompt, rollout):
        return Grade(float(prompt.tokens[-1] % 2 == 0 or next(self.graded) % 2))


class ByText(LastDigit):
    """Rewards what it reads; fails where the prompt ends in 1."""

    async def score(self, prompt, rollout):
        if prompt.tokens[-1] == 1:
            return Failure("value", "returned None, which is no number")
        return Grade(len(rollout.text), {"eos": float("<1>" in rollout.text)})


class Never(LastDigit):
    async def score(self, prompt, rollout):
        return Failure("error", "raised KeyError: 'x' (mine.py:7)")


def new_prompt(index):
    return Prompt(f"p{index}", np.array([5, index], np.int32), "", "")


def build(config, heard=str):
    return Parts(Counting(), [new_prompt(i) for i in range(8)], LastDigit(), (1,), decode)


def decode(answers):
    return ["".join(f"<{token}>" for token in answer) for answer in answers]


def build_by_text(config, heard=str):
    return replace(build(config), scorer=ByText())


def build_never(config, heard=str):
    return replace(build(config), scorer=Never())


def build_odd_differ(config, heard=str):
    return replace(build(config), scorer=OddDiffer())


def build_small(config, heard=str):
    return replace(build(config), vocab_size=7)


def build_badly(config, heard=str):
    raise FileNotFoundError("no such data set: nowhere.jsonl")


def build_from_666(config, heard=str):
    parts = build(config)
    parts.prompts.position = 666
    return parts


def new_config(**rollout):
    config = Config()
    config.rollout = replace(config.rollout, batch_size=6, group_size=2, **rollout)
    config.evaluation.prompts = 5
    return config


@pytest.fixture
def server():
    with FakeServer() as fake:
        yield fake


@pytest.fixture
def start(server):
    started = []

    def build_collector(parts=build, config=None, **options):
        collector = Collector(config or new_config(), [server.url], parts, **options)
        started.append(collector)
        return collector

    yield build_collector
    for collector in started:
        collector.close()
        assert not collector._process.is_alive()


def test_batches_evaluation_and_state(server, start):
    collector = start(config=new_config(max_staleness=1))
    collector.set_version(0)
    groups = collector.take(0).groups
    assert [g.id for g in groups] == ["0/p0", "1/p1", "2/p2"]
    assert groups[1].rollouts[0].tokens.tolist() == [5, 1, 1]
    assert [g.rewards.tolist() for g in groups] == [[1, 1], [0, 0], [1, 1]]
    assert server.requests[0][1]["sampling_params"]["stop_token_ids"] == [1]

    result = collector.evaluate(1)
    assert (result.version, result.prompts, result.pass_rate) == (1, 5, 0.6)
    assert (result.mean_reward, result.mean_length, result.truncated) == (0.6, 3.0, 0.0)
    assert server.requests[-1][1]["sampling_params"]["temperature"] == 0.0

    collector.set_version(1)
    state = collector.state()
    collector.close()
    resumed = start(config=new_config(max_staleness=1), state=state)
    resumed.set_version(1)
    assert [g.id for g in resumed.take(1).groups] == ["3/p3", "4/p4", "5/p5"]


def test_after_the_last_step_nothing_is_asked_for(server, start):
    config = new_config(max_staleness=2)
    config.run.steps = 2
    collector = start(config=config)
    for step in range(2):
        collector.set_version(step)
        collector.take(step)
    collector.set_version(2)
    assert collector.evaluate(2).prompts == 5  # time enough for others
    asked = [body["rid"].split("/", 1)[1] for _, body in server.requests]
    assert sum(not rid.startswith("evaluation/") for rid in asked) == 6


def sampling_config(**sampling):
    config = new_config()
    config.algo.sampling = SamplingConfig(**sampling)
    return config


def test_dynamic_sampling_replaces_groups_of_equal_rewards(start):
    collector = start(build_odd_differ, sampling_config(dynamic=True))
    collector.set_version(0)
    taken = collector.take(0)
    assert [g.id for g in taken.groups] == ["1/p1", "3/p3", "5/p5"]
    assert [g.rewards.tolist() for g in taken.groups] == [[0, 1]] * 3
    assert taken.dropped == (1, 1, 1)
    assert collector.evaluate(1).prompts == 5


def test_dynamic_sampling_gives_up_at_its_limit(start):
    collector = start(config=sampling_config(dynamic=True, limit=4))
    collector.set_version(0)
    with pytest.raises(ValueError, match=r"^algo\.sampling\.limit = 4: more than 12 groups"):
        collector.take(0)


def test_without_it_such_groups_are_left_to_the_trainer(start):
    collector = start(config=sampling_config(flat_groups=FlatGroups.drop))
    collector.set_version(0)
    taken = collector.take(0)
    assert [g.id for g in taken.groups] == ["0/p0", "1/p1", "2/p2"] and taken.dropped == ()


def test_rewards_read_the_tokens_that_were_sampled(start, caplog):
    """Not the engine's text, which lacks special tokens; the end token is left off."""
    collector = start(build_by_text)
    collector.set_version(0)
    taken = collector.take(0)
    assert [g.rollouts[0].text for g in taken.groups] == ["<5><0>", "<5><1>", "<5><2>"]
    assert [g.rewards.tolist() for g in taken.groups] == [[6, 6], [0, 0], [6, 6]]
    assert taken.grading == {
        **{"reward/failed": 1 / 3, "reward/failed_value": 1 / 3, "reward_part/eos": 0.0},
        **{f"reward/failed_{kind}": 0.0 for kind in ("error", "timeout", "crash")},
    }
    assert caplog.text.count("step 1: 2 of 6 rewards failed (value 2) and count as 0: that of") == 1
    result = collector.evaluate(1)  # p0 to p4, greedy
    assert result.grading["reward/failed"] == 0.2 and result.mean_reward == 24 / 5


def test_failed_answers_can_be_left_out(start):
    config = new_config()
    config.reward = RewardConfig(on_error=OnError.drop)
    collector = start(build_by_text, config)
    collector.set_version(0)
    taken = collector.take(0)
    assert [g.id for g in taken.groups] == ["0/p0", "2/p2", "3/p3"]  # p1 has no answer left
    assert taken.grading["reward/failed"] == 0.25
    assert collector.evaluate(1).mean_reward == 6


def test_a_reward_that_never_works_ends_the_run_in_its_first_step(start):
    collector = start(build_never)
    collector.set_version(0)
    rule = (
        r"^reward\.kind = 'arithmetic': all 6 rewards of a step failed \(error 6\), that of a "
        r"rollout of p\d raised KeyError: 'x' \(mine\.py:7\); its text ends '<5><\d>'; correct it"
    )
    with pytest.raises(RuntimeError, match=rule):
        collector.take(0)


def test_or_in_its_first_evaluation(start):
    collector = start(build_never)
    with pytest.raises(RuntimeError, match="all 5 rewards of an evaluation failed"):
        collector.evaluate(0)


def test_an_error_comes_with_its_message_and_the_log_has_its_traceback(start, caplog):
    caplog.set_level("INFO")
    collector = start(build_from_666)
    collector.set_version(0)
    with pytest.raises(ValueError, match=r"^no grade for p666$"):
        collector.take(0)
    assert re.search(
        r"(?s)in the collector process:\n.*in score.*ValueError: no grade", caplog.text
    )


def test_an_error_while_building_comes_with_the_first_call(start):
    collector = start(build_badly)
    with pytest.raises(
        RuntimeError, match=r"^FileNotFoundError: no such data set: nowhere\.jsonl$"
    ):
        collector.ready()


def test_so_does_a_state_that_cannot_be_restored(start):
    collector = start(state=b"no state")
    with pytest.raises(RuntimeError, match=r"^UnpicklingError: "):
        collector.ready()


class Slow(LastDigit):
    """Waits for the file ``GO`` with every answer of the second prompt, of which it warns; the
    third fails."""

    async def score(self, prompt, rollout):
        if prompt.id == "p1":
            logging.getLogger("rewards").warning("100 % slow")
            await until(lambda: os.path.exists(os.environ["GO"]))
        return Failure("error", "raised") if prompt.id == "p2" else Grade(0.0)


def build_slow(config, heard=str):
    heard("2 of 5 files")
    return replace(build(config), scorer=Slow())


def test_one_hears_how_far_it_is_and_what_is_wrong(start, caplog, tmp_path, monkeypatch):
    """Warnings come through the trainer, which alone writes to the screen."""
    monkeypatch.setenv("GO", str(tmp_path / "go"))
    collector, heard = start(build_slow), []
    collector.heard = heard.append
    collector.ready()
    assert heard[0] == "2 of 5 files"

    def hear(text):
        if text == "2 of 3 groups, 1 in flight":
            (tmp_path / "go").touch()

    collector.heard = hear
    collector.set_version(0)
    taken = collector.take(0)
    assert "100 % slow" in caplog.text
    assert taken.grading["reward/failed"] == taken.grading["reward/failed_error"] == 1 / 3
    collector.set_version(1)
    assert collector.take(1).grading["reward/failed"] == 0


def test_a_dead_process_is_noticed(server, start):
    collector = start()
    collector.set_version(0)
    os.kill(collector._process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="collector process ended with exit code -9"):
        collector.take(0)


def test_ctrl_c_is_left_to_the_trainer(start):
    collector = start()
    collector.set_version(0)
    os.kill(collector._process.pid, signal.SIGINT)
    assert len(collector.take(0).groups) == 3


def test_waiting_can_be_given_up_and_loses_nothing():
    """The groups that were ready are still there, those in flight are asked for again; what was
    there before the wish is not lost, either."""
    hold = [True]

    def answer(body):
        while hold[0] and body["rid"].split("/", 1)[1].startswith(("1/", "evaluation")):
            time.sleep(0.01)
        return answer_generate(body)

    with FakeServer(answer) as server:
        collector = Collector(new_config(), [server.url], build)
        try:
            collector.set_version(0)
            heard = []
            collector.heard = heard.append
            ready = lambda: heard and heard[-1].startswith("2 of 3")  # noqa: E731
            assert collector.take(0, until=ready) is None
            state = collector.state()
            asked = lambda: [body["rid"].split("/")[1] for _, body in server.requests]  # noqa: E731
            assert collector.evaluate(0, until=lambda: asked().count("evaluation") == 5) is None
            hold[0] = False
            time.sleep(0.5)  # for the group in flight
            taken = collector.take(0, until=lambda: True)
            assert taken is None or [g.id for g in taken.groups] == ["0/p0", "1/p1", "2/p2"]
        finally:
            collector.close()
        resumed = Collector(new_config(), [server.url], build, state=state)
        before = len(server.requests)
        try:
            resumed.set_version(0)
            assert [g.id for g in resumed.take(0).groups] == ["0/p0", "1/p1", "2/p2"]
        finally:
            resumed.close()
        asked = [body["rid"].split("/", 1)[1] for _, body in server.requests[before:]]
        assert [rid.split("/")[0] for rid in asked] == ["1"]


def test_the_groups_signals_are_the_trainers(start):
    collector = start()
    collector.set_version(0)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(collector._process.pid, number)
    assert len(collector.take(0).groups) == 3


def test_a_server_that_dies_in_the_middle_is_an_error_not_a_hang():
    answers = count()

    def two_then_refuse(body):
        return answer_generate(body) if next(answers) < 2 else (400, {"message": "out of memory"})

    with FakeServer(two_then_refuse) as server:
        collector = Collector(new_config(), [server.url], build)
        try:
            collector.set_version(0)
            with pytest.raises(RuntimeError, match="answered 400: out of memory"):
                collector.take(0)
        finally:
            collector.close()


def test_a_managed_server_that_died_ends_the_wait_at_once():
    words, over = [], threading.Event()

    def slow(body):
        words.append("server 0 was ended by SIGKILL")  # from now on
        over.wait(60)
        return 200, [sample([7])] * 2

    with FakeServer(slow) as server:
        ended = lambda wait: dict(zip([server.url], words, strict=False))  # noqa: E731
        collector = Collector(new_config(), [server.url], build, ended=ended)
        try:
            collector.set_version(0)
            with pytest.raises(RuntimeError, match=r"^server 0 was ended by SIGKILL$"):
                collector.take(0)
        finally:
            over.set()
            collector.close()


def test_only_answers_with_this_runs_weights_are_taken():
    version = ["a:0"]

    def answer(body):
        return 200, [sample([7], version=version[0])] * body["sampling_params"]["n"]

    with FakeServer(answer) as server:
        collector = Collector(new_config(), [server.url], build, identity="a")
        try:
            for step in range(2):
                version[0] = f"a:{step}"
                collector.expect(step)
                collector.set_version(step)
                collector.take(step)
            version[0] = "b:2"
            collector.set_version(2)
            with pytest.raises(RuntimeError, match=rf"{server.url}: .*run 'b' \(version 2\)"):
                collector.take(2)
        finally:
            collector.close()


def test_a_server_that_missed_a_sync_is_named():
    """It answers with weights of this run that the others no longer have."""

    def answer(body):
        return 200, [sample([7], version="a:0")] * body["sampling_params"]["n"]

    with FakeServer(answer) as server:
        collector = Collector(new_config(max_staleness=5), [server.url], build, identity="a")
        try:
            collector.expect(5)
            collector.set_version(5)
            with pytest.raises(RuntimeError) as error:
                collector.take(5)
            assert str(error.value) == (
                f"{server.url}: answered with version 0 of this run's weights to a request of "
                "version 5, so it has missed a weight sync: was the server restarted?; resume this "
                "run to load its weights again"
            )
        finally:
            collector.close()


def test_the_models_vocabulary_is_known():
    with FakeServer(lambda body: (200, [sample([7])] * 2)) as server:
        collector = Collector(new_config(), [server.url], build_small)
        try:
            collector.set_version(0)
            with pytest.raises(RuntimeError, match="answered with token id 7, while the model's"):
                collector.take(0)
        finally:
            collector.close()


def test_a_trainer_interrupted_while_it_waits_can_close_at_once(monkeypatch):
    monkeypatch.setattr(module, "GRACE_SECONDS", 120.0)
    with Hanging() as server:
        collector = Collector(new_config(), [server.url], build)
        collector.set_version(0)
        collector._connection.send(("take", (0,)))  # the answer will not be waited for
        wait_until(lambda: server.requests)
        collector.close()
        assert collector._process.exitcode == 0  # it ended by itself
