"""A module ``transformer_engine_torch`` without CUDA: functions by their names in PyTorch.

What the real one (``signatures.json``, of version 2.11.0) has beside them, it has here in name
alone: userbuffers, cuDNN's attention, MXFP8 and NVFP4, kernels of mixtures of experts and what else
peergrad's models never call.
"""

import inspect
import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tests.te import adam, gemm, layers, machine, padding, quantisation, scales, softmax
from tests.te.enums import TYPES

NAME = "transformer_engine_torch"
SIGNATURES: dict[str, str] = json.loads(Path(__file__).with_name("signatures.json").read_text())
"""Parameters of all functions of the real one, as its binding reports them."""

_PARTS = (adam, gemm, layers, machine, padding, quantisation, scales, softmax)
FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(part, name) for part in _PARTS for name in SIGNATURES if hasattr(part, name)
}
"""Those that do here what they do there."""

calls: dict[str, int] = {}
"""How often each was called in this process."""


def make() -> ModuleType:
    module = ModuleType(NAME, __doc__)
    for name, kind in TYPES.items():
        setattr(module, name, kind)
    for name in SIGNATURES:
        found = FUNCTIONS.get(name)
        setattr(module, name, _refusal(name) if found is None else _counted(name, found))
    return module


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """As the compiled one is: unseen by autograd."""

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        calls[name] = calls.get(name, 0) + 1
        with torch.no_grad():
            return function(*args, **options)

    return call


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **options: Any) -> Any:
        raise NotImplementedError(f"{NAME}.{name} is not emulated")

    return refuse


def parameters(signature: inspect.Signature) -> list[tuple[str | None, str, bool]]:
    """(name, kind, whether it may be left out) of each parameter; one that can be given by its
    place alone has no name."""
    alone = inspect.Parameter.POSITIONAL_ONLY
    return [
        (None if x.kind is alone else x.name, x.kind.name, x.default is not x.empty)
        for x in signature.parameters.values()
    ]


def real(name: str) -> inspect.Signature:
    return inspect.signature(eval(f"lambda {SIGNATURES[name]}: None"))
