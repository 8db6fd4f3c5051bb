"""Our request bodies against SGLang's own request classes; no server needed."""

import argparse
import dataclasses

import pytest
import torch

from peergrad.config import Fp8Serving, ServersConfig
from peergrad.config.rollout import OURS, REFUSED
from peergrad.rollout import arguments
from peergrad.rollout.buckets import buckets, update_payload
from peergrad.rollout.claim import mark_payload
from peergrad.rollout.engine import Sampling
from peergrad.rollout.form import BLOCKS_QUESTION, CHECKSUM
from peergrad.rollout.requests import Draw, generate_payload, score_payload
from peergrad.rollout.servers import FORMS, PLAIN_SCALES, _flags
from peergrad.rollout.sync import init_payload

io = pytest.importorskip("sglang.srt.managers.io_struct")


def check(cls, body):
    """SGLang's own validation, and no field that it would silently ignore."""
    from pydantic import TypeAdapter

    adapter = TypeAdapter(cls)
    adapter.validate_python(body)
    assert not set(body) - set(adapter.json_schema()["properties"])


THREE = Sampling(n=3, max_new_tokens=8, stop_token_ids=(1,))


@pytest.mark.parametrize(
    "body",
    [
        generate_payload([Draw([5, 6] * 100, THREE, "0/p")]),
        generate_payload([Draw([5, 6], THREE, "0/p"), Draw([7], THREE, "1/q")]),
        score_payload([5, 6, 7]),
    ],
    ids=["one group", "several groups", "score"],
)
def test_generate(body):
    from sglang.srt.entrypoints.api_contract import generate_contract_error

    assert generate_contract_error(body) is None
    assert not set(body) - {field.name for field in dataclasses.fields(io.GenerateReqInput)}
    io.GenerateReqInput(**body).normalize_batch_and_arguments()


@pytest.mark.parametrize("version", [None, "run:3"])
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
        ("CheckWeightsReqInput", CHECKSUM),
        ("CheckWeightsReqInput", BLOCKS_QUESTION),
        ("AbortReq", {"abort_all": True}),
        ("UpdateWeightVersionReqInput", mark_payload("runs/a:-1")),
    ],
)
def test_control(name, body):
    check(getattr(io, name), body)


@pytest.fixture(scope="module")
def spellings():
    """Every option of SGLang with its other spellings, without dashes."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return [
        {name.removeprefix("--") for name in action.option_strings if name.startswith("--")}
        for action in parser._actions
    ]


def test_no_spelling_of_an_option_that_is_not_the_users_is_forgotten(spellings):
    """Neither an alias nor a shorter form; and nothing else is refused for looking like one."""
    kept = {*OURS, *REFUSED}
    for names in spellings:
        for name in names:
            refused = bool(names & kept)
            if refused:
                with pytest.raises(ValueError, match=rf"^rollout\.servers\.args\.{name} = 1: "):
                    ServersConfig(args={name: 1})
            else:
                ServersConfig(args={name: 1})
    known = set().union(*spellings)
    assert {name for name in kept if name not in known} <= {"dp", "pp", "tp", "config"}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--max-total-tokens", "9", "--sleep-on-idle"], None),
        (_flags(FORMS[Fp8Serving.block] | PLAIN_SCALES), None),
        (_flags(FORMS[Fp8Serving.flash_rl]), None),
        (["--tokenizer-mode", "quick"], "argument --tokenizer-mode: invalid choice: 'quick'"),
        (["--max-total-tokens", "many"], "argument --max-total-tokens: "),
        (["--chunked-prefill", "9"], "SGLang has no option chunked-prefill; did you mean"),
        (["--zzzzzz"], "SGLang has no option zzzzzz; remove it"),
    ],
)
def test_what_sglangs_parser_says_is_one_line(capsys, options, line):
    if line is None:
        assert arguments.main(options) == 0
        return
    with pytest.raises(SystemExit) as end:
        arguments.main(options)
    assert end.value.code == arguments.REFUSED_STATUS
    printed = capsys.readouterr().out
    assert printed.startswith(line) and printed.count("\n") == 1 and printed.count("; ") == 1
