"""The log of a process: everything into its file, warnings to the person who watches."""

import logging
import sys
from pathlib import Path


class Few(logging.Filter):
    """Lets the first records of one place in the code pass, and then a few a minute: a reward that
    always fails would fill the screen. The log file has them all."""

    ALLOWED, SECONDS = 3, 60.0

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[object, list[float]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        self._seen = {
            place: recent
            for place, times in self._seen.items()
            if (recent := [t for t in times if record.created - t < self.SECONDS])
        }
        place = (record.pathname, record.lineno, str(record.msg))
        recent = self._seen.get(place, [])
        self._seen[place] = recent
        if len(recent) >= self.ALLOWED:
            return False
        recent.append(record.created)
        return True


class OnScreen(logging.StreamHandler):  # type: ignore[type-arg]
    """Warnings on whatever ``sys.stderr`` is at the time: a live table takes it over."""

    def __init__(self) -> None:
        logging.Handler.__init__(self, logging.WARNING)
        self.addFilter(Few())
        self.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))

    @property
    def stream(self):  # type: ignore[no-untyped-def]
        return sys.stderr


def log_to(folder: Path, name: str, *, screen: bool) -> Path:
    """Send this process's log to ``folder/<name>.log``, and its warnings to stderr if
    ``screen``; the file."""
    file = folder / f"{name}.log"
    logging.raiseExceptions = False  # a full disk is said once, by what it stops
    handlers: list[logging.Handler] = [logging.FileHandler(file)]
    if screen:
        handlers.append(OnScreen())
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=handlers,
        force=True,
    )
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)  # libraries' deprecations
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return file
