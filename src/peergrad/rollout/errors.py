"""What goes wrong between us and a server, each as one line that names the server."""

import re
from collections.abc import Callable, Mapping
from errno import ECONNREFUSED, ECONNRESET, EHOSTUNREACH, ENETUNREACH, ETIMEDOUT

import aiohttp
import httpx

DEATH_SECONDS = 2.0  # from the end of a server's connections to its own
MESSAGE_LIMIT = 500  # characters of what a server says: an HTML page is not an error message

NOT_THERE = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    aiohttp.ClientConnectorError,
    aiohttp.ConnectionTimeoutError,
)
ABSENT = (ECONNREFUSED, ECONNRESET, EHOSTUNREACH, ENETUNREACH, ETIMEDOUT)
BROKEN = (
    httpx.RemoteProtocolError,
    httpx.ReadError,
    httpx.WriteError,
    aiohttp.ServerDisconnectedError,
    aiohttp.ClientOSError,
    aiohttp.ClientPayloadError,
    ConnectionResetError,
)


class ServerError(RuntimeError):
    """A server refused or failed a request, or holds what it should not. The message is one line
    that names the server; ``url`` is that server, None if it is about several."""

    def __init__(self, message: str, *, url: str | None = None) -> None:
        super().__init__(" ".join(message.split()))
        self.url = url


class ServerUnavailable(ServerError):
    """A 5xx answer: another attempt may succeed."""


class ServerGone(ServerError):
    """A server that had something to do cannot be reached any more, and was given time."""


class LoadAgain(ServerError):
    """A load of weights met servers that are gone, or were: it is to be done anew, with those that
    are there."""


Ended = Callable[[float], Mapping[str, str]]
"""What is known of servers that have ended, by URL, as ``ManagedServers.ended`` tells it."""


def none_ended(wait: float) -> dict[str, str]:
    """Of servers that this process has not started."""
    return {}


def out_of_reach(url: str, seconds: float) -> str:
    """Of a server that was given time."""
    return f"{url}: cannot be reached for {seconds:.0f} s; see whether it and its machine still run"


def quote(text: str) -> str:
    """``text`` on one line, and of bearable length."""
    line = " ".join(text.split())
    return line if len(line) <= MESSAGE_LIMIT else f"{line[:MESSAGE_LIMIT]}..."


def reason(error: BaseException) -> str:
    """Why a request got no answer, in a user's words."""
    text = quote(str(error)).lower()
    if isinstance(error, httpx.ConnectTimeout | aiohttp.ConnectionTimeoutError):
        return "the host does not answer"
    if isinstance(error, httpx.ConnectError | aiohttp.ClientConnectorError):
        unknown = ("name or service not known", "name resolution", "nodename", "no address")
        if any(words in text for words in unknown):
            return "the host name is not known"
        refused = getattr(error, "errno", None) == ECONNREFUSED or "refused" in text
        if refused or "all connection attempts failed" in text:
            return "connection refused"
        return f"cannot connect: {quote(str(error))}"
    if isinstance(error, httpx.TimeoutException | TimeoutError):
        return "no answer in time"
    if isinstance(error, BROKEN):
        return "the connection broke before the answer"
    return quote(f"{type(error).__name__}: {error}").rstrip(": ")


def may_come(error: BaseException) -> bool:
    """Whether what did not answer may be a server's place before the server is there: nothing
    listens, the machine is not up, or whatever listens is too busy to answer."""
    if isinstance(error, httpx.TimeoutException | httpx.ReadError):
        return True
    number = re.search(r"\[Errno (\d+)\]", str(error))  # httpx keeps it nowhere else
    return isinstance(error, httpx.ConnectError) and number is not None and int(number[1]) in ABSENT


def cannot_connect(error: BaseException | None) -> bool:
    """Whether nothing listens there: the request has not even been sent."""
    return isinstance(error, NOT_THERE)


def some_of(names: Mapping[str, object] | set[str], limit: int = 5) -> str:
    """``a, b and 3 more``."""
    shown = ", ".join(sorted(names)[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
