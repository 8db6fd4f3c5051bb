"""The rotary embedding that a config.json means."""

import math
from dataclasses import dataclass, replace
from typing import Any

from peergrad.parallel.hf.source import Source
from peergrad.parallel.hf.strict_json import shown

LENGTH = "original_max_position_embeddings"
KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", LENGTH),
    "yarn": ("factor", LENGTH, "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim"),
}
"""What each kind reads. Of YaRN's ``attention_factor`` SGLang knows nothing."""
READ_BY_ALL = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


@dataclass(frozen=True)
class Rope:
    """Pairs of a head's numbers turn with the position, pair i by ``theta ** (-2i / head_dim)``.

    Scaled, those that turn less than ``slow`` times over the ``original`` length turn ``factor``
    times slower, those that turn more than ``fast`` times as they did, and those between so that
    one passes into the other; with ``linear`` all turn slower.

    Example:
        Llama 3.1: ``Rope(theta=5e5, kind="llama3", factor=8.0, original=8192, slow=1.0, fast=4.0)``
    """

    theta: float
    kind: str = "default"  # or linear, llama3, yarn
    factor: float = 1.0
    original: int = 0
    slow: float = 0.0
    fast: float = 0.0
    truncate: bool = True  # yarn: whole pairs begin and end what is in between
    attention: float = 1.0  # yarn: what turned queries and keys are multiplied by


def read_rope(source: Source, default: float) -> Rope:
    """In the new spelling (``rope_parameters``) or the old one (``rope_theta`` and
    ``rope_scaling``, which wins); ``default``: the theta of one that says none. ValueError for what
    is not supported."""
    values = source.values
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    found = {} if values.get(name) is None else values[name]
    if not isinstance(found, dict):
        source.refuse(name, "must be an object", "correct it")
    kind = found.get("rope_type", found.get("type", "default"))
    if not isinstance(kind, str) or kind not in KEYS:
        source.refuse(name, f"is not supported, only a rope_type of {', '.join(KEYS)}")
    for key, value in found.items():
        if value is not None and key not in (*READ_BY_ALL, *KEYS[kind]):
            source.refuse(name, f"is not supported: {shown(key)} has no part in {kind} rope")
    for where, partial in ((name, found), ("partial_rotary_factor", values)):
        if partial.get("partial_rotary_factor") not in (None, 1):
            source.refuse(where, "is not supported: partial_rotary_factor must be 1")
    theta = found.get("rope_theta", values.get("rope_theta", default))
    if not _is_number(theta) or theta <= 1:
        where = "rope_theta" if "rope_theta" in values else name
        source.refuse(where, "must be a number above 1", "correct it")
    rope = Rope(float(theta), kind)
    return rope if kind == "default" else _scaled(rope, _Scaling(source, name, found))


@dataclass(frozen=True)
class _Scaling:
    """The object in config.json that describes one.

    Example:
        ``_Scaling(source, "rope_scaling", {"rope_type": "linear", "factor": 2.0})``
    """

    source: Source
    name: str
    values: dict[str, Any]

    def require(self, ok: bool, rule: str) -> None:
        if not ok:
            self.source.refuse(self.name, f"must have {rule}", "correct it")

    def number(self, key: str, default: float | None = None) -> float:
        value: Any = self.values.get(key, default)
        self.require(_is_number(value) and value > 0, f"a positive number as {key}")
        return float(value)


def _scaled(rope: Rope, given: _Scaling) -> Rope:
    factor = given.number("factor")
    given.require(factor >= 1, "a factor of at least 1")
    if rope.kind == "linear":  # SGLang takes anything but a float for a list of factors
        given.require(type(given.values["factor"]) is float, "a decimal point in its factor")
        return replace(rope, factor=factor)
    length = given.source.size("max_position_embeddings")
    # One that stands beside the object wins, as in transformers.
    original = given.source.values.get(LENGTH, given.values.get(LENGTH, length))
    given.require(type(original) is int and original > 0, f"a positive whole {LENGTH}")
    if rope.kind == "llama3":
        slow, fast = given.number("low_freq_factor"), given.number("high_freq_factor")
        given.require(slow < fast, "a low_freq_factor below its high_freq_factor")
        return replace(rope, factor=factor, original=original, slow=slow, fast=fast)
    slow, fast = given.number("beta_slow", 1), given.number("beta_fast", 32)
    given.require(slow < fast, "a beta_slow below its beta_fast")
    reach = f"a factor that takes {LENGTH} to max_position_embeddings"
    given.require(length <= factor * original, reach)  # SGLang's table ends there
    truncate = given.values.get("truncate", True)
    given.require(isinstance(truncate, bool), "true or false as truncate")
    rope = replace(rope, factor=factor, original=original, slow=slow, fast=fast, truncate=truncate)
    return replace(rope, attention=_attention(factor, given))


def _attention(factor: float, given: _Scaling) -> float:
    names = ("mscale", "mscale_all_dim")
    said = [given.number(key) for key in names if given.values.get(key) is not None]
    given.require(len(said) != 1, "both mscale and mscale_all_dim or neither")
    above, below = (0.1 * scale * math.log(factor) + 1 for scale in (said or (1, 0)))
    return above / below


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and value < math.inf
