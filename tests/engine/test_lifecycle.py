"""Managed SGLang servers live and die apart, and end with their trainer, however that ends."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks.marked import is_alive
from tests.servers import START_TIMEOUT, managed
from tests.waiting import wait_until

REPO = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.engine

TRAINER = """
import sys, time
from pathlib import Path
import psutil
from tests.servers import managed

with managed(*map(Path, sys.argv[1:]), count=2):
    print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
    time.sleep(600)
"""


def test_servers_live_and_die_apart(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of one start, the last of which SGLang refuses. Each has a port, a log, a session and
    workers of its own; whichever ends is named within seconds, and the others go on."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # what has two threads could not be forked
    before = set(psutil.Process().children(recursive=True))
    servers = managed(model, tmp_path, count=3)
    options = servers.options
    servers.options = lambda index: options(index) + ["--no-such", "9"] * (index == 2)
    try:
        servers.start()
        (_,) = set(psutil.Process().children(recursive=True)) - before  # which only imports so far
        wait_until(servers.ended, START_TIMEOUT)
        ((url, words),) = servers.ended().items()
        assert url == servers.urls[2] and words.startswith(
            f"rollout.servers: server 2 at {servers.urls[2]} ended with exit code 2 (its log says "
            "'sglang serve: error: unrecognized arguments: --no-such 9'); see "
        )
        trees = [tree_of(servers.log(index), servers.urls[index]) for index in range(2)]
        assert len({os.getsid(0), *(os.getsid(root.pid) for root, *_ in trees)}) == 3
        for url, (_, *workers) in zip(servers.urls, trees, strict=False):
            titles = {worker.cmdline()[0].strip() for worker in workers}
            assert titles == {
                "sglang::scheduler",
                "sglang::detokenizer",
            }  # no other: they are forked
            assert len(answer(url)) == 3
        trees[1][1].kill()  # a worker: the rest of its server ends by itself
        wait_until(lambda: len(servers.ended()) == 2, 45)  # SGLang itself would take a minute
        words = servers.ended()[servers.urls[1]]
        assert f"{servers.urls[1]} was ended by SIGKILL, perhaps for want of" in words
        wait_until(lambda: not any(map(is_alive, trees[1])))
        assert len(answer(servers.urls[0])) == 3
        started = set(psutil.Process().children(recursive=True)) - before
        assert started > set(trees[0])
    finally:
        servers.stop()
    wait_until(lambda: not any(map(is_alive, started)))


def tree_of(log: Path, url: str) -> list[psutil.Process]:
    """The server that serves ``url`` and its workers, once its log says that it does."""
    wait_until(lambda: f"Uvicorn running on {url} " in log.read_text(), START_TIMEOUT)
    (number,) = re.findall(r"Started server process \[(\d+)\]", log.read_text())
    root = psutil.Process(int(number))
    return [root, *root.children(recursive=True)]


def answer(url: str) -> list[int]:
    """Three tokens."""
    sampling = {"max_new_tokens": 3, "ignore_eos": True}
    body = {"input_ids": [5, 9, 30], "sampling_params": sampling}
    return list(httpx.post(f"{url}/generate", json=body, timeout=60.0).json()["output_ids"])


@pytest.mark.slow
def test_a_killed_trainer_leaves_no_server(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", TRAINER, str(model), str(tmp_path)]
    trainer = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    tree = [psutil.Process(int(pid)) for pid in trainer.stdout.readline().split()]
    assert len(tree) >= 6  # two servers with two workers each
    trainer.send_signal(signal.SIGKILL)
    trainer.communicate()
    wait_until(lambda: not any(map(is_alive, tree)))
