"""Run a function on real gloo ranks, each a process of its own."""

import multiprocessing as mp
import os
import pickle
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _rank(
    function: Callable[..., Any],
    rank: int,
    ranks: int,
    port: int,
    results: Any,
    args: tuple[Any, ...],
) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    import torch

    torch.set_num_threads(1)
    try:
        # pickled here: a queue would pass tensors by handles that end with this process
        results.put((rank, pickle.dumps(function(*args)), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def run_ranks(
    ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 300
) -> list[Any]:
    """Call the top-level ``function(*args)`` on ``ranks`` processes; its results in rank order.

    The first rank that fails raises here with its traceback; all others are then ended.
    """
    context = mp.get_context("spawn")
    results = context.Queue()
    port = free_port()
    workers = [
        context.Process(target=_rank, args=(function, rank, ranks, port, results, args))
        for rank in range(ranks)
    ]
    for worker in workers:
        worker.start()
    found: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(found) < ranks:
            try:
                rank, value, error = results.get(timeout=1)
            except queue.Empty:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"only ranks {sorted(found)} of {ranks} answered") from None
                continue
            if error:
                raise RuntimeError(f"rank {rank} of {ranks} failed:\n{error}")
            found[rank] = pickle.loads(value)
    finally:
        for worker in workers:
            worker.join(timeout=10)
            if worker.is_alive():
                worker.kill()
    return [found[rank] for rank in range(ranks)]
