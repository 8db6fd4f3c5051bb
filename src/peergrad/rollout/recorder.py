"""Recordings of a run's groups, made beside the training."""

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from peergrad.data import Group
from peergrad.recording import write_groups

log = logging.getLogger(__name__)


def recorded(run_dir: Path, step: int) -> Path:
    """File of the groups trained on after ``step`` steps: it carries the number of that step."""
    return run_dir / "rollouts" / f"step_{step + 1:06d}.parquet"


def missing(run_dir: Path, step: int) -> tuple[str, str]:
    """Rule and remedy for a recording of step ``step + 1`` that is not there."""
    old = recorded(run_dir, step).with_suffix(".jsonl.zst")
    if old.is_file():
        rule = f"has {old.name} of an earlier peergrad, which this one does not read"
        return rule, "replay it with that version, or record the run again"
    return f"has no record of step {step + 1}", "name a run with rollout.dump=true"


class Recorder:
    """Writes one file at a time in a thread of its own; a second one waits for the first.

    What went wrong with a file is raised by the next ``put`` or ``wait``, as the StorageError that
    ``write_groups`` raised. A process that is killed loses what it has not yet written.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._thread = ThreadPoolExecutor(1, "recorder")
        self._writing: Future[None] | None = None

    def put(self, groups: Sequence[Group], step: int) -> Path:
        """Begin to record the groups trained on after ``step`` steps; nobody may change them."""
        self.wait()
        path = recorded(self._run_dir, step)
        self._writing = self._thread.submit(write_groups, path, groups, step=step + 1)
        return path

    def wait(self) -> None:
        """Until everything is on the disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Finish the file at work; safe to call again. An error is only logged: the run is about
        to end, and if with another error, that is the one to show."""
        try:
            self.wait()
        except Exception as error:
            log.warning("%s", error)
        self._thread.shutdown()
