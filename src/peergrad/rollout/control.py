"""The same request to every server at once: pause, weight updates, checksums.

This goes to the servers themselves; no router forwards it.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import httpx

from peergrad.rollout.sglang import Json, ServerError, check

T = TypeVar("T")

CONNECT_SECONDS = 10.0


class Control:
    """Blocking requests to all servers in parallel; results come in the order of ``urls``."""

    def __init__(self, urls: Sequence[str], *, timeout: float = 300.0) -> None:
        self.urls = [url.rstrip("/") for url in urls]
        # Twice the servers: requests of a broken update may still wait while new ones are made.
        self._threads = ThreadPoolExecutor(2 * len(urls) + 1, thread_name_prefix="control")
        self._timeout = timeout
        self._http = httpx.Client(trust_env=False)

    def post(
        self, path: str, body: Mapping[str, Any] | None = None, *, timeout: float | None = None
    ) -> list[Json]:
        """POST ``body`` to every server. Raises ServerError if one fails, or takes too long."""
        return finish(self.start(path, [body or {}] * len(self.urls), timeout=timeout))

    def get(self, path: str) -> list[Json]:
        """GET ``path`` from every server."""
        return finish([self._threads.submit(self._request, "GET", u, path) for u in self.urls])

    def start(
        self, path: str, bodies: Sequence[Mapping[str, Any]], *, timeout: float | None = None
    ) -> list[Future[Json]]:
        """Have the k-th body on its way to the k-th server; ``finish`` waits for the answers."""
        return [
            self._threads.submit(self._request, "POST", url, path, body, timeout)
            for url, body in zip(self.urls, bodies, strict=True)
        ]

    def run(self, fn: Callable[[], T]) -> Future[T]:
        """Run ``fn`` beside the requests."""
        return self._threads.submit(fn)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._http.close()

    def _request(
        self,
        method: str,
        url: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> Json:
        limits = httpx.Timeout(timeout or self._timeout, connect=CONNECT_SECONDS)
        try:
            response = self._http.request(method, url + path, json=body, timeout=limits)
        except httpx.TransportError as error:
            raise ServerError(f"{method} {url}{path} got no answer: {error!r}") from error
        answer = check(response).json() if response.content else {}
        return answer if isinstance(answer, dict) else {"answer": answer}


def finish(futures: Sequence[Future[T]]) -> list[T]:
    """All results, or the first failure as soon as there is one."""
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in done:
        future.result()
    return [future.result() for future in futures]
