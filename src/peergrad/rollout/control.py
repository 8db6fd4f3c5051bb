"""The same request to every server at once: pause, weight updates, checksums.

This goes to the servers themselves; no router forwards it.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from functools import partial
from threading import Thread
from typing import Any, TypeVar

import httpx

from peergrad.rollout.errors import ServerError, ServerGone, out_of_reach, reason
from peergrad.rollout.presence import CONNECT_SECONDS, absent_since
from peergrad.rollout.reply import Reply
from peergrad.rollout.requests import Json

T = TypeVar("T")

WATCH_SECONDS = 10.0
KEEP_SECONDS = 3.0  # an idle connection; servers close theirs after 5, also under a request


class Control:
    """Blocking requests to all servers in parallel; results come in the order of ``urls``."""

    def __init__(
        self, urls: Sequence[str], *, timeout: float = 300.0, lost_after: float = 60.0
    ) -> None:
        """``timeout``: seconds that a request may take. ``lost_after``: that a server with one may
        be out of reach meanwhile; a machine that loses its power breaks no connection."""
        self.urls = [url.rstrip("/") for url in urls]
        self._timeout = timeout
        self._lost_after = lost_after
        self._http = httpx.Client(
            trust_env=False, limits=httpx.Limits(keepalive_expiry=KEEP_SECONDS)
        )

    def post(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
        urls: Sequence[str] | None = None,
    ) -> list[Json]:
        """POST ``body`` to every server, or to ``urls``. Raises as ``finish`` does."""
        urls = self.urls if urls is None else urls
        requests = [self._submit("POST", url, path, body or {}, timeout) for url in urls]
        return self.finish(requests)

    def get(self, path: str, *, timeout: float | None = None) -> list[Json]:
        """GET ``path`` from every server. Raises as ``finish`` does."""
        return self.finish([self._submit("GET", url, path, None, timeout) for url in self.urls])

    def answers(self, path: str, *, timeout: float) -> dict[str, Json]:
        """GET ``path``: the answers of those servers that give one in time, by URL."""
        requests = {url: self._submit("GET", url, path, None, timeout) for url in self.urls}
        wait(requests.values())
        return {url: got.result() for url, got in requests.items() if got.exception() is None}

    def start(self, path: str, bodies: Sequence[Mapping[str, Any]]) -> list[Future[Json]]:
        """Have the k-th body on its way to the k-th server; ``finish`` waits for the answers."""
        return [
            self._submit("POST", url, path, body, None)
            for url, body in zip(self.urls, bodies, strict=True)
        ]

    def finish(self, futures: Sequence[Future[T]]) -> list[T]:
        """All results. Raises the first failure as soon as there is one, of a request ServerError;
        and ServerGone once a server has been out of reach for ``lost_after``."""
        away: dict[str, float] = {}
        pause = min(WATCH_SECONDS, self._lost_after / 4)
        while True:
            done, left = wait(futures, pause, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            if not left:
                return [future.result() for future in futures]
            away = asyncio.run(absent_since(self.urls, away))
            for url, since in away.items():
                if (seconds := time.monotonic() - since) >= self._lost_after:
                    raise ServerGone(out_of_reach(url, seconds), url=url)

    def run(self, fn: Callable[[], T]) -> Future[T]:
        """Run ``fn`` beside the requests."""
        return _beside(fn)

    def close(self) -> None:
        self._http.close()

    def _submit(
        self,
        method: str,
        url: str,
        path: str,
        body: Mapping[str, Any] | None,
        timeout: float | None,
    ) -> Future[Json]:
        return _beside(partial(self._request, method, url, path, body, timeout))

    def _request(
        self,
        method: str,
        url: str,
        path: str,
        body: Mapping[str, Any] | None,
        timeout: float | None,
    ) -> Json:
        seconds = timeout or self._timeout
        limits = httpx.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS))
        try:
            response = self._http.request(method, url + path, json=body, timeout=limits)
        except httpx.RequestError as error:
            late = isinstance(error, httpx.ReadTimeout)
            why = f"none within {seconds:g} s" if late else reason(error)
            raise ServerError(
                f"{url}: no answer to {method} {path} ({why}); see whether that server still runs, "
                "and its log",
                url=url,
            ) from error
        reply = Reply(url, path, response.status_code, response.content).checked()
        answer = reply.json() if reply.content else {}
        return answer if isinstance(answer, dict) else {"answer": answer}


def _beside(function: Callable[[], T]) -> Future[T]:
    """Run ``function`` in a thread of its own, which a program that ends does not wait for: a
    request to a server that hangs may take minutes."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="control", daemon=True).start()
    return future
