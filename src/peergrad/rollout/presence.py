"""Whether anything listens where a server should be.

Asked of the kernel alone, by opening a connection: a server that computes, is paused or has a long
queue is there all the same, one whose process or machine is gone is not.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from urllib.parse import urlsplit

CONNECT_SECONDS = 10.0


async def reachable(url: str) -> bool:
    """Whether a connection to the server at ``url`` can be opened now."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    with suppress(OSError):  # of which TimeoutError is one
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(parts.hostname, port)
        writer.close()
        return True
    return False


async def absent(urls: Sequence[str]) -> list[str]:
    """Those of ``urls`` where nothing can be reached now."""
    found = await asyncio.gather(*map(reachable, urls))
    return [url for url, there in zip(urls, found, strict=True) if not there]
