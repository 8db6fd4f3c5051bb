"""Seconds of the parts of a phase: where each tenth of a second of it goes."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Parts:
    """Adds up seconds by name.

    Example:
        >>> parts = Parts()
        >>> with parts.time("pause"):
        ...     pass
        >>> sorted(parts.row("sync"))
        ['time/sync/pause']
    """

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        """``seconds``: what was taken elsewhere."""
        self.seconds = dict(seconds or {})

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Add the block's seconds to those of ``name``."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def each(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """``items``; the seconds that they take to come are those of ``name``."""
        rest = iter(items)
        while True:
            with self.time(name):
                try:
                    item = next(rest)
                except StopIteration:
                    return
            yield item

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def row(self, phase: str) -> dict[str, float]:
        """As metrics of ``phase``: ``time/<phase>/<part>``."""
        return {f"time/{phase}/{name}": seconds for name, seconds in self.seconds.items()}
