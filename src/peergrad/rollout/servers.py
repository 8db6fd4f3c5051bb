"""SGLang servers that live and die with this process."""

import importlib.util
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil
import torch

from peergrad.config import Dtype, ServersConfig

# Deterministic inference seeds all requests alike: every group would be one answer, copied.
REFUSED = ("enable-deterministic-inference",)
OURS = ("model-path", "host", "port", "tp-size", "tp", "tensor-parallel-size", "weight-version")
# Without them the KV cache takes most of the memory, and an idle server a whole core.
CPU_OPTIONS = {"max-total-tokens": 32768, "sleep-on-idle": True, "disable-cuda-graph": True}
TORCHRUN = re.compile(r"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE|NAME)|MASTER_\w+|TORCHELASTIC_\w+)")
POLL_SECONDS = 0.25
GRACE_SECONDS = 10.0
LOG_TAIL_BYTES = 4000


class ManagedServers:
    """``with ManagedServers(...) as servers:`` yields healthy servers at ``servers.urls``.

    Each runs in a session of its own, so that Ctrl-C in the terminal reaches only the trainer,
    which then stops them in order; if the trainer is killed, the kernel kills them (``launch``).
    Start it from the main thread.
    """

    def __init__(
        self,
        config: ServersConfig,
        *,
        model_path: str,
        dtype: Dtype,
        log_dir: Path,
        seed: int = 0,
        weight_version: int = 0,
    ) -> None:
        refused = sorted({*OURS, *REFUSED} & {_flag(key) for key in config.args})
        if refused:
            raise ValueError(
                f"rollout.servers.args = {config.args}: {refused} are peergrad's to set, or would "
                "break training; remove them"
            )
        self._config = config
        self._log_dir = log_dir
        self._processes: list[subprocess.Popen[bytes]] = []
        self._fixed = {
            "model-path": model_path,
            "host": "127.0.0.1",
            "dtype": dtype.name,
            "tp-size": config.tensor,
            "weight-version": weight_version,
        }
        self._seed = seed
        ports = _free_ports(config.count)
        self.urls = [f"http://127.0.0.1:{port}" for port in ports]

    def __enter__(self) -> Self:
        _check_installed()
        self._log_dir.mkdir(parents=True, exist_ok=True)
        try:
            for index in range(self._config.count):
                self._start(index)
            self._wait_healthy()
        except BaseException:  # an interrupt too: nobody else knows of these processes yet
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the servers with all their processes; safe to call again."""
        _end(self._processes)
        self._processes.clear()

    def command(self, index: int) -> list[str]:
        """The command line of server ``index``; ``rollout.servers.args`` wins over our defaults."""
        options: dict[str, Any] = {"random-seed": self._seed + index}
        if not torch.cuda.is_available():
            options |= CPU_OPTIONS
        options |= {_flag(key): value for key, value in self._config.args.items()}
        if torch.cuda.is_available():
            # Behind the GPUs of this node's trainer ranks, unless told otherwise.
            first = int(options.get("base-gpu-id", os.environ.get("LOCAL_WORLD_SIZE", "1")))
            options["base-gpu-id"] = first + index * self._config.tensor
        options |= self._fixed | {"port": self.urls[index].rpartition(":")[2]}
        return [sys.executable, "-m", "sglang.launch_server", *_flags(options)]

    def _start(self, index: int) -> None:
        launch = [sys.executable, "-m", "peergrad.rollout.launch", str(os.getpid())]
        with self.log(index).open("wb") as log:
            process = subprocess.Popen(
                [*launch, *self.command(index)],
                env=_environment(index, self._config.tensor),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)

    def _wait_healthy(self) -> None:
        deadline = time.monotonic() + self._config.start_timeout
        with httpx.Client(timeout=5.0, trust_env=False) as http:
            for index, url in enumerate(self.urls):
                while not _is_healthy(http, url):
                    self._check_alive()
                    if time.monotonic() > deadline:
                        raise RuntimeError(
                            f"server {index} was not healthy within "
                            f"rollout.servers.start_timeout = {self._config.start_timeout:g} s; "
                            f"raise it, or see what it is doing{self._log_tail(index)}"
                        )
                    time.sleep(POLL_SECONDS)

    def _check_alive(self) -> None:
        for index, process in enumerate(self._processes):
            if process.poll() is not None:
                raise RuntimeError(
                    f"server {index} ended with exit code {process.returncode} while starting"
                    f"{self._log_tail(index)}"
                )

    def log(self, index: int) -> Path:
        """What server ``index`` prints."""
        return self._log_dir / f"server_{index}.log"

    def _log_tail(self, index: int) -> str:
        path = self.log(index)
        tail = path.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
        return f"\n--- end of {path} ---\n{tail}"


def _flag(key: str) -> str:
    return key.removeprefix("--").replace("_", "-")


def _flags(options: dict[str, Any]) -> list[str]:
    """``{"a": 1, "b": True, "c": [2, 3], "d": False}`` as ``--a 1 --b --c 2 3``."""
    flags: list[str] = []
    for key, value in options.items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, list | tuple) else [value]
        flags += [f"--{key}", *map(str, values)]
    return flags


def _environment(index: int, tensor: int) -> dict[str, str]:
    """Ours, less what torchrun set: a server would take itself for one of the trainer's ranks."""
    env = {key: value for key, value in os.environ.items() if not TORCHRUN.fullmatch(key)}
    env["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "0"  # healthy while paused, too
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not torch.cuda.is_available():
        env.setdefault("OMP_NUM_THREADS", "1")
        if tensor > 1:  # SGLang binds ranks to NUMA nodes unless told which cores to take
            cores = sorted(os.sched_getaffinity(0))
            bind = [cores[(index * tensor + rank) % len(cores)] for rank in range(tensor)]
            env.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(map(str, bind)))
    return env


def _check_installed() -> None:
    if importlib.util.find_spec("sglang") is None:
        raise RuntimeError(
            "rollout.servers.mode=managed needs SGLang in this Python environment; install it "
            "(see README.md), or start servers elsewhere and set rollout.servers.mode=external"
        )
    plugins = {point.name for point in entry_points(group="sglang.srt.platforms")}
    if not torch.cuda.is_available() and not plugins:
        raise RuntimeError(
            "SGLang finds no platform plugin and would not start without a GPU; install peergrad "
            "as a package (pip install -e .) so that it finds peergrad's"
        )


def _free_ports(count: int) -> list[int]:
    """Distinct local ports that were free a moment ago."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _is_healthy(http: httpx.Client, url: str) -> bool:
    try:
        return http.get(f"{url}/health").is_success
    except httpx.TransportError:
        return False


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """SIGTERM to each server, SIGKILL to what its tree still holds after the grace, and wait.

    SIGTERM goes to the launcher alone: it ends its workers, and would take it for a crash if they
    ended by themselves.
    """
    tree: list[psutil.Process] = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(process.pid)
            tree += [root, *root.children(recursive=True)]
            root.terminate()
    _, alive = psutil.wait_procs(tree, timeout=GRACE_SECONDS)
    for member in alive:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(alive, timeout=GRACE_SECONDS)
    for process in processes:
        process.wait()
