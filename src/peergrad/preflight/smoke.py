"""The all-reduces that a node takes part in: started, watched, given up on in time."""

import json
import multiprocessing as mp
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from peergrad.preflight.collective import STAGES, Seat, take_part
from peergrad.preflight.exchange import POLL_SECONDS
from peergrad.preflight.report import Job, Order, Outcome

KILL_SECONDS = 1.0


@dataclass(frozen=True)
class _Member:
    """A process of a job."""

    job: Job
    process: Any  # of multiprocessing's context
    said: Path


class Collectives:
    """The node's processes for all-reduces.

    Example:
        >>> collectives = Collectives(log)  # torch is imported meanwhile, by their fork server
        >>> outcomes = collectives.run(order, "gpu01", gpus=8, over=lambda: False)
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._context: Any = mp.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "torch.distributed", "peergrad.preflight"])
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process is not forked from threads
        forkserver.ensure_running()

    def run(
        self, order: Order, host: str, gpus: int, over: Callable[[], bool]
    ) -> tuple[Outcome, ...]:
        """Take part in those jobs that name ``host``, all at once, with a process for each GPU or
        with one; how they went, once they have ended, the time is up, or ``over()``."""
        end = time.monotonic() + order.seconds
        mine = [job for job in order.jobs if host in job.hosts]
        with tempfile.TemporaryDirectory(prefix="peergrad-", ignore_cleanup_errors=True) as folder:
            members = [
                self._start(job, host, index, gpus, Path(folder) / f"{number}-{index}")
                for number, job in enumerate(mine)
                for index in range(max(1, gpus))
            ]
            while any(m.process.is_alive() for m in members):
                if time.monotonic() > end or over():
                    break
                time.sleep(POLL_SECONDS)
            _end([member.process for member in members])
            return tuple(_outcome(job, [m.said for m in members if m.job is job]) for job in mine)

    def _start(self, job: Job, host: str, index: int, gpus: int, said: Path) -> _Member:
        local = max(1, gpus)
        rank, world = job.hosts.index(host) * local + index, len(job.hosts) * local
        gpu = index if gpus else None
        seat = Seat(job.address, job.port, rank, world, gpu, said, self._log)
        said.touch()
        process = self._context.Process(target=take_part, args=(seat,), daemon=True)
        process.start()
        return _Member(job, process, said)


def _end(processes: Sequence[Any]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join(KILL_SECONDS)  # a driver may hold a dead process for ever


def _outcome(job: Job, files: Sequence[Path]) -> Outcome:
    """Of the process that came least far."""
    found = [_read(job.name, path.read_text()) for path in files]
    return min(found, key=lambda outcome: (STAGES.index(outcome.stage), outcome.rate))


def _read(job: str, text: str) -> Outcome:
    lines = [json.loads(line) for line in text.splitlines() if line.startswith('{"stage"')]
    stages = [line["stage"] for line in lines if line["stage"] in STAGES]
    last = lines[-1] if lines else {}
    stage = stages[-1] if stages else STAGES[0]
    return Outcome(job, stage, float(last.get("rate", 0)), str(last.get("error", "")))
