"""Run a command that dies with its parent: ``python -m peergrad.rollout.launch PARENT COMMAND...``.

A trainer killed by SIGKILL (out of memory, Slurm, an impatient user) has no chance to stop its
servers. On Linux the kernel does it: it signals a process whose parent has ended, and the request
survives ``exec``. Elsewhere the command just runs.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, the process ``parent``, ends.

    The parent says who it is: if it ended before the kernel heard the request, this process already
    belongs to another, and exits here. (To the kernel "parent" is the thread that started us; start
    from one that lives on.)
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


def main(arguments: list[str]) -> None:
    """Usage: PARENT_PID COMMAND [ARGUMENT...]."""
    die_with_parent(int(arguments[0]))
    os.execvp(arguments[1], arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
