"""Ports for servers that listen a while after they were told of them."""

import socket
from pathlib import Path

import pytest

from peergrad.running import ports
from peergrad.running.ports import LOWEST, USUAL, free_ports


def test_no_connection_is_given_them() -> None:
    found = free_ports(20)
    assert len(set(found)) == 20
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(LOWEST <= port < (first if first > LOWEST + 1000 else USUAL) for port in found)
    for port in found:
        socket.create_server(("127.0.0.1", port)).close()


def test_what_is_taken_or_named_already_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, one, two = free_ports(3)
    drawn = iter([taken, one, one, two])
    monkeypatch.setattr(ports.secrets, "randbelow", lambda _: next(drawn) - LOWEST)
    with socket.create_server(("127.0.0.1", taken)):
        assert free_ports(2) == [one, two]


@pytest.mark.parametrize(
    ("text", "end"),
    [("32768\t60999\n", 32768), ("49152 65535\n", 49152), ("1024 65535\n", USUAL), ("", USUAL)],
)
def test_the_kernel_tells_which_it_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, end: int
) -> None:
    monkeypatch.setattr(ports, "GIVEN", tmp_path / "range")
    assert ports._first_given() == USUAL
    (tmp_path / "range").write_text(text)
    assert ports._first_given() == end
