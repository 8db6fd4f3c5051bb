"""The HTTP engine against a local server: choice of server, retries, errors, aborted answers."""

import asyncio
import pickle
import socket
import threading
import time

import httpx
import numpy as np
import pytest
from fake_sglang import FakeServer, answer_generate, sample

from peergrad.rollout.engine import Sampling
from peergrad.rollout.sglang import ServerError, SGLangEngine, parse_rollout, parse_scores

THREE = Sampling(n=3, max_new_tokens=8, stop_token_ids=(1,))


def generate(*urls, sampling=THREE, prompts=1, **options):
    """All groups' rollouts, the groups asked for at once."""

    async def main():
        engine = SGLangEngine(urls, **options)
        try:
            return await asyncio.gather(
                *(engine.generate([5, i], sampling, request_id=f"{i}/p") for i in range(prompts))
            )
        finally:
            await engine.aclose()

    return asyncio.run(main())


def test_a_group_is_one_request():
    with FakeServer() as server:
        (rollouts,) = generate(server.url)
    ((path, body),) = server.requests
    assert path == "/generate"
    assert body["input_ids"] == [5, 0]
    assert body["sampling_params"]["n"] == 3
    assert len(rollouts) == 3
    assert rollouts[0].tokens.tolist() == [5, 0, 1]
    assert rollouts[0].logprobs.tolist() == [-5.0, 0.0, -1.0]
    assert rollouts[0].logprobs.dtype == np.float32
    assert rollouts[0].versions == ((0, 0, 3),)
    assert rollouts[0].finish == "stop"


def test_a_single_answer_is_no_list():
    with FakeServer() as server:
        (rollouts,) = generate(server.url, sampling=Sampling(n=1, max_new_tokens=8))
    assert len(rollouts) == 1


def test_5xx_is_tried_again():
    answers = iter([(503, {"message": "busy"}), (500, {"message": "busy"})])
    with FakeServer(lambda body: next(answers, None) or answer_generate(body)) as server:
        (rollouts,) = generate(server.url)
    assert len(rollouts) == 3 and len(server.requests) == 3
    ids = [body["rid"] for _, body in server.requests]
    assert ids[0].endswith("/0/p/0")


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "too long"}},
        {"error": "too long"},
        {"message": "too long"},
        "too long",
    ],
)
def test_4xx_raises_at_once_with_the_servers_words(body):
    with (
        FakeServer(lambda _: (400, body)) as server,
        pytest.raises(ServerError, match=rf"{server.url}: /generate answered 400: \W*too long\W*$"),
    ):
        generate(server.url)
    assert len(server.requests) == 1


def test_a_dead_server_does_not_keep_its_groups():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        dead = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with FakeServer() as server:
        groups = generate(dead, server.url, prompts=4, retries=1)
    assert [len(group) for group in groups] == [3] * 4


def test_a_timeout_names_its_setting():
    def slow(body):
        time.sleep(0.5)
        return answer_generate(body)

    with (
        FakeServer(slow) as server,
        pytest.raises(ServerError, match=r"in 2 attempts.*rollout\.request_timeout") as error,
    ):
        generate(server.url, request_timeout=0.1, retries=1)
    assert isinstance(error.value.__cause__, httpx.ReadTimeout)
    assert error.value.url == server.url
    assert len(server.requests) == 2


def test_aborted_answers_are_drawn_again():
    def abort_two_of_three(body):
        if body["sampling_params"]["n"] == 3:
            return 200, [sample([7]), sample([8], finish="abort"), sample([], finish="abort")]
        return answer_generate(body)

    with FakeServer(abort_two_of_three) as server:
        (rollouts,) = generate(server.url)
    assert [body["sampling_params"]["n"] for _, body in server.requests] == [3, 2]
    assert [r.tokens.tolist() for r in rollouts] == [[7], [5, 0, 1], [5, 0, 1]]
    assert len({body["rid"] for _, body in server.requests}) == 2


