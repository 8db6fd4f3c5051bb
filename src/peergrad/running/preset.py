"""What an ``algo`` preset sets gives way to what the user has chosen."""

from collections.abc import Collection, Mapping
from enum import Enum
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf

from peergrad.config import AlgoConfig, Conflict
from peergrad.running.keys import config_dir

WORDS = ("algo.source", "algo.differences")


def read_preset(option: str) -> DictConfig:
    """``conf/algo/<option>.yaml`` over the defaults, and nothing else."""
    own = OmegaConf.load(config_dir() / f"algo/{option}.yaml")
    preset = OmegaConf.merge(OmegaConf.structured(AlgoConfig), own)
    assert isinstance(preset, DictConfig)
    return preset


def leaves(node: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key, with ``prefix`` before it -> value."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}{key!s}"
        found |= leaves(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def adapt_preset(composed: DictConfig, preset: DictConfig, chosen: Collection[str]) -> None:
    """Put back to their defaults the keys of ``composed.algo`` that only ``preset`` sets and that
    have no place beside ``chosen`` ones; then name all that differs from the preset in its source.

    A knob without effect is put back in silence: the objective is the same. What nobody but the
    user can decide is left as it is, for the configuration to refuse.
    """
    try:
        OmegaConf.to_object(preset)
    except ValueError:  # wrong by itself
        return
    lost = _give_way(composed, chosen)
    source = composed.algo.source
    if source and "algo.source" not in chosen:
        ours, theirs = leaves(composed.algo, "algo."), leaves(preset, "algo.")
        changed = [
            f"{key.removeprefix('algo.')}={_written(value)}"
            for key, value in ours.items()
            if value != theirs[key] and (key in chosen or key in lost) and key not in WORDS
        ]
        if changed:
            composed.algo.source = f"{source}, changed: {', '.join(changed)}"


def _give_way(composed: DictConfig, chosen: Collection[str]) -> set[str]:
    """The keys that were put back although they had an effect."""
    lost: set[str] = set()
    usual = _usual()
    while True:
        try:
            OmegaConf.to_object(composed.algo)
        except Conflict as conflict:
            now = leaves(composed.algo, "algo.")
            free = [k for k in conflict.gives_way if k not in chosen and now[k] != usual[k]]
            if not free:
                return lost
            OmegaConf.update(composed, free[0], usual[free[0]])
            if not conflict.idle:
                lost.add(free[0])
        except ValueError:
            return lost
        else:
            return lost


@cache
def _usual() -> dict[str, Any]:
    return leaves(OmegaConf.structured(AlgoConfig), "algo.")


def _written(value: Any) -> str:
    """As on the command line, numbers in few digits."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, Enum):
        return value.name
    return f"{value:g}" if isinstance(value, float) else str(value)
