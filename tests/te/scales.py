"""Scales of what is not quantised at once: of earlier steps, and of parameters held in parts."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from tests.te.enums import TORCH, DType
from tests.te.quantisation import cast, scale_of


def fused_amax_and_scale_update_after_reduction(
    reduced: Tensor,
    histories: Sequence[Tensor],
    scales: Sequence[Tensor],
    algorithm: str,
    dtype: DType,
    margin: float,
    /,
) -> None:
    """Move each history ``[length, tensors]`` on by the largest values just seen, which are in
    ``reduced [all tensors]``, and take the scales of the next step from it."""
    largest, at = torch.finfo(TORCH[dtype]).max, 0
    for history, scale in zip(histories, scales, strict=True):
        new = reduced[at : at + history.shape[1]]
        at += history.shape[1]
        history.copy_(torch.roll(history, -1, 0))
        history[-1] = new
        amax = history.amax(0) if algorithm == "max" else history[-1]
        fit = (amax > 0) & torch.isfinite(amax)
        scale.copy_(torch.where(fit, largest / amax / 2.0**margin, scale))
        history[0].zero_()  # where the next step is noted


def multi_tensor_compute_scale_and_scale_inv(
    chunk: int,
    noop: Tensor,
    lists: Sequence[Sequence[Tensor]],
    largest: float,
    powers: bool,
    epsilon: float,
    /,
) -> None:
    """(amax, scale, inverse scale) of each parameter."""
    e4m3 = largest == torch.finfo(torch.float8_e4m3fn).max
    dtype = DType.kFloat8E4M3 if e4m3 else DType.kFloat8E5M2
    for amax, scale, inverse in zip(*lists, strict=True):
        scale.copy_(scale_of(amax, dtype, epsilon=epsilon, powers=powers))
        inverse.copy_(1.0 / scale)


def fp8_block_scaling_compute_partial_amax(
    tensor: Tensor, amax: Tensor, h: int, w: int, start_offset: int, block_len: int
) -> None:
    """Largest value of each block of a parameter ``[h, w]``, of which ``tensor`` is a part."""
    whole = torch.zeros(h * w)
    whole[start_offset : start_offset + tensor.numel()] = tensor.float().view(-1)
    rows, columns = -(-h // block_len), -(-w // block_len)
    missing = (0, columns * block_len - w, 0, rows * block_len - h)
    blocks = pad(whole.view(h, w), missing).view(rows, block_len, columns, block_len)
    amax[:rows, :columns] = blocks.abs().amax((1, 3))


def fp8_block_scaling_partial_cast(
    inp: Tensor,
    out: Tensor,
    scale: Tensor,
    h: int,
    w: int,
    start_offset: int,
    block_len: int,
    out_dtype: DType,
) -> None:
    """The part ``inp`` of a parameter ``[h, w]`` in 8 bits, with the scales of its blocks."""
    each = scale.repeat_interleave(block_len, 0)[:h].repeat_interleave(block_len, 1)[:, :w]
    each = each.reshape(-1)[start_offset : start_offset + inp.numel()]
    out.copy_(cast(inp.view(-1), each, out_dtype))
