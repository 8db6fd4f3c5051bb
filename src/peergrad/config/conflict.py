"""Knobs of the objective that have no place beside others."""

from typing import Any

from peergrad.config.rules import require


class Conflict(ValueError):
    """A knob that has no place beside others.

    Back at its default, the first of ``gives_way`` that nobody insists on ends it. ``idle``: it had
    no effect there; else the objective changes with it.
    """

    def __init__(self, message: str, gives_way: tuple[str, ...], idle: bool) -> None:
        super().__init__(message)
        self.gives_way = gives_way
        self.idle = idle


def agree(
    ok: bool,
    key: str,
    value: object,
    rule: str,
    remedy: str,
    *,
    gives_way: tuple[str, ...] = (),
    idle: bool = True,
) -> None:
    """Raise ``Conflict`` unless ``ok``; ``gives_way`` is ``key`` alone unless said."""
    try:
        require(ok, key, value, rule, remedy)
    except ValueError as error:
        raise Conflict(str(error), gives_way or (key,), idle) from None


def belongs(
    key: str, value: object, chosen: object, homes: list[Any], where: str | None = None
) -> None:
    """Refuse ``value`` unless it turns ``key`` off or ``chosen`` is one of its ``homes``."""
    names = where or "kind=" + "|".join(home.name for home in homes)
    section = key.rpartition(".")[0]
    where_to = names if where else f"{section}.{names}"
    agree(
        value is None or value == 0 or chosen in homes,
        key,
        value,
        f"has no effect without {where_to}",
        "remove it, or set that",
    )
