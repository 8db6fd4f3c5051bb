"""The wish that a run end early, and keep what it has learned.

SIGTERM and SIGUSR1 express it, to any rank, and so does the clock where it is known when the
machine will be taken away. It is granted where the weights are a whole version: after the present
step, or at once while a step waits for its rollouts. Rank 0 alone decides, between two steps and
while it waits, so that all ranks stop at the same place.
"""

import logging
import os
import signal
import time
from collections.abc import Callable
from datetime import datetime

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REPEAT_SECONDS = 3.0
"""A launcher repeats what its process group was told: signals so close together are one."""
SLURM_END = "SLURM_JOB_END_TIME"  # seconds since 1970, set by Slurm 22.05 and later


class Stopped(KeyboardInterrupt):
    """The run ends early, with everything on the disk that a resume needs."""


class Stop:
    """Whether to stop, and why. Until ``listen`` a signal has nothing to wait for.

    Example:
        >>> stop = Stop(ends=time.time() + 3600, before=300)
        >>> stop.reason() is None, stop.reason(ahead=3400)
        (True, 'the time limit')
    """

    def __init__(self, *, ends: float | None = None, before: float = 0.0) -> None:
        """``ends``: when the machine is taken away, in seconds since 1970; ``before``: seconds to
        be left by then."""
        self._limit = None if ends is None else ends - before
        self._tell: Callable[[str], None] | None = None
        self._ask: Callable[[], str | None] = lambda: None
        self._heard: str | None = None
        self._since = 0.0
        self._longest = 0.0
        self._began: float | None = None

    def listen(self, tell: Callable[[str], None], ask: Callable[[], str | None]) -> None:
        """From here on there is something to save. ``tell`` the other ranks, ``ask`` them."""
        self._tell, self._ask = tell, ask

    @property
    def listens(self) -> bool:
        """Whether ``listen`` has been called."""
        return self._tell is not None

    def hear(self, number: int) -> bool:
        """One of ``SIGNALS`` has come; whether the run will see to it. False: end at once, as there
        is nothing to save yet, or somebody is impatient."""
        if self._tell is None:
            return False
        if self._heard is not None:
            return time.monotonic() < self._since + REPEAT_SECONDS
        self._heard, self._since = signal.Signals(number).name, time.monotonic()
        self._tell(self._heard)
        return True

    def reason(self, ahead: float = 0.0) -> str | None:
        """Why to stop now rather than in ``ahead`` seconds; None: go on."""
        why = self._heard or self._ask()
        if why is None and self._limit is not None and time.time() + ahead > self._limit:
            why = "the time limit"
        return why

    def between_steps(self) -> str | None:
        """``reason``, if another step as long as the longest so far would come too late."""
        now = time.monotonic()
        if self._began is not None:
            self._longest = max(self._longest, now - self._began)
        self._began = now
        return self.reason(ahead=self._longest)


def stop_before(until: str | None, minutes: float) -> Stop:
    """Stop ``minutes`` (``checkpoint.before``) before ``until`` (``run.until``), else before the
    end of the Slurm job, if this is one. ValueError if that is now."""
    told = os.environ.get(SLURM_END, "")
    ends = float(told) if told.isdigit() else None
    if until is not None:
        ends = datetime.fromisoformat(until).timestamp()
    if ends is not None and (left := (ends - time.time()) / 60) <= minutes:
        what = "the Slurm job ends" if until is None else f"run.until = {until!r} is"
        raise ValueError(
            f"checkpoint.before = {minutes:g}: {what} in {left:.3g} minutes, so that no step could "
            "be trained; lower it, or allow for more time"
        )
    return Stop(ends=ends, before=60 * minutes)
