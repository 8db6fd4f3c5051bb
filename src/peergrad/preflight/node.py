"""What a node does: look at itself, report, take part in what the first node orders."""

import time
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

from peergrad.config import Config, ServerMode
from peergrad.preflight.engine import asks_for_engine, check_packages, needs_engine
from peergrad.preflight.exchange import Exchange, until
from peergrad.preflight.gpus import check_gpus
from peergrad.preflight.machine import (
    check_cpus,
    check_disks,
    check_limits,
    check_memory,
    temporary,
)
from peergrad.preflight.options import Options
from peergrad.preflight.ports import check_ports
from peergrad.preflight.probe import Probe
from peergrad.preflight.report import Answer, Found, Order, Report, problem
from peergrad.preflight.smoke import Collectives
from peergrad.preflight.versions import check_model, versions
from peergrad.running.ending import FINISHED
from peergrad.running.ports import free_ports
from peergrad.storage import StorageError

SAYING_SECONDS = 3.0
"""That a report takes to reach the first node."""


@dataclass
class Node:
    """One node's part.

    Example:
        ``Node(options, Exchange(options.folder, options.host), end=time.monotonic() + 60).run()``
    """

    options: Options
    exchange: Exchange
    end: float  # of time.monotonic; anew once the first node has begun
    doing: str = "waiting for the first node"
    _seen: float = field(default=0.0, init=False)

    def run(self) -> int:
        """The exit status: 0 once this node has done its part, whatever it has found.

        StorageError if it cannot write what it has found.
        """
        if until(self.end, self._join, self.exchange.refresh) is None:
            first, seconds = self.options.names[0], self.options.deadline
            rule = f"shows no sign of the first node ({first}) within {seconds:g} s"
            remedy = "see whether it is the same folder there, and whether it still runs"
            raise StorageError(problem("--shared", str(self.options.folder.parent), rule, remedy))
        self._follow()
        return FINISHED

    def _join(self) -> bool | None:
        if not self.exchange.join():
            return None
        self._seen = time.time()
        self.end = time.monotonic() + self.options.deadline
        return True

    def _follow(self) -> None:
        gpus, found = self._examine()
        alone = self.options.nodes == 1 and gpus == 0
        log = self.exchange.folder / f"{self.options.host}.log"
        # Before the report, so that torch is loaded while those of the others are waited for.
        collectives = None if alone or found.wrong else Collectives(log)
        self._report(gpus, found)
        for number in count(1):
            self.doing = f"waiting for order {number}"

            def ask(name: str = f"order-{number}.json") -> Order | None:
                if self._join():  # what we have answered was left from an earlier preflight
                    self._report(gpus, found)
                return self.exchange.hear(name, Order)

            order = until(self.end, ask, self.exchange.refresh)
            if order is None or order.end or collectives is None:
                return
            self.doing = "taking part in an all-reduce"
            outcomes = collectives.run(
                order, self.options.host, gpus, over=partial(self._is_over, number)
            )
            self.exchange.say(f"{self.options.host}.answer-{number}.json", Answer(outcomes))

    def _is_over(self, number: int) -> bool:
        """Whether the first node waits no longer for what order ``number`` asks."""
        self.exchange.refresh()
        return self.exchange.hear(f"order-{number + 1}.json", Order) is not None

    def _examine(self) -> tuple[int, Found]:
        """Everything that a node can tell of itself."""
        asked = self.options
        late = time.monotonic() + self.options.reporting - SAYING_SECONDS
        self.doing = "asking nvidia-smi"
        gpus, found = check_gpus(asked.gpus)
        engine = asks_for_engine(asked.config)
        with Probe(
            0 if found.wrong else gpus, engine=engine
        ) as probe:  # torch takes seconds to load
            self.doing = "looking at processors, memory and limits"
            found += check_cpus(gpus, asked.min_cpus) + check_memory(gpus, asked.min_memory)
            found += check_limits() + check_ports(asked.ports)
            self.doing = "writing to its disks"
            found += check_disks(self._folders(), asked.min_disk, asked.min_shm)
            self.doing = "reading versions"
            found += versions()
            if gpus and engine:
                found += check_packages(needs_engine(asked.config))
            if asked.config is not None:
                self.doing = f"reading {asked.config.model.path}"
                found += check_model(asked.config.model.path, _reads_weights(asked.config))
            self.doing = "waiting for torch to find the GPUs"
            found += probe.found(max(1.0, late - time.monotonic()))
        return gpus, found

    def _folders(self) -> dict[str, Path]:
        config = self.options.config
        run = {"--shared": self.options.folder}
        if config is not None:
            run = {"run.root": Path(config.run.root)}
        return {**run, "TMPDIR": temporary()}

    def _report(self, gpus: int, found: Found) -> None:
        wrong = list(found.wrong)
        order = self.exchange.hear("order-0.json", Order)
        fault = None if order is None else self.exchange.canary_of(order.first)
        if fault is not None:
            key, remedy = str(self.options.folder.parent), "mount one file system on all nodes"
            wrong.append(problem("--shared", key, f"the first node's file {fault}", remedy))
        self.exchange.put_canary()
        self.exchange.say(
            f"{self.options.host}.json",
            Report(
                rank=self.options.rank,
                host=self.options.host,
                address=self.options.address,
                ports=tuple(free_ports(2)),
                gpus=gpus,
                seen=self._seen,
                said=time.time(),
                wrong=tuple(wrong),
                unknown=found.unknown,
                facts={**(found.facts or {}), "gpus": str(gpus)},
            ),
        )


def _reads_weights(config: Config) -> bool:
    """Whether ranks or servers start from the weights of model.path."""
    rollout = config.rollout
    managed = rollout.replay is None and rollout.servers.mode is ServerMode.managed
    return managed or config.model.weights is None
