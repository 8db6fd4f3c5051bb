"""A mixture of experts learns, with its experts on two ranks and the engine's choices replayed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.run import Run
from tests.models import MIXTURES, make_hf_model

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_a_mixture_learns_as_a_dense_model_does(
    new_run: Callable[..., Run], tmp_path: Path
) -> None:
    path = make_hf_model(tmp_path / "model", family="qwen3_moe", **MIXTURES["qwen3_moe"])
    run = new_run(
        "mixture",
        *(f"model.path={path}", "parallel.expert=2", "parallel.micro_batch_tokens=256"),
        *("algo.kl.coef=0.001", "moe.aux_loss_coef=0.001", "moe.z_loss_coef=0.0001"),
        *("rollout.batch_size=64", "run.steps=6", "optim.lr=3e-3", "evaluation.every=0"),
        *("checkpoint.every=3", "moe.replay=on"),
    )
    run.start(ranks=2)
    run.finish()
    rows = run.rows("train")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert row["moe/replayed"] == 1 and row["moe/agreement"] > 0.999
        assert 1 <= row["moe/imbalance"] <= row["moe/imbalance_worst"] <= 8
        assert row["moe/aux_loss"] > 0.9 and row["moe/z_loss"] > 0
        assert row["logprob_gap/max"] <= 1e-4 and row["sync/canary_gap"] <= 1e-4  # of the dense one
    assert rows[-1]["reward/mean"] > rows[0]["reward/mean"] + 0.1
