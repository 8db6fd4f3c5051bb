"""All processes that descend from one, wherever they have gone: sessions and groups of their own,
another parent, another name. Nothing here but psutil, so that tests use it, too."""

import uuid
from contextlib import suppress

import psutil

MARK = "PEERGRAD_RUN_MARK"  # inherited by everything a run starts, so that nothing can hide


class Marked:
    """Start a process with ``environment``, and find what comes of it."""

    def __init__(self) -> None:
        self._mark = uuid.uuid4().hex
        self._seen: set[psutil.Process] = set()

    @property
    def environment(self) -> dict[str, str]:
        return {MARK: self._mark}

    def alive(self) -> list[psutil.Process]:
        """Every living process, and remember them."""
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # gone, or not ours to look at
                if process.environ().get(MARK) == self._mark:
                    # SGLang's workers overwrite their environment with a title
                    self._seen |= {process, *process.children(recursive=True)}
        self._seen = {process for process in self._seen if is_alive(process)}
        return sorted(self._seen, key=lambda process: process.pid)

    def kill(self) -> None:
        """SIGKILL to all of them."""
        for process in self.alive():
            with suppress(psutil.NoSuchProcess):
                process.kill()


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; a process that ended and waits for its parent to notice does not."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
