"""What asking for a step's answers costs the process that asks, in CPU seconds.

A server that has all answers ready runs beside it. Ways: ``peergrad``, the engine as runs use it;
``httpx``, one request a group through ``httpx.AsyncClient``, the answers read by Python's own JSON
reader, token by token (``json_lines.py``).
"""

import asyncio
import json
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import httpx
import msgspec
from json_lines import parse_one_by_one

from peergrad.rollout.engine import Sampling
from peergrad.rollout.sglang import SGLangEngine

GROUP = 8
IN_FLIGHT = 256  # rollout.max_concurrency
SHORT = (6, 3, 5)  # tokens of a prompt, of an answer, and asked for at most: the quickstart's
LONG = (256, 576, 1024)
Sizes = tuple[int, int, int]


def as_sglang(text: str, tokens: list[int], logprobs: list[float]) -> dict[str, Any]:
    """One answer as SGLang gives it."""
    scored = [[logprob, token, None] for logprob, token in zip(logprobs, tokens, strict=True)]
    return {
        "text": text,
        "output_ids": tokens,
        "meta_info": {
            "finish_reason": {"type": "stop", "matched": tokens[-1]},
            "output_token_logprobs": scored,
            "weight_versions": [{"version": "run:0", "start": 0, "end": len(tokens)}],
        },
    }


def sample(size: int) -> bytes:
    """One answer of ``size`` tokens, as it travels."""
    tokens = [17 + k % 1000 for k in range(size)]
    logprobs = [-0.1234567 * (1 + k % 7) for k in range(size)]
    return msgspec.json.encode(as_sglang("x" * size, tokens, logprobs))


async def answer(one: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Requests of one connection, as many answers for each as it asks for."""
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            size = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            body = json.loads(await reader.readexactly(size))
            ids = body["input_ids"]
            count = len(ids) if isinstance(ids[0], list) else body["sampling_params"]["n"]
            content = b"[" + b",".join([one] * count) + b"]"
            await asyncio.sleep(0.2)  # so that all are in flight at once
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


def serve(pipe: Connection, tokens: int) -> None:
    async def main() -> None:
        one = sample(tokens)
        server = await asyncio.start_server(
            lambda reader, writer: answer(one, reader, writer), "127.0.0.1", 0, backlog=1024
        )
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


@contextmanager
def server(tokens: int) -> Iterator[str]:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, tokens), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{mine.recv()}"
    finally:
        process.terminate()
        process.join()


async def ours(url: str, sizes: Sizes, groups: int) -> None:
    engine = SGLangEngine([url], max_concurrency=IN_FLIGHT, vocab_size=2000)
    sampling = Sampling(n=GROUP, max_new_tokens=sizes[2])
    prompt = [5] * sizes[0]
    try:
        await asyncio.gather(
            *(engine.generate(prompt, sampling, request_id=str(k)) for k in range(groups))
        )
    finally:
        await engine.aclose()


async def through_httpx(url: str, sizes: Sizes, groups: int) -> None:
    slots = asyncio.Semaphore(IN_FLIGHT)
    body = {"input_ids": [5] * sizes[0], "sampling_params": {"n": GROUP}}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=600, limits=limits, trust_env=False) as client:

        async def one() -> None:
            async with slots:
                response = await client.post(f"{url}/generate", json=body)
            parse_one_by_one(response.content.replace(b'"run:0"', b'"0"'))

        await asyncio.gather(*(one() for _ in range(groups)))


def cpu_seconds(sizes: Sizes, groups: int, repeats: int) -> Iterator[tuple[str, list[float]]]:
    """Ways, and the CPU seconds of each repeat."""
    with server(sizes[1]) as url:
        for way, ask in (("peergrad", ours), ("httpx", through_httpx)):
            seconds = []
            for _ in range(1 + repeats):  # the first is the warm-up
                began = time.process_time()
                asyncio.run(ask(url, sizes, groups))
                seconds.append(time.process_time() - began)
            yield way, seconds[1:]
