"""Statistics of a step by hand."""

import numpy as np
import pytest

from peergrad.algo.report import rollout_statistics
from peergrad.data import Group, Prompt, Rollout

Spans = tuple[tuple[int, int, int], ...]


def new_rollout(length: int, reward: float, finish: str, versions: Spans) -> Rollout:
    tokens = np.ones(length, np.int32)
    return Rollout(tokens, np.zeros(length, np.float32), versions, finish, "", reward)


def test_rollouts() -> None:
    prompts = [Prompt("a", np.ones(3, np.int32), "", ""), Prompt("b", np.ones(5, np.int32), "", "")]
    groups = [
        Group(
            "a",
            prompts[0],
            (
                new_rollout(4, 1.0, "stop", ((6, 0, 1), (7, 1, 4))),  # oldest token: one behind
                new_rollout(2, 0.0, "length", ((7, 0, 2),)),
            ),
        ),
        Group(
            "b",
            prompts[1],
            (
                new_rollout(6, 1.0, "length", ((4, 0, 6),)),  # three behind
                new_rollout(0, 1.0, "abort", ()),  # no token: of no age
            ),
        ),
    ]
    assert rollout_statistics(groups, version=7) == {
        "sampling/groups": 2.0,
        "sampling/reward": 0.75,  # of .5 and 1
        "reward/mean": 0.75,
        "reward/std": pytest.approx(np.sqrt(3) / 4),  # sqrt((3 * .0625 + .5625) / 4)
        "reward/flat_groups": 0.5,
        "response/length": 3.0,
        "response/length_max": 6.0,
        "response/truncated": 0.5,
        "tokens/response": 12.0,
        "tokens/total": 28.0,  # each rollout is trained with its prompt: 12 + 2 * 3 + 2 * 5
        "version/trainer": 7.0,
        "version/staleness": 1.0,  # (1 + 0 + 3 + 0) / 4
    }


@pytest.mark.parametrize(
    ("rewards", "flat"),
    [
        ([[1, 1], [0, 0], [0, 1]], 2 / 3),
        ([[0, 1]], 0.0),
        ([[0.1] * 3], 1.0),
        ([[0.1 + 0.2, 0.3]], 1.0),
    ],
)
def test_flat_groups(rewards: list[list[float]], flat: float) -> None:
    prompt = Prompt("a", np.ones(1, np.int32), "", "")
    groups = [
        Group("a", prompt, tuple(new_rollout(1, r, "stop", ((0, 0, 1),)) for r in group))
        for group in rewards
    ]
    assert rollout_statistics(groups, version=0)["reward/flat_groups"] == flat


def test_dropped_groups_count_as_drawn() -> None:
    prompt = Prompt("a", np.ones(1, np.int32), "", "")
    pair = tuple(new_rollout(1, r, "stop", ((0, 0, 1),)) for r in (0.0, 1.0))
    found = rollout_statistics([Group("a", prompt, pair)], dropped=[1.0, 0.0, 1.0], version=0)
    assert found["sampling/groups"] == 4
    assert found["sampling/reward"] == 0.625  # (.5 + 1 + 0 + 1) / 4
    assert found["reward/mean"] == 0.5
