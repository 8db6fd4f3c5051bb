"""What the log of a server that has ended says it ended by."""

import re
from pathlib import Path

from peergrad.rollout.errors import quote

TAIL_BYTES = 200_000
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# A message begins with the time; what follows up to the next, a traceback perhaps, belongs to it.
MESSAGE = re.compile(r"(?=\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[^]]*\] )")
EXCEPTION = re.compile(r"^[\w.]*(?:Error|Exception)(?::.*)?$", re.MULTILINE)  # ends a traceback
# Said by whoever is about to end: uvicorn, argparse, Python, SGLang of its workers.
FATAL = re.compile(
    r"(?P<line>ERROR: +\[Errno.*|^[\w ./]+: error: .*|^Fatal Python error: .*)|"
    r"hit an exception: |warmup error: ",
    re.MULTILINE,
)
CRASHED = re.compile(r"Subprocess \w+ .*crashed with exit code (-?)\d+.*")
# Whatever was the matter before, the server lived to say this.
SERVES = re.compile(r'fired up and ready|HTTP/1\.1" 200')


def cause(path: Path) -> str | None:
    """The line that tells best why the server of this log ended; None if none does.

    Later lines are often consequences: of a port in use, a request to the server itself that nobody
    answers; of a worker that failed, the ends of the others. So in this order: the first failure
    that whoever ended announced, with its exception; the first worker that a signal ended; the last
    exception, unless the server went on to serve; the first worker that ended.
    """
    messages = _messages(path)
    for message in messages:
        if match := FATAL.search(message):
            return quote(match["line"] or _exception(message[match.end() :]) or message)
    crashes = [match for message in messages if (match := CRASHED.search(message))]
    if killed := [match[0] for match in crashes if match[1]]:
        return quote(killed[0])
    for message in reversed(messages):
        if SERVES.search(message):
            break
        if raised := _exception(message):
            return quote(raised)
    return quote(crashes[0][0]) if crashes else None


def _messages(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            tail = file.read().decode(errors="replace")
    except OSError:
        return []
    return MESSAGE.split(COLOURS.sub("", tail))


def _exception(text: str) -> str | None:
    """The exception that left the last traceback of ``text``."""
    found = EXCEPTION.findall(text)
    return found[-1] if found else None
