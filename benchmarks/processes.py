"""Runs a command and watches its processes: who computes how much, and their memory together.

``Watched.cpu_between`` answers who is the bottleneck: a kind of process that computes for a whole
step's seconds holds all others up.
"""

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from machine import load_average

INTERVAL = 0.2  # seconds between two looks at the processes' times
COST = 0.01  # share of the time that reading memory may take: it walks all page tables
KINDS = {
    "server: scheduler": r"sglang::scheduler",
    "server: detokenizer": r"sglang::detokenizer",
    "server: tokenizer manager": r"sglang[. ]|peergrad\.rollout\.cpu_server",
    "collector": r"multiprocessing.spawn",
    "reward worker": r"peergrad\.rewards\.worker",
    "launcher": r"torch\.distributed\.run|peergrad\.launch",
    "ranks": r"peergrad\.main|trl_grpo",
}
"""What a command line says of a process, the first that fits. A server's part is a ``collector``
until it has given itself a name, some seconds after its start."""


@dataclass(frozen=True)
class Watched:
    """A command that has ended.

    Example:
        of two looks: ``Watched(status=0, load_highest=2.1, memory_gib=3.2, times=[10.0, 10.2],
        cpu={"ranks": [4.0, 4.3]})``
    """

    status: int
    load_highest: float  # load average of the machine
    memory_gib: float  # highest sum of the processes' memory; shared pages count once
    times: list[float]  # of the looks, seconds since 1970
    cpu: dict[str, list[float]]  # CPU seconds so far of all processes of a kind, at those times

    def cpu_between(self, start: float, end: float) -> dict[str, float]:
        """CPU seconds of each kind from ``start`` to ``end`` (seconds since 1970), the greatest
        first; between two looks in proportion."""
        found = {
            kind: float(np.diff(np.interp([start, end], self.times, seconds))[0])
            for kind, seconds in self.cpu.items()
        }
        return dict(sorted(found.items(), key=lambda item: -item[1]))


@dataclass
class Tree:
    """The times of a process and its descendants, also of those that have ended."""

    root: int
    seen: dict[int, tuple[str, float]] = field(default_factory=dict)  # by process: kind, seconds

    def look(self) -> dict[str, float]:
        """CPU seconds so far, by kind."""
        for process in self.processes():
            try:
                with process.oneshot():
                    times = process.cpu_times()
                    self.seen[process.pid] = kind(process.cmdline()), times.user + times.system
            except psutil.Error:
                continue  # it ended meanwhile
        totals: dict[str, float] = {}
        for name, seconds in self.seen.values():
            totals[name] = totals.get(name, 0.0) + seconds
        return totals

    def memory(self) -> int:
        """Bytes of all processes; a page that several map counts once (proportional set size)."""
        total = 0
        for process in self.processes():
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
        return total

    def processes(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self.root)
            return [root, *root.children(recursive=True)]
        except psutil.Error:
            return []


def kind(command: Sequence[str]) -> str:
    """Example: ``["python", "-m", "sglang.launch_server"]``: ``server: tokenizer manager``."""
    line = " ".join(command)
    return next((name for name, pattern in KINDS.items() if re.search(pattern, line)), "other")


def run_watched(
    arguments: Sequence[str], *, cwd: Path, environment: Mapping[str, str] | None = None
) -> Watched:
    """Run to the end; ``environment`` adds to this process's.

    An interrupted benchmark asks the run to end and waits for its clean-up. The session of its own
    keeps a Ctrl-C from reaching torchrun a second time, which would end it before its workers.
    """
    highest, peak, next_memory = 0.0, 0, 0.0
    times: list[float] = []
    looks: list[dict[str, float]] = []
    env = {**os.environ, **(environment or {})}
    with subprocess.Popen(arguments, cwd=cwd, env=env, start_new_session=True) as process:
        tree = Tree(process.pid)
        try:
            while process.poll() is None:
                times.append(time.time())
                looks.append(tree.look())
                highest = max(highest, load_average())
                if time.time() >= next_memory:
                    began = time.time()
                    peak = max(peak, tree.memory())
                    next_memory = time.time() + (time.time() - began) / COST
                time.sleep(INTERVAL)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    kinds = dict.fromkeys(name for look in looks for name in look)
    cpu = {name: [look.get(name, 0.0) for look in looks] for name in kinds}
    return Watched(process.returncode, highest, round(peak / 2**30, 2), times, cpu)
