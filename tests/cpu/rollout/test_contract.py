"""Our request bodies against SGLang's own request classes; no server needed."""

import dataclasses

import pytest
import torch

from peergrad.rollout.buckets import buckets, update_payload
from peergrad.rollout.engine import Sampling
from peergrad.rollout.sglang import generate_payload, score_payload
from peergrad.rollout.sync import init_payload

io = pytest.importorskip("sglang.srt.managers.io_struct")


def check(cls, body):
    """SGLang's own validation, and no field that it would silently ignore."""
    from pydantic import TypeAdapter

    adapter = TypeAdapter(cls)
    adapter.validate_python(body)
    assert not set(body) - set(adapter.json_schema()["properties"])


@pytest.mark.parametrize(
    "body",
    [
        generate_payload([5, 6], Sampling(n=3, max_new_tokens=8, stop_token_ids=(1,)), "0/p"),
        score_payload([5, 6, 7]),
    ],
    ids=["generate", "score"],
)
def test_generate(body):
    from sglang.srt.entrypoints.api_contract import generate_contract_error

    assert generate_contract_error(body) is None
    assert not set(body) - {field.name for field in dataclasses.fields(io.GenerateReqInput)}
    io.GenerateReqInput(**body).normalize_batch_and_arguments()


@pytest.mark.parametrize("version", [None, 3])
def test_update_weights(version):
    named = [("a", torch.ones(2, 3)), ("b", torch.ones((), dtype=torch.bfloat16))]
    ((bucket, _),) = buckets(named, 1000)
    check(io.UpdateWeightsFromDistributedReqInput, update_payload(bucket, "group", version))


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("InitWeightsUpdateGroupReqInput", init_payload("127.0.0.1", 1, 1, 2, "group", "gloo")),
        ("DestroyWeightsUpdateGroupReqInput", {"group_name": "group"}),
        ("PauseGenerationReqInput", {"mode": "retract"}),
        ("BeginWeightUpdateReqInput", {}),
        ("EndWeightUpdateReqInput", {}),
        ("ContinueGenerationReqInput", {}),
        ("CheckWeightsReqInput", {"action": "checksum"}),
        ("AbortReq", {"abort_all": True}),
    ],
)
def test_control(name, body):
    check(getattr(io, name), body)
