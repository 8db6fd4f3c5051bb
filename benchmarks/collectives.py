"""The collectives of one rank: what a single GPU can show of NCCL, over gloo on a CPU.

    python benchmarks/collectives.py            # one GPU
    python benchmarks/collectives.py --tiny     # seconds on a CPU

The trainer's own groups are built and add up; then rank 0's side of a weight sync: its group apart
from the trainer's, weights in buckets through it, the group given up as after a server's failure,
and another one made. Alone in its groups a rank moves nothing over a network: times are those of
calls and copies on the device. The file is written after every part.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from machine import describe, load_average, result_path
from summary import save_result, spread, write_result
from torch import Tensor

from peergrad.config import ParallelConfig
from peergrad.parallel.mesh import Mesh, close_mesh, init_mesh
from peergrad.rollout.buckets import buckets
from peergrad.rollout.sync import broadcaster, join_group

GPU = torch.cuda.is_available()
ROUNDS, WARMUP = 12, 2
LIMIT = timedelta(seconds=30)
Part = tuple[str, Callable[[], dict[str, Any]]]


def seconds(action: Callable[[], Any]) -> float:
    """Until the device is done."""
    begin = perf_counter()
    action()
    if GPU:
        torch.cuda.synchronize()
    return perf_counter() - begin


def all_reduce(mesh: Mesh, size: int) -> dict[str, Any]:
    """Of ``size`` bytes of float32 over the ranks that share the data."""
    numbers = torch.full((size // 4,), 3.0, device=mesh.device)
    times = [seconds(lambda: dist.all_reduce(numbers, group=mesh.data)) for _ in range(ROUNDS)]
    assert numbers[0] == numbers[-1] == 3 * mesh.world ** len(times)
    return {"bytes": size, "seconds": asdict(spread(times[WARMUP:]))}


class SyncGroup:
    """Rank 0 of a group with no servers in it, made as ``rollout.sync`` makes it."""

    def __init__(self, backend: str) -> None:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", 0, 1, is_master=True, timeout=LIMIT, wait_for_workers=False
        )
        name = f"peergrad-{uuid4().hex[:8]}"
        self.thread = ThreadPoolExecutor(1)  # the sync joins and sends in threads, too
        join = self.thread.submit(join_group, store, name, 0, 1, backend, LIMIT)
        self.handle = join.result()

    def send(self, named: list[tuple[str, Tensor]], limit: int) -> int:
        """Broadcast; the number of buckets."""
        count = 0
        for bucket, _ in buckets(named, limit):
            before = bucket.flat.clone()
            self.thread.submit(broadcaster(bucket.flat, self.handle)).result().wait()
            assert torch.equal(bucket.flat, before)
            count += 1
        return count


def weight_sync(device: torch.device, size: int) -> dict[str, Any]:
    """Two groups one after the other, the first of them aborted."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    named = [(f"layer.{i}", torch.randn(size // 16, device=device).bfloat16()) for i in range(8)]
    found: dict[str, Any] = {"bytes": size}
    for end in ("abort", "destroy"):
        begin = perf_counter()
        group = SyncGroup(backend)
        found[f"join_seconds_before_{end}"] = perf_counter() - begin
        times, count = [], 0
        for _ in range(3):
            begin = perf_counter()
            count = group.send(named, size // 3)
            times.append(perf_counter() - begin)
        found |= {"buckets": count, "seconds": asdict(spread(times))}
        if end == "abort":
            group.handle.abort()
        else:
            dist.destroy_process_group(group.handle)
    return found


def parts(tiny: bool, kept: list[Mesh]) -> Iterator[Part]:
    def join() -> dict[str, Any]:
        begin = perf_counter()
        kept.append(init_mesh(ParallelConfig(), seed=0))
        nccl = list(torch.cuda.nccl.version()) if GPU else None  # type: ignore[no-untyped-call]
        return {"seconds": perf_counter() - begin, "backend": dist.get_backend(), "nccl": nccl}

    yield "the trainer's groups", join
    for size in (2**12, 2**16) if tiny else (2**12, 2**20, 2**28, 2**30):
        yield f"all-reduce of {size} bytes", partial(lambda n: all_reduce(kept[0], n), size)
    size = 2**20 if tiny else 2**31
    yield "weight sync", lambda: weight_sync(kept[0].device, size)
    yield "an all-reduce behind it", lambda: all_reduce(kept[0], 2**12)
    yield "all groups closed", lambda: {"seconds": seconds(close_mesh)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="few bytes")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    gpu = torch.cuda.get_device_name() if GPU else None
    out = options.out or result_path(gpu, "collectives")
    result = {"benchmark": "collectives", **describe(gpu), "load_average_before": load_average()}
    records: list[dict[str, Any]] = []
    kept: list[Mesh] = []
    for what, part in parts(options.tiny, kept):
        try:
            records.append({"what": what, **part()})
        except Exception as error:  # the others may say more
            records.append({"what": what, "failed": f"{type(error).__name__}: {error}"[:500]})
        print(records[-1], flush=True)
        save_result(out, {**result, "records": records})
    write_result(out, {**result, "records": records})
    return 1 if any("failed" in record for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
