"""A run that is interrupted, in any phase, ends at once, leaves no process and can be resumed; one
that is asked to stop saves what it has learned first."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.run import Run
from tests.servers import SharedServer

pytestmark = [pytest.mark.engine, pytest.mark.slow]

GRACE_SECONDS = 150  # a quarter of what a reward, a request or the clean-up may take
RESUME = "run.resume=true"


@pytest.fixture
def run(new_run: Callable[..., Run]) -> Run:
    """Three steps whose update takes a second or more: a hundred small micro-batches."""
    return new_run(
        "interrupted",
        "rollout.batch_size=128",
        "algo.kl.coef=0",
        "run.steps=3",
        "evaluation.every=0",
        "checkpoint.every=1",
        "parallel.micro_batch_tokens=8",
    )


@pytest.mark.timeout(1200)
def test_in_every_phase(run: Run, server: SharedServer) -> None:
    """One run, ended and resumed again and again: by Ctrl-C while its server starts and while
    rewards are awaited (server of its own), in an update and a weight sync (server of others); by
    SIGUSR1 to one rank in an evaluation, by SIGTERM to the launcher in a checkpoint. Then it
    finishes."""
    recorded = run.path / "rollouts" / "step_000001.parquet"
    log = run.path / "logs" / "latest" / "server_0.log"

    run.start()
    run.wait_until(lambda: "for SGLang to start" in run.printed, "the server's start")
    run.wait_until(lambda: log.stat().st_size, "the server's first words")
    run.interrupt()
    check_end(run, inside="ready")
    assert run.process.returncode == 130

    run.start(RESUME, ranks=2)
    hold(run, "train")
    run.interrupt()
    check_end(run, inside="take")
    assert not recorded.exists()

    run.start(RESUME, "evaluation.every=1", *server.overrides, ranks=2)
    hold(run, "test")
    run.signal_rank(1, signal.SIGUSR1)
    check_stop(run, "SIGUSR1; run.resume=true begins again")
    assert not run.rows("eval")

    run.start(RESUME, *server.overrides, ranks=2)
    run.wait_until(recorded.exists, "the rollouts of step 1")
    time.sleep(0.3)
    run.interrupt()
    check_end(run, inside="update")

    begun = server.syncs()
    run.start(RESUME, *server.overrides, ranks=2)
    run.wait_until(lambda: server.syncs() == begun + 2, "the weight sync of step 1")
    with server.frozen():  # or it would be over before the signal arrives
        run.interrupt()
        time.sleep(1)
    run.interrupt()  # the impatient second time
    check_end(run, inside="load_weights")
    assert not run.checkpoints.exists()

    run.start(RESUME, *server.overrides, ranks=2)
    partial = lambda: list(run.checkpoints.glob(".step_000002.partial*"))  # noqa: E731
    run.wait_until(partial, "the checkpoint of step 2")
    run.terminate()
    check_stop(run, "SIGTERM; run.resume=true continues from step 2")
    assert [row["step"] for row in run.rows("train")] == [1, 2]

    run.start(RESUME, *server.overrides, ranks=2)
    run.finish()
    assert [row["step"] for row in run.rows("train")] == [1, 2, 3]
    assert run.done.exists()


def hold(run: Run, split: str) -> None:
    """Wait until a reward of ``split`` is being computed; it does not end by itself."""
    flag, held = run.holds / f"hold-{split}", run.holds / f"held-{split}"
    held.unlink(missing_ok=True)
    flag.touch()
    run.wait_until(held.exists, f"a reward of {split}")
    time.sleep(0.5)
    flag.unlink()


def check_end(run: Run, *, inside: str) -> None:
    """Everything ends soon, with a status other than 0 and a word on how to go on; the interrupt
    was met in the function ``inside``; only whole checkpoints are left."""
    run.assert_gone(GRACE_SECONDS)
    assert run.process.returncode != 0
    assert "interrupted; run.resume=true " in run.printed, run.printed
    log = (run.path / "logs" / "latest" / "rank_00000.log").read_text()
    assert f", in {inside}\n" in log.partition("interrupted here")[2], log
    check_checkpoints(run.checkpoints)


def check_stop(run: Run, words: str) -> None:
    """The run ends by itself, soon, and says with status and words that it can go on."""
    run.assert_gone(GRACE_SECONDS)
    assert run.process.returncode == 75
    assert f"stopped by {words}" in run.printed, run.printed
    check_checkpoints(run.checkpoints)


def check_checkpoints(folder: Path) -> None:
    """Whatever is visible is whole, and what ``latest`` names is visible."""
    from peergrad.parallel.damage import damage

    for path in folder.glob("step_*"):
        assert damage(path) is None
    latest = folder / "latest"
    assert not latest.exists() or (folder / latest.read_text()).is_dir()
