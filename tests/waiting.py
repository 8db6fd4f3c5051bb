"""Waiting for what a test is about: the event itself, however long a starved machine takes."""

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_SECONDS = 120.0  # many times what anything that is waited for takes


def wait_until(event: Callable[[], T], seconds: float = PATIENCE_SECONDS) -> T:
    """The first result of ``event`` that is true."""
    deadline = time.monotonic() + seconds
    while not (result := event()):
        assert time.monotonic() < deadline, f"waited in vain for {seconds:g} s"
        time.sleep(0.02)
    return result


async def until(event: Callable[[], T], seconds: float = PATIENCE_SECONDS) -> T:
    """``wait_until`` in an event loop that goes on meanwhile."""
    deadline = time.monotonic() + seconds
    while not (result := event()):
        assert time.monotonic() < deadline, f"waited in vain for {seconds:g} s"
        await asyncio.sleep(0.01)
    return result
