"""The HTTP engine against a local server: choice of server, retries, errors, aborted answers."""

import asyncio
import json
import math
import pickle
import re
import socket
import threading
import time
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import aiohttp
import numpy as np
import pytest
from fake_sglang import FakeServer, Hanging, Vanishing, answer_generate, sample, wanted

from peergrad.rollout.answers import Asked, parse_rollout, parse_scores, read_answers
from peergrad.rollout.engine import Sampling
from peergrad.rollout.sglang import ServerError, SGLangEngine
from tests.waiting import until, wait_until

THREE = Sampling(n=3, max_new_tokens=8, stop_token_ids=(1,))


LONG = 40  # tokens of a prompt that is asked for alone


def generate(*urls, sampling=THREE, prompts=1, more=0, **options):
    """All groups' rollouts, the groups asked for at once; prompts have 2 + ``more`` tokens."""
    asked = [([7] * more + [5, i], f"{i}/p") for i in range(prompts)]

    async def main():
        engine = SGLangEngine(urls, **options)
        try:
            return await asyncio.gather(
                *(engine.generate(prompt, sampling, request_id=name) for prompt, name in asked)
            )
        finally:
            await engine.aclose()

    return asyncio.run(main())


def test_a_group_is_one_request():
    """If its prompt is long: the server computes it once."""
    with FakeServer() as server:
        two = generate(server.url, prompts=2, more=LONG, sampling=replace(THREE, max_new_tokens=64))
    assert [len(rollouts) for rollouts in two] == [3, 3]
    for index, (path, body) in enumerate(sorted(server.requests, key=lambda r: r[1]["rid"])):
        assert path == "/generate"
        assert body["input_ids"] == [7] * LONG + [5, index]
        assert body["sampling_params"]["n"] == 3
        assert body["rid"].endswith(f"/{index}/p/0")


def test_short_groups_share_a_request():
    """43 of 192 tokens each are two requests; every group gets its own prompt's answers."""
    with FakeServer() as server:
        groups = generate(server.url, prompts=43, sampling=replace(THREE, max_new_tokens=64))
    assert [len(body["input_ids"]) for _, body in server.requests] in ([126, 3], [3, 126])
    for index, rollouts in enumerate(groups):
        assert [rollout.tokens.tolist() for rollout in rollouts] == [[5, index, 1]] * 3
    ids = [rid for _, body in server.requests for rid in body["rid"]]
    assert len(set(ids)) == len(ids) == 3 * 43
    assert all(body["sampling_params"]["n"] == 1 for _, body in server.requests)
    rollouts = groups[0]
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
    assert ids[0] == ids[2] and ids[0][0].endswith("/0/p/0/0")


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


@pytest.fixture
def hanging(monkeypatch):
    """A server that answers nothing; a request there times out after 0.1 s, and by the clock of the
    retries no earlier and no later."""
    clock = count(0, 0.1)  # read at the start, and at the end of every attempt
    monkeypatch.setattr("tenacity.time", SimpleNamespace(monotonic=clock.__next__))
    with Hanging() as server:
        yield server


def test_a_timeout_names_its_setting(hanging):
    with pytest.raises(ServerError, match=r"in 2 attempts.*rollout\.request_timeout") as error:
        generate(hanging.url, request_timeout=0.1, retries=1)
    assert isinstance(error.value.__cause__, aiohttp.SocketTimeoutError)
    assert error.value.url == hanging.url
    wait_until(lambda: len(hanging.requests) == 2)


def test_a_hanging_server_is_not_asked_for_ever(hanging):
    with pytest.raises(ServerError, match="in 2 attempts"):
        generate(hanging.url, request_timeout=0.1, retries=1000)


def test_aborted_answers_are_drawn_again():
    def abort_two_of_three(body):
        if len(body["input_ids"]) == 3:
            return 200, [sample([7]), sample([8], finish="abort"), sample([], finish="abort")]
        return answer_generate(body)

    with FakeServer(abort_two_of_three) as server:
        (rollouts,) = generate(server.url)
    assert [len(body["input_ids"]) for _, body in server.requests] == [3, 2]
    assert [r.tokens.tolist() for r in rollouts] == [[7], [5, 0, 1], [5, 0, 1]]
    assert len({rid for _, body in server.requests for rid in body["rid"]}) == 5


