"""Servers on a node of their own as a user meets them: what is refused, how they end."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.marked import is_alive
from peergrad.serve import SIGNALS, Options, main, read
from tests.models import make_hf_model
from tests.ports import free_row
from tests.waiting import PATIENCE_SECONDS, wait_until

REPO = Path(__file__).resolve().parents[2]

# In place of SGLang's servers those that answer every question, and begin their logs with their
# own number.
SERVER = """
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
print(os.getpid(), flush=True)
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
# A signal that is heard is answered with a line; two of them are one, however late the second is.
PROGRAM = f"""
import os, sys
from peergrad.rollout import servers
from peergrad.running import stopping
from peergrad.serve import main
from tests.cpu.rollout import stand_in

servers._check_installed = lambda: None
servers.CPU_SERVER = servers.GPU_SERVER = stand_in.__name__
hear, heard = stopping.Stop.hear, []
stopping.Stop.hear = lambda self, number: (
    hear(self, number), heard.append(number), os.write(1, b"heard\\n"))[0]
stopping.REPEAT_SECONDS = 600.0
port = lambda self, index: str(self._address.ports[index])
servers.ManagedServers.options = lambda self, index: [{SERVER!r}, port(self, index)]
"""
# Ends its servers once it has been told twice.
TOLD_TWICE = """
import time

stop = servers.ManagedServers.stop
servers.ManagedServers.stop = lambda self: (
    [time.sleep(0.01) for _ in iter(lambda: len(heard) < 2, False)], stop(self))
"""
# As beside GPUs, whose servers are given time to end, which these do not take notice of. No signal
# is taken for the same again.
STUBBORN = """
import signal, torch

torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 8
servers.GRACE_SECONDS, stopping.REPEAT_SECONDS = 600.0, 0.0
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.default_int_handler)
"""


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """What ``main`` does to this process's handlers is undone."""
    numbers = (*SIGNALS, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"model.path={make_hf_model(tmp_path_factory.mktemp('model'), layers=1)}"


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("", Options()),
        (
            "--host node7 a=1 --port 80 --check --log-dir logs/x b=2",
            Options("node7", 80, Path("logs/x"), True, ("a=1", "b=2")),
        ),
        ("--host=::1 --port=7 --log-dir=x", Options("::1", 7, Path("x"))),
        ("--port 1 --port 2", Options(port=2)),
    ],
)
def test_reading(line: str, options: Options) -> None:
    assert read(line.split()) == options


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--port", "x"], "--port = 'x': must be a whole number; use 30000"),
        (["--port", "-1"], "--port = '-1': must be a whole number; use 30000"),
        (["--port"], "--port: has no value; write --port <value>, see --help"),
        (["--host", "--port", "1"], "--host: has no value; write --host <value>, see --help"),
        (["--host="], "--host: has no value; write --host <value>, see --help"),
        (["--hots", "a"], "--hots: there is no such option; did you mean --host?"),
        (["--log_dir=x"], "--log_dir: there is no such option; did you mean --log-dir?"),
        (["--cfg"], "--cfg: is an option of peergrad.main; ask that, or see --help"),
        (["--tp", "2"], "--tp: there is no such option; did you mean parallel.tensor?"),
        (["30000"], "'30000': is neither key=value nor an option; see --help"),
    ],
)
def test_what_is_no_option(arguments: list[str], line: str) -> None:
    with pytest.raises(ValueError) as error:
        read(arguments)
    assert str(error.value) == line


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err[7:]


def test_a_configuration_that_describes_no_servers(
    capsys: pytest.CaptureFixture[str], path: str, tmp_path: Path
) -> None:
    external = (path, "rollout=external", "rollout.servers.urls=[http://a:1]")
    line = refusal(capsys, *external)
    assert line.startswith("rollout.servers.mode = 'external': ") and "rollout=managed" in line
    assert refusal(capsys, path, "rollout.replay=x").startswith("rollout.replay = 'x': ")
    assert refusal(capsys).startswith("model.path = ???: is mandatory")
    assert refusal(capsys, f"model.path={tmp_path}").startswith(f"model.path = '{tmp_path}': ")
    assert "did you mean rollout.servers.count?" in refusal(capsys, path, "rollout.server.count=2")
    assert refusal(capsys, path, "--host", "192.0.2.1").startswith("--host = '192.0.2.1': is no ")


