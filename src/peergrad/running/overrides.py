"""One override at a time, before Hydra composes: syntax, key, option and type.

Hydra would find most of this itself, and say it in terms of its grammar and of OmegaConf's nodes.
"""

import re
import shlex
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import AnyNode, ListConfig
from omegaconf.nodes import FloatNode, IntegerNode

from peergrad.running.hints import unknown_key, unknown_option
from peergrad.running.keys import TEXTS, groups, is_free, keys
from peergrad.running.quoting import argument, quoted
from peergrad.running.values import check_value, show, wrong_type

PROGRAM = "python -m peergrad.main"
OPTIONAL = "experiment"  # the only group that may be left out, or hold several options


def read_overrides(overrides: Sequence[str]) -> list[str]:
    """The overrides as Hydra is to get them: a leading ``+`` dropped, and what looks like a number
    quoted where a text is meant.

    Raises ValueError with one line for the first that cannot be right by itself.
    """
    parser = OverridesParser.create()
    return [_read(parser, text) for text in overrides]


def named_keys(overrides: Sequence[str]) -> frozenset[str]:
    """The keys that the overrides set, those inside of a ``{...}`` one by one.

    ``overrides`` must be such that ``read_overrides`` takes them.
    """
    parser, found = OverridesParser.create(), set()
    for text in read_overrides(overrides):
        if not text.startswith("~"):
            parsed = parser.parse_override(text)
            found |= _inside(parsed.key_or_group, parsed.value())
    return frozenset(found)


def _inside(key: str, value: object) -> set[str]:
    if not isinstance(value, dict):
        return {key}
    return {name for part, inner in value.items() for name in _inside(f"{key}.{part}", inner)}


def _read(parser: OverridesParser, text: str) -> str:
    text = text.lstrip("+")
    key, equals, raw = text.partition("=")
    if key.startswith("~"):
        _check_removal(text, key[1:])
        return text
    _check_key(key, bool(equals), raw)
    try:
        parsed = parser.parse_override(text)
    except HydraException as error:
        raise ValueError(_unreadable(key, raw)) from error
    if parsed.is_sweep_override():
        raise ValueError(_sweep(key, raw, parsed))
    value = parsed.value()
    if key in groups() and not isinstance(value, dict):
        _check_option(key, value)
        return text
    if isinstance(keys().get(key), TEXTS) and isinstance(value, bool | int | float):
        return f"{key}={quoted(raw.strip())}"
    check_value(key, value, raw)
    return text


def _check_removal(text: str, key: str) -> None:
    if not is_free(key) and key != OPTIONAL:
        raise ValueError(
            f"{text}: nothing can be taken away; leave {key.partition('=')[0]} out for its default"
        )


def _check_key(key: str, equals: bool, raw: str) -> None:
    if re.match(r"hydra([./]|$)", key):
        raise ValueError(
            f"{key}: Hydra's own settings have no effect here; "
            "run.root and run.name say where a run is kept, logger.* what it writes"
        )
    if "@" in key:
        raise ValueError(
            f"{key}: every group has one place here; write {key.partition('@')[0]}={raw}"
        )
    if not equals:
        raise ValueError(f"{key!r}: has no value; write key=value, as in run.steps=100")
    if key != key.strip():
        raise ValueError(f"{key!r}: has a space beside its =; write {key.strip()}={raw.strip()}")
    if re.search(r"\s", key) or not key or key.endswith("."):
        raise ValueError(f"{key!r}: is no key; write key=value, as in run.steps=100")
    if not is_free(key) and key not in keys() and key not in groups():
        raise ValueError(unknown_key(key, raw))


def _check_option(group: str, value: object) -> None:
    if value is None and group == OPTIONAL:
        return
    several = isinstance(value, list)
    if several and group != OPTIONAL:
        raise ValueError(f"{group} = {show(value)}: takes one option; choose one of them")
    for option in value if isinstance(value, list) else [value]:
        if option not in groups()[group]:
            raise ValueError(unknown_option(group, show(option)))


def _unreadable(key: str, raw: str) -> str:
    """The line for a value that Hydra's grammar does not know."""
    if key in groups():
        return unknown_option(key, raw)
    node = keys().get(key)
    if node is not None and not isinstance(node, TEXTS):
        return wrong_type(key, raw, raw)
    return f"{key} = {raw!r}: needs quotes; {_with_quotes(key, raw)}"


def _with_quotes(key: str, raw: str) -> str:
    written = argument(key, raw)
    return f"write {written}" if written else f"put them inside the shell's: '{key}=\"...\"'"


def _sweep(key: str, raw: str, parsed: Override) -> str:
    """The line for several values at once."""
    node, start = keys().get(key), f"{key} = {raw}: a start runs one configuration; "
    plain = parsed.value()
    if isinstance(node, ListConfig | AnyNode) and isinstance(plain, ChoiceSweep):
        return f"{key} = {raw}: is a list; write {shlex.quote(f'{key}=[{raw}]')}"
    if isinstance(node, IntegerNode | FloatNode) and re.fullmatch(r"\d{1,3}(,\d{3})+", raw):
        return f"{key} = {raw}: has commas; write {key}={raw.replace(',', '')}"
    simple = isinstance(plain, ChoiceSweep) and plain.simple_form
    text = isinstance(node, TEXTS) or is_free(key)
    if simple and text and re.search(r",\s", raw):
        return f"{key} = {raw!r}: a text with a comma needs quotes; {_with_quotes(key, raw)}"
    own = "" if key == "run.name" else " run.name=run$((++i))"
    loop = f"do {PROGRAM} ... {key}=$v{own}; done"
    line = f"{start}for one each: for v in {_items(raw, plain)}; {loop}"
    return f"{line}; as one text: {argument(key, raw)}" if text and argument(key, raw) else line


def _items(raw: str, sweep: object) -> str:
    """The values of a sweep, for the shell."""
    typed = [item.strip() for item in raw.split(",")]
    if isinstance(sweep, ChoiceSweep) and sweep.simple_form and len(typed) == len(sweep.list):
        return " ".join(map(shlex.quote, typed))
    if isinstance(sweep, ChoiceSweep):
        return " ".join(shlex.quote(show(getattr(item, "text", item))) for item in sweep.list)
    if isinstance(sweep, RangeSweep):
        found = list(sweep.range())
        return " ".join(map(str, found)) if len(found) <= 8 else "..."
    return "..."