def test_a_group_that_is_always_aborted_is_an_error():
    with (
        FakeServer(lambda _: (200, [sample([7], finish="abort")] * 3)) as server,
        pytest.raises(ServerError, match="aborted prompt 0/p 3 times"),
    ):
        generate(server.url, retries=2)
    assert len(server.requests) == 3


def test_groups_go_to_the_least_loaded_server_within_the_limit():
    """Every answer is held until it may go; those of one server go first, so that whatever is
    asked for next belongs to that one."""

    def held(gate):
        return lambda body: gate.acquire() and answer_generate(body)

    async def main(one, two):
        engine = SGLangEngine([one.url, two.url], max_concurrency=4)
        sampling, prompt = replace(THREE, max_new_tokens=64), [7] * LONG
        groups = asyncio.gather(
            *(engine.generate([*prompt, i], sampling, request_id=f"{i}/p") for i in range(8))
        )
        for asked in ((2, 2), (3, 2), (4, 2), (5, 2), (6, 2)):
            await until(lambda asked=asked: len(one.requests + two.requests) >= sum(asked))
            assert (len(one.requests), len(two.requests)) == asked
            gates[0].release()
        for gate in gates:
            gate.release(2)
        assert [len(group) for group in await groups] == [3] * 8
        await engine.aclose()

    gates = [threading.Semaphore(0), threading.Semaphore(0)]
    with FakeServer(held(gates[0])) as one, FakeServer(held(gates[1])) as two:
        asyncio.run(main(one, two))


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
    spans[:] = [{"version": 3, "start": a, "end": b} for a, b in ((0, 3), (3, 2), (2, 3))]
    with pytest.raises(ServerError, match="do not cover the answer's 3 tokens"):
        parse_rollout(answer)
    with pytest.raises(ServerError, match="--weight-version 0"):
        parse_rollout(sample([4], version="default"))


def test_an_aborted_answer_is_none_whatever_there_is_of_it():
    """SGLang leaves out what it had not begun: logprobs, versions, even tokens."""
    cut = sample([4, 5], finish="abort")
    cut["meta_info"]["output_token_logprobs"].pop()
    bare = {"meta_info": {"finish_reason": {"type": "abort", "message": "Abort in queue"}}}
    for answer in (sample([], finish="abort"), sample([7], finish="abort"), cut, bare):
        assert parse_rollout(answer) is None


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


def draw(versions, *, held=3, newest=4, identity=MINE):
    """Of servers that hold the weights ``held`` and are about to get ``newest``."""

    async def main(url):
        engine = SGLangEngine([url], identity=identity)
        engine.set_version(held)
        engine.expect(newest)
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
        (
            [f"{MINE}:4", f"{MINE}:0"],
            "answered with version 0 of this run's weights to a request of version 3, so it has "
            "missed a weight sync: was the server restarted?; resume this run to load its weights "
            "again",
        ),
    ],
)
def test_an_answer_with_other_weights_than_this_runs_is_an_error(versions, words):
    url, _, error = draw(versions)
    assert str(error) == f"{url}: {words}"
    assert error.url == url


def test_an_answer_over_a_sync_has_both_versions_and_no_older_one():
    """Asked for at version 4 and retracted by the sync of version 5: a token of 3 is none of its
    own. What is asked for after the sync has tokens of 5 alone."""

    synced = threading.Event()

    async def main(server):
        synced.clear()
        engine = SGLangEngine([server.url], identity=MINE)
        engine.set_version(4)
        asked = asyncio.create_task(engine.generate([5], ONE, request_id="p"))
        await until(lambda: server.requests)
        engine.expect(5)
        engine.set_version(5)
        synced.set()
        try:
            (rollout,) = await asked
            with pytest.raises(ServerError, match=r"version 4 of .* to a request of version 5, so"):
                await engine.generate([5], ONE, request_id="q")
            return rollout
        finally:
            await engine.aclose()

    def held(*versions):
        answer = answering(weight_versions=spans(*versions))
        return lambda body: synced.wait() and answer(body)

    with FakeServer(held(f"{MINE}:4", f"{MINE}:5")) as server:
        assert asyncio.run(main(server)).versions == ((4, 0, 1), (5, 1, 2))
    with (
        FakeServer(held(f"{MINE}:3", f"{MINE}:5")) as server,
        pytest.raises(ServerError, match=r"version 3 of .* to a request of version 4"),
    ):
        asyncio.run(main(server))


