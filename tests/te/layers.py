"""What a layer does beside products: RMSNorm, rotary embedding, SwiGLU, rows of sequences."""

from typing import Any

import torch
from torch import Tensor

from tests.te.enums import TORCH, TYPES, DType
from tests.te.quantisation import quantize

Format: Any = TYPES["NVTE_QKV_Format"]


def rmsnorm_fwd(
    input: Tensor,
    weight: Tensor,
    eps: float,
    ln_out: Any,
    quantizer: Any,
    otype: DType,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Any]:
    """(normed ``[M, K]``, None, 1 / rms ``[M]``)."""
    x, gain = input.float(), weight.float() + zero_centered_gamma
    inverse = torch.rsqrt(x.square().mean(-1) + eps)
    normed = (x * inverse[:, None] * gain).to(TORCH[otype])
    if quantizer is not None:
        normed = quantize(normed, quantizer, ln_out)
    elif ln_out is not None:
        normed = ln_out.copy_(normed)
    return [normed, None, inverse]


def rmsnorm_bwd(
    grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, sm_margin: int, centered: bool, /
) -> list[Any]:
    """(gradient of x ``[M, K]``, of the weight ``[K]``)."""
    upper, gain = grad.float(), weight.float() + centered
    normed = x.float() * inverse[:, None]
    inner = upper * gain
    of_x = (inner - normed * (inner * normed).mean(-1, keepdim=True)) * inverse[:, None]
    return [of_x.to(x.dtype), (upper * normed).sum(0).to(weight.dtype)]


def fused_rope_forward(
    x: Tensor,
    freqs: Tensor,
    start: Tensor | None,
    layout: Any,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
    /,
) -> Tensor:
    """``x [T, heads, D]`` turned by the angles ``freqs [S, 1, 1, d]`` of its positions; what is
    behind d passes."""
    assert not interleaved and start is None
    angles = _angles(x, freqs, layout, cu_seqlens, cp_size, cp_rank)
    turned, rest = x[..., : angles.shape[-1]].float(), x[..., angles.shape[-1] :]
    turned = turned * angles.cos() + _half_turn(turned) * angles.sin()
    return torch.cat((turned.to(x.dtype), rest), -1)


def fused_rope_backward(
    grad: Tensor,
    freqs: Tensor,
    start: Tensor | None,
    layout: Any,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
    /,
) -> Tensor:
    """The transpose of the turn: the turn back where both halves have one angle."""
    assert not interleaved and start is None
    angles = _angles(grad, freqs, layout, cu_seqlens, cp_size, cp_rank)
    upper, rest = grad[..., : angles.shape[-1]].float(), grad[..., angles.shape[-1] :]
    turned = upper * angles.cos() - _half_turn(upper * angles.sin())
    return torch.cat((turned.to(grad.dtype), rest), -1)


def _half_turn(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _angles(
    x: Tensor, freqs: Tensor, layout: Any, cu_seqlens: Tensor | None, ranks: int, rank: int
) -> Tensor:
    """One row of angles for each token: of packed sequences from 0 in each, of which a context rank
    has the pieces ``rank`` and ``2 ranks - 1 - rank`` of ``2 ranks``."""
    flat = freqs.float().view(-1, freqs.shape[-1])
    if layout != Format.NVTE_THD or cu_seqlens is None:
        assert layout == Format.NVTE_SBHD and ranks == 1
        return flat[: x.shape[0], None, None]
    lengths = cu_seqlens.diff().tolist()
    if ranks == 1:
        places = [torch.arange(length) for length in lengths]
    else:
        halves = [
            (length // (2 * ranks), index) for length in lengths for index in _held(rank, ranks)
        ]
        places = [torch.arange(half) + index * half for half, index in halves]
    return flat[torch.cat(places)][:, None]


def _held(rank: int, ranks: int) -> tuple[int, int]:
    return rank, 2 * ranks - 1 - rank


def convert_thd_to_bshd(x: Tensor, cu_seqlens: Tensor, batch: int, longest: int, /) -> Tensor:
    """``[T, ...]`` -> ``[batch, longest, ...]``, filled up with 0."""
    padded = x.new_zeros(batch * longest, *x.shape[1:])
    places = _places(cu_seqlens, longest)
    padded[places] = x[: len(places)]
    return padded.view(batch, longest, *x.shape[1:])


def convert_bshd_to_thd(x: Tensor, cu_seqlens: Tensor, tokens: int, /) -> Tensor:
    """``[batch, longest, ...]`` -> ``[tokens, ...]``, 0 behind the last sequence."""
    packed = x.new_zeros(tokens, *x.shape[2:])
    places = _places(cu_seqlens, x.shape[1])
    packed[: len(places)] = x.reshape(-1, *x.shape[2:])[places]
    return packed


def _places(cu_seqlens: Tensor, longest: int) -> Tensor:
    lengths = cu_seqlens.long().diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    within = torch.arange(int(lengths.sum())) - (cu_seqlens.long() - cu_seqlens[0])[sequence]
    return sequence * longest + within


def swiglu(input: Tensor, quantizer: Any) -> Any:
    gate, up = input.chunk(2, -1)
    return quantize(torch.nn.functional.silu(gate) * up, quantizer)


def dswiglu(grad: Tensor, fwd_input: Tensor, quantizer: Any) -> Any:
    gate, up = fwd_input.float().chunk(2, -1)
    open, upper = gate.sigmoid(), grad.float()
    of_gate = upper * up * open * (1 + gate * (1 - open))
    found = torch.cat((of_gate, upper * gate * open), -1)
    return quantize(found.to(fwd_input.dtype), quantizer)
