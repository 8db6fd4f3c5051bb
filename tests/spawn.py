"""Run a function on real gloo ranks, each a process of its own.

The ranks are forked from a server that has imported what they need once a session
(``tests/preload.py``). Nothing else is shared: a rank has the environment, the working directory
and the arguments of the test that started it, and a port of its own to meet its peers.
"""

import multiprocessing as mp
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

from tests.ports import free_port

JOIN_SECONDS = 10
PRELOAD = "tests.preload"
"""What the server imports: this module, or one that imports it."""


@cache
def fork_server() -> Any:
    """The context whose processes are forked from the server, which is started here."""
    context: Any = mp.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    # Of Python 3.11 a server gets no sys.path. OpenBLAS starts its threads when it is imported.
    ours = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    with mock.patch.dict(os.environ, ours):
        forkserver.ensure_running()
    return context


def _rank(
    answer: Connection,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    try:
        from peergrad.running.lifetime import die_with_parent
        from tests import preload

        assert not preload.unfit(), f"the fork server has {preload.unfit()}"
        die_with_parent(preload.SERVER)
        # pickled here: a connection would pass tensors by handles that end with this process
        result = (pickle.dumps(function(*args)), None)
    except BaseException:
        result = (None, traceback.format_exc())
    answer.send(result)


def run_ranks(
    ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 300
) -> list[Any]:
    """Call the top-level ``function(*args)`` on ``ranks`` processes; its results in rank order.

    The first rank that fails raises here with its traceback; all others are then ended.
    """
    context = fork_server()
    job = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    waiting: dict[Connection, int] = {}
    workers = []
    found: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            environment = {**os.environ, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            worker = context.Process(target=_rank, args=(theirs, environment, function, args))
            worker.start()
            theirs.close()  # so that the end of the process shows as the end of the pipe
            waiting[ours] = rank
            workers.append(worker)
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"only ranks {sorted(found)} of {ranks} answered")
            for ours in ready:
                rank = waiting.pop(ours)
                found[rank] = _received(ours, f"rank {rank} of {ranks}")
    finally:
        for worker in workers:
            worker.join(JOIN_SECONDS if len(found) == ranks else 0)
            if worker.is_alive():
                worker.kill()
                worker.join()
    return [found[rank] for rank in range(ranks)]


def _received(answer: Connection, who: str) -> Any:
    try:
        value, error = answer.recv()
    except EOFError:
        raise RuntimeError(f"{who} ended without an answer") from None
    finally:
        answer.close()
    if error:
        raise RuntimeError(f"{who} failed:\n{error}")
    return pickle.loads(value)
