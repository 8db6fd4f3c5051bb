"""Which groups share a request."""

from peergrad.rollout.engine import Sampling
from peergrad.rollout.requests import (
    SHARED_TOKENS,
    SHORT_ANSWER,
    SHORT_PROMPT,
    Draw,
    generate_payload,
    together,
)

FOUR = Sampling(n=4, max_new_tokens=64)  # 256 tokens at most


def draws(count, sampling=FOUR, tokens=3):
    return [Draw([5] * tokens, sampling, str(index)) for index in range(count)]


def sizes(draws, **options):
    requests = together(draws, **options)
    assert [draw for request in requests for draw in request] == draws, "in order, none lost"
    return [len(request) for request in requests]


def test_short_groups_fill_a_request():
    assert SHARED_TOKENS == 8192
    assert sizes(draws(70)) == [32, 32, 6]
    assert sizes(draws(1)) == [1]
    assert sizes([]) == []


def test_no_server_is_left_without():
    assert sizes(draws(16), servers=2) == [8, 8]
    assert sizes(draws(17), servers=4) == [5, 5, 5, 2]
    assert sizes(draws(2), servers=4) == [1, 1]
    assert sizes(draws(128), servers=2) == [32, 32, 32, 32]


def test_a_long_prompt_or_long_answers_go_alone():
    assert sizes(draws(3, tokens=SHORT_PROMPT)) == [3]
    assert sizes(draws(3, tokens=SHORT_PROMPT + 1)) == [1, 1, 1]
    for answer, found in ((SHORT_ANSWER, [3]), (SHORT_ANSWER + 1, [1, 1, 1])):
        assert sizes(draws(3, Sampling(n=2, max_new_tokens=answer))) == found
    mixed = [*draws(2), *draws(1, tokens=99), *draws(2)]
    assert sizes(mixed) == [2, 1, 2]


def test_only_what_is_sampled_alike_shares_a_request():
    """But for the number of answers: an aborted one is asked for again alone."""
    hot, cold = (Sampling(n=1, max_new_tokens=64, temperature=t) for t in (1.0, 0.0))
    assert sizes([*draws(2), *draws(2, hot), *draws(2, cold)]) == [4, 2]


def test_a_long_prompt_is_computed_once_and_a_short_one_with_each_answer():
    (body,) = map(generate_payload, together(draws(1, tokens=99)))
    assert body["input_ids"] == [5] * 99 and body["sampling_params"]["n"] == 4
    assert body["rid"] == "0"
    (body,) = map(generate_payload, together(draws(2)))
    assert body["input_ids"] == [[5] * 3] * 8 and body["sampling_params"]["n"] == 1
    assert body["rid"] == ["0/0", "0/1", "0/2", "0/3", "1/0", "1/1", "1/2", "1/3"]
    (body,) = map(generate_payload, together(draws(1, Sampling(n=1, max_new_tokens=8))))
    assert body["input_ids"] == [5] * 3 and body["rid"] == "0"
