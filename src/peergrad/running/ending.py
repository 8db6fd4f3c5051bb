"""How a run ends: one line on the screen whatever happened, a status, the traceback in the log.

Status 0: finished. 2: the configuration, or what it names, is wrong. 1: failed on the way.
75: stopped by SIGTERM, SIGUSR1 or the clock, and saved; run again with run.resume=true. 130:
interrupted, by Ctrl-C or a second signal, and not saved.

Of many ranks one speaks. The first that fails says so to all others (``Speaker.claim``) before they
notice; these keep silent, and wait until it has spoken and cleaned up, because a launcher ends all
ranks when the first one has ended.
"""

import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Protocol

from peergrad.echo import is_echo
from peergrad.running.place import Place
from peergrad.running.stopping import SIGNALS as SOFT
from peergrad.running.stopping import Stop, Stopped

log = logging.getLogger(__name__)

FINISHED, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again
POLITE_SECONDS = 15.0  # rank 0 is let say first what every rank finds
LIKE_SECONDS = 1.0
CLEAN_UP_SECONDS = 600.0
SIGNALS = (signal.SIGINT, signal.SIGHUP, *SOFT)
IN_FULL = re.compile(r".+ = .+: .+; .+")
"""A line that names key, value, rule and remedy: no log could add to it."""
LONGEST = 700

LATE = ("Timed out waiting", "Watchdog caught collective operation timeout")


class Speaker(Protocol):
    """The ranks' word on which of them failed first."""

    def failed(self) -> bool: ...

    def claim(self) -> bool: ...

    def said(self, status: int) -> None: ...

    def await_said(self, seconds: float) -> int | None: ...


def one_line(error: BaseException) -> str:
    """What to tell a person of ``error``: its own words if they are meant for one."""
    text = " ".join(str(error).split())
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    kind = type(error).__name__
    if kind == "OutOfMemoryError":
        return f"out of GPU memory ({text}); lower parallel.micro_batch_tokens or kernels.chunk_mb"
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
    return f"{kind}: {text} (unforeseen)"


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
        self.how_to_resume: Callable[[], str] = lambda: "nothing was started"
        self._place = place
        self._error: BaseException | None = None
        self.stop = Stop()
        self._interrupted = self._told = self._speaks = False

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Inside, SIGTERM and SIGUSR1 ask the run to stop where it can (``Stop``). SIGINT, and what
        nothing waits for, is a KeyboardInterrupt, and all after that are ignored: torchrun repeats
        them, and one that arrived during the clean-up would leave servers behind."""
        heeded = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]  # nohup
        before = {number: signal.signal(number, self._on_signal) for number in heeded}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        ending = self._told or self._error is not None
        soft = number in SOFT and not ending and not self._others_fail()
        if soft and self.stop.hear(number):
            return
        self._told = True
        if ending:
            return
        if soft and not self.stop.listens:
            raise Stopped(signal.Signals(number).name)
        self._interrupted = True
        raise KeyboardInterrupt

    def _others_fail(self) -> bool:
        """Whether a launcher may be ending this rank, because another one has failed."""
        return self.speaker is not None and self.speaker.failed()

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Innermost: the end begins before anything is cleaned up."""
        try:
            yield
        except BaseException as error:
            self.begin(error)
            raise

    def begin(self, error: BaseException) -> None:
        """The run is over because of ``error``, whatever may go wrong while it is cleaned up: the
        log gets the traceback, the ranks agree on who speaks. Signals are ignored from here on."""
        self._error = error
        kind = "interrupted" if self._interrupted else "failed"
        kind = "stopped" if isinstance(error, Stopped) else kind
        log.info("%s here", kind, exc_info=error)
        self._speaks = self._is_first(error)

    def _is_first(self, error: BaseException) -> bool:
        others = self._place.rank > 0
        if self._interrupted and others:
            return False
        if self.speaker is None:  # see ``refuse``
            return not self._told_within(POLITE_SECONDS) if others else True
        if is_echo(error):
            self._await_other(POLITE_SECONDS)
        elif others:  # rank 0 may find the same
            self._await_other(LIKE_SECONDS)
        return self.speaker.claim()

    def _await_other(self, seconds: float) -> None:
        """Let another rank speak if it wants to. One that was killed cannot: then the launcher ends
        this one."""
        assert self.speaker is not None
        end = time.monotonic() + seconds
        while not (self.speaker.failed() or self._told) and time.monotonic() < end:
            time.sleep(0.05)

    def _told_within(self, seconds: float) -> bool:
        """Whether the launcher ends this rank, because another one has ended."""
        end = time.monotonic() + seconds
        while not self._told and time.monotonic() < end:
            time.sleep(0.05)
        return self._told

    def end(self, error: BaseException) -> int:
        """Say why, if that is this rank's to do, once all is cleaned up; the exit status."""
        if self._error is None:
            self.begin(error)
        elif error is not self._error:
            log.info("while cleaning up", exc_info=error)
        status, line = self._verdict(self._error or error)
        if self._speaks:
            with suppress(OSError):  # nobody listens any more
                print(line, file=sys.stderr, flush=True)
            tell_torchrun(line)
            log.info("%s", line)
        return self._leave(status)

    def _leave(self, status: int) -> int:
        """The status to end with. The speaker ends first: the launcher takes its status, and ends
        all others."""
        if self.speaker is None:
            return status
        if self._speaks:
            self.speaker.said(status)
            return status
        said = None if self._told else self.speaker.await_said(CLEAN_UP_SECONDS)
        if said is not None:
            self._told_within(POLITE_SECONDS)
        return status if said is None else said

    def _verdict(self, error: BaseException) -> tuple[int, str]:
        if isinstance(error, Stopped):
            return STOPPED, f"stopped by {error}; {self.how_to_resume()}"
        if self._interrupted:
            return INTERRUPTED, f"interrupted; {self.how_to_resume()}"
        text = one_line(error)
        where = "" if self._place.rank == 0 else f" [{self._place.name}]"
        wrong = isinstance(error, ValueError)
        if not (wrong and IN_FULL.fullmatch(text)):
            where += f" (log: {self.log or write_traceback(error)})"
        return WRONG if wrong else FAILED, f"error: {text}{where}"


def refuse(error: Exception, place: Place) -> int:
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


def write_traceback(error: BaseException) -> Path:
    """Keep the traceback of a process that has no log; the file."""
    with tempfile.NamedTemporaryFile("w", prefix="peergrad-", suffix=".log", delete=False) as file:
        file.write("".join(traceback.format_exception(error)))
    return Path(file.name)


def tell_torchrun(line: str) -> None:
    """Put the line into the report that torchrun prints of the rank that failed first."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        message = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": message}))
