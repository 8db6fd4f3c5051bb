"""Start whole runs as a user does, watch them, end them, read what they wrote."""

import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from benchmarks.marked import Marked
from peergrad.data import Group
from peergrad.observing.metrics import read_metrics
from peergrad.recording import read_groups
from peergrad.running.rundir import RunDir
from tests.e2e.rewards import HOLD
from tests.ports import free_port
from tests.spawn import run_ranks

REPO = Path(__file__).resolve().parents[2]
MAIN = "src/peergrad/main.py"


class Run(RunDir):
    """The run ``name`` of the folder ``root``, and the process that was last started for it."""

    def __init__(self, root: Path, name: str, *overrides: str) -> None:
        super().__init__(root / name)
        self.arguments = [f"run.root={root}", f"run.name={name}", *overrides]
        self._marked = Marked()
        self.log = root / f"{name}.log"
        self.holds = root / f"{name}.hold"
        self.holds.mkdir()

    def start(self, *overrides: str, ranks: int = 1) -> None:
        """Start it as the leader of a process group of its own, as a shell would."""
        launch = ["peergrad.launch", "--nproc-per-node", str(ranks)]
        program = launch if ranks > 1 else ["peergrad.main"]
        ours = {**self._marked.environment, HOLD: str(self.holds)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *program, *self.arguments, *overrides],
                cwd=REPO,
                env={**os.environ, **ours, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def complete(self, ranks: int = 1) -> None:
        """All of it, on ranks of the fork server: for tests of what a run does, not of how the
        program starts and ends."""
        run_in_turn(ranks, [MAIN, *self.arguments])

    def finish(self, timeout: float = 400) -> None:
        """Wait for a run that must succeed."""
        status = self.process.wait(timeout)
        assert status == 0, f"exit status {status}:\n{self.printed}"

    def wait_until(self, event: Callable[[], object], what: str, timeout: float = 300) -> None:
        """Poll ``event`` closely while the run is alive."""
        deadline = time.monotonic() + timeout
        while not event():
            assert self.process.poll() is None, f"ended before {what}:\n{self.printed}"
            assert time.monotonic() < deadline, f"waited in vain for {what}:\n{self.printed}"
            time.sleep(0.005)

    def interrupt(self) -> None:
        """What Ctrl-C does: SIGINT to every process of the foreground group."""
        os.killpg(self.process.pid, signal.SIGINT)
        self.alive()

    def terminate(self) -> None:
        """What ``kill`` does to the process that the shell started, be it the launcher."""
        self.process.terminate()
        self.alive()

    def signal_rank(self, rank: int, number: int) -> None:
        """A signal to one rank alone."""
        psutil.Process(self.process.pid).children()[rank].send_signal(number)

    def alive(self) -> list[psutil.Process]:
        """Every living process that this run has started, directly or not, and remember them."""
        return self._marked.alive()

    def assert_gone(self, timeout: float) -> None:
        """No process is left within ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while (left := self.alive()) and time.monotonic() < deadline:
            self.process.poll()
            time.sleep(0.1)
        assert not left, f"left behind: {[p.cmdline() for p in left]}\n{self.printed}"
        self.process.wait(timeout)

    def kill(self) -> None:
        """SIGKILL to all of it: the cleaning up after a test, passed or failed."""
        self._marked.kill()

    @property
    def printed(self) -> str:
        """Everything the processes of the last start printed."""
        return self.log.read_text()

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """``metrics.jsonl``: rows of ``train`` or ``eval``."""
        return [row for row in read_metrics(self.metrics) if row["kind"] == kind]

    def groups(self, step: int) -> list[Group]:
        """The recorded rollouts of one step."""
        return read_groups(self.path / "rollouts" / f"step_{step:06d}.parquet")


def run_in_turn(ranks: int, *commands: list[object]) -> None:
    """Run several ``[program, argument, ...]`` on the same ``ranks`` processes: most of the time
    that a short program takes is that of its imports. Each must exit with 0."""
    run_ranks(ranks, _run_programs, [(free_port(), *map(str, c)) for c in commands])


def _run_programs(commands: list[tuple[int, str, ...]]) -> None:
    for port, program, *arguments in commands:
        os.environ["MASTER_PORT"] = str(port)  # one each: the last job's store may still listen
        sys.argv = [program, *arguments]
        try:
            runpy.run_path(str(REPO / program), run_name="__main__")
        except SystemExit as end:
            if end.code != 0:
                raise RuntimeError(f"{sys.argv} exits with {end.code}") from end


def assert_same_weights(one: Path, two: Path) -> None:
    """Two HF folders hold the same tensors, bit for bit."""
    a, b = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype and torch.equal(value, b[name]), name
