"""Addresses of this machine, real sockets and all."""

import socket
from collections.abc import Iterator

import pytest

from peergrad.rollout.address import Address
from peergrad.running.ports import free_ports


@pytest.fixture
def taken() -> Iterator[int]:
    """A port of the loopback that somebody listens at; the one below it is free."""
    while True:
        (port,) = free_ports(1)
        try:
            Address("127.0.0.1", (port, port + 1)).check()
        except ValueError:
            continue
        with socket.create_server(("127.0.0.1", port + 1)):
            yield port + 1
        return


@pytest.mark.parametrize(
    ("host", "urls"),
    [
        ("node7", ["http://node7:30000", "http://node7:30001"]),
        ("10.0.0.7", ["http://10.0.0.7:30000", "http://10.0.0.7:30001"]),
        ("fd00::7", ["http://[fd00::7]:30000", "http://[fd00::7]:30001"]),
    ],
)
def test_each_server_has_a_port(host: str, urls: list[str]) -> None:
    address = Address.row(host, 30000, 2)
    assert address.urls == address.own_urls == urls


@pytest.mark.parametrize(("host", "own"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]")])
def test_all_addresses_are_this_machines_to_others(host: str, own: str) -> None:
    address = Address.row(host, 30000, 1)
    assert address.urls == [f"http://{socket.gethostname()}:30000"]
    assert address.own_urls == [f"http://{own}:30000"]


@pytest.mark.parametrize(
    ("host", "first", "count", "line"),
    [
        ("", 30000, 1, "--host = '': is empty; give an address of this machine"),
        ("a", 0, 1, "--port = 0: "),
        ("a", 65534, 3, "--port = 65534: of 3 servers, the last one would listen beyond 65535; u"),
    ],
)
def test_ports_that_are_none(host: str, first: int, count: int, line: str) -> None:
    with pytest.raises(ValueError) as error:
        Address.row(host, first, count)
    assert str(error.value).startswith(line)


def test_the_last_port_is_one() -> None:
    assert list(Address.row("a", 65533, 3).ports) == [65533, 65534, 65535]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_free_ports_pass_and_stay_free(host: str) -> None:
    address = Address(host, free_ports(2))
    address.check()
    address.check()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_taken_port_is_named(taken: int, host: str) -> None:
    with pytest.raises(ValueError) as error:
        Address.row(host, taken - 1, 2).check()
    assert str(error.value) == (
        f"--port = {taken - 1}: port {taken} is taken by another program; end that, or choose "
        "another"
    )


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("192.0.2.1", "is no address of this machine"),  # of no machine: RFC 5737
        ("no.such.invalid", "cannot be listened at (Name or service not known)"),
    ],
)
def test_a_host_that_is_not_this_machine_is_refused(host: str, words: str) -> None:
    with pytest.raises(ValueError) as error:
        Address.row(host, 30000, 1).check()
    remedy = "give one of its addresses, or 0.0.0.0 for all of them"
    assert str(error.value) == f"--host = {host!r}: {words}; {remedy}"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "::", "192.0.2.1"])
def test_what_says_itself_whom_it_reaches_is_not_hidden(host: str) -> None:
    assert not Address.row(host, 30000, 1).is_hidden


def test_a_name_for_the_loopback_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Debian has it in /etc/hosts, which a test cannot write."""
    place = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 30000))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [place])
    assert Address.row("node7", 30000, 1).is_hidden
