"""The processes of a run before and beside any process group: who has come, who has failed.

All of it goes through the launcher's key-value store, where waiting costs nothing and has no limit:
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

FAILED, SAID, ARRIVED = "peergrad/failed", "peergrad/said", "peergrad/arrived"
TURN, KEPT = "peergrad/turn", 100


class OtherRankFailed(RuntimeError):
    """Another rank has failed and says why; this one has nothing to add."""


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
    def join(cls, *, minutes: float, heard: Callable[[str], None] = lambda text: None) -> "Job":
        """Find the other processes (``torchrun`` sets the environment; without it there are none)
        and wait until all have come. ``heard`` is told how many have.

        Raises RuntimeError after ``minutes``.
        """
        limit = timedelta(minutes=minutes)
        if "RANK" not in os.environ:
            return cls(0, 1, dist.HashStore())  # type: ignore[attr-defined]
        job = cls(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), _store(limit))
        job._await_all(time.monotonic() + limit.total_seconds(), heard)
        return job

    def _await_all(self, deadline: float, heard: Callable[[str], None]) -> None:
        here = self.store.add(ARRIVED, 1)
        for _ in _pauses():
            if here == self.world:
                return
            heard(f"{here} of {self.world} ranks are there")
            self.raise_if_failed()
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"only {here} of {self.world} ranks have come within "
                    "parallel.timeout_minutes; see whether all nodes have started, or raise it"
                )
            here = self.store.add(ARRIVED, 0)

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
            for _ in _pauses():
                if self.store.check([f"{TURN}/{self._turn}"]):
                    return
                self.raise_if_failed()
        except DistError as error:
            raise OtherRankFailed("lost the connection to rank 0") from error

    def raise_if_failed(self) -> None:
        if self.failed():
            raise OtherRankFailed(f"rank {self.store.get(FAILED).decode()} failed")

    def failed(self) -> bool:
        """Whether a rank has said that it fails."""
        return bool(self.store.check([FAILED]))

    def claim(self) -> bool:
        """Say that this rank fails; whether it is the first, which is the one to say why."""
        with suppress(DistError):  # with a store on another rank, which may be gone
            return bool(
                self.store.compare_set(FAILED, "", str(self.rank)).decode() == str(self.rank)
            )
        return False

    def said(self) -> None:
        """The failure has been told and cleaned up after."""
        with suppress(DistError):
            self.store.set(SAID, "")

    def await_said(self, seconds: float) -> None:
        """Wait for the failed rank: the first that ends has the launcher end all others."""
        deadline = time.monotonic() + seconds
        with suppress(DistError):
            for _ in _pauses():
                if self.store.check([SAID]) or time.monotonic() > deadline:
                    return


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


def _pauses() -> Iterator[None]:
    """Ever longer ones, from half a millisecond to a twentieth of a second. Asking again and again
    is quieter than the store's own ``wait``, which warns on the screen when its time is over."""
    pause = 5e-4
    while True:
        yield
        time.sleep(pause)
        pause = min(1.5 * pause, 0.05)