def test_a_group_that_is_always_aborted_is_an_error():
    with (
        FakeServer(lambda _: (200, [sample([7], finish="abort")] * 3)) as server,
        pytest.raises(ServerError, match="aborted prompt 0/p 3 times"),
    ):
        generate(server.url, retries=2)
    assert len(server.requests) == 3


def test_groups_go_to_the_least_loaded_server_within_the_limit():
    running, peak, lock = 0, 0, threading.Lock()

    def slow(body):
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)
        time.sleep(0.1)
        with lock:
            running -= 1
        return answer_generate(body)

    with FakeServer(slow) as one, FakeServer(slow) as two:
        generate(one.url, two.url, prompts=8, max_concurrency=4)
    assert len(one.requests) == len(two.requests) == 4
    assert peak == 4


def test_a_missing_logprob_is_an_error():
    answer = sample([4, 5])
    answer["meta_info"]["output_token_logprobs"].pop()
    with pytest.raises(ServerError, match="2 tokens but logprobs of 1"):
        parse_rollout(answer)
    with pytest.raises(ServerError, match="asked to score 3 tokens, the server scored 2"):
        parse_scores({"meta_info": {"input_token_logprobs": [[None, 4, None], [-1, 5, None]]}}, 3)


def test_versions_are_numbered_spans_over_all_tokens():
    answer = sample([4, 5, 6])
    spans = [{"version": "3", "start": 0, "end": 2}, {"version": "4", "start": 2, "end": 3}]
    answer["meta_info"]["weight_versions"] = spans
    assert parse_rollout(answer).versions == ((3, 0, 2), (4, 2, 3))
    spans[1]["start"] = 1
    with pytest.raises(ServerError, match="do not cover the answer's 3 tokens"):
        parse_rollout(answer)
    with pytest.raises(ServerError, match="--weight-version 0"):
        parse_rollout(sample([4], version="default"))


def test_an_empty_answer_has_no_versions():
    assert parse_rollout(sample([], finish="length")).versions == ()


MINE = "runs/a:1-1f3a"


def answering(**changes):
    """A server's function: one sample whose meta_info or own fields are changed."""

    def answer(_):
        one = sample([4, 5])
        for key, value in changes.items():
            target = one if key in one else one["meta_info"]
            if value is None:
                del target[key]
            else:
                target[key] = value
        return 200, one

    return answer


def spans(*versions):
    """One token each."""
    return [{"version": v, "start": i, "end": i + 1} for i, v in enumerate(versions)]


ONE = Sampling(n=1, max_new_tokens=8)


def draw(versions, *, newest=4, identity=MINE):
    async def main(url):
        engine = SGLangEngine([url], identity=identity)
        engine.set_version(newest)
        try:
            return await engine.generate([5], ONE, request_id="p")
        finally:
            await engine.aclose()

    with FakeServer(answering(weight_versions=spans(*versions))) as server:
        try:
            return server.url, asyncio.run(main(server.url))[0], None
        except ServerError as error:
            return server.url, None, error


def test_inside_versions_are_numbers():
    _, rollout, _ = draw([f"{MINE}:3", f"{MINE}:4"])
    assert rollout.versions == ((3, 0, 1), (4, 1, 2))
    _, rollout, _ = draw(["other:9", "3"], identity=None, newest=9)
    assert rollout.versions == ((9, 0, 1), (3, 1, 2))


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        (
            [f"{MINE}:4", "other-1f3a:12"],
            "answered with weights of run 'other-1f3a' (version 12) while this run is at version 4"
            ": a server belongs to one run at a time; give each run servers of its own",
        ),
        (
            [f"{MINE}:4", f"{MINE}:5"],
            "answered with version 5 of this run's weights, while this process is at version 4: "
            "another process of the same run is alive; end one of them",
        ),
        (
            ["default", f"{MINE}:4"],
            "answered with weights 'default' that no run has pushed, while this run is at version "
            "4: the server was restarted or released by hand; resume this run to load its weights "
            "again",
        ),
    ],
)
def test_an_answer_with_other_weights_than_this_runs_is_an_error(versions, words):
    url, _, error = draw(versions)
    assert str(error) == f"{url}: {words}"
    assert error.url == url


