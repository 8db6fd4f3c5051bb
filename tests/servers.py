"""An SGLang server of the tests' own, started once, that runs use as an external one."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import pytest

from peergrad.config import Dtype, ServersConfig
from peergrad.rollout.servers import ManagedServers

START_TIMEOUT = 240.0  # seconds, on a machine with other things to do


def managed(model: Path, logs: Path, count: int = 1) -> ManagedServers:
    """Servers of ``model`` in float32, not yet started; skips the test without SGLang."""
    pytest.importorskip("sglang")
    return ManagedServers(
        ServersConfig(count=count, start_timeout=START_TIMEOUT),
        model_path=str(model),
        dtype=Dtype.float32,
        log_dir=logs,
    )


class SharedServer:
    """``with SharedServer(model, logs) as server:`` for one run or test at a time."""

    def __init__(self, model: Path, logs: Path) -> None:
        self._servers = managed(model, logs)
        self._stack = ExitStack()
        self._log = logs / "server_0.log"
        (self.url,) = self._servers.urls
        self.overrides = (
            "rollout=external",
            f"rollout.servers.urls=[{self.url}]",
            "rollout.servers.takeover=true",  # from runs that a test has killed
        )
        """What makes a run use it."""

    def __enter__(self) -> Self:
        before = set(psutil.Process().children(recursive=True))
        self._stack.enter_context(self._servers)
        self._processes = set(psutil.Process().children(recursive=True)) - before
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def syncs(self) -> int:
        """Weight syncs that have begun."""
        return self._log.read_text().count("POST /pause_generation")

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """It does nothing meanwhile, as if its machine were gone, and goes on where it was."""
        for process in self._processes:
            process.suspend()
        try:
            yield
        finally:
            for process in self._processes:
                process.resume()
