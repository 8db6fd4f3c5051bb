"""Whether Transformer Engine can be used, and if not, why.

Light to import. Whoever only describes a run asks ``installed``; what builds it asks ``absence``,
which imports the package.
"""

import importlib
import os
import sys
from functools import cache
from importlib.util import find_spec
from typing import Any

from peergrad.config.rules import one_line, require

PACKAGE = "transformer_engine"
ATTENTION = {kind: f"NVTE_{kind.upper()}_ATTN" for kind in ("flash", "fused", "unfused")}
"""Its kinds of attention, and what in the environment turns each on or off."""


@cache  # before ``import_error`` hides it
def installed() -> bool:
    """Whether the package is there, however broken."""
    return find_spec(PACKAGE) is not None


def has_gpu() -> bool:
    """Whether there is what its layers run on."""
    import torch

    return torch.cuda.is_available()


def absence() -> tuple[str, str] | None:
    """(what is the matter with the package, as the end of a sentence about it; what to do); None:
    nothing is."""
    if not installed():
        return "is not installed", "install peergrad[gpu]"
    error = import_error()
    return None if error is None else (f"cannot be imported ({error})", "repair it")


@cache
def import_error() -> str | None:
    """Why the package, which is there, cannot be imported; None: it can. Megatron is then told that
    there is none: of all errors it expects a missing module alone, and would end with any other."""
    if not installed():
        return None
    try:
        importlib.import_module(f"{PACKAGE}.pytorch")
    except Exception as error:  # with a compiled library anything can be the matter
        sys.modules[PACKAGE] = None  # type: ignore[assignment]
        return one_line(error)
    return None


class _BeforeMegatron:
    """Has the package tried before Megatron is imported, whoever does so first."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "megatron":
            sys.meta_path.remove(self)
            import_error()


def try_before_megatron() -> None:
    """See above; once a process."""
    sys.meta_path.insert(0, _BeforeMegatron())


def require_attention(backend: str) -> None:
    """ValueError if the environment turns another kind of attention on or off than Megatron is
    about to for ``parallel.megatron.attention_backend``: it would stop there."""
    for kind, variable in ATTENTION.items():
        found, wanted = os.environ.get(variable), "1" if backend in ("auto", kind) else "0"
        rule = f"contradicts parallel.megatron.attention_backend = {backend!r}, which sets it"
        require(found in (None, wanted), variable, found, rule, "unset it, and choose by that key")
