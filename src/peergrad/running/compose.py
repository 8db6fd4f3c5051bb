"""From ``conf/`` and the command line to a checked ``Config``."""

import re
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import (
    InterpolationResolutionError,
    InterpolationValidationError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)
from yaml import YAMLError  # type: ignore[import-untyped]

from peergrad.config import Config, require
from peergrad.running.hints import meant, unknown_key, unknown_option
from peergrad.running.keys import TEXTS, config_dir, groups, keys, schema
from peergrad.running.overrides import named_keys, read_overrides
from peergrad.running.preset import adapt_preset, leaves, read_preset
from peergrad.running.quoting import argument, escaped
from peergrad.running.values import wrong_type

UNSET = "unset"


def compose_config(overrides: Sequence[str], *, allow_missing: bool = False) -> tuple[Config, str]:
    """Compose ``conf/config.yaml`` with Hydra overrides; the checked configuration and its YAML.

    What only the ``algo`` preset sets gives way to what the user has chosen, and ``algo.source``
    says what was changed. With ``allow_missing`` mandatory values may be absent: ``???`` in the
    YAML and ``unset`` in the configuration, which then serves to be looked at.

    Raises ValueError with one line for an unknown key or option, a wrong type, a missing or an
    out-of-range value.
    """
    pristine, preset = _compose(tuple(overrides), config_dir())
    composed = pristine.copy()
    try:
        adapt_preset(composed, preset, _chosen(composed, preset, overrides))
        text = _yaml(composed)
        config = OmegaConf.to_object(_filled(composed) if allow_missing else composed)
    except OmegaConfBaseException as error:
        raise ValueError(_one_line(error)) from error
    assert isinstance(config, Config)
    require(
        config.run.epochs is None or "run.steps" not in named_keys(overrides),
        "run.epochs",
        config.run.epochs,
        "stands in place of run.steps, which is given, too",
        "leave one of the two out, or set run.epochs=null",
    )
    return config, text


def chosen_keys(overrides: Sequence[str]) -> frozenset[str]:
    """The keys of ``algo`` that the user has chosen: those named on the command line, and those
    that an experiment sets otherwise than the ``algo`` group's option does.

    ``overrides`` must be such that ``compose_config`` takes them.
    """
    composed, preset = _compose(tuple(overrides), config_dir())
    return _chosen(composed, preset, overrides)


def _chosen(composed: DictConfig, preset: DictConfig, overrides: Sequence[str]) -> frozenset[str]:
    ours, theirs = leaves(composed.algo, "algo."), leaves(preset, "algo.")
    named = named_keys(overrides)
    return frozenset(key for key, value in ours.items() if value != theirs[key] or key in named)


@lru_cache(maxsize=64)  # a third of a second each, and a start asks twice
def _compose(overrides: tuple[str, ...], folder: Path) -> tuple[DictConfig, DictConfig]:
    """The configuration composed of the files in ``folder``, and the ``algo`` group's option alone,
    both to be read only."""
    _store_schema()
    readable = read_overrides(overrides)
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            composed = compose("config", overrides=readable, return_hydra_config=True)
        option = composed.hydra.runtime.choices.algo
        with open_dict(composed):
            del composed["hydra"]
        return composed, read_preset(option)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ValueError(_one_line(error)) from error


@cache
def _store_schema() -> None:
    ConfigStore.instance().store(name="schema", node=schema())


def _filled(composed: DictConfig) -> DictConfig:
    """With something harmless for every mandatory value that is missing."""
    filled = composed.copy()
    for key in OmegaConf.missing_keys(composed):
        node = keys()[key]
        usual = UNSET if isinstance(node, TEXTS) else OmegaConf.select(schema(), key)
        OmegaConf.update(filled, key, usual)
    return filled


def _yaml(composed: DictConfig) -> str:
    """References resolved; what then still looks like one is text, and stays so when read back."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [plain(inner) for inner in value]
        return escaped(value) if isinstance(value, str) else value

    values = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    return OmegaConf.to_yaml(OmegaConf.create(plain(values)))


def _one_line(error: Exception) -> str:
    """The line for what only composing shows: mistakes in YAML files, references between keys,
    mandatory values."""
    text = " ".join(str(error).split())
    found = re.search(r"full_key: ((?!object_type)[\w.-]+)", text)
    key = found[1] if found else ""
    detail = re.sub(r"\s*(full_key|object_type|reference_type)[:=] ?\S*", "", text).rstrip(".")
    if isinstance(error, InterpolationResolutionError) and key:
        return _reference(key, error, detail)
    if isinstance(error, MissingMandatoryValue) and key:
        return f"{key} = ???: is mandatory; set it, as in {key}=<value>"
    file = re.match(r"In '([\w/-]+)': ", text)
    where = f" (in conf/{file[1]}.yaml)" if file else ""
    if isinstance(error, MissingConfigException):
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        if group in groups() and option not in groups()[group]:
            return unknown_option(group, option) + where
    if isinstance(error, YAMLError):
        return f"conf/: a file in it is not YAML: {detail}; correct it"
    if key and "Key '" in detail:
        return unknown_key(key) + where
    value = re.search(r"[Vv]alue:? '([^']*)'", detail)
    if key in keys():
        return wrong_type(key, value[1] if value else None) + where
    return f"{key or 'conf/'}: {detail}; correct it"


def _reference(key: str, error: InterpolationResolutionError, detail: str) -> str:
    """The line for a ``${...}`` that leads nowhere."""
    typed = str(error.child_node)
    start, literal = f"{key} = {typed}: ", argument(key, typed)
    if isinstance(error, InterpolationValidationError):
        return wrong_type(key, error.value)
    variable = re.search(r"Environment variable '(\w+)' not found", detail)
    if variable:
        return f"{start}the environment variable {variable[1]} is not set; set it"
    target = re.search(r"Interpolation key '([^']*)' not found", detail)
    if target:
        near = meant(target[1])
        also = f"did you mean {' or '.join(near)}? " if near else ""
        also += f"for the text itself write {literal}" if literal else "name another"
        return f"{start}refers to a key that does not exist; {also}"
    return f"{start}cannot be resolved: {detail}; refer to a key with a value of its own"
