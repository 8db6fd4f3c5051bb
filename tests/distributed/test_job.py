"""Ranks that find each other, wait for rank 0, and tell each other of failures: real gloo ranks."""

import time
from typing import Any

import pytest

from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed


def part(job: Any) -> None:
    """The store lies on rank 0, which stays until the others have asked all they wanted."""
    job.store.add("parted", 1)
    while job.rank == 0 and job.store.add("parted", 0) < job.world:
        time.sleep(0.01)


def waits() -> dict[str, Any]:
    """Rank 0 takes longer than a collective may; then one of its tasks fails."""
    from peergrad.config import ParallelConfig
    from peergrad.echo import OtherRankFailed
    from peergrad.parallel.job import Job
    from peergrad.parallel.mesh import init_mesh

    heard: list[str] = []
    job = Job.connect(minutes=1)
    job.await_all(minutes=1, heard=heard.append)
    mesh = init_mesh(ParallelConfig(timeout_minutes=0.125), seed=0, job=job)

    def slow() -> int:
        time.sleep(9)  # of the 7.5
        return 7

    def fail() -> None:
        raise KeyError("on rank 0")

    seen: dict[str, Any] = {"slow": mesh.share(slow)}
    seen["many"] = [mesh.share(lambda i=i: i) for i in range(250)]  # more than are kept
    try:
        mesh.share(fail)
    except (KeyError, OtherRankFailed) as error:
        seen["error"] = f"{type(error).__name__}: {error}"
    seen["first"] = [job.claim(), job.claim()]
    mesh.barrier()
    seen["failed"] = job.failed()
    began = time.monotonic()
    assert job.await_said(0.3) is None
    seen["patience"] = time.monotonic() - began
    mesh.barrier()
    if job.rank == 0:
        job.said(7)
    seen["status"] = job.await_said(120)
    part(job)
    return seen


def test_waiting_for_rank_0_has_no_limit() -> None:
    seen = run_ranks(2, waits)
    assert [each["slow"] for each in seen] == [7, 7]
    assert all(each["many"] == list(range(250)) for each in seen)
    assert seen[0]["error"] == "KeyError: 'on rank 0'"
    assert seen[1]["error"] == "OtherRankFailed: rank 0 failed: KeyError: 'on rank 0'"
    firsts = [first for each in seen for first in each["first"]]
    assert sorted(firsts) == [False, False, True, True]  # one rank, also when it asks again
    assert [each["status"] for each in seen] == [7, 7]
    assert all(each["failed"] and 0.3 <= each["patience"] < 60 for each in seen)


def a_failure_while_others_wait() -> str:
    from peergrad.echo import OtherRankFailed
    from peergrad.parallel.job import Job

    job = Job.join(minutes=1)
    if job.rank == 1:
        time.sleep(0.5)
        assert job.claim()
        job.await_said(120)
        part(job)
        return "failed"
    try:
        if job.rank == 2:
            job.await_zero()
        while True:
            job.raise_if_failed()
    except OtherRankFailed as error:
        return str(error)
    finally:
        job.said(1)
        part(job)


def test_a_failure_reaches_those_who_wait() -> None:
    assert run_ranks(3, a_failure_while_others_wait) == ["rank 1 failed", "failed", "rank 1 failed"]


def alone() -> list[Any]:
    """One of two ranks comes."""
    import os

    from peergrad.parallel.job import Job

    os.environ["WORLD_SIZE"] = "2"
    heard: list[str] = []
    try:
        Job.connect(minutes=1).await_all(minutes=0.01, heard=heard.append)
    except RuntimeError as error:
        return [heard[0], str(error)]
    return []


def test_a_rank_that_never_comes_is_missed() -> None:
    ((heard, error),) = run_ranks(1, alone)
    assert heard == "1 of 2 ranks are there"
    assert error.startswith("only 1 of 2 ranks have come within parallel.timeout_minutes; ")
