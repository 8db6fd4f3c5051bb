"""Messages between nodes, as files of a folder that all of them see.

Every message carries the word that the first node has chosen for this preflight, so that none of an
earlier one in the same folder is taken for its own.
"""

import hashlib
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from peergrad.preflight.report import Order, Report
from peergrad.storage import remove, replace_text, writing

CANARY_BYTES = 1 << 20
POLL_SECONDS = 0.2
T = TypeVar("T")


class Exchange:
    """The folder as one node sees it.

    Example:
        >>> exchange = Exchange(Path("/shared/preflight-12.0"), "gpu01")
        >>> exchange.open()  # on the first node
        >>> exchange.say("gpu01.json", report)
    """

    def __init__(self, folder: Path, host: str) -> None:
        self.folder = folder
        self._host = host
        self.word = ""

    def open(self) -> None:
        """Begin a new preflight. StorageError if the folder cannot be written."""
        with writing("--shared", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob("[!.]*"):  # hidden: another node is writing it right now
                remove(path)
        self.word = secrets.token_hex(8)
        self.put_canary()
        self.say("order-0.json", Order(first=self._host))

    def join(self) -> bool:
        """Whether a preflight has begun, other than the one joined before. One that is past its
        first order is over, or does not count on this node."""
        word = self._word_of("order-0.json")
        if word in ("", self.word) or self._word_of("order-1.json") == word:
            return False
        self.word = word
        return True

    def say(self, name: str, message: object) -> None:
        """StorageError if the folder cannot be written."""
        text = msgspec.json.encode({"word": self.word, "message": message}).decode()
        with writing("--shared", self.folder):
            replace_text(self.folder / name, text)

    def hear(self, name: str, kind: type[T]) -> T | None:
        """The message ``name``; None as long as it is not there."""
        found = self._read(name)
        if found.get("word") != self.word:
            return None
        try:
            return msgspec.convert(found.get("message"), kind)
        except msgspec.ValidationError:
            return None

    def reports(self) -> dict[int, Report]:
        """By rank, those that are there."""
        found = (self.hear(path.name, Report) for path in self.folder.glob("*.json"))
        return {report.rank: report for report in found if report is not None}

    def refresh(self) -> None:
        """Have the kernel look again. NFS clients remember for up to half a minute that a name was
        not there, unless they have themselves changed the folder (nfs(5), acdirmin)."""
        path = self.folder / f".refresh-{self._host}"
        with suppress(OSError):
            path.touch()
            path.unlink()

    def put_canary(self) -> None:
        with writing("--shared", self.folder):
            (self.folder / f"{self._host}.canary").write_bytes(self._canary(self._host))

    def canary_of(self, host: str) -> str | None:
        """What is wrong with the file that ``host`` has written; None if it is as it should be."""
        try:
            content = (self.folder / f"{host}.canary").read_bytes()
        except OSError as error:
            return f"is not seen ({error.strerror})"
        if content == self._canary(host):
            return None
        size = len(content)
        return "has another content" if size == CANARY_BYTES else f"is cut off at {size} bytes"

    def _canary(self, host: str) -> bytes:
        seed = hashlib.sha256(f"{self.word} {host}".encode())
        return b"".join(
            hashlib.sha256(seed.digest() + number.to_bytes(4)).digest()
            for number in range(CANARY_BYTES // seed.digest_size)
        )

    def _word_of(self, name: str) -> str:
        return str(self._read(name).get("word", ""))

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return msgspec.json.decode((self.folder / name).read_bytes(), type=dict[str, Any])
        except (OSError, msgspec.DecodeError):
            return {}


def until(end: float, ask: Callable[[], T | None], between: Callable[[], None]) -> T | None:
    """What ``ask`` answers, asked again and again until it is not None, or None at the time ``end``
    (of ``time.monotonic``); ``between`` is called before each asking but the first."""
    for _ in _ticks(end, between):
        found = ask()
        if found is not None:
            return found
    return None


def _ticks(end: float, between: Callable[[], None]) -> Iterator[None]:
    while True:
        yield
        left = end - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(POLL_SECONDS, left))
        between()
