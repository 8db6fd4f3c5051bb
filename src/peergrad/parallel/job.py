"""The processes of a run before and beside any process group: who has come, who has failed.

All of it goes through the launcher's key-value store, where waiting costs little and has no limit:
a collective that waits for a long rollout would trip its timeout.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import DistError
from torch.distributed.rendezvous import rendezvous

from peergrad.echo import OtherRankFailed

FAILED, SAID, ARRIVED = "peergrad/failed", "peergrad/said", "peergrad/arrived"
TURN, KEPT = "peergrad/turn", 100
STOP = "peergrad/stop"


class Job:
    """This process's place among those that a launcher has started.

    Example:
        >>> job = Job.join(minutes=30)
        >>> job.rank, job.world
        (0, 1)
    """

    def __init__(self, rank: int, world: int, store: Any) -> None:
        self.rank, self.world, self.store = rank, world, store
        self._turn = 0

    @classmethod
    def join(cls, *, minutes: float) -> "Job":
        """Find the other processes, and wait until all have come: ``connect``, then
        ``await_all``."""
        job = cls.connect(minutes=minutes)
        job.await_all(minutes=minutes)
        return job

    @classmethod
    def connect(cls, *, minutes: float) -> "Job":
        """Find the store where the processes meet (``torchrun`` sets the environment; without it
        there is but one process). Raises RuntimeError after ``minutes``."""
        if "RANK" not in os.environ:
            return cls(0, 1, dist.HashStore())  # type: ignore[attr-defined]
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        return cls(rank, world, _store(timedelta(minutes=minutes)))

    def await_all(
        self, *, minutes: float, heard: Callable[[str], None] = lambda text: None
    ) -> None:
        """Wait until all ranks have come; ``heard`` is told how many have. Raises RuntimeError
        after ``minutes``, OtherRankFailed if one fails meanwhile."""
        deadline = time.monotonic() + 60 * minutes
        try:
            here = self.store.add(ARRIVED, 1)
            for _ in self._pauses():
                if here == self.world:
                    return
                heard(f"{here} of {self.world} ranks are there")
                self.raise_if_failed()
                if time.monotonic() > deadline:
                    break
                here = self.store.add(ARRIVED, 0)
        except DistError as error:
            raise OtherRankFailed("lost the connection to rank 0") from error
        raise RuntimeError(
            f"only {here} of {self.world} ranks have come within parallel.timeout_minutes; see "
            "whether all nodes have started, or raise it"
        )

    def done(self) -> None:
        """Rank 0 has done what the others ``await_zero`` for."""
        self._turn += 1
        self.store.set(f"{TURN}/{self._turn}", "")
        if self._turn > KEPT:
            self.store.delete_key(f"{TURN}/{self._turn - KEPT}")

    def await_zero(self) -> None:
        """Wait until rank 0 is ``done``, however long that takes. Raises OtherRankFailed if a rank
        fails meanwhile."""
        self._turn += 1
        try:
            for _ in self._pauses():
                if self.store.check([f"{TURN}/{self._turn}"]):
                    return
                self.raise_if_failed()
        except DistError as error:
            raise OtherRankFailed("lost the connection to rank 0") from error

    def raise_if_failed(self) -> None:
        if self.failed():
            raise OtherRankFailed(f"rank {self.store.get(FAILED).decode()} failed")

    def failed(self) -> bool:
        """Whether a rank has said that it fails. Nobody has if the store is gone with its rank."""
        with suppress(DistError):
            return bool(self.store.check([FAILED]))
        return False

    def claim(self) -> bool:
        """Say that this rank fails; whether it is the first, which is the one to say why."""
        try:
            first = self.store.compare_set(FAILED, "", str(self.rank)).decode()
        except DistError:  # the store was on rank 0, which is gone: the next one speaks
            return self.rank <= 1
        return bool(first == str(self.rank))

    def ask_to_stop(self, reason: str) -> None:
        """Say to rank 0 that the run should end early, and why."""
        with suppress(DistError):
            self.store.set(STOP, reason)

    def asked_to_stop(self) -> str | None:
        """Why a rank has asked to stop; None if none has."""
        with suppress(DistError):
            if self.store.check([STOP]):
                return str(self.store.get(STOP).decode())
        return None

    def said(self, status: int) -> None:
        """The failure has been told and cleaned up after; this rank ends with ``status``."""
        with suppress(DistError):
            self.store.set(SAID, str(status))

    def await_said(self, seconds: float) -> int | None:
        """Wait for the failed rank: its status, None if it does not come to that."""
        deadline = time.monotonic() + seconds
        with suppress(DistError):
            for _ in self._pauses():
                if self.store.check([SAID]):
                    return int(self.store.get(SAID))
                if time.monotonic() > deadline:
                    break
        return None

    def _pauses(self) -> Iterator[None]:
        """Ever longer ones, from half a millisecond on; the more ranks ask, the longer. Asking
        again and again is quieter than the store's own ``wait``, which warns on the screen when its
        time is over."""
        pause, longest = 5e-4, max(0.01, self.world / 1000)
        while True:
            yield
            time.sleep(pause)
            pause = min(1.5 * pause, longest)


def _store(limit: timedelta) -> Any:
    """The store that the launcher keeps, or one that rank 0 keeps."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store, _, _ = next(rendezvous("env://", timeout=limit))
            return store
        return dist.TCPStore(  # type: ignore[attr-defined]  # public, though not in __all__
            address,
            int(port),
            is_master=os.environ["RANK"] == "0",
            timeout=limit,
            wait_for_workers=False,
        )
    except DistError as error:
        raise RuntimeError(
            f"MASTER_ADDR = {address!r}, MASTER_PORT = {port}: cannot be reached, or the port is "
            f"taken ({str(error).splitlines()[0]}); see whether the first node has started, or "
            "choose another port"
        ) from error
