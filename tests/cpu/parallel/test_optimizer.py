"""The learning rate of a step, by hand, and what Megatron's optimizer is asked to keep."""

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig

from peergrad.config import OptimConfig, Schedule, StateDtype
from peergrad.parallel.optimizer import learning_rate
from peergrad.parallel.states import state_fields


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


def test_what_the_optimizer_keeps_is_megatrons_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    OptimizerConfig(**state_fields(OptimConfig()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("peergrad.parallel.engine.absence", lambda: None)
    offload = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.25}
    found = state_fields(OptimConfig(use_precision_aware_optimizer=True, **offload))
    assert found.items() >= {"use_precision_aware_optimizer": True, **offload}.items()
    aware = OptimConfig(
        use_precision_aware_optimizer=True,
        main_params_dtype=StateDtype.float16,
        exp_avg_dtype=StateDtype.fp8,
        exp_avg_sq_dtype=StateDtype.bfloat16,
    )
    names = ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
    kept = [state_fields(aware)[name] for name in names]
    assert kept == [torch.float16, torch.uint8, torch.bfloat16]
