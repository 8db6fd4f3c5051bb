"""One holder at a time for a folder, on any machine that sees it.

The holder keeps a lock of the kernel on a file that says who it is, and rewrites that file now and
then. The kernel frees the lock of a process that dies, so a lock that cannot be had is a living
holder's. Not every shared file system carries locks to other machines, though: a lock that can be
had while the file names another machine is a dead holder's only if the file has stopped changing.
That is watched with the watcher's own clock: two machines need not agree on the time.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from threading import Event, Thread
from typing import Any, Self

BEAT_SECONDS = 5.0
WATCH_SECONDS = 20.0
SETTLE_SECONDS = 1.0  # longer than from one start's reading to its writing
JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class FolderLock:
    """``with FolderLock(file, "run.name = 'x'"):`` holds the folder that ``file`` lies in.

    Raises ValueError, starting with ``what``, if another process holds it; ``heard`` is told when a
    sign of life from another machine is waited for.
    """

    def __init__(
        self, file: Path, what: str, *, heard: Callable[[str], None] = lambda text: None
    ) -> None:
        self._path, self._what, self._heard = file, what, heard
        self._holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": next((os.environ[name] for name in JOBS if name in os.environ), None),
            "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
            "beat": 0,
        }
        self._stop = Event()
        self._thread = Thread(target=self._beat, name="lock", daemon=True)

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._take()
        except BaseException:
            os.close(self._file)
            raise
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(OSError):
            if self._is_ours(read_holder(self._path) or {}):
                os.ftruncate(self._file, 0)  # the file stays: two could lock one each otherwise
        os.close(self._file)

    def _take(self) -> None:
        locked = _try_lock(self._file)
        found = read_holder(self._path)
        if locked is False or (found is not None and self._lives(found, locked)):
            who = "another process" if found is None else describe(found)
            raise ValueError(
                f"{self._what}: {self._path.parent} is in use by {who}; end that, or wait for it"
            )
        self._write()
        if locked is None:  # of two that found it free at once, the later one finds itself
            time.sleep(SETTLE_SECONDS)
            found = read_holder(self._path) or {}
            if not self._is_ours(found):
                raise ValueError(
                    f"{self._what}: {self._path.parent} was taken by {describe(found)}"
                )

    def _is_ours(self, found: dict[str, Any]) -> bool:
        return all(found.get(key) == self._holder[key] for key in ("host", "pid", "since"))

    def _lives(self, found: dict[str, Any], locked: bool | None) -> bool:
        """Whether the holder that the file names still lives, though its lock does not show it."""
        if found.get("host") == socket.gethostname():
            others = found.get("pid") != os.getpid()  # or of a container that is gone
            return locked is None and others and Path(f"/proc/{found.get('pid')}").exists()
        self._heard(f"a sign of life of {describe(found)}, the last to use {self._path.parent}")
        end = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < end:
            time.sleep(BEAT_SECONDS / 10)
            if read_holder(self._path) != found:
                return True
        return False

    def _write(self) -> None:
        text = json.dumps(self._holder)
        os.pwrite(self._file, f"{text:<512}\n".encode(), 0)  # of one length: never half of two
        os.fsync(self._file)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            self._holder["beat"] = int(str(self._holder["beat"])) + 1
            with suppress(OSError):  # a full disk is somebody else's to report
                self._write()


def read_holder(file: Path) -> dict[str, Any] | None:
    """Who holds the folder of lock ``file``, as far as the file says; None if nobody does."""
    try:
        text = file.read_text().strip()
        holder: dict[str, Any] = json.loads(text) if text else {}
    except (OSError, ValueError):
        return None
    return holder or None


def describe(holder: dict[str, Any]) -> str:
    """``process 123 on node7 (job 99, since 2026-01-02 03:04:05)``."""
    job = f"job {holder['job']}, " if holder.get("job") else ""
    return f"process {holder.get('pid')} on {holder.get('host')} ({job}since {holder.get('since')})"


def _try_lock(file: int) -> bool | None:
    """Whether the kernel's lock was free, and is ours now; None if this file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in WITHOUT_LOCKS:
            return None
        raise
    return True
