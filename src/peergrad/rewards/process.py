"""A process of our own for a function that is not ours.

A plain subprocess rather than a multiprocessing pool: it may be started by a daemonic process, it
does not import the program's main module (and with it torch), and no lock or queue is shared, so
killing one process in the middle of a reward cannot hurt another.
"""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from multiprocessing import Pipe

from peergrad.data import Prompt, Rollout
from peergrad.grades import Failure, Grade

START_SECONDS = 120.0  # Importing the user's module; that long only on a cold network file system.
END_SECONDS = 5.0  # Between the end of a process's connection and its own.
FIRST_SECONDS = 60.0  # A process's first reward: it imports more, loads a model, opens connections.


class RewardProcess:
    """Runs one function in a process that is started when needed and killed when it hangs.

    The process leads a process group, so that Ctrl-C in the terminal does not reach it and killing
    it takes along whatever the function has started. Not thread-safe, except ``kill``.
    """

    def __init__(self, function: str) -> None:
        self._function = function
        self._patient = True  # with the next first reward
        self._first = True
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, limit: float = START_SECONDS) -> None:
        """Start and import the function, within ``limit`` seconds. Raises ValueError if the
        function cannot be used."""
        # On Linux the process dies with the *thread* that starts it: see peergrad.rewards.worker.
        self._connection, theirs = Pipe()
        descriptor = theirs.fileno()
        module = "peergrad.rewards.worker"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(descriptor), self._function],
                stdin=subprocess.DEVNULL,
                pass_fds=[descriptor],
                process_group=0,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self._first = True
        problem = self._receive(limit)
        if isinstance(problem, Failure):
            rule = f"importing it {problem.reason}"
            problem = f"reward.function = {self._function!r}: {rule}; correct the module"
        if problem is not None:
            self.stop()
            raise ValueError(problem)

    def score(self, prompt: Prompt, rollout: Rollout, limit: float) -> Grade | Failure:
        """The function's value, or why there is none, after at most ``limit`` seconds.

        The first reward of a process may take ``FIRST_SECONDS`` if ``limit`` is less; not again
        before one has come, once that was too little.
        """
        if self._process is None:
            self.start()
        if self._first and self._patient:
            limit = max(limit, FIRST_SECONDS)
        with suppress(ConnectionError):  # it has ended: _receive finds out how
            self._connection.send((prompt, rollout))
        answer = self._receive(limit)
        assert isinstance(answer, Grade | Failure)
        slow = isinstance(answer, Failure) and answer.kind == "timeout"
        self._patient = not slow or (self._patient and not self._first)
        self._first = False
        return answer

    def _receive(self, limit: float) -> Grade | Failure | str | None:
        """The next message; a process that does not send one in time, or ends, is done with."""
        try:
            if self._connection.poll(limit):
                message: Grade | Failure | str | None = self._connection.recv()
                return message
        except (EOFError, ConnectionError):
            assert self._process is not None
            with suppress(subprocess.TimeoutExpired):  # killed while it ends, it had no status
                self._process.wait(END_SECONDS)
            return Failure("crash", f"ended its process, status {self.stop()}")
        self.stop()
        return Failure("timeout", f"took longer than {limit:g} s")

    def kill(self) -> None:
        """End the process group, whatever it is doing."""
        process = self._process  # which another thread may be forgetting
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def stop(self) -> int | None:
        """End the process and forget it; its exit status, negative for a signal."""
        if self._process is None:
            return None
        self.kill()
        status = self._process.wait()
        self._connection.close()
        self._process = None
        return status
