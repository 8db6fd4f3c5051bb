"""What matrix products in 8 bits ask of a model, its rows and its optimizer."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.fp8_utils import (
    dequantize_fp8_tensor,
    is_float8tensor,
    post_all_gather_processing,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from peergrad.config import Fp8, ParallelConfig, Spec, require
from peergrad.config.fp8 import FP8_BLOCK, FP8_MULTIPLE


def fp8_fields(parallel: ParallelConfig, spec: Spec) -> dict[str, Any]:
    """Megatron's names for ``parallel.fp8`` and what belongs to it. ValueError where the layers, or
    this machine's GPU, cannot."""
    recipe = parallel.fp8
    first, last = parallel.fp8_first_layers_bf16, parallel.fp8_last_layers_bf16
    fields = {
        "fp8": None,
        "fp8_recipe": "delayed",
        "fp8_param": parallel.fp8_params,
        "first_last_layers_bf16": bool(first or last),
        "num_layers_at_start_in_bf16": first,
        "num_layers_at_end_in_bf16": last,
    }
    if recipe is Fp8.off:
        return fields
    rule = "needs Transformer Engine's layers, and parallel.spec=auto found none to use here"
    require(spec is Spec.te, "parallel.fp8", recipe.name, rule, "install them, or set fp8=off")
    from transformer_engine.pytorch import fp8

    blockwise = recipe is Fp8.blockwise
    able, why = (fp8.check_fp8_block_scaling_support if blockwise else fp8.check_fp8_support)()
    rule = f"Transformer Engine cannot on this GPU ({why})"
    require(able, "parallel.fp8", recipe.name, rule, "use another GPU, or set fp8=off")
    return fields | {"fp8": parallel.fp8_format.name, "fp8_recipe": recipe.name}


def row_multiple(parallel: ParallelConfig) -> int:
    """Of what number a context rank's part of a packed row must be a multiple.

    With sequence parallelism the products of a tensor rank are of its own rows; Transformer Engine
    gathers rows in 8 bits only by whole blocks of scales.
    """
    ranks = parallel.tensor if parallel.sequence else 1
    if parallel.fp8 is Fp8.off:
        return ranks
    gathered = parallel.sequence and parallel.fp8 is Fp8.blockwise
    return ranks * (FP8_BLOCK if gathered else FP8_MULTIPLE)


@contextmanager
def products_in_8_bits(config: TransformerConfig, wanted: bool) -> Iterator[None]:
    """In the body a model of this configuration, made for 8 bits, uses them only if ``wanted``; its
    weights are the same ones, from 8 bits brought back to bfloat16 if they are kept in these."""
    kind = config.fp8
    config.fp8 = kind if wanted else None
    try:
        yield
    finally:
        config.fp8 = kind


def keep_exact(parameter: torch.nn.Parameter, values: Tensor) -> None:
    """Tell the optimizer, which is made later, that ``values`` are those of a parameter which holds
    them in 8 bits: it would start from those that the model was made with, random ones."""
    if is_float8tensor(parameter):
        dtype = parameter.dtype  # what it is taken for, not what is stored
        parameter._high_precision_init_val = values.to("cpu", dtype)  # type: ignore[attr-defined]


def forget_exact(model: torch.nn.Module) -> None:
    """Free what ``keep_exact`` and Transformer Engine have kept on the host, once there is an
    optimizer that has taken its part, or if there will be none."""
    for parameter in model.parameters():
        if is_float8tensor(parameter) and hasattr(parameter, "clear_high_precision_init_val"):
            parameter.clear_high_precision_init_val()


def gathered(group: Any) -> None:
    """Renew what backward passes read of the parameters in a group of Megatron's buckets that came
    from other ranks in 8 bits: their transposes, which do not come with them."""
    held = [p for bucket in group.buckets for p in bucket.params if is_float8tensor(p)]
    if held:
        post_all_gather_processing(held)


def whole_numbers(tensor: Tensor) -> Tensor:
    """The values of a tensor that may be kept in 8 bits, in its nominal dtype."""
    return dequantize_fp8_tensor(tensor) if is_float8tensor(tensor) else tensor


def forget_scales() -> None:
    """Of models that are gone: Transformer Engine keeps what it must reduce over their ranks for
    the whole process, and would do so beside any other model."""
    engine = sys.modules.get("transformer_engine.pytorch.quantization")
    if engine is not None:
        engine.FP8GlobalStateManager.reset()
