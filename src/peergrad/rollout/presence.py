"""Whether anything listens where a server should be.

Asked of the kernel alone, by opening a connection: a server that computes, is paused or has a long
queue is there all the same, one whose process or machine is gone is not.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from peergrad.config.rollout import host_and_port

CONNECT_SECONDS = 10.0


async def reachable(url: str) -> bool:
    """Whether a connection to the server at ``url`` can be opened now."""
    with suppress(OSError):  # of which TimeoutError is one
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(*host_and_port(url))
        writer.close()
        return True
    return False


async def absent(urls: Sequence[str]) -> list[str]:
    """Those of ``urls`` where nothing can be reached now."""
    found = await asyncio.gather(*map(reachable, urls))
    return [url for url, there in zip(urls, found, strict=True) if not there]


async def absent_since(urls: Sequence[str], before: Mapping[str, float]) -> dict[str, float]:
    """When each of ``urls`` where nothing can be reached now was first found so, by the monotonic
    clock; ``before``: what this gave when it was last asked, or is known otherwise."""
    missing, now = await absent(urls), time.monotonic()
    return {url: before.get(url, now) for url in missing}
