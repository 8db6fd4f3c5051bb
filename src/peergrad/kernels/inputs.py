"""What callers may give: one check for every way, whether PyTorch or Triton goes it.

Shapes and dtypes cost nothing to look at. Values are looked at on a CPU; on a GPU they are asserted
there, so that nobody waits: what is wrong there ends the run before its numbers are used.
"""

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def check_logits(logits: Tensor, *, inplace: bool) -> None:
    """ValueError unless ``logits`` are rows of a vocabulary, to be overwritten if ``inplace``."""
    if logits.ndim != 2 or logits.dtype not in FLOATING or not logits.shape[1]:
        _refuse("logits", logits, "must be [R, w], float32, bfloat16 or float16", "convert them")
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        strides = f"strides {logits.stride()}"
        _refuse("logits", strides, "must be dense in the vocabulary", "make them contiguous")
    if inplace and logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]:
        strides = f"strides {logits.stride()}"
        _refuse("logits", strides, "rows that share memory cannot be overwritten", "copy them")


def check_projection(hidden: Tensor, weight: Tensor, logits: torch.dtype, chunk: int) -> None:
    """ValueError unless ``hidden @ weight.T`` is a product of one dtype, whose gradient fits into
    the weight's ``main_grad`` if it has one."""
    if hidden.ndim != 2 or hidden.dtype not in FLOATING:
        _refuse("hidden", hidden, "must be [R, H], float32, bfloat16 or float16", "convert it")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or not weight.shape[0]:
        _refuse("weight", weight, f"must be [w, {hidden.shape[1]}], as hidden is", "transpose it")
    if (weight.dtype, weight.device) != (hidden.dtype, hidden.device):
        rule = f"must be {hidden.dtype} on {hidden.device}, as hidden is"
        _refuse("weight", f"{weight.dtype} on {weight.device}", rule, "convert one of the two")
    main = getattr(weight, "main_grad", None)
    if main is not None and (main.shape, main.device) != (weight.shape, weight.device):
        rule = f"must be {list(weight.shape)} on {weight.device}, as the weight is"
        _refuse("main_grad", main, rule, "give it the weight's shape, or take it away")
    if logits not in (torch.float32, weight.dtype):
        _refuse("logits", logits, f"must be float32 or {weight.dtype}", "choose one of them")
    if chunk < 1:
        _refuse("chunk", chunk, "must be 1 row or more", "use 2048")


def check_rows(
    targets: Tensor, temperature: float | Tensor, like: Tensor, *, vocab: int, columns: int
) -> tuple[Tensor, Tensor]:
    """Targets and temperatures of the rows of ``like``, ``[R]`` int64 and float32, both dense.

    ``vocab``: real columns of the vocabulary, ``columns``: with padding, on all ranks together.
    Raises ValueError; for a value on a GPU, an assertion fails there.
    """
    rows, device = like.shape[0], like.device
    if targets.shape != (rows,) or targets.dtype != torch.int64 or targets.device != device:
        _refuse("targets", targets, f"must be [{rows}] int64 on {device}", "give an id to each row")
    if not 1 <= vocab <= columns:
        _refuse("vocabulary", vocab, f"must be 1 to {columns}, the columns", "pass its real size")
    message = f"targets: must be below the vocabulary of {vocab}; negative ones are ignored"
    hold((targets < vocab).all(), message)
    return targets.contiguous(), _per_row(temperature, rows, device)


def check_derivative(found: Any, rows: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a derivative gave for ``rows`` rows, (loss, dL/dlogp, dL/dentropy or None)."""
    if not isinstance(found, tuple) or len(found) != 3 or not isinstance(found[1], Tensor):
        rule = "must be (loss, dL/dlogp, dL/dentropy or None)"
        _refuse("derivative", type(found).__name__, rule, "give zeros for what has no influence")
    loss, *derivatives = found
    for name, x in zip(("dL/dlogp", "dL/dentropy"), derivatives, strict=True):
        if x is not None and x.shape != (rows,):
            _refuse(name, x, f"must be [{rows}], one for each row of the chunk", "expand it")
    d_logp, d_entropy = (None if x is None else x.float().contiguous() for x in derivatives)
    assert d_logp is not None
    return loss, d_logp, d_entropy


def hold(ok: Tensor, message: str) -> None:
    """ValueError unless ``ok``; on a GPU an assertion there, which costs no synchronisation."""
    if ok.is_cuda:
        torch._assert_async(ok, message)
    elif not ok:
        raise ValueError(message)


def _per_row(temperature: float | Tensor, rows: int, device: torch.device) -> Tensor:
    if isinstance(temperature, Tensor):
        if temperature.requires_grad:
            rule = "has no gradient here"
            _refuse("temperature", "one that requires a gradient", rule, "detach it")
        if temperature.shape not in ((), (rows,)) or not temperature.is_floating_point():
            _refuse("temperature", temperature, f"must be one number, or [{rows}]", "expand it")
        hold((temperature > 0).all(), "temperature: must be above 0")
    elif not 0 < temperature < math.inf:
        _refuse("temperature", temperature, "must be above 0 and finite", "use 1.0")
    return torch.ones(rows, dtype=torch.float32, device=device).mul_(temperature)


def _refuse(name: str, value: object, rule: str, remedy: str) -> NoReturn:
    if isinstance(value, Tensor):
        value = f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
    raise ValueError(f"{name} = {value}: {rule}; {remedy}")
