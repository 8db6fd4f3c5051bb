"""Where servers listen, and whether they can."""

import errno
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from peergrad.config import require

LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Hosts that mean all addresses of a machine, and where it finds itself then."""
LAST_PORT = 65_535


@dataclass(frozen=True)
class Address:
    """A host and a port for each server.

    Example:
        >>> Address("node7", (30000, 30001)).urls
        ['http://node7:30000', 'http://node7:30001']
    """

    host: str
    ports: Sequence[int]

    @classmethod
    def row(cls, host: str, first: int, count: int) -> "Address":
        """``count`` ports from ``first`` on. ValueError if there are not so many."""
        require(bool(host.strip()), "--host", host, "is empty", "give an address of this machine")
        require(
            1 <= first <= LAST_PORT - count + 1,
            "--port",
            first,
            f"of {count} servers, the last one would listen beyond {LAST_PORT}",
            "use 30000",
        )
        return cls(host, range(first, first + count))

    @property
    def name(self) -> str:
        """What others call the host."""
        return socket.gethostname() if self.host in LOOPBACK else self.host

    @property
    def urls(self) -> list[str]:
        """By which others find the servers."""
        return [_url(self.name, port) for port in self.ports]

    @property
    def own_urls(self) -> list[str]:
        """By which this machine finds them."""
        host = LOOPBACK.get(self.host, self.host)
        return [_url(host, port) for port in self.ports]

    def check(self) -> None:
        """Raise ValueError unless servers can listen there now, by listening there."""
        for port in self.ports:
            try:
                _listen(self.host, port)
            except OSError as error:
                raise ValueError(self._refusal(port, error)) from error

    @property
    def is_hidden(self) -> bool:
        """Whether a name leads to the loopback alone, as that of a machine itself may do in its
        own /etc/hosts: other machines do not reach what listens there."""
        if self.host == "localhost" or self.host in LOOPBACK:
            return False
        found = {str(place[0]) for *_, place in _places(self.host, self.ports[0])}
        return self.host not in found and all(ip_address(each).is_loopback for each in found)

    def _refusal(self, port: int, error: OSError) -> str:
        if error.errno == errno.EADDRINUSE:
            rule = f"port {port} is taken by another program"
            return f"--port = {self.ports[0]}: {rule}; end that, or choose another"
        if error.errno == errno.EACCES:
            rule = f"port {port} may not be taken without privileges"
            return f"--port = {self.ports[0]}: {rule}; use one from 1024 on"
        remedy = "give one of its addresses, or 0.0.0.0 for all of them"
        if error.errno == errno.EADDRNOTAVAIL:
            return f"--host = {self.host!r}: is no address of this machine; {remedy}"
        return f"--host = {self.host!r}: cannot be listened at ({error.strerror}); {remedy}"


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _places(host: str, port: int) -> list[tuple[int, Any]]:
    """Family and address of each place that the two name."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(family, place) for family, _, _, _, place in found]


def _listen(host: str, port: int) -> None:
    for family, place in _places(host, port):
        socket.create_server(place[:2], family=family).close()
