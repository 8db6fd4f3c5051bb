"""The experts that an engine says its tokens went to."""

from base64 import b64encode
from dataclasses import replace

import numpy as np
import pytest
from fake_sglang import sample

from peergrad.rollout.answers import Asked, parse_rollout
from peergrad.rollout.engine import Routes, Sampling
from peergrad.rollout.errors import ServerError
from peergrad.rollout.requests import Draw, generate_payload, together

ROUTES = Routes(layers=2, chosen=2, experts=4, required=True)
ASKED = Asked(prompt_tokens=2, routes=ROUTES)
SAID = np.array([[[0, 1], [2, 3]], [[3, 0], [1, 2]], [[1, 3], [0, 2]]])  # 3 tokens, 2 layers


def answer(experts=SAID, dtype="<i4"):
    one = sample([4, 5])
    if experts is not None:
        one["meta_info"]["routed_experts"] = b64encode(experts.astype(dtype).tobytes()).decode()
    return one


def test_they_are_read_for_every_token_but_the_last():
    found = parse_rollout(answer(), asked=ASKED).experts
    assert found.dtype == np.uint8 and found.tolist() == SAID.tolist()
    many = replace(ASKED, routes=replace(ROUTES, experts=512))
    assert parse_rollout(answer(), asked=many).experts.dtype == np.int16


def test_without_them_an_answer_is_refused_only_where_they_are_required():
    optional = replace(ASKED, routes=replace(ROUTES, required=False))
    assert parse_rollout(answer(None), asked=optional).experts is None
    assert parse_rollout(answer(), asked=replace(ASKED, routes=None)).experts is None
    with pytest.raises(ServerError, match=r"without the experts of its tokens, which moe\.replay"):
        parse_rollout(answer(None), asked=ASKED)


@pytest.mark.parametrize(
    ("said", "rule"),
    [
        (SAID[:2], "with 8 experts in place of 3 x 2 x 2"),
        (np.where(SAID == 3, 4, SAID), "with an expert that is none of 4"),
        (np.where(SAID == 3, -1, SAID), "with an expert that is none of 4"),
        (np.where(SAID == 1, 0, SAID), "with an expert that a token went to twice"),
    ],
)
def test_what_cannot_be_is_one_line(said, rule):
    with pytest.raises(ServerError) as error:
        parse_rollout(answer(said), url="URL", asked=ASKED)
    remedy = "start it with --enable-return-routed-experts and the run's model, or set moe.replay"
    assert str(error.value) == f"URL: answered {rule}; {remedy}=off"


@pytest.mark.parametrize("spoilt", ["%%%", b64encode(b"abc").decode(), 7])
def test_what_is_no_list_of_numbers_is_another_form(spoilt):
    one = answer()
    one["meta_info"]["routed_experts"] = spoilt
    with pytest.raises(ServerError, match="in another form than SGLang's"):
        parse_rollout(one, asked=ASKED)


def test_they_are_asked_for_with_every_group():
    sampling = Sampling(n=2, max_new_tokens=8, routes=ROUTES)
    draws = [Draw([5] * 3, sampling, "0"), Draw([6] * 3, sampling, "1")]
    (both,) = together(draws)
    assert generate_payload(both)["return_routed_experts"] is True
    assert "return_routed_experts" not in generate_payload(
        [Draw([5], replace(sampling, routes=None), "0")]
    )
