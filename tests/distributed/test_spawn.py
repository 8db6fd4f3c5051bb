"""Forked ranks are as good as new processes: nothing inherited, nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.marked import is_alive
from tests.spawn import run_ranks
from tests.waiting import wait_until

pytestmark = pytest.mark.distributed

REPO = Path(__file__).resolve().parents[2]
DRIVER = """
import sys
from tests.distributed.test_spawn import report_and_sleep
from tests.spawn import run_ranks

run_ranks(2, report_and_sleep, sys.argv[1])
"""


def dirty() -> tuple[list[str], list[str], int, str]:
    """(what was inherited, and what a rank has of its own once it has joined a job)."""
    from peergrad.config import ParallelConfig
    from peergrad.parallel.mesh import init_mesh
    from tests.preload import unfit

    before = unfit()
    mesh = init_mesh(ParallelConfig(), seed=0)
    os.environ["PEERGRAD_TEST_LEFT"] = "behind"
    return before, unfit(), mesh.world, f"{Path.cwd()} {os.environ.get('PEERGRAD_TEST_GIVEN')}"


def test_nothing_is_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From one job to the next; from the test, its environment and folder as of now."""
    for ranks, given in ((2, "first"), (1, "second")):
        folder = tmp_path / given
        folder.mkdir()
        monkeypatch.chdir(folder)
        monkeypatch.setenv("PEERGRAD_TEST_GIVEN", given)
        for before, after, world, where in run_ranks(ranks, dirty):
            assert before == []
            assert {"a process group", "a device"} <= set(after)
            assert (world, where) == (ranks, f"{folder} {given}")
    assert "PEERGRAD_TEST_LEFT" not in os.environ and "RANK" not in os.environ


def fail_on(rank: int, how: str) -> None:
    if int(os.environ["RANK"]) != rank:
        time.sleep(600)
    if how == "raise":
        raise KeyError("the cause")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raise", r"rank 1 of 2 failed:\nTraceback(.|\n)*in fail_on(.|\n)*KeyError: 'the cause'"),
        ("die", "rank 1 of 2 ended without an answer"),
    ],
    ids=["raise", "die"],
)
def test_the_first_failure_ends_all(how: str, words: str) -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=words):
        run_ranks(2, fail_on, 1, how)
    assert time.monotonic() - start < 280  # run_ranks itself would have ended it after 300


def report_and_sleep(folder: str) -> None:
    from tests.preload import SERVER

    for pid in (os.getpid(), SERVER):
        (Path(folder) / str(pid)).touch()
    time.sleep(600)


def reported(folder: Path, wanted: int) -> list[psutil.Process]:
    wait_until(lambda: len(list(folder.iterdir())) == wanted)
    return [psutil.Process(int(path.name)) for path in folder.iterdir()]


def test_ranks_that_take_too_long_are_ended(tmp_path: Path) -> None:
    run_ranks(1, dirty)  # the server is there: the time goes to the ranks
    with pytest.raises(TimeoutError, match=r"only ranks \[\] of 2 answered"):
        run_ranks(2, report_and_sleep, str(tmp_path), timeout=10)
    assert sum(psutil.pid_exists(int(path.name)) for path in tmp_path.iterdir()) == 1  # the server


@pytest.mark.slow
def test_a_killed_pytest_leaves_neither_ranks_nor_server(tmp_path: Path) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)], cwd=REPO)
    tree = reported(tmp_path, 3)
    driver.kill()
    driver.wait()
    wait_until(lambda: not any(map(is_alive, tree)))
