"""Asking servers of which some are not there yet."""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
NAMED = 8  # on one line


class NotThereYet(ValueError):
    """Nobody answers at ``url``, or somebody who is not ready; ``why`` in a few words."""

    def __init__(self, message: str, url: str, why: str) -> None:
        super().__init__(message)
        self.url, self.why = url, why


class Waiting(Protocol):
    """What tells a person of a wait, as ``Screen.waiting`` does."""

    def __call__(
        self, what: str, *, announce: bool, detail: Callable[[], str]
    ) -> AbstractContextManager[None]: ...


def gather(
    ask: Callable[[str], T], urls: Sequence[str], *, seconds: float, waiting: Waiting | None
) -> list[T]:
    """What ``ask`` says of each of ``urls``, all of them asked at once, and those that are not
    there yet again and again for ``seconds``.

    Raises what ``ask`` raises, at once unless it is NotThereYet; in the end that of the only try,
    or a ValueError that names all which did not come.
    """
    answers: dict[str, T] = {}
    absent = _try_all(ask, urls, answers)
    if absent and (waiting is None or seconds <= 0):
        raise absent[0]
    if absent and waiting is not None:
        deadline, first = time.monotonic() + seconds, absent

        def detail() -> str:
            fewer = len(absent) < len(first)
            still = _listed([error.url for error in absent]) if fewer else "all of them"
            return f"still {still}, {max(0.0, deadline - time.monotonic()):.0f} s left"

        what = f"servers, for {seconds:g} s at most: {_reasons(absent)}"
        with waiting(what, announce=True, detail=detail):
            while absent and (left := deadline - time.monotonic()) > 0:
                time.sleep(min(POLL_SECONDS, left))
                absent = _try_all(ask, [error.url for error in absent], answers)
    if absent:
        raise ValueError(
            f"rollout.servers.wait = {seconds:g}: {len(absent)} of {len(urls)} servers did not "
            f"come within these seconds, {_reasons(absent)}; see their logs, correct "
            "rollout.servers.urls, or raise it"
        ) from absent[0]
    return [answers[url] for url in urls]


def _try_all(
    ask: Callable[[str], T], urls: Sequence[str], answers: dict[str, T]
) -> list[NotThereYet]:
    """Add what is answered to ``answers``; the others."""

    def attempt(url: str) -> T | NotThereYet:
        try:
            return ask(url)
        except NotThereYet as error:
            return error

    absent = []
    with ThreadPoolExecutor(len(urls)) as threads:
        for url, found in zip(urls, threads.map(attempt, urls), strict=True):
            if isinstance(found, NotThereYet):
                absent.append(found)
            else:
                log.info("%s has answered", url)
                answers[url] = found
    return absent


def _reasons(absent: Sequence[NotThereYet]) -> str:
    return _listed([f"{error.url} ({error.why})" for error in absent])


def _listed(texts: Sequence[str]) -> str:
    more = len(texts) - NAMED
    return ", ".join(texts[:NAMED]) + (f" and {more} more" if more > 0 else "")
