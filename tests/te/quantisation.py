"""Numbers of 8 bits and their scales: of a whole tensor, of 128 x 128 blocks, of 1 x 128 ones.

A quantised tensor ``[..., K]`` is held for products along its columns, ``rows [..., K]``, along its
rows, ``columns [K, ...]``, or both. M is the product of all dimensions but the last. Whether it is
made of one scale or of blocks its quantiser says, which is Transformer Engine's own.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from tests.te.enums import TORCH, DType, Float8BlockScaleTensorFormat

BLOCK = 128


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """``tensor`` as ``quantizer`` has it, into ``output`` if there is one, left alone if ``noop``
    is 1."""
    if quantizer is None:
        return tensor
    if noop is not None and bool(noop):
        return output
    found = output
    if output is None:
        found = quantizer.make_empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    (_by_blocks if hasattr(quantizer, "block_len") else _by_one_scale)(tensor, quantizer, found)
    if output is None and quantizer.internal:
        storage = next(kind for kind in type(found).__mro__ if kind.__name__.endswith("Storage"))
        return storage(**found.get_metadata())
    return found


def dequantize(input: Any, otype: DType) -> Tensor:
    return value_of(input, rows=True).to(TORCH[otype])


def split_quantize(tensor: Tensor, split_sections: Any, quantizer_list: Any) -> list[Any]:
    parts = torch.split(tensor, list(split_sections))
    return [quantize(x, q) for x, q in zip(parts, quantizer_list, strict=True)]


def bgrad_quantize(input: Tensor, quantizer: Any) -> list[Any]:
    """(sum over rows, quantised)."""
    return [input.reshape(-1, input.shape[-1]).sum(0), quantize(input, quantizer)]


def compute_amax(input: Tensor, amax: Tensor) -> None:
    amax.copy_(input.abs().amax().view(amax.shape))


def fp8_transpose(input: Tensor, dtype: DType, *, out: Tensor | None) -> Tensor:
    turned = input.view(-1, input.shape[-1]).t().contiguous()
    turned = turned.view(input.shape[-1], *input.shape[:-1])
    return turned if out is None else out.copy_(turned)


def cast(x: Tensor, scale: Tensor, dtype: DType) -> Tensor:
    """``x * scale`` in 8 bits, as uint8; what is too large becomes the largest."""
    largest = torch.finfo(TORCH[dtype]).max
    return (x.float() * scale).clamp(-largest, largest).to(TORCH[dtype]).view(torch.uint8)


def scale_of(amax: Tensor, dtype: DType, *, epsilon: float, powers: bool) -> Tensor:
    """What makes the largest number of 8 bits of ``amax``; 1 for 0. ``powers``: of 2, rounded
    down."""
    largest = torch.finfo(TORCH[dtype]).max
    amax = amax.float().clamp(min=epsilon)
    scale = torch.where(amax > 0, largest / amax, 1.0)
    scale = scale.clamp(max=torch.finfo(torch.float32).max)
    return torch.exp2(torch.floor(torch.log2(scale))) if powers else scale


def value_of(tensor: Any, *, rows: bool) -> Tensor:
    """What a quantised tensor holds for products along its columns (``rows``) or along its rows, in
    float32 ``[..., K]``; what it lacks is taken from the other. Plain tensors as they are."""
    if not hasattr(tensor, "_quantizer"):
        return tensor
    kind = TORCH[tensor._fp8_dtype]
    if hasattr(tensor, "_rowwise_data"):
        by_rows = tensor._columnwise_data is None or (rows and tensor._rowwise_data is not None)
        return _of_blocks(tensor, kind) if by_rows else _of_columns(tensor, kind)
    turned = tensor._transpose if not tensor._transpose_invalid else None
    if tensor._data is not None and (rows or turned is None):
        return tensor._data.view(kind).float() * tensor._scale_inv
    return _turned_back(turned.view(kind).float() * tensor._scale_inv)


def quantize_blocks(
    x: Tensor, dtype: DType, *, tall: int, wide: int, epsilon: float, powers: bool
) -> tuple[Tensor, Tensor]:
    """``[M, K]`` -> (uint8 ``[M, K]``, inverse scales ``[ceil(M / tall), ceil(K / wide)]``)."""
    m, k = x.shape
    rows, columns = -(-m // tall), -(-k // wide)
    blocks = pad(x.float(), (0, columns * wide - k, 0, rows * tall - m))
    blocks = blocks.view(rows, tall, columns, wide)
    scale = scale_of(blocks.abs().amax((1, 3)), dtype, epsilon=epsilon, powers=powers)
    data = cast(blocks, scale[:, None, :, None], dtype).view(rows * tall, columns * wide)
    return data[:m, :k].contiguous(), 1.0 / scale


def _by_one_scale(x: Tensor, quantizer: Any, out: Any) -> None:
    """One of the present values, or one that earlier ones have set (delayed)."""
    amax = x.float().abs().amax() if x.numel() else x.new_zeros((), dtype=torch.float32)
    if hasattr(quantizer, "amax_epsilon"):
        quantizer.amax.copy_(amax)
        if quantizer.with_amax_reduction:
            group = quantizer.amax_reduction_group
            dist.all_reduce(quantizer.amax, op=dist.ReduceOp.MAX, group=group)
        epsilon, powers = quantizer.amax_epsilon, quantizer.force_pow_2_scales
        scale = scale_of(quantizer.amax, quantizer.dtype, epsilon=epsilon, powers=powers)
        quantizer.scale.copy_(scale)
    else:
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
    scale = quantizer.scale.view(-1)[:1]
    data = cast(x, scale, quantizer.dtype)
    if out._data is not None:
        out._data.copy_(data)
    if out._transpose is not None:
        out._transpose.copy_(fp8_transpose(data, quantizer.dtype, out=None))
        out._transpose_invalid = False
    out._scale_inv.copy_((1.0 / scale).view(out._scale_inv.shape))
    out._fp8_dtype = quantizer.dtype


def _by_blocks(x: Tensor, quantizer: Any, out: Any) -> None:
    """Of weights squares; of all else rows of 128, once along each dimension. A compact tensor,
    which is about to be gathered, is not turned; it is quantised all the same."""
    square = quantizer.block_scaling_dim == 2
    compact = out._data_format is Float8BlockScaleTensorFormat.COMPACT
    x = x.reshape(-1, x.shape[-1])
    options: dict[str, Any] = {
        **{"epsilon": quantizer.amax_epsilon, "powers": quantizer.force_pow_2_scales},
        **{"tall": BLOCK if square else 1, "wide": BLOCK},
    }
    if out._rowwise_data is not None:
        data, scale = quantize_blocks(x, quantizer.dtype, **options)
        out._rowwise_data.copy_(data.view(out._rowwise_data.shape))
        _store_scale(out._rowwise_scale_inv, scale if square or compact else scale.t())
    if out._columnwise_data is not None:
        data, scale = quantize_blocks(x.t().contiguous(), quantizer.dtype, **options)
        data = data.t() if compact else data
        out._columnwise_data.copy_(data.reshape(out._columnwise_data.shape))
        _store_scale(out._columnwise_scale_inv, scale if square else scale.t())


def _store_scale(padded: Tensor, scale: Tensor) -> None:
    padded.zero_()
    padded[: scale.shape[0], : scale.shape[1]] = scale


def _of_blocks(tensor: Any, kind: torch.dtype) -> Tensor:
    value = tensor._rowwise_data.view(kind).float()
    flat = value.view(-1, value.shape[-1])
    return (flat * _spread(tensor, tensor._rowwise_scale_inv, flat)).view(value.shape)


def _of_columns(tensor: Any, kind: torch.dtype) -> Tensor:
    value = tensor._columnwise_data.view(kind).float()
    flat = value.view(value.shape[0], -1)
    flat = flat * _spread(tensor, tensor._columnwise_scale_inv, flat)
    return _turned_back(flat.view(value.shape))


def _spread(tensor: Any, scale: Tensor, flat: Tensor) -> Tensor:
    """Inverse scales, one for each of ``flat [M, K]``."""
    m, k = flat.shape
    blocks = -(-k // BLOCK)
    if tensor._is_2D_scaled:
        each = scale[: -(-m // BLOCK), :blocks].repeat_interleave(BLOCK, 0)[:m]
    else:
        each = scale[:blocks, :m].t()
    return each.repeat_interleave(BLOCK, 1)[:, :k]


def _turned_back(value: Tensor) -> Tensor:
    """``[K, ...]`` -> ``[..., K]``."""
    return value.view(value.shape[0], -1).t().reshape(*value.shape[1:], value.shape[0])
