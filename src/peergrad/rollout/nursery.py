"""Processes that are forked from one which has imported once what all of them need.

    python -m peergrad.rollout.nursery FD MODULE ORDER...

imports MODULE, calls its ``load()``, forks one process for each order, in which ``MODULE.main()``
finds its own ``sys.argv``, environment and log, and tells through FD how each ends. It is the
parent of these processes, and lives as long as they do. For one order it does not fork: it becomes
the process.

Not multiprocessing's fork server: that is one for the whole program, with one set of imports;
starting a process waits for them; its processes import the program's main module as well, share its
session, and how they end is known only as long as the server lives to tell.

If the parent is killed the kernel kills this process, and with it those that it has forked.
"""

import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from threading import Lock
from types import ModuleType

import psutil

from peergrad.running.lifetime import die_with_parent


@dataclass(frozen=True)
class Order:
    """One process.

    Example:
        ``Order(["--port", "30000"], "logs/server_0.log", {"OMP_NUM_THREADS": "4"})``
    """

    arguments: list[str]
    log: str
    """Where it prints to, behind what is there."""
    environment: dict[str, str]
    """What it does not share with the process that it is forked from."""


class Child:
    """A process of the nursery's, told of as ``subprocess.Popen`` does."""

    def __init__(self, nursery: "Nursery") -> None:
        self._nursery = nursery
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit status, minus the number of a signal; None while it lives."""
        self._nursery.listen()
        return self.returncode


class Nursery:
    """Starts the nursery and returns at once; ``children`` are those to come, in the order of the
    orders. What is printed before they are there goes to the log of the first."""

    def __init__(
        self, module: str, orders: Sequence[Order], *, environment: Mapping[str, str]
    ) -> None:
        self._ends, theirs = Pipe(duplex=False)
        self._lock = Lock()  # of two threads that found the pipe full, one would wait for ever
        self.children = [Child(self) for _ in orders]
        ours = [sys.executable, "-m", "peergrad.rollout.launch", str(os.getpid())]
        command = [sys.executable, "-m", __name__, str(theirs.fileno()), module]
        told = [json.dumps(asdict(order)) for order in orders]
        with open(orders[0].log, "ab") as output, theirs:
            self.process = subprocess.Popen(
                [*ours, *command, *told],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[theirs.fileno()],
            )

    def listen(self) -> None:
        """Learn who has ended. None outlives the nursery: those that it has not told of ended as it
        did, or were never there."""
        own = self.process.poll()  # first: whatever it told is in the pipe by then
        with self._lock, suppress(EOFError):
            while self._ends.poll():
                index, status = self._ends.recv()
                self.children[index].returncode = status
        if own is not None:
            for child in self.children:
                child.returncode = own if child.returncode is None else child.returncode


def main(arguments: Sequence[str]) -> None:
    """Usage: FD MODULE ORDER..."""
    descriptor, module = int(arguments[0]), importlib.import_module(arguments[1])
    os.set_inheritable(descriptor, False)
    orders = [Order(**json.loads(text)) for text in arguments[2:]]
    module.load()
    if len(orders) == 1:
        return _become(module, orders[0])
    forkable = psutil.Process().num_threads() == 1
    gc.freeze()  # no child need copy pages to look through them for garbage
    sys.stdout.flush()  # or every child would print what is still in the buffer
    nursery, living = os.getpid(), {}
    for index, order in enumerate(orders):
        if (pid := os.fork()) == 0:
            os.close(descriptor)
            _stand_alone(nursery, order)
            return _become(module, order, anew=not forkable)
        living[pid] = index
    _tell(Connection(descriptor, readable=False), living)


def _stand_alone(nursery: int, order: Order) -> None:
    """A session and a log of its own, and an end with the nursery's."""
    os.setsid()
    die_with_parent(nursery)
    log = os.open(order.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)


def _become(module: ModuleType, order: Order, *, anew: bool = False) -> None:
    """Be the process that was ordered; ``anew`` without anything of this one. One forked from
    several threads must, for it would wait for ever for what the others held at that moment."""
    os.environ.update(order.environment)
    if anew:
        os.execv(sys.executable, [sys.executable, "-m", module.__name__, *order.arguments])
    sys.argv = [str(module.__file__), *order.arguments]
    module.main()


def _tell(ends: Connection, living: dict[int, int]) -> None:
    """``(index, status)`` of every process that ends, until the last has."""
    while living:
        pid, status = os.wait()
        if pid in living:  # not one of an import's
            ends.send((living.pop(pid), os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main(sys.argv[1:])
