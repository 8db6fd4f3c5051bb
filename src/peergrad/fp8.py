"""Matrices as 8-bit floating-point codes, with a scale for each block of 128 x 128, as SGLang
serves them.

A checkpoint, or a weight sync, has ``X.weight`` as float8_e4m3fn codes [N, K] and
``X.weight_scale_inv`` as float32 [ceil(N / 128), ceil(K / 128)]; the weight is their product. All
matrices of the layers are so, an expert's each by itself. What is no matrix is not, nor are
embedding, head and the routers, which SGLang computes as they are.
"""

import re

import torch
from torch import Tensor

from peergrad.config import Fp8Scales
from peergrad.config.fp8 import FP8_BLOCK as BLOCK

LARGEST = 448.0  # of the codes
LEAST = 1e-4
"""What SGLang takes for the largest of a block whose values are all smaller: its codes then do not
use all their range."""
CODES = torch.float8_e4m3fn
SCALE = "_scale_inv"
QUANTISED = re.compile(
    r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(experts\.\d+\.)?(gate|up|down)_proj"
    r"|block_sparse_moe\.experts\.\d+\.w[123])\.weight"
)
"""HF names of the matrices that are codes."""
STRIP = 1 << 24  # numbers held in float32 at a time


def served(name: str, weight: Tensor, scales: Fp8Scales) -> list[tuple[str, Tensor]]:
    """What servers take for the weight of that HF name: itself, or its codes and their scales.

    Raises ValueError, which names it, for values that are not finite.
    """
    if QUANTISED.fullmatch(name) is None:
        return [(name, weight)]
    try:
        codes, inverse = quantise(weight, scales)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return [(name, codes), (name + SCALE, inverse)]


@torch.no_grad()
def quantise(weight: Tensor, scales: Fp8Scales) -> tuple[Tensor, Tensor]:
    """``weight`` [N, K] as codes [N, K] and scales [ceil(N / 128), ceil(K / 128)], on its device.

    A block of largest magnitude m has the scale m / 448, or the next power of two. The bits are
    those of SGLang's own quantiser (``per_block_cast_to_fp8``, ``bf16_to_block_fp8_128``). Beside
    the result it holds about ``STRIP`` numbers in float32. Raises ValueError for a value that is
    not finite.
    """
    rows = max(1, STRIP // (BLOCK * weight.shape[1])) * BLOCK
    strips = [_strip(strip, scales) for strip in torch.split(weight, rows)]
    codes, inverse = (torch.cat(parts) for parts in zip(*strips, strict=True))
    return codes, inverse


def _strip(weight: Tensor, scales: Fp8Scales) -> tuple[Tensor, Tensor]:
    (n, k), down, across = weight.shape, *(-(-size // BLOCK) for size in weight.shape)
    padded = weight.new_zeros(down * BLOCK, across * BLOCK, dtype=torch.float32)
    padded[:n, :k] = weight
    blocks = padded.view(down, BLOCK, across, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3), keepdim=True).clamp(min=LEAST) / LARGEST
    if not bool(scale.isfinite().all()):
        raise ValueError("has values that are not finite, which FP8 cannot hold")
    if scales is Fp8Scales.power_of_two:
        mantissa, exponent = torch.frexp(scale)  # of a power of two the mantissa is 0.5
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    codes = (blocks / scale).to(CODES).view_as(padded)[:n, :k]
    return codes.contiguous(), scale.view(down, across)
