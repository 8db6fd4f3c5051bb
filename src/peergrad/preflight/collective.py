"""One process of an all-reduce over nodes; it writes a line of JSON for every stage it reaches.

A process of its own, so that whatever hangs in it can be killed. It is forked from a server that
imports torch once for the node (``smoke.Collectives``).
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from peergrad.config import rules
from peergrad.running.lifetime import die_with_parent

if TYPE_CHECKING:
    from torch import Tensor

STAGES = (
    "its start",
    "loading torch",
    "taking its device",
    "meeting the others",
    "a first sum",
    "all sums",
)
"""What a process has reached. The others are met at the first one's port."""
LONG = timedelta(days=1)
NUMBERS = {"nccl": 64 << 20, "gloo": 1 << 20}  # of 4 bytes
ROUNDS = 3


@dataclass(frozen=True)
class Seat:
    """A process's place in a job.

    Example:
        ``Seat(address="gpu01", port=21000, rank=9, world=16, gpu=1,
        said=Path("/tmp/x/1.out"), log=Path("/shared/gpu02.log"))``
    """

    address: str  # of the first node
    port: int
    rank: int
    world: int
    gpu: int | None
    said: Path  # the file for its lines
    log: Path  # the file for what libraries complain of


def take_part(seat: Seat) -> None:
    """Add up with all others, and end this process. Its last line has a rate or an error."""
    try:
        die_with_parent(os.getppid())
        with seat.said.open("a") as out, seat.log.open("a") as complaints:
            os.dup2(out.fileno(), sys.stdout.fileno())
            os.dup2(complaints.fileno(), sys.stderr.fileno())
        tell(STAGES[5], rate=_reduce(seat))
    except BaseException as error:
        tell("failed", error=rules.one_line(error))
    os._exit(0)  # nothing is left to be put in order, and doing so has its own ways to hang


def _reduce(seat: Seat) -> float:
    """GB/s. RuntimeError if the sum is wrong. Who started this process ends it when time is up: a
    process that gave up by itself would look like one that has failed."""
    import torch
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    tell(STAGES[1])
    rank, world = seat.rank, seat.world
    device = torch.device("cpu") if seat.gpu is None else torch.device("cuda", seat.gpu)
    backend = "gloo" if seat.gpu is None else "nccl"
    if seat.gpu is not None:
        torch.cuda.set_device(device)
    numbers = torch.full((NUMBERS[backend],), float(rank + 1), device=device)
    tell(STAGES[2])
    store = TCPStore(seat.address, seat.port, world, rank == 0, LONG, wait_for_workers=False)
    store.set(f"here/{rank}", "")
    store.wait([f"here/{other}" for other in range(world)], LONG)
    tell(STAGES[3])
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=LONG)
    dist.all_reduce(numbers)
    expected = world * (world + 1) / 2
    right = bool((numbers == expected).all())
    tell(STAGES[4])
    if not right:
        wrong = numbers[numbers != expected][0].item()
        raise RuntimeError(f"the sum of 1 to {world} came out as {wrong:g}")
    rate = _rate(numbers, world)
    store.set(f"done/{rank}", "")
    if rank == 0:  # the store must outlive the others' last words
        store.wait([f"done/{other}" for other in range(world)], LONG)
    return rate


def _rate(numbers: "Tensor", world: int) -> float:
    """GB/s through each process's slowest link, as NCCL's tests count ("bus bandwidth")."""
    import torch
    import torch.distributed as dist

    numbers.zero_()
    start = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_reduce(numbers)
    if numbers.is_cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / ROUNDS
    return float(2 * (world - 1) / world * numbers.numel() * 4 / seconds / 1e9)


def tell(stage: str, **more: float | str) -> None:
    os.write(sys.stdout.fileno(), f"{json.dumps({'stage': stage, **more})}\n".encode())
