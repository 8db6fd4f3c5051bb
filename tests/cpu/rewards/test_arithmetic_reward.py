"""The exact-match reward."""

import numpy as np
import pytest

from peergrad.data import Prompt, Rollout
from peergrad.rewards.arithmetic import reward

NONE = np.zeros(0, np.int32)


@pytest.mark.parametrize(
    ("text", "finish", "value"),
    [
        ("42", "stop", 1.0),
        (" 42\n", "stop", 1.0),
        ("42", "length", 0.0),
        ("42", "abort", 0.0),
        ("42!", "stop", 0.0),
        ("042", "stop", 0.0),
        ("4 2", "stop", 0.0),
        ("", "stop", 0.0),
    ],
)
def test_reward(text: str, finish: str, value: float) -> None:
    rollout = Rollout(NONE, NONE.astype(np.float32), (), finish, text)
    assert reward(Prompt("p", NONE, "17+25=", "42"), rollout) == value
