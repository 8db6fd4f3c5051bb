"""Digests of what was sent, and the comparison with what servers hold."""

import hashlib

import numpy as np
import pytest
import torch

from peergrad.rollout.proof import CANARY_TOKENS, Digests, canary_group, canary_tokens, compare

LAYER = "model.layers.0."


def sha(*tensors: torch.Tensor) -> str:
    data = b"".join(t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors)
    return hashlib.sha256(data).hexdigest()[:16]


def digests(named, dtype=torch.float32):
    taken = Digests(dtype)
    for name, tensor in named:
        taken.add(name, tensor)
    return taken.result()


def test_parts_are_hashed_as_the_fused_matrix_whatever_their_order():
    q, k, v = (torch.randn(rows, 4) for rows in (4, 2, 2))
    attention = LAYER + "self_attn."
    named = [(f"{attention}{n}_proj.weight", t) for n, t in (("v", v), ("q", q), ("k", k))]
    assert digests(named) == {f"{attention}qkv_proj.weight": sha(torch.cat([q, k, v]))}


def test_a_part_that_came_early_is_copied():
    """The trainer may gather every tensor into the same memory."""
    memory = torch.ones(2, 2)
    taken = Digests(torch.float32)
    taken.add(LAYER + "mlp.up_proj.weight", memory)
    memory.fill_(2)
    taken.add(LAYER + "mlp.gate_proj.weight", memory)
    expected = sha(torch.full((2, 2), 2.0), torch.ones(2, 2))
    assert taken.result() == {LAYER + "mlp.gate_up_proj.weight": expected}


@pytest.mark.parametrize(("rows", "padding"), [(64, 0), (65, 63), (1, 63)])
def test_vocabulary_rows_are_padded_with_zeros(rows, padding):
    weight = torch.randn(rows, 3)
    padded = torch.cat([weight, torch.zeros(padding, 3)])
    assert digests([("lm_head.weight", weight)]) == {"lm_head.weight": sha(padded)}


def test_the_rest_is_taken_as_it_is():
    named = [("model.norm.weight", torch.randn(5)), ("scale", torch.tensor(2.0))]
    assert digests(named) == {"model.norm.weight": sha(named[0][1]), "scale": sha(named[1][1])}


def test_another_precision_than_the_servers_and_experts_cannot_be_known():
    named = [
        ("model.norm.weight", torch.randn(5)),
        (LAYER + "mlp.experts.3.up_proj.weight", torch.randn(2, 2)),
    ]
    assert digests(named, torch.bfloat16) == {"model.norm.weight": None}
    assert digests(named, None) == {"model.norm.weight": None}


def test_a_missing_part_is_an_error():
    with pytest.raises(RuntimeError, match=r"lack parts of .*gate_up_proj\.weight"):
        digests([(LAYER + "mlp.up_proj.weight", torch.ones(2, 2))])


EXPECTED = {"a": "1", "b": "2", "c": None}
HELD = {"a": "1", "b": "2", "c": "3"}


def test_equal_digests_are_counted():
    assert compare(EXPECTED, {"http://one": [HELD], "http://two": [HELD]}) == (2, 1)
    assert compare(None, {"http://one": [HELD]}) == (0, 3)
    experts = {**HELD, "layers.0.mlp.experts.w13_weight": "9"}
    assert compare(EXPECTED, {"http://one": [experts]}) == (2, 2)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([{**HELD, "b": "9"}], "http://two holds other values than were sent of b;? ?"),
        ([{"a": "1", "b": "2"}], "http://two has no tensor called c"),
        ([{**HELD, "d": "4"}], "http://two was never sent d"),
        ([{**HELD, "c": "9"}], "http://two holds other values than http://one of c"),
    ],
)
def test_each_difference_is_named_with_its_server(held, message):
    with pytest.raises(RuntimeError, match=message) as error:
        compare(EXPECTED, {"http://one": [HELD], "http://two": held})
    assert "rollout.proof=canary" in str(error.value)


def test_servers_of_another_layout_are_not_held_against_each_other():
    halves = [{"a": "5", "b": "6", "c": "7"}, {"a": "8", "b": "9", "c": "10"}]
    names = dict.fromkeys(EXPECTED)
    assert compare(names, {"http://one": [HELD], "http://two": halves}) == (0, 3)
    with pytest.raises(RuntimeError, match="http://three holds other values than http://two of a"):
        compare(names, {"http://two": halves, "http://three": [halves[0], HELD | {"a": "0"}]})


def test_the_canary_has_one_rollout_per_server():
    tokens = canary_tokens(1000)
    assert tokens.shape == (CANARY_TOKENS,) and tokens.max() < 1000
    assert np.array_equal(tokens, canary_tokens(1000)) and len(set(tokens.tolist())) > 32
    scores = np.full(CANARY_TOKENS - 1, -0.5, np.float32)
    group = canary_group(tokens, [scores, scores], version=7)
    assert group.prompt.tokens.tolist() == tokens[:1].tolist()
    assert len(group.rollouts) == 2
    assert group.rollouts[1].tokens.tolist() == tokens[1:].tolist()
    assert group.rollouts[1].versions == ((7, 0, CANARY_TOKENS - 1),)
