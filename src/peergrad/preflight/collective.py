"""One process of an all-reduce over nodes; it prints a line of JSON for every stage it reaches.

A process of its own, so that whatever hangs in it can be killed.
"""

import json
import os
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from peergrad.running.lifetime import die_with_parent

if TYPE_CHECKING:
    from torch import Tensor

STAGES = ("not started", "started", "torch", "device", "met", "joined", "reduced")
"""What a process has reached: its imports, its GPU, all others at the first one's port, their
group, the sum."""
NUMBERS = {"nccl": 64 << 20, "gloo": 1 << 20}  # of 4 bytes
ROUNDS = 3


def main(text: str) -> None:
    """``text``: {address, port, rank, world, gpu (null: none), seconds, parent} as JSON."""
    asked = json.loads(text)
    die_with_parent(asked["parent"])
    tell("started")
    import torch
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    tell("torch")
    gpu, rank, world = asked["gpu"], asked["rank"], asked["world"]
    device = torch.device("cpu") if gpu is None else torch.device("cuda", gpu)
    backend = "gloo" if gpu is None else "nccl"
    if gpu is not None:
        torch.cuda.set_device(device)
    numbers = torch.full((NUMBERS[backend],), float(rank + 1), device=device)
    tell("device")
    wait = timedelta(seconds=asked["seconds"])
    store = TCPStore(
        asked["address"], asked["port"], world, rank == 0, wait, wait_for_workers=False
    )
    store.set(f"here/{rank}", "")
    store.wait([f"here/{other}" for other in range(world)], wait)
    tell("met")
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
    dist.all_reduce(numbers)
    tell("joined")
    expected = world * (world + 1) / 2
    if not bool((numbers == expected).all()):
        wrong = numbers[numbers != expected][0].item()
        raise SystemExit(f"the sum of 1 to {world} came out as {wrong:g}")
    tell("reduced", rate=_rate(numbers, world))
    store.set(f"done/{rank}", "")
    if rank == 0:  # the store must outlive the others' last words
        store.wait([f"done/{other}" for other in range(world)], wait)
    os._exit(0)  # nothing is left to be put in order, and doing so has its own ways to hang


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


def tell(stage: str, **more: float) -> None:
    print(json.dumps({"stage": stage, **more}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