STOPPED = {"type": "stop", "matched": 5}
ASKED = Asked(max_new_tokens=4, vocab_size=6)


def altered(**changes):
    """``answering``'s sample of the tokens 4 and 5, and what the parser says of it."""
    with pytest.raises(ServerError) as error:
        parse_rollout(answering(**changes)(None)[1], url="URL", asked=ASKED)
    assert "\n" not in str(error.value) and error.value.url == "URL"
    return str(error.value)


@pytest.mark.parametrize("wrong", [math.nan, -math.inf, math.inf, 0.01, -3.4e38, "null"])
def test_what_is_no_log_probability_is_refused(wrong):
    wrong = None if wrong == "null" else wrong
    said = "null" if wrong is None or math.isnan(wrong) else wrong
    line = (
        f"URL: answered with logprob {said} for token 2 of 2, which is no log probability: its "
        "weights or its kernels are broken; see its log, or lower optim.lr and resume from an "
        "earlier checkpoint"
    )
    assert altered(output_token_logprobs=[[-4.0, 4, None], [wrong, 5, None]]) == line
    scores = {
        "meta_info": {"input_token_logprobs": [[None, 3, None], [-4, 4, None], [wrong, 5, None]]}
    }
    with pytest.raises(ServerError) as error:
        parse_scores(scores, 3, url="URL")
    assert str(error.value) == line


def test_rounding_above_0_is_none():
    scored = [[5e-4, 4, None], [-200, 5, None]]
    answer = answering(output_token_logprobs=scored, finish_reason=STOPPED)(None)[1]
    assert parse_rollout(answer, asked=ASKED).logprobs.tolist() == pytest.approx([5e-4, -200])


def test_a_null_from_the_wire_is_refused_whatever_else_is_in_the_answer():
    null = answering(output_token_logprobs=[[None, 4, None], [-1.0, 5, None]])
    nan = answering(output_token_logprobs=[[math.nan, 4, None], [-1.0, 5, None]])  # not even JSON
    for answer, said in ((null, "logprob null for"), (nan, "no JSON but")):
        with FakeServer(answer) as server, pytest.raises(ServerError, match=said):
            generate(server.url, sampling=ONE)


@pytest.mark.parametrize("token", [6, -1, 2**40])
def test_a_token_that_the_model_does_not_have_is_refused(token):
    scored = [[-4.0, 4, None], [-1.0, token, None]]
    assert altered(output_token_logprobs=scored, output_ids=[4, token]) == (
        f"URL: answered with token id {token}, while the model's are 0 to 5: it serves another "
        "model, or its kernels are broken; start it with the run's model"
    )


@pytest.mark.parametrize("token", [5.0, None, "5", True])
def test_a_token_that_is_no_whole_number_is_another_form(token):
    scored = [[-4.0, token, None], [-1.0, token, None]]
    line = altered(output_token_logprobs=scored, output_ids=[token, token])
    assert line.startswith("URL: answered /generate in another form than SGLang's")


@pytest.mark.parametrize(
    ("tokens", "reason", "line"),
    [
        ([1] * 5, {"type": "stop"}, "with 5 tokens, asked for 4 at most; use the SGLang that"),
        (
            [],
            {"type": "stop"},
            "without a token (finish 'stop'); use the SGLang that peergrad pins",
        ),
        (
            [4],
            {"type": "length", "length": 1},
            "with 1 tokens cut off, asked for 4: it has too little room; lower "
            "rollout.max_new_tokens, or start it with a larger --max-total-tokens or "
            "--context-length",
        ),
        (  # how SGLang says that the logits were no numbers; the last token is made up
            [4, 1],
            {"type": "stop", "matched": "NaN happened"},
            "up to 'NaN happened' instead of a stop token; see its log",
        ),
        ([4, 2], STOPPED, "without the stop token 5 that ended it, but with 2; use the SGLang"),
        ([4, 2], {"type": "stop", "matched": [5, 3]}, "without the stop token [5, 3] that ended"),
        ([4, 2], {"type": "stop", "matched": []}, "without the stop token [] that ended"),
    ],
)
def test_an_answer_ends_where_and_why_it_says(tokens, reason, line):
    answer = sample(tokens)
    answer["meta_info"]["finish_reason"] = reason
    with pytest.raises(ServerError) as error:
        parse_rollout(answer, url="URL", asked=ASKED)
    assert str(error.value).startswith(f"URL: answered {line}")
    for fine in ({"type": "stop", "matched": 2}, {"type": "length"}):
        whole = sample([4, 2])
        whole["meta_info"]["finish_reason"] = fine
        assert parse_rollout(whole, asked=ASKED).tokens.tolist() == [4, 2]


