"""How a run ends: one line on the screen whatever happened, a status, the traceback in the log.

Status 0: finished. 2: the configuration, or what it names, is wrong. 1: failed on the way.
130: interrupted by Ctrl-C or SIGTERM.

Of many ranks one speaks. The first that fails says so to all others (``Speaker.claim``) before they
notice; these keep silent, and wait until it has spoken and cleaned up, because a launcher ends all
ranks when the first one has ended.
"""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Protocol

from peergrad.running.place import Place

log = logging.getLogger(__name__)

FINISHED, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130
POLITE_SECONDS = 15.0  # rank 0 is let say first what every rank finds
LIKE_SECONDS = 1.0
CLEAN_UP_SECONDS = 60.0
LONGEST = 700

LOST = (  # how gloo and NCCL say that the other side has ended
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL communicator was aborted",
)
LATE = ("Timed out waiting", "Watchdog caught collective operation timeout")


class Speaker(Protocol):
    """The ranks' word on which of them failed first."""

    def failed(self) -> bool: ...

    def claim(self) -> bool: ...

    def said(self) -> None: ...

    def await_said(self, seconds: float) -> None: ...


def one_line(error: BaseException) -> str:
    """What to tell a person of ``error``: its own words if they are meant for one."""
    text = " ".join(str(error).split())
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    kind = type(error).__name__
    if kind == "OutOfMemoryError":
        return f"out of GPU memory ({text}); lower parallel.micro_batch_tokens or kernels.chunk"
    if isinstance(error, MemoryError):
        return f"out of memory ({text}); lower parallel.micro_batch_tokens, or use more ranks"
    if isinstance(error, OSError):
        return text
    if isinstance(error, RuntimeError) and any(sign in text for sign in LATE):
        return (
            f"parallel.timeout_minutes: another rank did not come to a collective in time "
            f"({text}); see the rank_*.log of all ranks for one that hangs, or raise it"
        )
    if isinstance(error, ValueError | RuntimeError) and text:
        return text
    return f"{kind}: {text} (unforeseen; the traceback is in the log)"


class Ending:
    """The frame around a run.

    Example:
        >>> ending = Ending(place)
        >>> with ending.signals():
        ...     try:
        ...         with ExitStack() as stack, ending.noted():
        ...             ...
        ...     except BaseException as error:
        ...         status = ending.end(error)
    """

    def __init__(self, place: Place) -> None:
        self.speaker: Speaker | None = None
        self.log: Path | None = None
        self.how_to_resume: Callable[[], str] = lambda: "nothing was begun yet"
        self._place = place
        self._interrupted: str | None = None
        self._begun = self._speaks = False

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Inside, the first SIGINT or SIGTERM is a KeyboardInterrupt and the rest are ignored:
        torchrun repeats them, and one that arrived during the clean-up would leave servers
        behind."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        if not self._begun:
            self._interrupted = signal.Signals(number).name
            raise KeyboardInterrupt

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Innermost: the end begins before anything is cleaned up."""
        try:
            yield
        except BaseException as error:
            self.begin(error)
            raise

    def begin(self, error: BaseException) -> None:
        """The run is over because of ``error``: the log gets the traceback, the ranks agree on who
        speaks. Signals are ignored from here on."""
        self._begun = True
        kind = "interrupted" if self._interrupted else "failed"
        log.info("%s here", kind, exc_info=error)
        self._speaks = self._is_first(error)

    def _is_first(self, error: BaseException) -> bool:
        if self._interrupted:  # maybe only because another rank has failed
            told = self.speaker is not None and self.speaker.failed()
            return self._place.rank == 0 and not told
        others = self._place.rank > 0
        if self.speaker is None:
            time.sleep(POLITE_SECONDS * others)  # see ``refuse``
            return True
        if is_echo(error):  # what we see may be another rank's failure
            self._await_other(POLITE_SECONDS)
        elif others and isinstance(error, ValueError):  # which rank 0 may find as well
            self._await_other(LIKE_SECONDS)
        return self.speaker.claim()

    def _await_other(self, seconds: float) -> None:
        """Let another rank speak if it wants to."""
        assert self.speaker is not None
        end = time.monotonic() + seconds
        while not self.speaker.failed() and time.monotonic() < end:
            time.sleep(0.05)

    def end(self, error: BaseException) -> int:
        """Say why, if that is this rank's to do, once all is cleaned up; the exit status."""
        if not self._begun:
            self.begin(error)
        status, line = self._verdict(error)
        if self._speaks:
            print(line, file=sys.stderr, flush=True)
            tell_torchrun(line)
            log.info("%s", line)
        if self.speaker is not None and not self._interrupted:
            if self._speaks:
                self.speaker.said()
            else:
                self.speaker.await_said(CLEAN_UP_SECONDS)
        return status

    def _verdict(self, error: BaseException) -> tuple[int, str]:
        if self._interrupted:
            return INTERRUPTED, f"interrupted; {self.how_to_resume()}"
        where = "" if self._place.rank == 0 else f" [{self._place.name}]"
        if isinstance(error, ValueError):
            return WRONG, f"error: {one_line(error)}{where}"
        more = "" if self.log is None else f" (log: {self.log})"
        return FAILED, f"error: {one_line(error)}{where}{more}"


def refuse(error: ValueError | RuntimeError, place: Place) -> int:
    """End for a mistake found before the ranks know of each other; the exit status.

    Every rank finds most of them. Rank 0 says so; another rank lets it, and speaks only if it is
    still alive then: the launcher ends it when rank 0 has ended.
    """
    where = ""
    if place.rank > 0:
        time.sleep(POLITE_SECONDS)
        where = f" [{place.name}]"
    line = f"error: {one_line(error)}{where}"
    print(line, file=sys.stderr, flush=True)
    tell_torchrun(line)
    return WRONG if isinstance(error, ValueError) else FAILED


def is_echo(error: BaseException) -> bool:
    """Whether ``error`` is, most likely, how another rank's end shows here."""
    if type(error).__name__ == "OtherRankFailed":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST)


def tell_torchrun(line: str) -> None:
    """Put the line into the report that torchrun prints of the rank that failed first."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        message = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": message}))
