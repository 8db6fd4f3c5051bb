"""What can be set: the schema's keys, its sections, and the options of every group of ``conf/``."""

from functools import cache
from importlib.resources import files
from pathlib import Path

from omegaconf import AnyNode, DictConfig, OmegaConf, StringNode
from omegaconf.base import Node

from peergrad.config import Config

# Dicts that take any key.
FREE = ("parallel.megatron", "rollout.servers.args", "data.template_args")
TEXTS = (StringNode, AnyNode)  # a text; AnyNode: or a list of texts


def config_dir() -> Path:
    """The folder of YAML files: inside the installed package, or ``conf/`` of a source checkout."""
    inside = Path(str(files("peergrad"))) / "conf"
    return inside if inside.is_dir() else Path(__file__).resolve().parents[3] / "conf"


@cache
def groups() -> dict[str, list[str]]:
    """Group -> its options: the folders of ``conf/`` and the YAML files in them."""
    return {
        folder.name: sorted(
            file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml")
        )
        for folder in sorted(config_dir().iterdir())
        if folder.is_dir()
    }


@cache
def schema() -> DictConfig:
    """The dataclasses as Hydra's schema, with the free dicts open to any key; to be read only."""
    found = OmegaConf.structured(Config)
    assert isinstance(found, DictConfig)
    for free in FREE:
        node = OmegaConf.select(found, free)
        OmegaConf.set_struct(node, False)
    return found


@cache
def keys() -> dict[str, Node]:
    """Dotted key -> its node in the schema, sections included, in the order of the dataclasses."""

    def walk(section: DictConfig, prefix: str) -> dict[str, Node]:
        found: dict[str, Node] = {}
        for name in section:
            node = section._get_node(name)
            assert isinstance(node, Node)
            path = f"{prefix}{name!s}"
            found[path] = node
            if isinstance(node, DictConfig):
                found |= walk(node, path + ".")
        return found

    return walk(schema(), "")


def is_section(key: str) -> bool:
    return key not in FREE and isinstance(keys().get(key), DictConfig)


def is_free(key: str) -> bool:
    """Whether ``key`` lies in a dict that takes any key."""
    return any(key.startswith(f"{free}.") for free in FREE)