def test_scores_with_another_runs_weights_are_an_error():
    async def main(url):
        engine = SGLangEngine([url], identity=MINE)
        try:
            await engine.score([4, 5])
        finally:
            await engine.aclose()

    scores = [[None, 4, None], [-1.0, 5, None]]
    answer = {"meta_info": {"input_token_logprobs": scores, "weight_version": "other:3"}}
    with (
        FakeServer(lambda _: (200, answer)) as server,
        pytest.raises(ServerError, match="weights of run 'other'"),
    ):
        asyncio.run(main(server.url))


@pytest.mark.parametrize(
    "answer",
    [
        answering(output_token_logprobs=None),
        answering(output_token_logprobs=[[None, 4, None], [-1.0, 5, None]]),
        answering(output_token_logprobs=[[-1.0, "x", None], [-1.0, 5, None]]),
        answering(output_token_logprobs=[3, 4]),
        answering(weight_versions=None),
        answering(weight_versions=[{"version": "0"}]),
        answering(finish_reason={}),
        answering(finish_reason={"type": "bored"}),
        answering(output_ids=None),
        lambda _: (200, {}),
        lambda _: (200, "Hello"),
        lambda _: (200, [7]),
        lambda _: (200, [sample([4])] * 2),
        lambda _: (200, []),
    ],
)
def test_a_malformed_answer_is_one_line_that_names_the_server(answer):
    with FakeServer(answer) as server, pytest.raises(ServerError) as error:
        generate(server.url, sampling=ONE)
    assert str(error.value).startswith(f"{server.url}: ")
    assert "\n" not in str(error.value)
    assert len(server.requests) == 1


def test_no_json_is_one_short_line(monkeypatch):
    page = "<html>\n" + "<p>Welcome\n" * 1000
    monkeypatch.setattr("fake_sglang.json.dumps", lambda content: page)
    with (
        FakeServer() as server,
        pytest.raises(ServerError, match=rf"{server.url}: .*no JSON.*is this an SGLang") as error,
    ):
        generate(server.url)
    assert len(str(error.value)) < 800 and "\n" not in str(error.value)


def nowhere():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def test_each_retry_is_told_in_the_log_and_a_dead_server_in_the_error(caplog):
    url = nowhere()
    caplog.set_level("INFO", logger="peergrad.rollout.sglang")
    with pytest.raises(ServerError) as error:
        generate(url, retries=2)
    assert str(error.value) == (
        f"{url}: no answer to /generate in 3 attempts (connection refused); see whether that "
        "server still runs, and its log"
    )
    told = [record.getMessage() for record in caplog.records]
    assert [text.partition(" of a")[0] for text in told] == ["retry 1 of 2", "retry 2 of 2"]
    assert all(text.endswith("s: connection refused") for text in told)


def test_a_dead_server_is_not_waited_for_however_many_retries_are_allowed(monkeypatch):
    monkeypatch.setattr("peergrad.rollout.sglang.GIVE_UP_SECONDS", 1.0)
    began = time.monotonic()
    with pytest.raises(ServerError, match="connection refused"):
        generate(nowhere(), retries=1000)
    assert time.monotonic() - began < 10


def test_a_hanging_server_is_not_asked_for_ever():
    def hang(_):
        time.sleep(0.6)
        return 200, {}

    with FakeServer(hang) as server, pytest.raises(ServerError, match="in 2 attempts"):
        generate(server.url, request_timeout=0.2, retries=1000)


def test_an_error_keeps_its_server_on_the_way_between_processes():
    error = pickle.loads(pickle.dumps(ServerError("http://a: bad\nnews", url="http://a")))
    assert (str(error), error.url) == ("http://a: bad news", "http://a")
