"""What can be reached, by opening connections."""

import asyncio
import socket
import threading
import time

from peergrad.rollout.presence import absent, absent_for


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        return unused.getsockname()[1]


def test_what_listens_is_there_whatever_it_does():
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # accepts nothing
        here = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        gone = f"http://127.0.0.1:{free_port()}"
        assert asyncio.run(absent([gone, here])) == [gone]
    unknown = "http://no-such-host.invalid"
    assert asyncio.run(absent([here, unknown])) == [here, unknown]


def test_a_place_is_given_time_to_be_reached_again(monkeypatch):
    monkeypatch.setattr("peergrad.rollout.presence.POLL_SECONDS", 0.05)
    port, back = free_port(), []
    come_back = lambda: back.append(socket.create_server(("127.0.0.1", port)))  # noqa: E731
    threading.Timer(0.3, come_back).start()
    url = f"http://127.0.0.1:{port}"
    began = time.monotonic()
    assert asyncio.run(absent_for([url], 60.0)) == []
    assert 0.25 < time.monotonic() - began < 30
    back[0].close()
    assert asyncio.run(absent_for([url], 0.2)) == [url]
