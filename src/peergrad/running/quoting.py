"""Two layers of quotes: Hydra's around a value, the shell's around the whole argument."""

import re
import shlex

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from peergrad.running.keys import keys

INTERPOLATION = re.compile(r"\$\{([^${}]*)\}")


def quoted(text: str) -> str:
    """``text`` as a Hydra value that means exactly it.

    Hydra keeps backslashes as they are, except in front of a quote; OmegaConf looks for ``${``.

    Example:
        ``quoted('say "a"')`` is ``'"say \\\\"a\\\\""'``
    """
    text = escaped(text)
    quote = "'" if '"' in text and "'" not in text else '"'
    inner = re.sub(rf"(\\*)({quote}|$)", lambda m: m[1] * 2 + (f"\\{m[2]}" if m[2] else ""), text)
    return f"{quote}{inner}{quote}"


def escaped(text: str) -> str:
    """``text`` with every ``${`` made plain text for OmegaConf."""
    return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", text)


def argument(key: str, text: str) -> str:
    """What to type into a shell so that ``key`` becomes ``text``; "" if that takes several lines.

    References to keys that exist stay references.
    """
    named = INTERPOLATION.findall(text)
    value = quoted(text)
    if named and text.count("${") == len(named) and all(name in keys() for name in named):
        value = value.replace("\\${", "${")
    elif _read(value) != text:
        return ""
    return "" if not text.isprintable() else shlex.quote(f"{key}={value}")


def _read(value: str) -> object:
    """What Hydra and OmegaConf make of a value."""
    try:
        override = OverridesParser.create().parse_override(f"key={value}")
        return OmegaConf.create({"key": override.value()}).key
    except (HydraException, OmegaConfBaseException):
        return None
