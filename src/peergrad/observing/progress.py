"""What a long piece of work is doing, for the person who waits for it."""

import os
import threading
import time
from collections.abc import Callable
from types import TracebackType


class Progress:
    """Says on stderr what is done: each part as it begins, and how far it is every few seconds.

    Example:
        ``with Progress() as progress: progress.begin("reading", lambda: f"{n} of 310 tensors")``
    """

    def __init__(self, *, speak: bool = True, every: float = 5.0) -> None:
        self._speak, self._every = speak, every
        self._what = ""
        self._far: Callable[[], str] = str
        self._started = self._said = time.monotonic()
        self._stop = threading.Event()
        # A thread: the libraries' calls take minutes and report nothing.
        self._thread = threading.Thread(target=self._run, daemon=True)

    def begin(self, what: str, far: Callable[[], str] = str) -> None:
        """``what`` begins; ``far()``, called from another thread, says how far it is."""
        self._what, self._far, self._started = what, far, time.monotonic()
        self.say(f"{what} ...")

    def say(self, line: str) -> None:
        """Print ``line``, unless this is not the process that speaks."""
        self._said = time.monotonic()
        if self._speak:
            # Unbuffered: Megatron forks, and a lock held then would be held for ever in the child.
            os.write(2, f"{line}\n".encode())

    def _run(self) -> None:
        while not self._stop.wait(0.2):
            if time.monotonic() - self._said >= self._every:
                far = self._far()
                seconds = time.monotonic() - self._started
                self.say(f"{self._what} ... {far}{', ' if far else ''}{seconds:.0f} s")

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
