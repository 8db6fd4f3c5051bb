"""Recorded rollouts that a run cannot be trained on are refused at check time."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from peergrad.checks import check_inputs
from peergrad.config import Config, Replay
from peergrad.data import Group, Prompt, Rollout
from peergrad.recording import write_groups
from peergrad.rollout.rollouts import recorded
from tests.models import MIXTURES, make_hf_model


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Three steps of two groups of two, as recorded in ``first``."""
    for step in range(3):
        write_groups(recorded(tmp_path / "first", step), [group(5), group(127)])
    config = Config()
    config.run.root, config.run.steps = str(tmp_path), 3
    config.model.path = str(make_hf_model(tmp_path / "model", layers=1))
    config.data.source = "arithmetic"
    config.rollout.replay = str(tmp_path / "first")
    config.rollout.batch_size, config.rollout.group_size = 4, 2
    return config


def group(token: int) -> Group:
    tokens, logprobs = np.array([3, token], np.int32), np.array([-0.1, -0.2], np.float32)
    rollout = Rollout(tokens, logprobs, versions=((0, 0, 2),), finish="stop", text="")
    return Group("0/x", Prompt("x", tokens, "?", "1"), (rollout, rollout))


def refusal(config: Config) -> str:
    with pytest.raises(ValueError) as caught:
        check_inputs(config)
    start, message = f"rollout.replay = {config.rollout.replay!r}: ", str(caught.value)
    assert message.startswith(start) and re.fullmatch(r".+; .+", message), message
    return message.removeprefix(start)


def test_a_whole_record(config: Config) -> None:
    assert check_inputs(config).train is None


def test_a_record_that_is_too_short(config: Config) -> None:
    config.run.steps = 5
    assert refusal(config) == "has no record of step 4; set run.steps=3"
    recorded(Path(str(config.rollout.replay)), 0).unlink()
    assert refusal(config).startswith("has no record of step 1; name a run with rollout.dump=true")


def test_a_record_of_an_earlier_peergrad(config: Config) -> None:
    file = recorded(Path(str(config.rollout.replay)), 0)
    file.rename(file.with_suffix(".jsonl.zst"))
    assert refusal(config) == (
        "has step_000001.jsonl.zst of an earlier peergrad, which this one does not read; replay it "
        "with that version, or record the run again"
    )


def test_damaged_files(config: Config) -> None:
    files = [recorded(Path(str(config.rollout.replay)), step) for step in range(3)]
    whole = files[1].read_bytes()
    files[1].write_bytes(b"")
    assert refusal(config) == "step_000002.parquet is damaged; restore the file"
    files[1].write_bytes(whole[:-1])
    assert refusal(config) == "step_000002.parquet is damaged; restore the file"
    files[1].write_bytes(whole)
    for size in (len(whole) // 2, 12):
        files[2].write_bytes(whole[:size])
        assert refusal(config).startswith("step_000003.parquet ")


def test_a_file_that_the_disk_does_not_give(config: Config) -> None:
    file = recorded(Path(str(config.rollout.replay)), 1)
    file.unlink()
    file.symlink_to("/proc/self/mem")  # its first page cannot be read
    line = "step_000002.parquet cannot be read (Input/output error); correct that, or name another"
    assert refusal(config).startswith(line)


@pytest.mark.parametrize(
    ("layers", "chosen", "highest", "rule"),
    [
        (1, 3, 7, None),
        (2, 3, 7, "step_000001.parquet has other experts than 3 of 8 in each of 1 layers; use the"),
        (1, 2, 7, "step_000001.parquet has other experts than 3 of 8 in each of 1 layers; use the"),
        (1, 3, 8, "step_000001.parquet has other experts than 3 of 8 in each of 1 layers; use the"),
        (0, 0, 0, "step_000001.parquet has answers without the experts that moe.replay=on needs; "),
    ],
)
def test_experts_are_those_of_the_model(
    config: Config, layers: int, chosen: int, highest: int, rule: str | None
) -> None:
    folder = Path(config.model.path).with_name("mixture")
    options = {**MIXTURES["qwen3_moe"], "layers": 1, "family": "qwen3_moe"}
    config.model.path = str(make_hf_model(folder, **options))
    config.moe.replay = Replay.on
    kept = group(5)
    if layers:
        experts = np.full((3, layers, chosen), highest, np.uint8)
        experts[:, :, 1:] = np.arange(chosen - 1)
        told = tuple(replace(rollout, experts=experts) for rollout in kept.rollouts)
        kept = replace(kept, rollouts=told)
    for step in range(3):
        write_groups(recorded(Path(str(config.rollout.replay)), step), [kept, kept])
    if rule is None:
        assert check_inputs(config).train is None
    else:
        assert refusal(config).startswith(rule)


def test_another_number_of_groups(config: Config) -> None:
    write_groups(recorded(Path(str(config.rollout.replay)), 2), [group(5)])
    assert refusal(config) == (
        "step_000003.parquet holds 1 groups instead of 2; set rollout.batch_size=2"
    )


def test_tokens_that_the_model_does_not_know(config: Config) -> None:
    write_groups(recorded(Path(str(config.rollout.replay)), 0), [group(5), group(128)])
    assert refusal(config).startswith(
        "step_000001.parquet has the token id 128, the model only ids below 128; use the model "
    )
