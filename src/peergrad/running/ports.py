"""Ports that are still free when whoever was told of them gets to listen there."""

import secrets
import socket
from contextlib import suppress
from pathlib import Path

LOWEST, USUAL = 20_000, 32_768
GIVEN = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(count: int) -> list[int]:
    """Distinct local ports that are free, and that the kernel gives to no connection of its own
    accord: a server listens seconds after its port was chosen, while others connect."""
    end = _first_given()
    found: list[int] = []
    while len(found) < count:
        port = LOWEST + secrets.randbelow(end - LOWEST)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found += [port] * (port not in found)
    return found


def _first_given() -> int:
    """The first port of those that the kernel gives to connections; Linux's usual one if that is
    not known, or if it leaves no others."""
    with suppress(OSError, ValueError, IndexError):
        first = int(GIVEN.read_text().split()[0])
        if first > LOWEST + 1000:
            return first
    return USUAL
