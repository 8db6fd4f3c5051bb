"""``python -m peergrad.rewards.worker DESCRIPTOR FUNCTION``: a process that runs one function.

``DESCRIPTOR`` is the file descriptor of a connection inherited from ``peergrad.rewards.process``.
The first message out is None, or why the function cannot be used; then each (prompt, rollout) is
answered by one ``Grade`` or ``Failure``. The process ends when the connection does. What the
function opens while it is awaited it may keep: all calls share one event loop.
"""

import asyncio
import ctypes
import os
import signal
import sys
from contextlib import suppress
from multiprocessing.connection import Connection

from peergrad.rewards.function import evaluate, load_function

PR_SET_PDEATHSIG = 1


def main(descriptor: int, path: str) -> None:
    if sys.platform == "linux":  # A busy function would not notice that the connection has ended.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    os.set_inheritable(descriptor, False)  # What the function starts must not keep it open.
    with Connection(descriptor) as parent, suppress(EOFError, ConnectionError):
        try:
            function = load_function(path)
        except ValueError as error:
            parent.send(str(error))
            return
        parent.send(None)
        process = os.getpid()
        with asyncio.Runner() as runner:
            while True:
                prompt, rollout = parent.recv()
                result = evaluate(function, prompt, rollout, runner)
                if os.getpid() != process:  # forked by the function, and back from it
                    os._exit(0)  # its answer would be taken for that of the next rollout
                parent.send(result)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
