"""What the collector process tells the trainer: results, errors, progress and warnings."""

import logging
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from peergrad.running.logs import Few

log = logging.getLogger(__name__)


class Outbox(logging.Handler):
    """What the process says: (kind, content), from whatever thread; as a log handler, warnings."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(logging.WARNING)
        self.addFilter(Few())
        self._connection = connection

    def put(self, kind: str, content: Any) -> None:
        self.acquire()
        try:
            with suppress(OSError):  # nobody listens any more: the process is about to end
                self._connection.send((kind, content))
        finally:
            self.release()

    def put_error(self, error: BaseException) -> None:
        """Its kind, its message and its traceback, as text: not every error can be pickled."""
        text = "".join(traceback.format_exception(error))
        log.info("%s", text)
        known = isinstance(error, ValueError | RuntimeError) and str(error)
        message = str(error) if known else f"{type(error).__name__}: {error}"
        self.put(
            "error", (ValueError if isinstance(error, ValueError) else RuntimeError, message, text)
        )

    def emit(self, record: logging.LogRecord) -> None:
        self.put("warning", record.getMessage())


def raise_here(kind: type[Exception], message: str, text: str) -> NoReturn:
    """Raise on the trainer's side what ``put_error`` sent."""
    log.info("in the collector process:\n%s", text)  # the trainer's own traceback ends at the pipe
    raise kind(message)
