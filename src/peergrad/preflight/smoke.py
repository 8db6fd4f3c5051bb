"""The all-reduces that a node takes part in: started, watched, given up on in time."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from os import getpid
from pathlib import Path

from peergrad.preflight.collective import STAGES
from peergrad.preflight.report import Job, Outcome

LONGEST = 200
KILL_SECONDS = 1.0


@dataclass(frozen=True)
class _Member:
    """A process of a job, and what it writes."""

    job: Job
    process: "subprocess.Popen[bytes]"
    said: Path
    complained: Path


def run_jobs(jobs: Sequence[Job], host: str, gpus: int, seconds: float) -> tuple[Outcome, ...]:
    """Take part in those that name ``host``, all at once, with a process for each GPU or with one;
    how they went, after ``seconds`` at most."""
    end = time.monotonic() + seconds
    mine = [job for job in jobs if host in job.hosts]
    with tempfile.TemporaryDirectory(prefix="peergrad-", ignore_cleanup_errors=True) as folder:
        members = []
        for number, job in enumerate(mine):
            for index in range(max(1, gpus)):
                asked = _words(job, host, index, gpus, seconds)
                members.append(_start(job, asked, Path(folder) / f"{number}-{index}"))
        while time.monotonic() < end and any(m.process.poll() is None for m in members):
            time.sleep(0.05)
        _end([m.process for m in members if m.process.poll() is None])
        return tuple(_outcome(job, [m for m in members if m.job is job], seconds) for job in mine)


def _words(job: Job, host: str, index: int, gpus: int, seconds: float) -> str:
    """What ``collective.main`` is told."""
    local = max(1, gpus)
    return json.dumps(
        {
            "address": job.address,
            "port": job.port,
            "rank": job.hosts.index(host) * local + index,
            "world": len(job.hosts) * local,
            "gpu": index if gpus else None,
            "seconds": seconds,
            "parent": getpid(),
        }
    )


def _start(job: Job, asked: str, place: Path) -> _Member:
    said, complained = place.with_suffix(".out"), place.with_suffix(".err")
    words = [sys.executable, "-m", "peergrad.preflight.collective", asked]
    with said.open("wb") as out, complained.open("wb") as err:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
    return _Member(job, process, said, complained)


def _end(processes: "Sequence[subprocess.Popen[bytes]]") -> None:
    for process in processes:
        process.kill()
    for process in processes:
        with suppress(subprocess.TimeoutExpired):  # a driver may hold a dead process for ever
            process.wait(KILL_SECONDS)


def _outcome(job: Job, members: Sequence[_Member], seconds: float) -> Outcome:
    """Of the process that came least far."""
    found = [_read(member, seconds) for member in members]
    return min(found, key=lambda outcome: (STAGES.index(outcome.stage), outcome.rate))


def _read(member: _Member, seconds: float) -> Outcome:
    lines = member.said.read_text().splitlines()
    last = json.loads(lines[-1]) if lines else {"stage": STAGES[0]}
    stage, name = str(last["stage"]), member.job.name
    if stage == STAGES[-1]:
        return Outcome(name, stage, float(last["rate"]))
    words = [word for word in map(str.strip, _text(member.complained).splitlines()) if word]
    status = member.process.poll()
    if status in (None, -9):
        return Outcome(name, stage, error=f"nothing more came for {seconds:.0f} s")
    error = words[-1][:LONGEST] if words else f"it ended with status {status}"
    return Outcome(name, stage, error=error)


def _text(path: Path) -> str:
    return path.read_text(errors="replace")
