"""Real servers on a node of their own, found, used and lost by a trainer's parts."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import torch

from benchmarks.marked import is_alive
from peergrad.config import Config, Dtype, ServerMode
from peergrad.observing.screen import Screen
from peergrad.rollout.engine import Sampling
from peergrad.rollout.errors import LoadAgain
from peergrad.rollout.probe import probe
from peergrad.rollout.sglang import SGLangEngine
from peergrad.rollout.sync import WeightSync
from tests.ports import free_row
from tests.servers import START_TIMEOUT
from tests.waiting import PATIENCE_SECONDS, wait_until

REPO = Path(__file__).resolve().parents[2]
RUN = "runs/a-1f3a"
pytestmark = pytest.mark.engine


class Serving:
    """``python -m peergrad.serve`` of ``model``, and all that it has started."""

    def __init__(self, model: Path, logs: Path, count: int) -> None:
        self.address = free_row(count)
        self.logs = logs
        overrides = [f"model.path={model}", "model.dtype=float32", f"rollout.servers.count={count}"]
        options = ["--port", str(self.address.ports[0]), "--log-dir", str(logs)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "peergrad.serve", *options, *overrides],
            cwd=REPO,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def config(self, model: Path) -> Config:
        """Of a run that waits for these servers."""
        config = Config()
        config.model.path, config.model.dtype = str(model), Dtype.float32
        config.data.max_prompt_tokens, config.rollout.max_new_tokens = 200, 100
        servers = config.rollout.servers
        servers.mode, servers.urls = ServerMode.external, self.address.urls
        servers.wait = START_TIMEOUT
        return config

    def tree(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def server(self, index: int) -> psutil.Process:
        log = self.logs / f"server_127.0.0.1_{self.address.ports[index]}.log"
        (number,) = re.findall(r"Started server process \[(\d+)\]", log.read_text())
        return psutil.Process(int(number))

    def end(self, tree: list[psutil.Process]) -> str:
        """Wait until it has ended, with all of ``tree``; what it has said."""
        said = self.process.communicate(timeout=PATIENCE_SECONDS)[0]
        wait_until(lambda: not any(map(is_alive, tree)))
        return said


@pytest.fixture
def serving(model: Path, tmp_path: Path) -> Iterator[Callable[[int], Serving]]:
    pytest.importorskip("sglang")
    made: list[Serving] = []

    def start(count: int) -> Serving:
        made.append(Serving(model, tmp_path / "logs", count))
        return made[-1]

    yield start
    for each in made:
        each.process.kill()  # the kernel ends the rest
        each.process.communicate()


def carried(urls: list[str]) -> list[str]:
    answers = [httpx.get(f"{url}/model_info", timeout=60.0) for url in urls]
    return [answer.json()["weight_version"] for answer in answers]


async def answers(urls: list[str], prompt: list[int]) -> list[object]:
    """One for each of several requests, which go to the servers in turns."""
    engine = SGLangEngine(urls, request_timeout=60.0, identity=RUN)
    engine.set_version(1)
    try:
        sampling = Sampling(n=4, max_new_tokens=16)
        asked = [engine.generate(prompt, sampling, request_id=str(i)) for i in range(4)]
        return [rollout for group in await asyncio.gather(*asked) for rollout in group]
    finally:
        await engine.aclose()


def test_a_trainer_waits_for_servers_uses_them_and_learns_why_they_end(
    serving, paths, models, capsys, caplog
) -> None:
    served = serving(3)
    config, urls = served.config(paths["A"]), served.address.urls
    with Screen(1) as screen:
        facts = probe(config, RUN, waiting=screen.waiting)
    refused = ", ".join(f"{url} (connection refused)" for url in urls)
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith(f"waiting for servers, for {START_TIMEOUT:g} s at most: {refused}")
    assert [(each.url, each.layers, each.warnings) for each in facts] == [(u, 2, ()) for u in urls]

    weights = [*models["B"].state_dict().items()]
    sync = WeightSync(urls, vocab_size=100, timeout=60.0, identity=RUN, lost_after=1.0)
    sync._limit = 20_000  # bytes of a bucket, so that there are several
    assert sync.load(weights, 0).verified == 19
    assert carried(urls) == [f"{RUN}:0"] * 3

    def lose_one() -> Iterator[tuple[str, torch.Tensor]]:
        yield from weights[:10]
        served.server(2).kill()
        yield from weights[10:]

    # One dies while weights are sent: those that held on to the broken broadcast get them anew.
    tree = served.tree()
    with pytest.raises(LoadAgain):
        sync.load(lose_one(), 1)
    proof = sync.load(weights, 1)
    assert (sync.urls, proof.servers, proof.verified) == (urls[:2], 2, 19)
    assert carried(urls[:2]) == [f"{RUN}:1"] * 2
    prompt = [5, 9, 30]
    rollouts = asyncio.run(answers(urls[:2], prompt))
    assert len({tuple(rollout.tokens) for rollout in rollouts}) == len(rollouts)
    for rollout in rollouts:
        tokens = torch.tensor([*prompt, *rollout.tokens.tolist()])
        with torch.no_grad():
            logits = models["B"](tokens[None]).logits[0, len(prompt) - 1 : -1]
        own = logits.log_softmax(-1).gather(1, tokens[len(prompt) :, None])[:, 0]
        assert np.abs(own.numpy() - rollout.logprobs).max() < 1e-4
    served.server(1).kill()
    with pytest.raises(LoadAgain):
        sync.load(weights, 2)
    assert (sync.load(weights, 2).servers, sync.urls) == (1, urls[:1])
    sync.close()
    assert carried(urls[:1]) == ["0"]
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [re.sub(r" for \d+ s;", " for N s;", line) for line in said] == [
        f"{urls[k]}: cannot be reached for N s; see whether it and its machine still run; the run "
        f"goes on with the other servers, now {k}"
        for k in (2, 1)
    ]

    served.server(0).kill()
    words = served.end(tree)
    assert served.process.returncode == 1
    for index in (2, 1):
        line = (
            rf"\nrollout\.servers: server {index} at {urls[index]} was ended .*; the others go on\n"
        )
        assert re.search(line, words)
    assert f"\nerror: rollout.servers: server 0 at {urls[0]} was ended by SIGKILL" in words


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGKILL, -9)])
def test_no_server_is_left(serving, model: Path, number: signal.Signals, status: int) -> None:
    served = serving(2)
    with Screen(1, shown=False) as screen:
        probe(served.config(model), waiting=screen.waiting)
    tree = served.tree()
    assert len(tree) == 7 or torch.cuda.is_available()  # the nursery; two of three processes each
    os.kill(served.process.pid, number)
    words = served.end(tree)
    assert served.process.returncode == status
    assert words.endswith("SIGTERM: all servers have ended\n") == (status == 0)
