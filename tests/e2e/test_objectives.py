"""Objectives that need more of the engine than plain sampling, on the real server."""

from collections.abc import Callable

import pytest

from tests.e2e.run import Run
from tests.servers import SharedServer

pytestmark = [pytest.mark.engine, pytest.mark.slow]

COMMON = ("rollout.batch_size=32", "evaluation.every=0", "parallel.micro_batch_tokens=256")


def test_dynamic_sampling_trains_on_groups_that_differ(
    new_run: Callable[..., Run], server: SharedServer
) -> None:
    """DAPO, two optimizer steps a batch. Answers of at most two tokens are often all right or all
    wrong: such groups are replaced, and every batch is full of others."""
    run = new_run(
        "dapo",
        *COMMON,
        *("algo=dapo", "algo.minibatches=2", "algo.shaping.overlong_filter=false"),
        *("reward.function=tests.e2e.rewards:first_fits", "run.steps=3"),
        *server.overrides,
    )
    run.complete()
    rows = run.rows("train")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        groups = run.groups(row["step"])
        assert len(groups) == 8
        assert all(len(set(group.rewards.tolist())) == 2 for group in groups)
        assert row["reward/flat_groups"] == 0 and row["sampling/kept"] == 1
        assert row["optim/grad_norm"] > 0 and row["optim/refused"] == 0
    assert sum(row["sampling/groups"] for row in rows) > 24  # some were replaced
    ids = [group.id for step in (1, 2, 3) for group in run.groups(step)]
    assert len(set(ids)) == 24  # no group twice
    text = (run.path / "logs" / "latest" / "objective.txt").read_text()
    assert ", 0.8, 1.28) A )" in text and "replaced by other prompts'" in text


def test_decoupled_loss_on_rollouts_of_older_weights(
    new_run: Callable[..., Run], server: SharedServer
) -> None:
    """AReaL, one version behind: the proximal policy is the step's own forward, so the ratio is 1,
    and what the rollouts lag is a weight. The gap to the engine is put down to the versions."""
    run = new_run(
        "areal",
        *COMMON,
        *("algo=areal", "rollout.max_staleness=1", "run.steps=6", "optim.lr=3e-3"),
        *("reward.function=tests.e2e.rewards:first_fits",),
        *server.overrides,
    )
    run.complete()
    rows = run.rows("train")
    assert rows[0]["version/staleness"] == 0
    assert all(0 <= row["version/staleness"] <= 1 for row in rows)
    # What a sync overtakes is a matter of timing: not every step needs to have lagging answers.
    late = [row for row in rows if row["version/staleness"] > 0]
    assert late
    for row in rows:
        assert row["policy/ratio"] == pytest.approx(1, abs=1e-6)
        assert 0 <= row["correction/dropped"] < 0.5
        assert row["optim/grad_norm"] > 0
    assert rows[0]["correction/weight"] == pytest.approx(1, abs=1e-4)
    assert all(abs(row["correction/weight"] - 1) > 1e-4 for row in late)
    assert rows[0]["logprob_gap/max"] < 1e-4
    # How many tokens a sync overtakes is a matter of timing; of one or two it could be chance.
    assert max(row["logprob_gap/share_version"] for row in rows[1:]) > 0.9


def test_a_wrong_temperature_stops_the_run_and_is_named(
    new_run: Callable[..., Run], server: SharedServer
) -> None:
    """Recorded at temperature 1, trained at 0.8: the gap says so; the worst tokens are there."""
    one_step = (*COMMON, "run.steps=1", "rollout.batch_size=256")
    recording = new_run("recording", *one_step, *server.overrides)
    recording.complete()
    (recording.path / "config.yaml").unlink()  # else the two temperatures are compared at once
    run = new_run(
        "wrong_temperature",
        *(*one_step, f"rollout.replay={recording.path}"),
        *("rollout.temperature=0.8", "rollout.max_logprob_gap=0.01"),
    )
    run.start()
    assert run.process.wait(400) == 1
    assert "rollout.max_logprob_gap = 0.01: step 1: trainer and engine differ by" in run.printed
    assert "mostly by temperature" in run.printed
    (row,) = run.rows("train")
    assert row["logprob_gap/temperature_ratio"] == pytest.approx(0.8, abs=0.05)
    worst = (run.path / "logprob_gap" / "step_000001.jsonl").read_text().splitlines()
    assert len(worst) == 32
