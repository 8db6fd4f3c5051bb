"""The endless order: complete epochs, exact resume, other data refused."""

import json
from itertools import islice

import numpy as np
import pytest

from peergrad.data import Prompt
from peergrad.prompts import Prompts


def records(count: int = 7, **changes: str) -> list[Prompt]:
    texts = [f"{i}=" for i in range(count)]
    texts[0] = changes.get("text", texts[0])
    return [
        Prompt(f"train-{i}", np.frombuffer(text.encode(), np.uint8).astype(np.int32), text, str(i))
        for i, text in enumerate(texts)
    ]


def ids(prompts: Prompts, count: int) -> list[str]:
    return [prompt.id for prompt in islice(prompts, count)]


def test_every_epoch_shows_every_prompt_once_in_another_order() -> None:
    prompts = Prompts(records(50), shuffle=True, seed=0)
    epochs = [ids(prompts, 50) for _ in range(4)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 50 for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4


def test_the_order_is_a_function_of_the_seed() -> None:
    orders = [ids(Prompts(records(), shuffle=True, seed=seed), 14) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    # Pinned: a new numpy must not change the meaning of an old checkpoint.
    assert orders[0][:7] == [f"train-{i}" for i in (0, 3, 5, 1, 2, 6, 4)]


def test_without_shuffle_the_order_is_the_data() -> None:
    prompts = Prompts(records(3), shuffle=False, seed=0)
    assert ids(prompts, 7) == [f"train-{i}" for i in (0, 1, 2, 0, 1, 2, 0)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_resuming_equals_an_uninterrupted_run(shuffle: bool) -> None:
    whole = ids(Prompts(records(), shuffle=shuffle, seed=5), 60)
    for stop in range(40):  # in the middle and at both ends of epochs
        first = Prompts(records(), shuffle=shuffle, seed=5)
        before = ids(first, stop)
        second = Prompts(records(), shuffle=shuffle, seed=5)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert second.state_dict() == first.state_dict()
        assert before + ids(second, 60 - stop) == whole


@pytest.mark.parametrize("other", [records(8), records(text="9="), records()[::-1]])
def test_other_data_is_refused(other: list[Prompt]) -> None:
    state = Prompts(records(), shuffle=True, seed=0).state_dict()
    with pytest.raises(ValueError, match=r"data.source = .* other prompts"):
        Prompts(other, shuffle=True, seed=0).load_state_dict(state)
