"""Processes that end with the process that started them, even if that one is killed.

A trainer killed by SIGKILL (out of memory, Slurm, an impatient user) has no chance to stop what it
has started. On Linux the kernel does it. Elsewhere nothing does.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, the process ``parent``, ends.

    The parent says who it is: if it ended before the kernel heard the request, this process already
    belongs to another, and exits here. (To the kernel "parent" is the thread that started us; start
    from one that lives on.) The request survives ``exec``.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    # SIGKILL: SGLang's workers ask the kernel for the same, so that its whole tree goes at once,
    # where SIGTERM would first wait for requests to finish.
    if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    if os.getppid() != parent:
        raise SystemExit(f"the parent process {parent} ended before its child was ready")


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Processes that are started inside ignore Ctrl-C from their first moment on, before Python
    could tell them to. One that comes in these milliseconds is lost to this process as well."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
