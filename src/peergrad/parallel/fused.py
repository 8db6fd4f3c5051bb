"""Kernels that do at once what PyTorch does in steps, taken by what they can do.

``import apex`` says nothing: on the package index that is another project. What counts is which of
its compiled modules Megatron has found.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from megatron.core import optimizer
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, layers

from peergrad.parallel.engine import has_gpu
from peergrad.parallel.model import Stage

WEIGHT_GRADIENTS = "fused_weight_gradient_mlp_cuda"
"""apex's module that adds a product to a float32 sum: the gradient of a matrix to its others'."""
MAKERS = {"transformer_engine": "Transformer Engine", "apex": "apex", "amp_C": "apex"}


def fuse_weight_gradients(model: Stage) -> str:
    """Have the layers' matrices add their gradients to ``main_grad`` in one pass, in float32, and
    not hand them to DDP in their own precision to do so: Transformer Engine's always, Megatron's
    own where the kernel for it is; what has come of it, for a person.

    For the model that learns alone, for no other has a ``main_grad``. The head adds its own by
    itself (``kernels/projection.py``) and stays as it is. Megatron's switch for both would want the
    kernel for its output layer, which here needs none.
    """
    module: Any
    found = [m for m in model.modules() if hasattr(m, "fuse_wgrad_accumulation")]
    for module in found:
        module.fuse_wgrad_accumulation = True
    if found:
        return f"added up in float32 by Transformer Engine in {len(found)} modules"
    if (absence := _absence()) is not None:
        return f"apart ({absence})"
    matrices = list(_matrices(model))
    for module in matrices:
        module.gradient_accumulation_fusion = True
    return f"added up in float32 by apex in {len(matrices)} matrices"


def describe(weight_gradients: str) -> str:
    """Which of these paths are in force, on a line."""
    return (
        f"fused paths: optimizer by {_maker(optimizer.Adam)}, gradient norms by "
        f"{_maker(clip_grads.l2_norm_impl)}, weight gradients {weight_gradients}"
    )


def _matrices(model: Stage) -> Iterator[Any]:
    heads = [piece.output_layer for piece in model.pieces if piece.post_process]
    for module in model.modules():
        own = isinstance(module, ColumnParallelLinear | RowParallelLinear)
        if own and not any(module is head for head in heads):
            yield module


def _absence() -> str | None:
    """Why the kernel for weight gradients cannot be used; None: it can."""
    if not hasattr(layers, WEIGHT_GRADIENTS):
        there = find_spec(WEIGHT_GRADIENTS) is not None
        return f"{WEIGHT_GRADIENTS} {'cannot be imported' if there else 'is not installed'}"
    return None if has_gpu() else "no GPU"


def _maker(thing: Any) -> str:
    package = thing.__module__.partition(".")[0]
    return next((name for part, name in MAKERS.items() if package.startswith(part)), "PyTorch")
