"""What a person sees while a run goes on: what it waits for, its steps, how long it will take.

In a terminal a table of the last steps and one status line, renewed every second; elsewhere a line
a step, and a line whenever something has been waited for long. All of it also goes to the log.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Lock, Thread
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from peergrad.observing.metrics import Row
from peergrad.observing.table import cells, duration, fit, phases, summary

log = logging.getLogger(__name__)

SHOWN = 12
RECENT = 20
TICK_SECONDS = 0.5
SPEAKING = Lock()
"""Held while something is printed, and while this process forks, as compilers do: a child born
while the thread here holds the lock of the output would wait for it for ever."""
os.register_at_fork(
    before=SPEAKING.acquire, after_in_parent=SPEAKING.release, after_in_child=SPEAKING.release
)
REMINDERS = (10.0, 20.0, 30.0, 60.0)  # seconds of one wait after which it is said; then every last


@dataclass
class _Wait:
    what: str
    began: float = field(default_factory=time.monotonic)
    detail: Callable[[], str] = str
    said: int = 0  # reminders so far

    def due(self, now: float) -> bool:
        last = len(REMINDERS) - 1
        at = REMINDERS[min(self.said, last)] + max(0, self.said - last) * REMINDERS[last]
        return now - self.began >= at

    def text(self, now: float) -> str:
        detail = self.detail()
        return f"{now - self.began:.0f} s waiting for {self.what}{detail and ': '}{detail}"


class Screen:
    """A sink of metrics that also says what is being waited for.

    ``shown=False`` (ranks other than 0, or ``logger.console=false``) only logs. Use it as a
    context: a thread of its own speaks while the program waits.

    Example:
        >>> with Screen(steps=40) as screen, screen.waiting("the servers"):
        ...     start_servers()
    """

    def __init__(self, steps: int, *, shown: bool = True) -> None:
        self.steps = steps
        self._shown = shown
        self._console = Console(highlight=False)
        self._waits: list[_Wait] = []
        self._rows: deque[dict[str, str]] = deque(maxlen=SHOWN)
        self._footer = ""
        self._began = time.monotonic()
        self._ends: deque[tuple[int, float]] = deque(maxlen=RECENT + 1)  # (step, when it was done)
        terminal = shown and self._console.is_terminal
        self._live = Live(console=self._console, auto_refresh=False) if terminal else None
        self._stop = Event()
        self._thread = Thread(target=self._tick, name="screen", daemon=True)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        if self._shown:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def say(self, text: str) -> None:
        """A line for the screen and the log."""
        log.info("%s", text)
        self._print(text)

    @contextmanager
    def waiting(
        self, what: str, *, announce: bool = False, detail: Callable[[], str] = str
    ) -> Iterator[None]:
        """Name what the block waits for: said at once if ``announce``, and again when it takes
        long, for as long as it does. ``what`` completes "waiting for"; ``detail()``, called in
        another thread, says how far it is."""
        wait = _Wait(what, detail=detail)
        self._waits.append(wait)
        if announce:
            self.say(f"{duration(wait.began - self._began)}  waiting for {what}")
        try:
            yield
        finally:
            self._waits.remove(wait)
            log.info("%s: %.1f s", what, time.monotonic() - wait.began)

    def detail(self, text: str) -> None:
        """How far the present wait is, as in "37 of 128 groups"."""
        if self._waits:
            self._waits[-1].detail = lambda: text

    def write(self, kind: str, step: int, row: Row) -> None:
        """Show a row of metrics: see ``Sink``."""
        if kind == "train":
            self._step(step, row)
        elif text := summary(kind, step, row):
            self.say(text)

    def close(self) -> None:
        """As a sink it has nothing to close: what comes after the last row is worth a word, too."""

    def stop(self) -> None:
        """Stop speaking; safe to call again."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._live:
            self._show(status=False)
            self._live.stop()
            self._live = None

    def _step(self, step: int, row: Row) -> None:
        now = time.monotonic()
        self._ends.append((step, now))
        shown = {"step": f"{step}/{self.steps}", **cells(row)}
        left = self._left(step)
        times = f"elapsed {duration(now - self._began)}  left {left}"
        line = "  ".join([f"{name} {cell}" for name, cell in shown.items()])
        log.info("%s  %s  (%s)", line, times, phases(row))
        self._footer = f"{times}  {phases(row)}"
        self._rows.append(shown)
        if self._live:
            self._show()
        else:
            self._print(f"{line}  {times}")

    def _print(self, text: str) -> None:
        if self._shown:
            with SPEAKING:
                self._console.print(text, soft_wrap=True, markup=False)

    def _show(self, *, status: bool = True) -> None:
        assert self._live is not None
        with SPEAKING:
            self._live.update(self._picture(status=status), refresh=True)

    def _left(self, step: int) -> str:
        """Time to the last step at the pace of the recent ones, everything between them
        included."""
        (first, start), (last, end) = self._ends[0], self._ends[-1]
        if last == first:
            return "?"
        return duration((end - start) / (last - first) * (self.steps - step))

    def _picture(self, *, status: bool) -> Text:
        now, width = time.monotonic(), self._console.width
        lines = fit(list(self._rows), width) if self._rows else []
        lines += [self._footer] if self._footer else []
        for wait in self._waits[-1:] if status else []:  # another thread may end it meanwhile
            lines.append(wait.text(now))
        return Text("\n".join(line[:width] for line in lines), no_wrap=True)

    def _tick(self) -> None:
        while not self._stop.wait(TICK_SECONDS):
            waits = self._waits[-1:]  # the main thread may end it meanwhile
            if self._live:
                self._show()
            elif waits and waits[0].due(now := time.monotonic()):
                waits[0].said += 1
                self.say(f"{duration(now - self._began)}  {waits[0].text(now)}")