def test_what_only_a_trainer_has_is_not_asked_for(
    capsys: pytest.CaptureFixture[str], path: str, tmp_path: Path
) -> None:
    """The overrides of a run whose folder, prompts, reward and layout are not for this machine."""
    overrides = [
        *(path, "run.root=/proc/no", "data=jsonl", "data.source=/no/such.jsonl", "reward=function"),
        *("reward.function=no.such:module", "parallel.tensor=8", "rollout.servers.count=2"),
    ]
    port, _ = free_row(2).ports
    logs = tmp_path / "logs"
    assert main(["--check", "--port", str(port), "--log-dir", str(logs), *overrides]) == 0
    model, *servers = capsys.readouterr().out.splitlines()
    assert model == f"model          {path[11:]} in bfloat16"
    assert servers[1].startswith(f"server 1       http://127.0.0.1:{port + 1} on ")
    assert servers[1].endswith(f", {logs}/server_127.0.0.1_{port + 1}.log") and len(servers) == 2
    assert not logs.exists()


def test_a_port_in_use_is_refused_before_anything_is_written(
    capsys: pytest.CaptureFixture[str], path: str, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal(capsys, "--port", str(port), "--log-dir", str(tmp_path / "logs"), path)
    assert line.startswith(f"--port = {port}: port {port} is taken by another program; ")
    assert not (tmp_path / "logs").exists()


class Serving:
    """A process that serves with stand-ins; ``tree``: all that it has started."""

    def __init__(self, path: str, logs: Path, count: int, more: str) -> None:
        program = f"{PROGRAM}{more}\nsys.exit(main())"
        self.port = free_row(count).ports[0]
        self.logs = logs
        options = ["--port", str(self.port), "--log-dir", str(logs), path]
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *options, f"rollout.servers.count={count}"],
            cwd=REPO,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "src")])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout is not None
        self.said = ""
        while "all are: " not in self.said:
            line = self.process.stdout.readline()
            assert line, self.said
            self.said += line
        self.tree = psutil.Process(self.process.pid).children(recursive=True)

    def server(self, index: int) -> int:
        """Of a stand-in, which begins its log with its number."""
        log = self.logs / f"server_127.0.0.1_{self.port + index}.log"
        return int(log.read_text().split()[0])

    def tell(self, number: int) -> None:
        """A signal, which is heard when this returns."""
        self.process.send_signal(number)
        assert self.process.stdout is not None and self.process.stdout.readline() == "heard\n"

    def end(self) -> int:
        """What it ends with, all of it."""
        self.said = self.process.communicate(timeout=PATIENCE_SECONDS)[0]
        wait_until(lambda: not any(map(is_alive, self.tree)))
        return self.process.returncode


@pytest.fixture
def serving(path: str, tmp_path: Path) -> Iterator[Callable[..., Serving]]:
    made: list[Serving] = []

    def start(count: int, more: str = "") -> Serving:
        made.append(Serving(path, tmp_path / "logs", count, more))
        return made[-1]

    yield start
    for each in made:
        each.process.kill()
        each.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_servers(serving: Callable[..., Serving], number: signal.Signals) -> None:
    served = serving(2, TOLD_TWICE)
    *told, first, second, last = (line.split()[0] for line in served.said.splitlines())
    assert (told, last) == (["model", "server", "server"], "all")
    urls = {f"http://127.0.0.1:{served.port + index}" for index in range(2)}
    assert {first, second} == urls  # in the order in which they are there
    assert len(served.tree) >= 2
    served.process.send_signal(signal.SIGUSR1)  # is for trainers
    for process in served.tree:
        process.send_signal(signal.SIGUSR1)
    time.sleep(0.5)
    assert served.process.poll() is None and all(map(is_alive, served.tree))
    served.tell(number)
    served.tell(number)  # as a launcher repeats it
    assert served.end() == 0
    assert served.said == f"{number.name}: all servers have ended\n"


def test_a_second_signal_does_not_wait_for_the_servers(serving: Callable[..., Serving]) -> None:
    served = serving(1, STUBBORN)
    served.tell(signal.SIGINT)
    time.sleep(0.5)
    assert served.process.poll() is None and all(map(is_alive, served.tree))
    served.tell(signal.SIGINT)
    assert served.end() == 130


def test_the_last_server_that_dies_ends_all_with_its_cause(serving: Callable[..., Serving]) -> None:
    served = serving(2)
    line = (
        "rollout.servers: server {} at http://127.0.0.1:{} was ended by SIGKILL, perhaps for want"
    )
    os.kill(served.server(1), signal.SIGKILL)
    assert served.process.stdout is not None
    told = served.process.stdout.readline()
    assert told.startswith(line.format(1, served.port + 1))
    assert told.endswith("; the others go on\n")
    os.kill(served.server(0), signal.SIGKILL)
    assert served.end() == 1
    assert served.said.startswith(f"error: {line.format(0, served.port)}")
    assert served.said.count("\n") == 1
    log = served.logs / f"serve_127.0.0.1_{served.port}.log"
    assert f"(log: {log})" in served.said and "Traceback" in log.read_text()


def test_nothing_outlives_a_killed_one(serving: Callable[..., Serving]) -> None:
    served = serving(2)
    served.process.kill()
    assert served.end() == -signal.SIGKILL
