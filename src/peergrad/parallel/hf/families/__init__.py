"""The families that can be trained, a file each; a file more is a family more."""

from importlib import import_module
from pkgutil import iter_modules

from peergrad.parallel.hf.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        import_module(f"{__name__}.{module.name}").FAMILY for module in iter_modules(__path__)
    )
}
"""By their ``model_type``."""
