"""Whether Transformer Engine can be used, and if not, why.

Light to import. Whoever only describes a run asks ``installed``; what builds it asks ``absence``,
which imports the package.
"""

import importlib
from functools import cache
from importlib.util import find_spec

from peergrad.config.rules import one_line

PACKAGE = "transformer_engine"


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
    """Why the package, which is there, cannot be imported; None: it can. Without its compiled part
    its first name can be, but for a warning; Megatron asks for the second."""
    try:
        importlib.import_module(f"{PACKAGE}.pytorch")
    except Exception as error:  # with a compiled library anything can be the matter
        return one_line(error)
    return None
