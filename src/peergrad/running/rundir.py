"""The folder of a run: what is where, and that nothing in it is ever overwritten by accident."""

import os
import secrets
from datetime import datetime
from pathlib import Path

from peergrad.config import RunConfig
from peergrad.storage import replace_text


class RunDir:
    """Paths of one run.

    Example:
        ``RunDir(Path("runs/quickstart")).metrics`` is ``runs/quickstart/metrics.jsonl``
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.hf = path / "hf"
        self.curve = path / "curve.png"
        self.done = path / "DONE"
        self.lock = path / "holder.json"

    @property
    def started(self) -> bool:
        """Whether there is anything here that a new run would overwrite or mix with; an attempt
        that failed before its first result leaves nothing."""
        measured = self.metrics.exists() and self.metrics.stat().st_size > 0
        return measured or self.checkpoints.exists()

    @property
    def known_identity(self) -> str | None:
        """``identity``; None if the run has none yet."""
        file = self.path / "identity"
        return file.read_text() if file.is_file() else None

    def identity(self) -> str:
        """Names this run to servers that others may use as well; the same after every resume."""
        if self.known_identity is None:
            replace_text(self.path / "identity", f"{self.path.name}-{secrets.token_hex(4)}")
        return str(self.known_identity)

    def how_to_resume(self) -> str:
        """What a run that has been interrupted can do."""
        try:
            latest = (self.checkpoints / "latest").read_text()
        except OSError:
            return "run.resume=true begins again: there is no checkpoint yet"
        step = latest.strip().removeprefix("step_").lstrip("0")
        return f"run.resume=true continues from step {step}"

    def new_attempt(self) -> Path:
        """A fresh log folder for this start of the run; ``logs/latest`` points to it."""
        logs = self.path / "logs"
        attempt = logs / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
        attempt.mkdir(parents=True)
        link = logs / ".latest"
        link.unlink(missing_ok=True)
        link.symlink_to(attempt.name)
        link.replace(logs / "latest")
        return attempt


def check_run_dir(config: RunConfig) -> RunDir:
    """The run's folder, refused with a ValueError if it holds a run that was not asked for."""
    run = RunDir(Path(config.root) / config.name)
    if run.started and not config.resume:
        raise ValueError(
            f"run.name = {config.name!r}: {run.path} already holds a run; set run.resume=true to "
            "continue it, or choose a new run.name to start anew"
        )
    return run
