"""Jobs of ``slurm/train.sbatch``: submit them, watch them, read what they leave."""

import json
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import psutil

from peergrad.observing.metrics import read_metrics
from peergrad.running.rundir import RunDir
from tests.slurm.cluster import Cluster, poll

REPO = Path(__file__).resolve().parents[2]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
PATIENCE = 400  # seconds for a server and trainers to start, on a computer with other things to do


class Job(RunDir):
    """The run ``name`` of the folder ``root``, and the job that was last submitted for it."""

    def __init__(self, cluster: Cluster, root: Path, name: str, *overrides: str) -> None:
        super().__init__(root / name)
        self._cluster = cluster
        self.overrides = [f"run.root={root}", f"run.name={name}", *overrides]
        self._output = root / f"{name}.out"
        self.id: str | None = None

    def submit(self, *overrides: str, nodes: int, **variables: str) -> None:
        """With one rank a training node, one server a serving one, and nodes that are taken as they
        are, unless told otherwise."""
        site = self.path.with_suffix(".site")  # the emulated nodes' GPUs have no driver
        site.write_text("PREFLIGHT=(--gpus 0 --min-memory-gb 0 --min-disk-gb 0 --min-shm-gb 0)\n")
        sizes = {"RANKS_PER_NODE": "1", "SERVERS_PER_NODE": "1", "NO_PREFLIGHT": "1"}
        sizes |= {"PYTHON": sys.executable, "SITE": str(site)}
        self.id = self._cluster.slurm(
            *("sbatch", "--parsable", f"--nodes={nodes}", "--time=60", f"--output={self._output}"),
            *("slurm/train.sbatch", *self.overrides, *overrides),
            cwd=REPO,
            **{**sizes, **variables},
        )

    def facts(self) -> dict[str, str]:
        """What Slurm says of it."""
        text = self._cluster.slurm("scontrol", "show", "job", "--oneliner", self.id)
        return dict(re.findall(r"(\w+)=(\S+)", text))

    @property
    def state(self) -> str:
        return self.facts()["JobState"]

    @property
    def nodes(self) -> list[int]:
        """Where it runs, or ran last."""
        return self._cluster.numbers(self.facts()["NodeList"])

    @property
    def printed(self) -> str:
        """All attempts' output."""
        return self._output.read_text() if self._output.exists() else ""

    def wait_until(self, event: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
        """Poll ``event`` while the job has not ended."""

        def happened() -> object:
            state = self.state  # first: what it does last is to be seen
            seen = event()
            assert seen or state not in ENDED, f"{state} before {what}"
            return seen

        try:
            poll(happened, what, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.printed}") from error

    def wait_for(self, state: str) -> None:
        """Until it has ended in ``state``, with no process left on any node."""
        self.wait_until(lambda: self.state in ENDED, "its end")
        assert self.state == state, f"{self.state}\n{self.printed}"
        self.wait_until_gone()

    def wait_until_gone(self) -> None:
        """Until no process of any job is left on any node."""
        poll(lambda: not self.processes(), "all processes to end", 60)

    def signal(self, name: str) -> None:
        """Signal the batch script alone, as --signal=B:... does."""
        self._cluster.slurm("scancel", "--batch", f"--signal={name}", self.id)

    def processes(self, module: str = "") -> list[psutil.Process]:
        """Those of any job on any node; only those that run ``module`` if one is named."""
        found = []
        for process in chain.from_iterable(map(self._cluster.processes, self._cluster.nodes)):
            with suppress(psutil.NoSuchProcess):
                if not module or process.cmdline()[:3] == [sys.executable, "-m", module]:
                    found.append(process)
        return found

    @property
    def step(self) -> int:
        """The last that was trained."""
        rows = read_metrics(self.metrics) if self.metrics.exists() else []
        return max((row["step"] for row in rows if row["kind"] == "train"), default=0)

    def servers(self) -> list[float]:
        """How many were given the weights after each step."""
        rows = read_metrics(self.metrics) if self.metrics.exists() else []
        return [row["sync/servers"] for row in rows if row["kind"] == "train"]

    def attempts(self) -> list[dict[str, Any]]:
        """What train.sbatch has written of each."""
        file = self.path / "attempts.jsonl"
        return [json.loads(line) for line in file.open()] if file.exists() else []
