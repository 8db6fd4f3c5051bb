"""Control requests, over real connections."""

import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace

import pytest
from fake_sglang import FakeServer, Vanishing

from peergrad.rollout.control import KEEP_SECONDS, Control
from peergrad.rollout.errors import ServerGone


class Remembers(BaseHTTPRequestHandler):
    """Keeps connections open, as SGLang's servers do, and notes which one a request comes by."""

    protocol_version = "HTTP/1.1"
    ports: list[int] = []  # noqa: RUF012

    def do_GET(self):
        self.ports.append(self.client_address[1])
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_):
        pass


def test_a_connection_that_the_server_may_be_closing_is_not_used_again(monkeypatch):
    """A server closes one that was idle for 5 seconds, and a request that is on its way breaks."""
    assert KEEP_SECONDS < 5
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("httpcore._sync.http11.time", clock)
    with ThreadingHTTPServer(("127.0.0.1", 0), Remembers) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        control = Control([f"http://127.0.0.1:{server.server_port}"])
        control.get("/model_info")
        now[0] += KEEP_SECONDS - 0.1
        control.get("/model_info")
        now[0] += KEEP_SECONDS + 0.1
        control.get("/model_info")
        control.close()
        server.shutdown()
    first, again, later = Remembers.ports
    assert first == again != later


def test_a_machine_that_vanishes_under_a_request_is_told_from_one_that_takes_long():
    def slow(_):
        time.sleep(1.0)
        return 200, {}

    with FakeServer(slow) as server:
        control = Control([server.url], lost_after=0.2)
        assert control.get("/model_info") == [{}]
        control.close()
        gone = Vanishing()
        control = Control([server.url, gone.url], lost_after=0.2)
        began = time.monotonic()
        with pytest.raises(ServerGone, match=rf"^{gone.url}: cannot be reached") as error:
            control.get("/model_info")
        assert time.monotonic() - began < 60 and error.value.url == gone.url
        control.close()
