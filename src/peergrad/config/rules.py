"""The checks that sections of the configuration share, and the one form of their errors."""

import math

LONGEST = 10_000_000.0
"""Seconds (four months); timers overflow far beyond it."""


def require(ok: bool, key: str, value: object, rule: str, remedy: str) -> None:
    """Raise the project's one form of configuration error unless ``ok``."""
    if not ok:
        raise ValueError(f"{key} = {value!r}: {rule}; {remedy}")


def one_line(error: BaseException | str, limit: int = 200) -> str:
    """What an error of somebody else's says, on one line that a person can read, and that can be
    written as UTF-8."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def finite(key: str, value: float | None, remedy: str = "correct it") -> None:
    """Refuse NaN and infinities; null turns the key off."""
    require(value is None or math.isfinite(value), key, value, "must be a finite number", remedy)


def at_least(key: str, value: float, least: float, remedy: str = "raise it") -> None:
    finite(key, value)
    require(value >= least, key, value, f"must be at least {least}", remedy)


def positive(key: str, value: float, remedy: str) -> None:
    require(0 < value < math.inf, key, value, "must be positive and finite", remedy)


def optional_positive(
    key: str, value: float | None, remedy: str = "use null to turn it off"
) -> None:
    if value is not None:
        positive(key, value, remedy)


def seconds(key: str, value: float, usual: float, unit: float = 1.0) -> None:
    """A time that one may wait, in ``unit`` seconds."""
    remedy = f"use {usual:g}"
    positive(key, value, remedy)
    most = LONGEST / unit
    require(value <= most, key, value, f"must be at most {most:g}", remedy)
