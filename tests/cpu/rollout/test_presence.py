"""What can be reached, by opening connections."""

import asyncio
import socket

from peergrad.rollout.presence import absent


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
