"""From ``conf/`` and the command line to a checked ``Config``."""

import difflib
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from peergrad.config import AlgoConfig, Config


def config_dir() -> Path:
    """The folder of YAML files: inside the installed package, or ``conf/`` of a source checkout."""
    inside = Path(str(files("peergrad"))) / "conf"
    return inside if inside.is_dir() else Path(__file__).resolve().parents[3] / "conf"


def compose_config(overrides: Sequence[str]) -> tuple[Config, str]:
    """Compose ``conf/config.yaml`` with Hydra overrides; the checked configuration and its YAML.

    Raises ValueError with one line for an unknown key or option, a wrong type, a missing or an
    out-of-range value.
    """
    ConfigStore.instance().store(name="schema", node=_schema())
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            composed = compose("config", overrides=list(overrides))
        # "+key=value" adds unknown keys past Hydra's check: merging into the schema refuses them.
        OmegaConf.merge(_schema(), OmegaConf.to_container(composed))
        config = OmegaConf.to_object(composed)
    except OverrideParseException as error:
        raise ValueError(
            f"{error.override!r}: cannot be read as an override; write key=value or group=option"
        ) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_one_line(error)) from error
    assert isinstance(config, Config)
    return config, OmegaConf.to_yaml(composed, resolve=True)


def chosen_keys(overrides: Sequence[str]) -> frozenset[str]:
    """The keys of ``algo`` that the user has chosen: those named on the command line, and those
    that an experiment sets otherwise than the ``algo`` group's option does.

    ``overrides`` must be such that ``compose_config`` takes them.
    """
    ConfigStore.instance().store(name="schema", node=_schema())
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        composed = compose("config", overrides=list(overrides), return_hydra_config=True)
    option = composed.hydra.runtime.choices.algo
    preset = OmegaConf.merge(
        OmegaConf.structured(AlgoConfig), OmegaConf.load(config_dir() / f"algo/{option}.yaml")
    )
    assert isinstance(preset, DictConfig)
    ours, theirs = (dict(_values(node, "algo.")) for node in (composed.algo, preset))
    named = [o.partition("=")[0].lstrip("+") for o in overrides if o.partition("=")[0] != "algo"]
    return frozenset(
        key
        for key, value in ours.items()
        if value != theirs[key] or any(key == n or key.startswith(f"{n}.") for n in named)
    )


def _values(node: DictConfig, prefix: str) -> list[tuple[str, Any]]:
    found = []
    for key, value in node.items():
        nested = isinstance(value, DictConfig)
        found += _values(value, f"{prefix}{key!s}.") if nested else [(f"{prefix}{key!s}", value)]
    return found


def _schema() -> DictConfig:
    """The dataclasses as Hydra's schema, with the two free dicts open to any key."""
    schema = OmegaConf.structured(Config)
    for free in (schema.parallel.megatron, schema.rollout.servers.args):
        OmegaConf.set_struct(free, False)
    assert isinstance(schema, DictConfig)
    return schema


def _one_line(error: Exception) -> str:
    """Hydra's message without its line breaks, with the nearest known key for a misspelt one."""
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    text = " ".join(str(root).split())
    unknown = re.search(r"Key '(\w+)' (?:is )?not in '?(\w+)'?", text)
    full = re.search(r"full_key: ([\w.]+)", text)
    if unknown:
        key = full[1] if full else unknown[1]
        known = [other for other in _known_keys() if not key.startswith(f"{other}.")]
        deeper = [other for other in known if other.endswith(f".{key}")]
        near = deeper or difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "see conf/ and src/peergrad/config/"
        return f"{key}: there is no such key in {unknown[2]}; {hint}"
    missing = re.search(r"missing mandatory value: (\w+)", text)
    if missing:
        key = full[1] if full else missing[1]
        return f"{key} = ???: is mandatory; set it, as in {key}=<value>"
    option = re.search(
        r"Could not find '([\w/]+)' Available options in '\w+': (.*?) Config search", text
    )
    if option:
        group, _, name = option[1].rpartition("/")
        return f"{group} = {name!r}: there is no such option; use one of {option[2]}"
    detail = re.sub(r"\s*(full_key|object_type|reference_type)[:=] ?\S+", "", text)
    return f"{full[1]}: {detail.rstrip('.')}; correct it" if full else detail


def _known_keys() -> list[str]:
    def walk(node: DictConfig, prefix: str) -> list[str]:
        found = []
        for key in node:
            value = None if OmegaConf.is_missing(node, key) else node._get_node(key)
            path = f"{prefix}{key!s}"
            found.append(path)
            if isinstance(value, DictConfig):
                found += walk(value, path + ".")
        return found

    return walk(_schema(), "")
