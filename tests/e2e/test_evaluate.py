"""Whole evaluations: on the real server, and on servers of their own that answer what is known."""

import json
import os
import re
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from itertools import combinations
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

from peergrad.checks.served import check_served
from peergrad.config import Config, Dtype, Proof
from peergrad.rollout.control import Control
from peergrad.rollout.sync import WeightSync
from tests.cpu.rollout import stand_in
from tests.servers import SharedServer
from tests.spawn import run_ranks

REPO = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.engine

# A server that has three different answers to each prompt.
SERVER = """
import sys
from tests.cpu.rollout.fake_sglang import FakeServer, sample, wanted

def answer(body):
    first = [4 + sum(prompt) * (k + 1) % 3 for k, prompt in enumerate(wanted(body))]
    return 200, [sample([token, 1]) for token in first]

FakeServer(answer, int(sys.argv[1]), health=lambda _: (200, {}))._http.serve_forever()
"""


def program(arguments: list[str]) -> tuple[int, str, str]:
    """What ``python -m peergrad.evaluate`` ends with and prints; runs in a process of its own."""
    from peergrad.evaluate import main

    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPO), str(REPO / "src")])
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(arguments)
    return status, out.getvalue(), err.getvalue()


def pretending(arguments: list[str]) -> tuple[int, str, str]:
    """The same with ``SERVER`` in place of SGLang's."""
    from peergrad.rollout import servers

    def options(self: servers.ManagedServers, index: int) -> list[str]:
        return [SERVER, str(self._address.ports[index])]

    servers._check_installed = lambda: None
    servers.CPU_SERVER = servers.GPU_SERVER = stand_in.__name__
    servers.ManagedServers.options = options
    return program(arguments)


@pytest.fixture
def arguments(model: Path, tmp_path: Path) -> list[str]:
    return [
        f"--out={tmp_path / 'found'}",
        f"model.path={model}",
        "model.dtype=float32",
        "data.source=/no/such.jsonl",
        "reward=function",
        "reward.function=tests.e2e.rewards:first_fits",
        "rollout.max_new_tokens=8",
        "evaluation.prompts=20",
        "evaluation.samples=4",
        "evaluation.temperature=1",
    ]


def told(folder: Path) -> dict[str, Any]:
    """evaluation.json, whose numbers are those that anybody would count in the answers' table."""
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    rows = pq.read_table(folder / "answers.parquet").to_pylist()
    assert len(rows) == 20 * 4 and all(row["tokens"] and row["step"] == 0 for row in rows)
    passed: dict[str, list[bool]] = {}
    for row in rows:
        passed.setdefault(row["prompt_text"], []).append(row["tokens"][0] % 4 == 0)
        assert row["reward"] == passed[row["prompt_text"]][-1]
    assert [len(some) for some in passed.values()] == [4] * 20
    rates = [mean(some) for some in passed.values()]
    assert 0 < mean(rates) < 1 and found["reward"] == pytest.approx(mean(rates))
    assert found["pass@1"] == pytest.approx(mean(rates))
    assert found["pass@1_error"] == pytest.approx(stdev(rates) / sqrt(20))
    for k in (2, 4):
        solved = [mean(map(any, combinations(some, k))) for some in passed.values()]
        assert found[f"pass@{k}"] == pytest.approx(mean(solved))
    assert found["length"] == pytest.approx(mean(len(row["tokens"]) for row in rows))
    assert found["truncated"] == pytest.approx(mean(row["finish"] == "length" for row in rows))
    return found


def test_on_a_server_of_others(
    server: SharedServer, model: Path, arguments: list[str], tmp_path: Path
) -> None:
    """It must hold the model, and is left as it was."""
    weights = AutoModelForCausalLM.from_pretrained(model).state_dict()
    norm = "model.norm.weight"
    sync = WeightSync([server.url], vocab_size=100, bucket_mb=1, timeout=60.0)
    sync.load({**weights, norm: weights[norm] + 1}.items(), 0)
    config = Config()
    config.model.path, config.model.dtype = str(model), Dtype.float32
    other = f"'{server.url}': holds other weights than model.path = '{model}', of {norm}; start it"
    with pytest.raises(ValueError, match=re.escape(other)):
        check_served(config, Control([server.url]))

    config.rollout.proof, control = Proof.canary, Control([server.url])
    assert not check_served(config, control)  # it cannot be told
    info = {**control.get("/server_info")[0], "load_format": "dummy"}
    control.get = lambda path: [info]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"was started without weights .*tools/quantize_fp8\.py"):
        check_served(config, control)

    sync.load(weights.items(), 0)
    sync.close()
    status, out, err = run_ranks(1, program, [*arguments, *server.overrides])[0]
    assert (status, err) == (0, "")
    found = told(tmp_path / "found")
    assert (
        f"pass@1         {found['pass@1']:.3f}, standard error {found['pass@1_error']:.3f}\n" in out
    )
    assert out.endswith(f"written to     {tmp_path / 'found'}\n")
    assert httpx.get(f"{server.url}/model_info").json()["weight_version"] == "0"


def test_on_servers_of_its_own(arguments: list[str], tmp_path: Path) -> None:
    """Two, which end with it."""
    ours = [*arguments, "rollout.servers.count=2"]
    status, out, err = run_ranks(1, pretending, ours)[0]
    assert (status, err) == (0, "") and "servers        2, started and stopped" in out
    told(tmp_path / "found")
    log = (tmp_path / "found" / "evaluate.log").read_text()
    urls = re.findall(r"server \d starts at (\S+), log", log)
    assert len(urls) == 2
    for url in urls:
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)
