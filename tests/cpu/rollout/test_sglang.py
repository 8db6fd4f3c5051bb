"""The HTTP engine against a local server: choice of server, retries, errors, aborted answers."""

import asyncio
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
        pytest.raises(ServerError, match=rf"{server.url}/generate answered 400: \W*too long"),
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
        pytest.raises(ServerError, match="0/p was aborted 3 times"),
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
