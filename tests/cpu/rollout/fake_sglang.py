"""A local HTTP server that answers like SGLang, or as badly as a test wants."""

import json
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any]  # status, body


def sample(tokens: list[int], *, version: str = "0", finish: str = "stop") -> dict[str, Any]:
    """One sample as /generate returns it; token t has logprob -t."""
    return {
        "text": " ".join(map(str, tokens)),
        "output_ids": tokens,
        "meta_info": {
            "finish_reason": {"type": finish},
            "output_token_logprobs": [[-float(t), t, None] for t in tokens],
            "weight_versions": [{"version": version, "start": 0, "end": len(tokens)}],
        },
    }


class Mark:
    """The weight version of a stand-in, and the routes that tell and change it."""

    def __init__(self, version: str = "default") -> None:
        self.version = version

    def routes(self) -> dict[str, Callable[[dict[str, Any]], Answer]]:
        return {"model_info": self.model_info, "update_weight_version": self.update}

    def model_info(self, _: dict[str, Any]) -> Answer:
        return 200, {"weight_version": self.version}

    def update(self, body: dict[str, Any]) -> Answer:
        assert body["abort_all_requests"] is False
        self.version = body["new_version"]
        return 200, {"success": True}


def answer_generate(body: dict[str, Any]) -> Answer:
    """Each sample repeats its prompt and ends it with token 1."""
    samples = [sample([*prompt, 1]) for prompt in wanted(body)]
    several = len(samples) > 1 or isinstance(body["input_ids"][0], list)
    return 200, samples if several else samples[0]


def wanted(body: dict[str, Any]) -> list[list[int]]:
    """The prompt of each answer that a request asks for."""
    ids, n = body["input_ids"], body["sampling_params"]["n"]
    prompts = ids if isinstance(ids[0], list) else [ids]
    return [prompt for prompt in prompts for _ in range(n)]


class FakeServer:
    """``with FakeServer(answer) as server``: ``answer(body)`` decides on each request.

    ``routes`` names other functions for single paths; port 0 is any that is free.
    """

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], Answer] = answer_generate,
        port: int = 0,
        **routes: Callable[[dict[str, Any]], Answer],
    ) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(
                    self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}"
                )
                fake.requests.append((self.path, body))
                status, content = routes.get(self.path[1:], answer)(body)
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                with suppress(BrokenPipeError):  # the client gave up, as some tests want it to
                    self.wfile.write(data)

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "FakeServer":
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()


class Hanging(FakeServer):
    """Takes requests, and answers none of them before it is left."""

    def __init__(self) -> None:
        self._over = threading.Event()
        super().__init__(lambda _: (200, {"over": self._over.wait()}))

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        super().__exit__(*exception)


class Vanishing:
    """A place where a request is taken, and then nothing can be reached any more; nor does the
    connection break, as when a machine loses its power."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.taken = threading.Event()  # the request
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._take_one, daemon=True).start()

    def _take_one(self) -> None:
        request = b""
        while not request:  # one who looks whether anybody is there sends nothing
            self._connection, _ = self._listening.accept()
            request = self._connection.recv(1)
        self._listening.close()
        self.taken.set()
