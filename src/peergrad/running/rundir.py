"""The folder of a run: what is where, and that nothing in it is ever overwritten by accident."""

import logging
import os
import sys
from datetime import datetime
from pathlib import Path

from peergrad.config import RunConfig


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

    @property
    def started(self) -> bool:
        """Whether there is anything here that a new run would overwrite or mix with; an attempt
        that failed before its first result leaves nothing."""
        measured = self.metrics.exists() and self.metrics.stat().st_size > 0
        return measured or self.checkpoints.exists()

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


def log_to(folder: Path, name: str, *, screen: bool) -> None:
    """Send this process's log to ``folder/<name>.log``, and its warnings to stderr if
    ``screen``."""
    handlers: list[logging.Handler] = [logging.FileHandler(folder / f"{name}.log")]
    if screen:
        handlers.append(logging.StreamHandler(sys.stderr))
        handlers[-1].setLevel(logging.WARNING)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=handlers,
        force=True,
    )
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)  # libraries' deprecations
    logging.getLogger("httpx").setLevel(logging.WARNING)
