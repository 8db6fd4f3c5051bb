"""Ports for the programs that a test starts."""

from peergrad.rollout.address import Address
from peergrad.running.ports import free_ports


def free_port() -> int:
    (port,) = free_ports(1)
    return port


def free_row(count: int) -> Address:
    """So many ports beside each other, all of them free: a first one that is says nothing of the
    next."""
    while True:
        address = Address.row("127.0.0.1", free_port(), count)
        try:
            address.check()
            return address
        except ValueError:
            continue
