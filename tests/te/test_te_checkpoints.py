"""Checkpoints of Transformer Engine's layers and FusedAdam read by PyTorch's, and the other way."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.spawn import run_ranks
from tests.te.test_te_parity import Layout, make, model, objective, samples

pytestmark = pytest.mark.distributed


def optimizers(spec: str) -> ExitStack:
    """With PyTorch's layers PyTorch's AdamW: Megatron chooses when it is imported."""
    import megatron.core.optimizer
    from megatron.core.optimizer import distrib_optimizer

    stack = ExitStack()
    if spec == "torch":
        chosen = {"HAVE_APEX_OR_TE": False, "USING_TE_OPTIMIZER": False}
        stack.enter_context(mock.patch.multiple(distrib_optimizer, **chosen))
        stack.enter_context(
            mock.patch.object(megatron.core.optimizer, "USING_PYTORCH_OPTIMIZER", True)
        )
    return stack


def exchange(path: str, folder: str, steps: int, layouts: list[Layout]) -> list[dict[str, Any]]:
    """On each layout ``steps`` updates with each spec, a checkpoint and one more update; and that
    one again, by each spec from the other's checkpoint and by one from its own. What each of those
    updates led to."""
    from peergrad.config import CheckpointConfig
    from peergrad.parallel.checkpoint import Checkpoints
    from peergrad.parallel.mesh import leave_layout

    def learnt(policy: Any) -> dict[str, torch.Tensor]:
        policy.update(samples(), objective())
        weights = {name: x.clone() for name, x in policy.weights()}
        leave_layout()
        return weights

    found = []
    for i, layout in enumerate(layouts):
        seen: dict[str, Any] = {"kinds": []}
        for spec in ("te", "torch"):
            with optimizers(spec):
                policy = make(path, spec, layout)
                seen["kinds"].append(
                    type(policy.optimizer.chained_optimizers[0].optimizer).__name__
                )
                for _ in range(steps):
                    policy.update(samples(), objective())
                checkpoints = Checkpoints(
                    Path(folder, str(i), spec), CheckpointConfig(), policy.mesh
                )
                checkpoints.save(policy, None, {}, None, step=steps + 1)
                seen[spec] = learnt(policy)
        for writer, reader in (("te", "te"), ("te", "torch"), ("torch", "te")):
            with optimizers(reader):
                policy = make(path, reader, layout)
                checkpoints = Checkpoints(
                    Path(folder, str(i), writer), CheckpointConfig(), policy.mesh
                )
                assert checkpoints.restore(policy) == steps + 1
                seen[f"{writer} -> {reader}"] = learnt(policy)
        found.append(seen)
    return found


@pytest.mark.parametrize(
    ("family", "ranks", "steps", "layouts"),
    [
        ("qwen3", 1, 0, [{}]),
        pytest.param("qwen3", 2, 2, [{}, {"distributed_optimizer": False}], marks=pytest.mark.slow),
        pytest.param("qwen3_moe", 2, 2, [{"expert": 2}], marks=pytest.mark.slow),
    ],
)
def test_each_goes_on_from_the_others(
    tmp_path: Path, family: str, ranks: int, steps: int, layouts: list[Layout]
) -> None:
    """Also before the first step, when FusedAdam has no state of its own."""
    path = model(tmp_path, family)
    for seen in run_ranks(ranks, exchange, path, str(tmp_path), steps, layouts)[0]:
        assert seen["kinds"] == ["FusedAdam", "AdamW"]
        for writer, reader, limit in (
            ("te", "te", 0),
            ("te", "torch", 1e-6),
            ("torch", "te", 1e-6),
        ):
            again = seen[f"{writer} -> {reader}"]
            for name, x in seen[writer].items():
                torch.testing.assert_close(again[name], x, rtol=0, atol=limit, msg=name)
