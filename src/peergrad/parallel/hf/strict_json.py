"""JSON files of strangers: one meaning or an error, and what they say shown on one line."""

import json
from typing import Any

from peergrad.config.rules import one_line


def parse(text: bytes) -> Any:
    """The value of the JSON document ``text``.

    ValueError, on one line, if it is none, or if an object gives one key two different values:
    readers differ in which of them they take.
    """
    try:
        return json.loads(text, object_pairs_hook=_agreeing)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError as error:
        raise ValueError(one_line(error)) from error


def _agreeing(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f"{shown(key)} is given twice, with different values")
        found[key] = value
    return found


def shown(name: object, limit: int = 120) -> str:
    """A name from such a file as part of a line for people."""
    text = str(name)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
