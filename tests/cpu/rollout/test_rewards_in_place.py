"""From the engine's tokens to the trainer's rewards: the parts of a run, and a stand-in engine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeServer, sample

from peergrad.config import Config, OnError, RewardConfig, RewardKind
from peergrad.inputs import collector_parts
from peergrad.rollout.collector import Collector
from tests.models import make_hf_model, make_tokenizer

FUNCTIONS = """
import numpy as np

async def closed(prompt, rollout):
    if len(rollout.tokens) == 3:
        raise LookupError("three")
    return {"score": np.bool_(rollout.text == "L<pad>Us"), "tokens": len(rollout.tokens)}

def junk(prompt, rollout):
    return [1.0]
"""
TOKENIZER = make_tokenizer()


def ids(text: str) -> list[int]:
    return TOKENIZER.convert_tokens_to_ids(list(text))


def answer(body: dict[str, Any]) -> tuple[int, Any]:
    pad, eos = TOKENIZER.pad_token_id, TOKENIZER.eos_token_id
    right = sample([*ids("L"), pad, *ids("Us"), eos])
    wrong = sample([*ids("LUs"), eos])
    fails = sample([*ids("no"), eos])
    for each in (right, wrong, fails):
        each["text"] = "LUs"  # as the engine has it
    return 200, [right, wrong, fails, right][: body["sampling_params"]["n"]]


@pytest.fixture
def new_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    make_hf_model(tmp_path, layers=1)
    (tmp_path / "rewards_in_place.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = Config()
    config.model.path, config.data.source = str(tmp_path), "arithmetic"
    config.rollout.batch_size, config.rollout.group_size = 8, 4
    return config


@pytest.fixture
def collector(new_config: Config, request: pytest.FixtureRequest) -> Iterator[Collector]:
    name, action = request.param
    function = f"rewards_in_place:{name}"
    new_config.reward = RewardConfig(
        kind=RewardKind.function, function=function, on_error=OnError[action]
    )
    with FakeServer(answer) as server:
        collector = Collector(new_config, [server.url], collector_parts)
        try:
            collector.set_version(0)
            yield collector
        finally:
            collector.close()


@pytest.mark.parametrize("collector", [("closed", "drop")], indirect=True)
def test_rewards_see_what_was_sampled(collector: Collector) -> None:
    taken = collector.take(0)
    for group in taken.groups:
        assert [r.text for r in group.rollouts] == ["L<pad>Us", "LUs", "L<pad>Us"]
        assert group.rewards.tolist() == [1, 0, 1]  # the one that failed was left out
    assert taken.grading["reward/failed_error"] == taken.grading["reward/failed"] == 0.25
    assert taken.grading["reward_part/tokens"] == pytest.approx((5 + 4 + 5) / 3)


@pytest.mark.parametrize("collector", [("junk", "zero")], indirect=True)
def test_junk_ends_the_run_in_its_first_step(collector: Collector) -> None:
    with pytest.raises(RuntimeError) as error:
        collector.take(0)
    assert str(error.value).startswith(
        "reward.function = 'rewards_in_place:junk': all 8 rewards of a step failed (value 8), that "
        "of a rollout of train-"
    )
    assert "returned [1.0], which is no number; its text ends '" in str(error.value)
