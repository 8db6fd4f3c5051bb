"""Types in the user's words: what a key takes, and what to write instead of what it does not."""

import shlex
from copy import deepcopy
from enum import Enum
from typing import Any

from omegaconf import AnyNode, DictConfig, EnumNode, ListConfig, StringNode
from omegaconf.base import Node
from omegaconf.errors import OmegaConfBaseException
from omegaconf.nodes import BooleanNode, FloatNode, IntegerNode, ValueNode

from peergrad.running.hints import likeliest, unknown_key
from peergrad.running.keys import is_free, is_section, keys
from peergrad.running.quoting import argument

SCALARS = {
    IntegerNode: "a whole number",
    FloatNode: "a number",
    BooleanNode: "true or false",
    StringNode: "text",
    AnyNode: "the path of a file, or a list of such",
}
ITEMS = {int: "whole numbers", str: "texts"}


def check_value(key: str, value: Any, raw: str | None = None) -> None:
    """Raise ValueError if ``key`` does not exist or does not take ``value``, which was typed as
    ``raw``. Values with a reference are left to the composition, which knows what they refer to."""
    if is_free(key):
        return
    if key not in keys():
        raise ValueError(unknown_key(key, show(value)))
    if isinstance(value, str) and ("${" in value or value == "???"):
        return
    if is_section(key) and isinstance(value, dict):
        for name, inner in value.items():
            check_value(f"{key}.{name}", inner)
    elif not _fits(key, value):
        raise ValueError(wrong_type(key, value, raw))


def wrong_type(key: str, value: Any, raw: str | None = None) -> str:
    """The line for a ``value`` that is not of the type of ``key``."""
    node, typed = keys()[key], show(value) if raw is None else raw.strip()
    if is_section(key):
        first = next(known for known in keys() if known.startswith(f"{key}."))
        return f"{key} = {typed}: is a section; set the keys in it, as in {first}=<value>"
    shown = repr(value) if isinstance(value, str) else show(value)
    return f"{key} = {shown}: must be {_rule(node)}; {_remedy(key, node, value, typed)}"


def show(value: Any) -> str:
    """As it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(show, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{name}:{show(inner)}' for name, inner in value.items())}}}"
    return value.name if isinstance(value, Enum) else str(value)


def _fits(key: str, value: Any) -> bool:
    node = keys()[key]
    if value is None:
        return bool(node._metadata.optional)
    if isinstance(node, DictConfig):
        return isinstance(value, dict) and not is_section(key)
    if isinstance(node, ListConfig):
        return isinstance(value, list) and all(_item_fits(node, item) for item in value)
    if isinstance(node, AnyNode):
        several = isinstance(value, list) and bool(value)
        return isinstance(value, str) or (several and all(isinstance(item, str) for item in value))
    if isinstance(node, EnumNode):
        return isinstance(value, str) and value in node.enum_type.__members__
    if isinstance(node, BooleanNode) and isinstance(value, int | float):
        return value in (0, 1)  # OmegaConf takes any number for true
    if isinstance(node, FloatNode | IntegerNode) and isinstance(value, bool):
        return False
    return _converts(node, value)


def _item_fits(node: ListConfig, item: Any) -> bool:
    if node._metadata.element_type is int:
        return type(item) is int
    return isinstance(item, str | int | float)


def _converts(node: Node, value: Any) -> bool:
    assert isinstance(node, ValueNode)
    try:
        deepcopy(node)._set_value(value)
    except OmegaConfBaseException:
        return False
    return True


def _rule(node: Node) -> str:
    rule = "names and values"
    if isinstance(node, EnumNode):
        rule = f"one of {', '.join(node.enum_type.__members__)}"
    elif isinstance(node, ListConfig):
        rule = f"a list of {ITEMS[node._metadata.element_type]}"
    elif isinstance(node, ValueNode):
        rule = SCALARS[type(node)]
    return rule + (", or null" if node._metadata.optional and type(node) is not AnyNode else "")


def _remedy(key: str, node: Node, value: Any, typed: str) -> str:
    if isinstance(node, EnumNode):
        near = likeliest(typed, list(node.enum_type.__members__))
        if near:
            return f"did you mean {' or '.join(near)}?"
    if isinstance(node, ListConfig):
        return _as_list(key, node, value)
    if isinstance(node, DictConfig):
        return f"write it as in '{key}={{name: value}}'"
    if isinstance(node, AnyNode):
        return f"write it as in {key}=a.jsonl or {shlex.quote(f'{key}=[a.jsonl,b.jsonl]')}"
    if isinstance(node, StringNode) and argument(key, typed):
        return f"for this very text write {argument(key, typed)}"
    if isinstance(node, IntegerNode) and isinstance(value, float) and value.is_integer():
        return f"write {key}={int(value)}"
    return f"write it as in {key}={show(node._value())}"


def _as_list(key: str, node: ListConfig, value: Any) -> str:
    items = value if isinstance(value, list) else [value]
    if isinstance(value, str):
        items = [item.strip() for item in value.strip("[]").split(",")]
    if isinstance(value, list) or not all(_item_fits(node, item) for item in items):
        items = [1, 2] if node._metadata.element_type is int else ["a", "b"]
        return f"write it as in {shlex.quote(f'{key}={show(items)}')}"
    return f"write {shlex.quote(f'{key}={show(items)}')}"