def test_an_answer_to_another_prompt_is_refused():
    """As of a server that cuts what is too long for it."""
    with FakeServer(answering(prompt_tokens=1)) as server:
        with pytest.raises(ServerError) as error:
            generate(server.url, sampling=ONE)
        assert str(error.value) == (
            f"{server.url}: answered a prompt of 1 tokens, asked with one of 2: it cuts or extends "
            "prompts; start it without --allow-auto-truncate, and with a --context-length that "
            "holds prompt and answer"
        )
    with FakeServer(answering(prompt_tokens=2)) as server:
        assert len(generate(server.url, sampling=ONE)[0]) == 1


def test_an_answer_may_end_where_the_context_does():
    """SGLang answers p tokens with at most context - p - 2, and lets one ask for two more."""
    asked = Asked(max_new_tokens=5)
    for size in (3, 4, 5):
        assert parse_rollout(sample([4] * size, finish="length"), asked=asked).finish == "length"
    with pytest.raises(ServerError, match="with 2 tokens cut off, asked for 5: it has too little"):
        parse_rollout(sample([4] * 2, finish="length"), asked=asked)


def test_a_servers_own_sampling_defaults_have_nothing_to_say():
    """Each that SGLang knows and a server may have preferred is said in the request."""
    with FakeServer() as server:
        generate(server.url)
    ((_, body),) = server.requests
    said = body["sampling_params"]
    neutral = {"top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1, "min_new_tokens": 0}
    assert said | neutral | {"presence_penalty": 0, "frequency_penalty": 0} == said


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
        answering(output_token_logprobs=[[-1.0, "x", None], [-1.0, 5, None]]),
        answering(output_token_logprobs=[3, 4]),
        answering(output_token_logprobs=[["-1.0", 4, None], [-1.0, 5, None]]),
        answering(output_token_logprobs=[[-1.0, 4, None], [False, 5, None]]),
        answering(output_token_logprobs=[[-1.0, 4, "text"], [-1.0, 5, None]]),
        answering(output_token_logprobs=[[-1.0, 4, None], [-1.0, 5]]),
        answering(output_token_logprobs=[[-1.0, 4, None], []]),
        answering(output_token_logprobs=[[-1.0, 4, None], [-(10**400), 5, None]]),
        answering(output_ids=[4, 2**70]),
        answering(output_ids=["4", "5"]),
        answering(weight_versions=[]),
        answering(weight_versions=[{"version": "0", "start": "0", "end": 2}]),
        answering(weight_versions=[{"version": "0", "start": 0, "end": 1.5}]),
        answering(finish_reason=7),
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


def test_a_pit_of_brackets_is_one_line():
    pit = b'{"meta_info":{"finish_reason":null},"x":' + b"[" * 100_000
    with pytest.raises(ServerError, match=r"^URL: answered /generate in another form"):
        read_answers(pit, "URL")


def compact(content):
    """As SGLang writes it, without spaces."""
    return json.dumps(content, separators=(",", ":")).encode()


def test_the_reading_does_not_depend_on_the_spelling_of_json():
    """A million tokens are no million lists, if SGLang wrote them."""
    answers = [sample([4, 5, 6, 7]), sample([9]), sample([], finish="length")]
    answers[0]["text"] = 'a ],null],[ b ",null],[" c'
    for body in (compact(answers), json.dumps(answers, indent=1).encode()):
        found = [parse_rollout(one) for one in read_answers(body, "URL")[:2]]
        assert [one.tokens.tolist() for one in found] == [[4, 5, 6, 7], [9]]
        assert [one.logprobs.tolist() for one in found] == [[-4, -5, -6, -7], [-9]]
        assert [one.text for one in found] == ["", ""]
    assert len(read_answers(compact(answers), "URL")[0].meta_info.output_token_logprobs) == 1
    (single,) = read_answers(compact(answers[1]), "URL")
    assert parse_rollout(single).tokens.tolist() == [9]


@pytest.mark.parametrize(
    "wrong",
    [
        b'[[-1,4,null],["-1",5,null]]',
        b"[[-1,4,null],[-1,5]]",
        b"[[-1,4],[-1,5,null]]",
        b"[[-1,4,null],[null,-1,5,null]]",
        b"[[-1,4,null],[-1e400,5,null]]",
        b"[[-1,4,null],[-1,5,null],null]",
        b'[[-1,4,null],[-1,5,"x"]]',
        b"[[-1,4,null],[-1,null,null]]",
        b"[[-1,4,null],[null,5,null]]",
        b"[[-1,5,null],[-1,4,null]]",
    ],
)
def test_no_malformed_logprobs_are_read_for_others(wrong):
    body = compact(sample([4, 5])).replace(b"[[-4.0,4,null],[-5.0,5,null]]", wrong)
    assert wrong in body
    with pytest.raises(ServerError, match=r"^URL: "):
        [parse_rollout(one, url="URL") for one in read_answers(body, "URL")]


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


def test_a_dead_server_is_not_waited_for_however_many_retries_are_allowed():
    began = time.monotonic()
    with pytest.raises(ServerError, match="connection refused"):
        generate(nowhere(), retries=1000, lost_after=1.0)
    assert time.monotonic() - began < 120  # retries would take hours


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr("peergrad.rollout.sglang.WATCH_SECONDS", 0.05)


def test_what_a_vanished_machine_was_asked_for_is_asked_for_elsewhere(often, caplog):
    gone = Vanishing()
    with FakeServer() as server:
        began = time.monotonic()
        (group,) = generate(gone.url, server.url, lost_after=0.3)
        assert 0.3 < time.monotonic() - began < 300  # half of a request's own time
    assert len(group) == 3 and len(server.requests) == 1
    told = rf"{gone.url}: cannot be reached for \d+ s; its groups are asked for again"
    assert re.search(told, caplog.text)


def test_a_machine_that_vanishes_alone_is_named(often):
    gone = Vanishing()
    with pytest.raises(ServerError, match=rf"^{gone.url}: no answer .*\(connection refused\)"):
        generate(gone.url, lost_after=0.3, retries=1000)


def test_a_server_that_is_away_is_asked_for_nothing_until_it_is_back(often):
    asked = []

    async def main(port, other):
        engine = SGLangEngine([f"http://127.0.0.1:{port}", other.url])

        async def ask():
            await engine.generate([5, 1], THREE, request_id="0/p")
            return len(engine._away)

        away = [await ask() for _ in range(3)]
        asked.append(len(other.requests))
        with FakeServer(port=port) as back:
            while not back.requests:
                await asyncio.sleep(0.05)
                away.append(await ask())
        await engine.aclose()
        return away

    with FakeServer() as other:
        away = asyncio.run(main(int(nowhere().rpartition(":")[2]), other))
    assert asked == [3] and away[:3] == [1] * 3 and away[-1] == 0


def test_servers_that_are_left_out_are_not_waited_for():
    async def main(gone, server):
        engine = SGLangEngine([gone.url, server.url])
        drawn = asyncio.create_task(engine.generate([5, 1], THREE, request_id="0/p"))
        await until(gone.taken.is_set)
        engine.set_version(3, [server.url])
        await engine.generate([5, 2], THREE, request_id="1/p")
        assert engine.urls == [server.url]
        group = await drawn
        await engine.aclose()
        return group

    def answer(body):
        samples = [sample([*prompt, 1], version="3") for prompt in wanted(body)]
        return 200, samples

    with FakeServer(answer) as server:
        assert len(asyncio.run(main(Vanishing(), server))) == 3
        assert len(server.requests) == 2


def test_an_error_keeps_its_server_on_the_way_between_processes():
    error = pickle.loads(pickle.dumps(ServerError("http://a: bad\nnews", url="http://a")))
    assert (str(error), error.url) == ("http://a: bad news", "http://a")
