"""The learning rate of a step, by hand."""

import pytest

from peergrad.config import OptimConfig, Schedule
from peergrad.parallel.optimizer import learning_rate


def rates(config: OptimConfig, total: int) -> list[float]:
    return [learning_rate(config, update=i, total=total) for i in range(total)]


def test_linear_reaches_the_minimum_at_the_last_step() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=2, schedule=Schedule.linear)
    assert rates(config, 6) == pytest.approx([0.5, 1, 1, 2 / 3, 1 / 3, 0])


def test_cosine_is_halfway_in_the_middle() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.2, schedule=Schedule.cosine)
    assert rates(config, 5) == pytest.approx([1, 0.2 + 0.8 * 0.8535534, 0.6, 0.3171573, 0.2])


def test_constant_after_the_warm_up_and_past_the_end() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=4)
    assert rates(config, 6) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    late = OptimConfig(lr=1.0, min_lr=0.1, schedule=Schedule.linear)
    assert learning_rate(late, update=99, total=10) == pytest.approx(0.1)
